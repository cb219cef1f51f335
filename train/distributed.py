"""Distributed training: the process group, parallel models (DDP, FSDP2) and their unsharded state."""

import os
import re
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from crate_fast.errors import UserError
from crate_fast.settings import usable_cores
from crate_fast.train.config import TrainConfig

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """Rank and world size of this process, globally and on this host, and its device."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    control: dist.ProcessGroup | None = None  # for `gather` and `wait`; the default group when None

    @property
    def first(self) -> bool:
        """True on the process that writes files and prints."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum `values` over all processes, in place, and return them."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def agree(self, value: T) -> T:
        """Return the picklable `value` of rank 0."""
        return self.gather(value)[0]

    def gather(self, value: T) -> list[T]:
        """Return the picklable `value` of every process, in the order of ranks."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def check_equal(self, values: dict[str, object]) -> None:
        """Raise a `UserError` on every process if the picklable `values` are not the same on all."""
        found = self.gather(values)
        differing = ((rank, name) for rank, own in enumerate(found) for name in own if own[name] != found[0][name])
        for rank, name in differing:
            own, first = (f"{found[process][name]!r:.100}" for process in (rank, 0))
            raise UserError(
                f"process {rank} has {name}={own} and process 0 {first}: give all processes the same data and options"
            )

    def wait(self) -> None:
        """Wait for all processes (a barrier)."""
        if self.world_size > 1:
            dist.barrier(group=self.control)


# --- the process group


def choose_device(asked: str, local_rank: int = 0) -> torch.device:
    """Return the device that `--device` names and make it the current one; "auto" is a GPU if there is one."""
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if asked == "auto" else asked
    try:
        device = torch.device(kind)
        if device.type != "cuda":
            torch.zeros((), device=device).item()
            return device
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UserError(f"device={asked!r} cannot be used here: choose auto, cpu, cuda or cuda:N") from error
    if not torch.cuda.is_available():
        raise UserError(f"device={asked!r}: PyTorch finds no GPU here; pass --device cpu or install a CUDA build")
    device = torch.device("cuda", local_rank if device.index is None else device.index)
    if device.index >= torch.cuda.device_count():
        raise UserError(
            f"device={asked!r}: {device} does not exist, PyTorch finds {torch.cuda.device_count()} GPUs; pass a "
            "lower number, or start fewer processes per host"
        )
    torch.cuda.set_device(device)
    return device


def _fresh_store(rank: int, world_size: int) -> dict:
    """Return arguments of `init_process_group` that give restarted processes a fresh part of the store.

    torchrun's default rendezvous keeps the addresses of dead processes over restarts (PyTorch issue 135712). On one
    host the restart count separates them. Across hosts that count may differ: use `--rdzv-backend c10d` there.
    """
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    if not restarts or int(os.environ.get("GROUP_WORLD_SIZE", 1)) > 1:
        return {}
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world_size, is_master=False)
    return {"store": dist.PrefixStore(f"restart_{restarts}", store), "rank": rank, "world_size": world_size}


@contextmanager
def process_group(device: str, threads: int = 0):
    """Yield this process's `Processes`, in the process group of `torchrun` if any (NCCL on GPUs, gloo on CPUs).

    `threads` is the number of CPU threads of this process. With 0, the processes of a host share its cores equally;
    a single process keeps PyTorch's default.
    """
    rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    world_size, local_size = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    chosen = choose_device(device, local_rank)
    if chosen.type == "cuda" and ":" in device and local_size > 1:
        raise UserError(f"device={device!r} would be shared by {local_size} processes: pass --device cuda")
    if threads or local_size > 1:
        torch.set_num_threads(threads or usable_cores(local_size))
    control = None
    if world_size > 1:
        # one process downloads data and writes the report while the others wait in the control group
        backend, long = "nccl" if chosen.type == "cuda" else "gloo", timedelta(hours=2)
        timeout = timedelta(minutes=30) if backend == "nccl" else long
        dist.init_process_group(backend, timeout=timeout, **_fresh_store(rank, world_size))
        control = dist.new_group(backend="gloo", timeout=long) if backend == "nccl" else None
    yield Processes(rank, local_rank, world_size, chosen, control)
    if world_size > 1:  # not after an error: NCCL would wait for processes that wait for this one
        dist.destroy_process_group()


# --- a model over the processes


def layers_of(model: nn.Module) -> list[nn.Module]:
    """Return the layers that the model's `group_matcher` (timm) names for layer decay, or the blocks of named stages.

    If it names none, return the model's `blocks`, if any.
    """
    matcher = model.group_matcher() if hasattr(model, "group_matcher") else {}
    named = matcher.get("blocks", ()) if isinstance(matcher, dict) else ()
    patterns = [named] if isinstance(named, str) else [pattern for pattern, order in named if order is None]
    layers = [part for name, part in model.named_modules() if any(re.fullmatch(p, name) for p in patterns)]
    blocks = [block for layer in layers for block in getattr(layer, "blocks", [layer])]
    return [*(blocks or getattr(model, "blocks", ())), *getattr(model, "decoder_blocks", ())]


def is_sharded(model: nn.Module) -> bool:
    """Return True if `shard` was applied."""
    return isinstance(model, FSDPModule)


def share_buffers(model: nn.Module, processes: Processes) -> None:
    """Broadcast the buffers of rank 0, such as BatchNorm statistics, because checkpoints store them."""
    if processes.world_size > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def shard(model: nn.Module, processes: Processes) -> None:
    """Shard a model's parameters by FSDP2, in place: each layer is a unit, the other parameters are another.

    Parameters are gathered and gradients reduced in fp32, so that losses match DDP; only autocast lowers precision.
    """
    mesh = dist.init_device_mesh(processes.device.type, (processes.world_size,))
    # The warning concerns in-place operations on a layer's output; the models have none.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    for layer in layers_of(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def parallelize(model: nn.Module, config: TrainConfig, processes: Processes) -> nn.Module:
    """Return the module for training steps: the model, compiled if configured, and in DDP if not sharded.

    `model` is on its device, and already sharded for fsdp.
    """
    runner = model
    if config.compile and is_sharded(model):  # layer by layer, to keep FSDP's all-gather outside the graphs
        for layer in layers_of(model):
            layer.compile(mode=config.compile_mode)
    elif config.compile:
        runner = torch.compile(model, mode=config.compile_mode)
    if processes.world_size > 1 and not is_sharded(model):
        runner = DistributedDataParallel(runner)
    return runner


def gradient_sync(runner: nn.Module, sync: bool) -> AbstractContextManager:
    """Return a context for a backward pass; DDP reduces gradients over all processes only if `sync`.

    FSDP reduces them in every pass, because it would keep whole gradients until then.
    """
    return runner.no_sync() if isinstance(runner, DistributedDataParallel) and not sync else nullcontext()


def unsharded(model: nn.Module, build: Callable[[], nn.Module], processes: Processes) -> nn.Module | None:
    """Return the unsharded model on rank 0 and None on the others. All processes must call it.

    A sharded model is copied into a new one from `build`; any other model is returned itself.
    """
    if not is_sharded(model):
        return model if processes.first else None
    weights, _ = get_state_dict(model, (), options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if not processes.first:
        return None
    whole = build().to(processes.device)
    whole.load_state_dict(weights, strict=True)
    return whole.eval()
