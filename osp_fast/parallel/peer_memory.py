"""All-to-alls that write straight into the other GPUs' memory: PyTorch's symmetric memory, over NVLink.

NCCL copies what is sent through buffers of its own with multiprocessors that computation then lacks. Here a GPU's copy
engines write each piece to its place on the other GPU. Each exchange of a block has a buffer of its own on every GPU,
which the same exchange of the next block overwrites: so this is for sampling, where nothing is kept for a backward
pass. Two barriers on the copies' stream go with it: before, all have read what the buffers held, as each is behind all
that was launched until then; afterwards all have written.

Not yet measured on a GPU, and not yet run on one: tests run it with files in the place of GPUs' memory.
"""

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from osp_fast.parallel.collectives import Coming, Splits
from osp_fast.parallel.world import World

BARRIERS = 0, 1  # channels: before and after


class PeerBuffer(Protocol):
    """Memory of the same size on every rank of a group, which all of them can write."""

    def of(self, rank: int, first: int, count: int, dtype: torch.dtype) -> Tensor:
        """`count` elements of a rank's memory, behind `first` of them: (count,)."""

    def barrier(self, channel: int) -> None:
        """Let the current stream wait until every rank's has come here."""


class Lane(Protocol):
    """Where copies run beside what is computed."""

    def behind(self, x: Tensor) -> Any:
        """A context whose copies run behind all that was launched before it; x is not freed before they end."""

    def mark(self) -> Any:
        """What `wait` takes, of all that was launched in the context so far."""

    def wait(self, mark: Any) -> None:
        """Let what is launched from here on run behind the mark."""


class PeerMemory:
    """The exchanges of one group. allocate: makes buffers of so many bytes; all ranks call it alike."""

    def __init__(self, rank: int, ranks: int, allocate: Callable[[int], PeerBuffer], lane: Lane):
        self._rank, self._ranks, self._allocate, self._lane = rank, ranks, allocate, lane
        self._buffers: dict[str, tuple[int, PeerBuffer]] = {}

    def begin(self, x: Tensor, splits_of: Callable[[int], Splits], slot: str) -> Coming:
        """Send pieces of a flat x. splits_of: of each rank's exchange; slot: names the buffer to use."""
        sent = [splits_of(rank).sent for rank in range(self._ranks)]
        totals = [sum(row[rank] for row in sent) for rank in range(self._ranks)]
        buffer = self._buffer(slot, max(totals) * x.element_size())
        pieces = x.split(sent[self._rank])
        with self._lane.behind(x):
            buffer.barrier(BARRIERS[0])
            for step in range(self._ranks):  # each begins with another one's memory
                peer = (self._rank + step) % self._ranks
                first = sum(row[peer] for row in sent[: self._rank])
                buffer.of(peer, first, len(pieces[peer]), x.dtype).copy_(pieces[peer])
            buffer.barrier(BARRIERS[1])
            mark = self._lane.mark()
        return Coming(buffer.of(self._rank, 0, totals[self._rank], x.dtype), None, mark)

    def arrived(self, coming: Coming) -> Tensor:
        """What has come; it stays until the next exchange of its slot begins."""
        self._lane.wait(coming.mark)
        return coming.contents

    def _buffer(self, slot: str, size: int) -> PeerBuffer:
        if slot not in self._buffers or self._buffers[slot][0] < size:
            self._buffers[slot] = size, self._allocate(size)
        return self._buffers[slot][1]


class SymmetricBuffer:
    """A `PeerBuffer` of GPUs that reach each other's memory."""

    def __init__(self, size: int, device: torch.device, group: dist.ProcessGroup, timeout_s: float):
        from torch.distributed import _symmetric_memory as symmetric_memory

        self._memory = symmetric_memory.empty(size, dtype=torch.uint8, device=device)
        self._handle = symmetric_memory.rendezvous(self._memory, group.group_name)
        self._timeout_ms = round(1000 * timeout_s)

    def of(self, rank: int, first: int, count: int, dtype: torch.dtype) -> Tensor:
        """See `PeerBuffer`."""
        return self._handle.get_buffer(rank, (count,), dtype, first)

    def barrier(self, channel: int) -> None:
        """See `PeerBuffer`. Waiting in vain, for the timeout, it ends the device's work with an error."""
        self._handle.barrier(channel, self._timeout_ms)


class CudaLane:
    """A `Lane`: a stream of its own."""

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.Stream(device)

    @contextmanager
    def behind(self, x: Tensor) -> Iterator[None]:
        """See `Lane`."""
        self._stream.wait_stream(torch.cuda.current_stream(x.device))
        x.record_stream(self._stream)
        with torch.cuda.stream(self._stream):
            yield

    def mark(self) -> torch.cuda.Event:
        """See `Lane`."""
        return self._stream.record_event()

    def wait(self, mark: torch.cuda.Event) -> None:
        """See `Lane`."""
        torch.cuda.current_stream(self._stream.device).wait_event(mark)


def open_peer_memory(
    world: World, group: dist.ProcessGroup, timeout_s: float, report: Callable[[str], None]
) -> PeerMemory | None:
    """For the ranks of `group`, where all of them reach each other's memory; else None, and why is reported.

    timeout_s: of a barrier. All ranks of the world must call it.
    """
    if world.device.type != "cuda":
        return None
    reason, hosts = None, world.gather(socket.gethostname())
    if len({hosts[rank] for rank in dist.get_process_group_ranks(group)}) > 1:
        reason = "the GPUs are in several machines"
    else:
        try:
            SymmetricBuffer(1, world.device, group, timeout_s)
        except (ImportError, RuntimeError) as error:  # an older driver, no NVLink, a build without it
            reason = str(error).strip().splitlines()[0]
    reasons = [found for found in world.gather(reason) if found is not None]
    if reasons:
        report(f"GPUs exchange tokens through NCCL ({reasons[0]})")
        return None
    report("GPUs write tokens straight into each other's memory")
    return PeerMemory(
        dist.get_rank(group),
        dist.get_world_size(group),
        lambda size: SymmetricBuffer(size, world.device, group, timeout_s),
        CudaLane(world.device),
    )
