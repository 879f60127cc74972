"""The processes of a run: who this one is, and what all of them agree on.

torchrun starts one process for each GPU and tells it by environment variables who it is. A run of one process needs
none of this: it makes no process group, and everything here answers at once.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from osp_fast.device import rank_device
from osp_fast.errors import UserError
from osp_fast.parallel.collectives import RankLost, all_answering
from osp_fast.parallel.health import await_ranks, open_store, timed_all_reduce

# So many of NCCL's last calls are remembered, for the report on a hang; PyTorch reads it when a group is made.
FLIGHT_RECORDER = ("TORCH_FR_BUFFER_SIZE", "2000")


@dataclass(frozen=True)
class Ranks:
    """This process among the others: its number of `size`, and its number of `local_size` on this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @classmethod
    def from_environment(cls) -> "Ranks":
        """As torchrun says; one process without it. Raises `UserError` if the variables contradict each other."""
        try:
            rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
            local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
            ranks = cls(rank, size, int(os.environ.get("LOCAL_RANK", rank % max(1, local_size))), local_size)
        except ValueError:
            raise UserError("RANK and WORLD_SIZE must be whole numbers: start with torchrun, or unset them") from None
        if not (0 <= ranks.rank < ranks.size and 0 <= ranks.local_rank < ranks.local_size):
            raise UserError(
                f"RANK {ranks.rank} is not one of WORLD_SIZE {ranks.size}: start with torchrun, or unset them"
            )
        return ranks


@dataclass(frozen=True)
class World:
    """The ranks of a run and how they talk.

    device: what this rank computes on
    files: a group of its own for the thread that writes checkpoints, gloo; None in a run of one process
    store: where ranks meet beside the groups, None in a run of one process; `clone()` it for a thread
    """

    ranks: Ranks
    device: torch.device
    files: dist.ProcessGroup | None = None
    store: dist.Store | None = None

    @property
    def rank(self) -> int:
        """This process's number."""
        return self.ranks.rank

    @property
    def size(self) -> int:
        """How many processes there are."""
        return self.ranks.size

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which speaks and writes for all."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """Whether there is no other process."""
        return self.size == 1

    def greatest(self, *values: int) -> list[int]:
        """The greatest of what the ranks give, for each value; all ranks must call it. By the CPUs: no GPU waits."""
        if self.alone:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor.tolist()

    def gather(self, value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
        """What each rank gives, by rank, on every rank; all ranks must call it. Small plain data only.

        group: `files` in the thread that writes checkpoints, whose calls must not mix with the others

        Raises `RankLost`.
        """
        if self.alone:
            return [value]
        values: list[Any] = [None] * self.size
        with all_answering():
            dist.all_gather_object(values, value, group=group)
        return values

    def add_up(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks, in place, on the tensor's device and without a wait of the host."""
        if not self.alone:
            dist.all_reduce(tensor)
        return tensor

    def first_fault(self, fault: str | None) -> None:
        """Raise on every rank what is wrong on the first one where something is (`fault`), as `UserError`."""
        for rank, found in enumerate(self.gather(fault)):
            if found is not None:
                raise UserError(found if self.alone else f"rank {rank}: {found}")

    @contextmanager
    def together(self) -> Iterator[None]:
        """Let a `UserError` within the block, or a lack of GPU memory, be raised on every rank; all must enter it.

        Where ranks exchange something within the block, all must find the same wrong: the others would wait there.
        """
        fault = None
        try:
            yield
        except RankLost:  # the others have lost it too
            raise
        except UserError as error:
            fault = str(error)
        except torch.OutOfMemoryError as error:
            if self.alone:
                raise
            fault = f"out of memory: {str(error).splitlines()[0]}"
        self.first_fault(fault)


@contextmanager
def open_world(
    device_name: str, timeout_s: float, collective_s: float, report: Callable[[str], None]
) -> Iterator[World]:
    """Join the run's other processes, see that all are well (`health.py`), and leave them at a good end.

    After an error they are not taken leave of: NCCL would wait for the others, and the error never be printed.

    device_name: as `--device` has it; under torchrun auto and cuda are the GPU of LOCAL_RANK
    timeout_s: of joining; collective_s: of every collective afterwards
    report: gets lines on the health of the ranks, on rank 0 only

    Raises:
        UserError: the environment or the device is wrong, or a rank is missing or does not answer: it is named.
    """
    ranks = Ranks.from_environment()
    device = rank_device(device_name)
    if device.type == "cuda":  # threads, streams and events must all mean this one
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    if ranks.size == 1:
        yield World(ranks, device)
        return
    os.environ.setdefault(*FLIGHT_RECORDER)
    store = open_store(ranks.rank, ranks.size, timeout_s)
    hosts = await_ranks(store, ranks.rank, ranks.size, timeout_s)
    timeout = timedelta(seconds=collective_s)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore("group", store),
        timeout=timeout,
        rank=ranks.rank,
        world_size=ranks.size,
        device_id=device if device.type == "cuda" else None,
    )
    health = timed_all_reduce(ranks.rank, ranks.size, device, store, hosts, timeout_s)
    if ranks.rank == 0:
        for line in health.lines():
            report(line)
    yield World(ranks, device, dist.new_group(backend="gloo", timeout=timeout), store)
    dist.destroy_process_group()
