"""A model over many processes: DDP, FSDP2, or FSDP2 within hosts and copies across them; and back into one piece."""

import warnings
from collections.abc import Callable
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from crate_fast.errors import UserError
from crate_fast.train.config import TrainConfig
from crate_fast.train.distributed import Processes

__all__ = [
    "distribute",
    "gather",
    "holding_gradients",
    "is_sharded",
    "layers_of",
    "scatter",
    "shard",
    "share_buffers",
    "shares_out",
    "unsharded_copy",
]

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The layers of a CRATE, a CRATE-MAE or a timm model; empty if it has none that we know."""
    if hasattr(model, "transformer"):
        return list(model.transformer.layers)
    return [*getattr(model, "blocks", ()), *getattr(model, "decoder_blocks", ())]


def shares_out(config: TrainConfig, processes: Processes) -> bool:
    """Whether a run's processes are to hold parts of the model."""
    return processes.world_size > 1 and config.parallel != "ddp"


def share_buffers(model: nn.Module, processes: Processes) -> None:
    """Give every process the first one's buffers, such as BatchNorm's statistics: a checkpoint holds those."""
    if processes.world_size > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def is_sharded(model: nn.Module) -> bool:
    """Whether each process holds a part of the model only."""
    return isinstance(model, FSDPModule)


def shard(model: nn.Module, config: TrainConfig, processes: Processes) -> nn.Module:
    """Share a model's parameters out by FSDP2, in place: each layer a unit, the rest another.

    fp32 parameters are gathered and fp32 gradients reduced, so that the losses are DDP's; autocast, not FSDP, lowers
    the precision.

    Raises:
        UserError: "hsdp" where hosts have different numbers of processes.
    """
    kind = processes.device.type
    if config.parallel == "hsdp":
        hosts, rest = divmod(processes.world_size, processes.local_world_size)
        if rest:
            raise UserError(
                f"parallel='hsdp': {processes.world_size} processes cannot be {processes.local_world_size} on every "
                "host; start as many on each"
            )
        shape = (hosts, processes.local_world_size)
        mesh = dist.init_device_mesh(kind, shape, mesh_dim_names=("replicate", "shard"))
    else:
        mesh = dist.init_device_mesh(kind, (processes.world_size,))
    # Nothing works in place on a layer's output, which is what the warning is about.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    for layer in layers_of(model):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def distribute(model: nn.Module, config: TrainConfig, processes: Processes) -> nn.Module:
    """What runs a training step: the model itself, compiled where wanted, in DDP where there are many processes.

    Args:
        model: On the device; already through `shard` for fsdp and hsdp.
        config: The run's.
        processes: This process and its fellows.
    """
    runner = model
    if config.compile and is_sharded(model):  # layer by layer: FSDP's gathering stays outside of the graphs
        for layer in layers_of(model):
            layer.compile(mode=config.compile_mode)
    elif config.compile:
        runner = torch.compile(model, mode=config.compile_mode)
    if processes.world_size > 1 and not is_sharded(model):
        runner = DistributedDataParallel(runner)
    return runner


@contextmanager
def holding_gradients(runner: nn.Module, held: bool):
    """Backward passes inside keep gradients to their process when `held`: an accumulation's last adds them up."""
    if held and isinstance(runner, FSDPModule):
        runner.set_requires_gradient_sync(False)
        yield
        runner.set_requires_gradient_sync(True)
    elif held and isinstance(runner, DistributedDataParallel):
        with runner.no_sync():
            yield
    else:
        yield


def gather(
    model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Weights and optimiser state in one piece on the CPU, the same whatever the number of processes or their engine.

    A collective call. The first process has them; of a shared-out model the others get empty dicts.

    Returns:
        (state dict, optimiser state by parameter names; empty without an optimiser).
    """
    weights = get_model_state_dict(model, options=_WHOLE)
    state = {} if optimizer is None else get_optimizer_state_dict(model, optimizer, options=_WHOLE)
    return weights, state


def scatter(
    model: nn.Module,
    weights: dict[str, Tensor],
    optimizer: torch.optim.Optimizer | None = None,
    state: dict[str, object] | None = None,
) -> None:
    """Load what `gather` gave, strictly, into a model of any engine and number of processes. A collective call."""
    if not is_sharded(model):
        model.load_state_dict(weights, strict=True)
    else:
        # each process has read the file: every one takes its own part of it
        set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, strict=True))
    if optimizer is not None:
        set_optimizer_state_dict(model, optimizer, state, options=StateDictOptions(full_state_dict=True))


def unsharded_copy(model: nn.Module, build: Callable[[], nn.Module], processes: Processes) -> nn.Module | None:
    """The model in one piece on the first process, None on the others; a model that is not shared out as it is.

    A collective call.

    Args:
        model: Of the run.
        build: Makes a model of the same architecture.
        processes: This process and its fellows.
    """
    if not is_sharded(model):
        return model if processes.first else None
    weights, _ = gather(model)
    if not processes.first:
        return None
    whole = build().to(processes.device)
    whole.load_state_dict(weights, strict=True)
    return whole
