"""Blocks of a network whose weights stay in CPU memory and come to the GPU for the time that they compute.

Each streamed block's weights lie in one pinned buffer. On the GPU there are a few slots, in which blocks take turns; a
block's parameters are views into its slot for good, so that compiled code and kernels see the same tensors each time.
While a block computes, the next ones are copied on a stream of their own: where a block computes longer than a copy
takes, streaming costs no time. Nothing makes the host wait: streams wait for each other by events.

    copies    | a -> slot 0 | b -> slot 1 |      | c -> slot 0 |
    compute                 | block a     | block b            | block c ...      c's copy waits for a's end

Blocks are expected in their order, over and over; one that comes out of it is copied when it is called.
"""

import functools
import mmap
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from osp_fast.errors import UserError
from osp_fast.models.wfvae_plan import gib

ALIGNMENT = 256  # bytes of each tensor's place in a buffer: what kernels may expect of an allocation


class Mover(Protocol):
    """What copies buffers to a device beside its computation. A ticket stands for an event."""

    def pin(self, size: int) -> Tensor:
        """A uint8 buffer of CPU memory that copies can read while the host goes on."""

    def unpin(self, buffer: Tensor) -> None:
        """Let such a buffer be memory as any other, when the copies that were begun are done."""

    def slot(self, size: int) -> Tensor:
        """A uint8 buffer on the device."""

    def copy(self, source: Tensor, slot: Tensor, after: Any | None) -> Any:
        """Begin a copy, when what `after` stands for is done. Returns a ticket for its end."""

    def wait(self, ticket: Any) -> None:
        """Let the computation that is launched from now on begin after this."""

    def mark(self) -> Any:
        """A ticket for the end of the computation that was launched until now."""


class CudaMover:
    """The `Mover` of a GPU: pinned memory, a stream for copies, events."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def pin(self, size: int) -> Tensor:
        """Of ordinary memory, pinned where it is: PyTorch's pinned memory comes in powers of two, up to twice `size`.

        Raises `UserError` if it cannot be pinned.
        """
        length = -(-max(size, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
        whole = torch.empty(length + mmap.PAGESIZE, dtype=torch.uint8)
        start = -whole.data_ptr() % mmap.PAGESIZE  # whole pages, so that none is pinned twice
        with torch.cuda.device(self._device):
            error = int(torch.cuda.cudart().cudaHostRegister(whole.data_ptr() + start, length, 0))
        if error:
            raise UserError(
                f"{gib(size)} more of CPU memory cannot be pinned for streamed weights (CUDA error {error}): free some,"
                " or let --memory_budget be more so that fewer blocks are streamed"
            )
        return whole[start : start + size]

    def unpin(self, buffer: Tensor) -> None:
        self._stream.synchronize()
        with torch.cuda.device(self._device):
            torch.cuda.check_error(int(torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())))

    def slot(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self._device)

    def copy(self, source: Tensor, slot: Tensor, after: "torch.cuda.Event | None") -> "torch.cuda.Event":
        with torch.cuda.stream(self._stream):
            if after is not None:
                self._stream.wait_event(after)
            slot[: len(source)].copy_(source, non_blocking=True)
            return self._stream.record_event()

    def wait(self, ticket: "torch.cuda.Event") -> None:
        torch.cuda.current_stream(self._device).wait_event(ticket)

    def mark(self) -> "torch.cuda.Event":
        return torch.cuda.current_stream(self._device).record_event()


@dataclass
class _Slot:
    """A place on the device. holds: which streamed block's weights, by rank; there: the ticket of their copy."""

    buffer: Tensor
    holds: int | None = None
    there: Any = None
    free: Any = None  # the ticket of the last computation with what it holds


@dataclass
class _Streamed:
    """A block, where its tensors lie in `source`, its pinned memory, and what its methods were in its own dict."""

    block: nn.Module
    layout: "_Layout"
    source: Tensor
    outer: dict[str, Callable[..., Any] | None]


class BlockStreamer:
    """Streams the weights of some blocks of a network, until `release`.

    blocks: all that are called in turn; streamed: the numbers of those whose weights are streamed
    slots: for how many blocks there is room on the device; 2 hide the copies
    methods: of a block that read its weights, called from outside
    mover: a stand-in for tests

    Raises:
        ValueError: a tensor belongs to two blocks, or numbers or slots make no sense.
        UserError: weights are of a class of their own, as quantized ones may be, or memory cannot be pinned.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        streamed: Collection[int],
        device: torch.device,
        slots: int = 2,
        methods: Sequence[str] = ("forward",),
        mover: Mover | None = None,
    ):
        if slots < 1 or not streamed or not set(streamed) <= set(range(len(blocks))):
            raise ValueError(f"{slots} slots for blocks {sorted(streamed)} of {len(blocks)}")
        self._mover = mover or CudaMover(device)
        self._methods = tuple(methods)
        streamed_blocks = [blocks[number] for number in sorted(set(streamed))]
        layouts = [_Layout(block) for block in streamed_blocks]
        _refuse_shared(blocks)
        self._slots = [_Slot(self._mover.slot(size)) for size in _slot_sizes(layouts, slots)]
        for slot in self._slots:  # whose memory may be some launched computation's until that is done
            slot.free = self._mover.mark()
        self._streamed: list[_Streamed] = []
        self._inside: list[int] = []
        try:
            for block, layout in zip(streamed_blocks, layouts, strict=True):
                self._take(block, layout)
        except BaseException:
            self.release()
            raise
        for rank in range(len(self._slots)):
            self._fetch(rank)

    @property
    def bytes_on_device(self) -> int:
        """Of the slots."""
        return sum(slot.buffer.numel() for slot in self._slots)

    @property
    def bytes_pinned(self) -> int:
        """Of CPU memory that cannot be paged out."""
        return sum(one.source.numel() for one in self._streamed)

    def release(self) -> None:
        """Give slots and pinned memory back; the blocks are on the CPU then, with their weights."""
        for slot in self._slots:  # a copy may be on its way into memory that others get next
            if slot.there is not None:
                self._mover.wait(slot.there)
        for one in self._streamed:
            for name, was in one.outer.items():
                if was is None:
                    delattr(one.block, name)
                else:
                    setattr(one.block, name, was)
            self._mover.unpin(one.source)
            one.layout.point_to(one.source)
        self._slots, self._streamed = [], []

    def _slot(self, rank: int) -> _Slot:
        return self._slots[rank % len(self._slots)]

    def _fetch(self, rank: int) -> None:
        """Begin to copy a block's weights, when its slot is free."""
        slot = self._slot(rank)
        slot.there = self._mover.copy(self._streamed[rank].source, slot.buffer, slot.free)
        slot.holds = rank

    def _take(self, block: nn.Module, layout: "_Layout") -> None:
        """Move one more block's weights to pinned memory, and let the block work in its slot."""
        rank, source = len(self._streamed), self._mover.pin(layout.size)
        layout.fill(source)
        self._streamed.append(
            _Streamed(block, layout, source, {name: block.__dict__.get(name) for name in self._methods})
        )
        layout.point_to(self._slot(rank).buffer)  # which frees what held the weights until now
        for name in self._methods:
            setattr(block, name, self._around(rank, getattr(block, name)))

    def _around(self, rank: int, method: Callable[..., Any]) -> Callable[..., Any]:
        """A block's method that waits for its weights, and gives its slot on afterwards."""

        @functools.wraps(method)
        def call(*arguments: Any, **named: Any) -> Any:
            if rank in self._inside:  # one of its methods calls another one
                return method(*arguments, **named)
            self._enter(rank)
            try:
                return method(*arguments, **named)
            finally:
                self._leave(rank)

        return call

    def _enter(self, rank: int) -> None:
        slot = self._slot(rank)
        if slot.holds != rank:
            self._fetch(rank)
        self._mover.wait(slot.there)
        self._inside.append(rank)

    def _leave(self, rank: int) -> None:
        self._inside.remove(rank)
        slot = self._slot(rank)
        slot.free = self._mover.mark()
        following = rank + len(self._slots)
        if following >= len(self._streamed):  # the first one of this slot, for the next step
            following = rank % len(self._slots)
        if following != rank:
            self._fetch(following)


def bytes_when_streamed(blocks: Sequence[nn.Module], streamed: Collection[int], slots: int) -> int:
    """What the blocks take on the device if some are streamed: slots for these, the others as they are.

    Blocks may be on the meta device. Raises `UserError` as `BlockStreamer` does.
    """
    layouts = [_Layout(block) for block in blocks]
    resident = sum(layout.bytes for number, layout in enumerate(layouts) if number not in streamed)
    return resident + sum(_slot_sizes([layouts[number] for number in sorted(streamed)], slots))


def _slot_sizes(layouts: Sequence["_Layout"], slots: int) -> list[int]:
    """Bytes of each slot: of the largest block that works there."""
    sizes = [layout.size for layout in layouts]
    return [max(sizes[slot::slots]) for slot in range(min(slots, len(sizes)))]


class _Layout:
    """Where a block's tensors, parameters and buffers, lie in a buffer. bytes: of the tensors alone."""

    def __init__(self, block: nn.Module):
        self.tensors: list[Tensor] = []
        self._places: list[tuple[int, int]] = []
        end = self.bytes = 0
        for name, tensor in (*block.named_parameters(), *block.named_buffers()):
            if type(tensor) not in (Tensor, nn.Parameter):
                raise UserError(
                    f"weights of class {type(tensor).__name__} ({name} of a {type(block).__name__}) cannot be streamed:"
                    " let --memory_budget be more, or use weights that are plain tensors"
                )
            start = -(-end // ALIGNMENT) * ALIGNMENT
            end = start + tensor.numel() * tensor.element_size()
            self.bytes += end - start
            self.tensors.append(tensor)
            self._places.append((start, end))
        self.size = end
        self._shapes = [(tensor.dtype, tensor.shape) for tensor in self.tensors]

    def fill(self, buffer: Tensor) -> None:
        """Copy the tensors' contents into a buffer."""
        for tensor, view in zip(self.tensors, self._views(buffer), strict=True):
            view.copy_(tensor.data)

    def point_to(self, buffer: Tensor) -> None:
        """Let the tensors' contents be what the buffer holds."""
        for tensor, view in zip(self.tensors, self._views(buffer), strict=True):
            tensor.data = view

    def _views(self, buffer: Tensor) -> list[Tensor]:
        return [
            buffer[start:end].view(dtype).view(shape)
            for (start, end), (dtype, shape) in zip(self._places, self._shapes, strict=True)
        ]


def _refuse_shared(blocks: Sequence[nn.Module]) -> None:
    """Raise ValueError for tensors of several blocks: they would lie in several slots."""
    seen: dict[int, int] = {}
    for number, block in enumerate(blocks):
        for tensor in dict.fromkeys((*block.parameters(), *block.buffers())):
            if seen.setdefault(id(tensor), number) != number:
                raise ValueError(f"blocks {seen[id(tensor)]} and {number} share a tensor, so neither can be streamed")
