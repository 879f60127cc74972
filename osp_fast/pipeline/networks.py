"""The pipeline's networks: when each is loaded, and where its weights are while it is used and otherwise."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch
from torch import nn

from osp_fast.engine.stream_blocks import BlockStreamer

NetworkT = TypeVar("NetworkT", bound=nn.Module)


class Held(Generic[NetworkT]):
    """A network that is on the device while it is used.

    load: makes it on the CPU, when it is first needed; or it is given as `network`, in its place on the device
    keep: whether it stays in CPU memory after it has left the device; otherwise it is loaded anew when it is needed
    leaves: whether it leaves the device after each use
    blocks: those of its parts whose weights may be streamed, and which of their methods read weights
    """

    def __init__(
        self,
        device: torch.device,
        network: NetworkT | None = None,
        load: Callable[[], NetworkT] | None = None,
        *,
        keep: bool = True,
        leaves: bool = False,
        blocks: Callable[[NetworkT], Sequence[nn.Module]] | None = None,
        methods: Sequence[str] = ("forward",),
    ):
        self._device, self._network, self._load = device, network, load
        self._keep, self.leaves, self._blocks, self._methods = keep, leaves, blocks, methods
        self._streamed: tuple[int, ...] = ()
        self._slots = 0
        self._streamer: BlockStreamer | None = None
        self._in_place = network is not None and not leaves

    def stream(self, streamed: Sequence[int], slots: int) -> None:
        """From its next use on: which blocks' weights stay in CPU memory, and how many are on the device at once."""
        if (tuple(streamed), slots) != (self._streamed, self._slots):
            self.leave()
            self._streamed, self._slots = tuple(streamed), slots

    @contextmanager
    def use(self) -> Iterator[NetworkT]:
        """Hold the network on the device for the time of the block, at least."""
        if not self._in_place:
            self._come()
        try:
            yield self._network
        finally:
            if self.leaves:
                self.leave()

    def _come(self) -> None:
        if self._network is None:
            self._network = self._load()
        if self._streamed:
            self._streamer = BlockStreamer(
                self._blocks(self._network), self._streamed, self._device, self._slots, tuple(self._methods)
            )
        self._network.to(self._device)
        self._in_place = True

    def leave(self) -> None:
        """Free the device of it, if it may leave."""
        if not self._in_place or (self._load is None and not self.leaves):
            return
        if self._streamer is not None:
            self._streamer.release()
            self._streamer = None
        if self._keep:
            self._network.to("cpu")
        else:
            self._network = None
        self._in_place = False
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
