"""One process or many: what `torchrun` set up, behind a few words."""

import os
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from crate_fast.errors import UserError

__all__ = ["Processes", "choose_device", "process_group"]


@dataclass(frozen=True)
class Processes:
    """This process among its fellows.

    Attributes:
        rank: Of this process, over all hosts.
        local_rank: On this host.
        world_size: Number of processes; 1 without `torchrun`.
        device: Where this process computes.
        local_world_size: Number of processes on this host.
    """

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    local_world_size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """`values` added up over all processes, on every one of them."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def largest(self, number: int) -> int:
        """The largest `number` of any process, on every one of them."""
        if self.world_size == 1:
            return number
        box = torch.tensor(number, device=self.device)
        dist.all_reduce(box, op=dist.ReduceOp.MAX)
        return int(box)

    def agree(self, value: str) -> str:
        """The first process's `value`, on every process."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: object) -> list:
        """Every process's picklable `value`, in the order of ranks, on every process."""
        if self.world_size == 1:
            return [value]
        values: list = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Until every process is here."""
        if self.world_size > 1:
            dist.barrier()


def choose_device(asked: str, local_rank: int = 0) -> torch.device:
    """The device that `--device` names, made the current one; "auto" is a GPU where there is one.

    Raises:
        UserError: PyTorch does not see it.
    """
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if asked == "auto" else asked
    try:
        device = torch.device(kind)
    except RuntimeError as error:
        raise UserError(f"device={asked!r}: choose auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"device={asked!r}: PyTorch sees no GPU here; pass --device cpu or install a CUDA build")
        if device.index is None:
            device = torch.device("cuda", local_rank)
        if device.index >= torch.cuda.device_count():
            raise UserError(
                f"device={asked!r}: {device} is not there, PyTorch sees {torch.cuda.device_count()} GPUs; pass a "
                "lower number, or start fewer processes a host"
            )
        torch.cuda.set_device(device)
    elif device.type != "cpu":
        try:
            torch.zeros((), device=device).item()
        except (RuntimeError, AssertionError, ImportError) as error:
            raise UserError(f"device={asked!r} computes nothing here: choose auto, cpu, cuda or cuda:N") from error
    return device


def _fresh_store(rank: int, world_size: int) -> dict:
    """Where restarted processes meet, apart from where those before them met.

    torchrun's default rendezvous keeps its store over restarts, and dead processes' addresses in it (PyTorch issue
    135712). On one host its count of restarts tells the attempts apart; across hosts that count may differ, and
    `--rdzv-backend c10d`, which makes a new store each time, is needed.
    """
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    if not restarts or int(os.environ.get("GROUP_WORLD_SIZE", 1)) > 1:
        return {}
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world_size, is_master=False)
    return {"store": dist.PrefixStore(f"restart_{restarts}", store), "rank": rank, "world_size": world_size}


@contextmanager
def process_group(device: str, threads: int = 0):
    """Join the processes that `torchrun` started (NCCL on GPUs, gloo on CPUs); alone, do nothing.

    Args:
        device: "auto", "cpu", "cuda" or "cuda:0".
        threads: CPU threads of this process; 0: PyTorch's choice for one process, an equal share for each of many.

    Yields:
        `Processes`.
    """
    rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    world_size, local_size = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    place = choose_device(device, local_rank)
    if torch.device(place).type == "cuda" and ":" in device and local_size > 1:
        raise UserError(f"device={device!r} would be shared by {local_size} processes: pass --device cuda")
    if threads or local_size > 1:
        torch.set_num_threads(threads or max(1, os.cpu_count() // local_size))
    if world_size > 1:
        dist.init_process_group(
            "nccl" if place.type == "cuda" else "gloo",
            timeout=timedelta(hours=2),  # one process downloads, scores and draws while the others wait
            **_fresh_store(rank, world_size),
        )
    try:
        yield Processes(rank, local_rank, world_size, place, local_size)
    finally:
        if world_size > 1:
            dist.destroy_process_group()
