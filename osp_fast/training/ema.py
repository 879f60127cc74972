"""Exponential moving average of the weights."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from osp_fast.parallel.shards import LocalShards


class EMA:
    """A float32 average of the parameters that train, this rank's part of each, for sampling.

    After `start_step` the average follows `average = d * average + (1 - d) * weight` with
    d = min(decay, (1 + n) / (10 + n)), n = averaged steps so far; the ramp (as in diffusers' `EMAModel`, which upstream
    uses) lets a short run forget its first weights. Up to `start_step`, and at n = 0, the average equals the weights.

    With `offload` the average lives in CPU memory: 4 bytes for each parameter of the rank. A GPU's weights are then
    copied while the next step's forward runs, and a thread takes them in.
    """

    def __init__(self, shards: LocalShards, decay: float, start_step: int = 0, offload: bool = False):
        self.decay = decay
        self.start_step = start_step
        self.shards = shards
        self._weights = [local.detach() for local in shards.local]
        device = self._weights[0].device
        home = torch.device("cpu") if offload else device
        # `copy=True`: without it a float32 weight on the target device would be shared, not copied.
        self.average = [weight.to(device=home, dtype=torch.float32, copy=True) for weight in self._weights]
        # How often the average has taken in the weights; on the device, because it is known there first.
        self._updates = torch.zeros((), dtype=torch.float64, device=home)
        self._offload = _Offload(self._weights, device) if offload and device.type == "cuda" else None

    @property
    def updates(self) -> int:
        """How often the average has taken in the weights; the host waits for the last step."""
        self.settle()
        return int(self._updates.item())

    @torch.no_grad()
    def update(self, step: int, skipped: Tensor | None = None) -> None:
        """Take in the weights as they are after optimizer step `step` (the first step is 1).

        skipped: 1 if the step changed no weight: then the average does not change either; () float32 on the device
        """
        skipped = torch.zeros((), device=self._weights[0].device) if skipped is None else skipped
        if self._offload is None:
            self._take_in(self._weights, step, skipped)
        else:
            self._offload.start(skipped, lambda weights, flag: self._take_in(weights, step, flag))

    def _take_in(self, weights: Sequence[Tensor], step: int, skipped: Tensor) -> None:
        """The same on any device, without a look at what is in the tensors."""
        taken = 1.0 - skipped.double()
        if step > self.start_step:
            ramp = ((1 + self._updates) / (10 + self._updates)).clamp(max=self.decay)
            share = torch.where(self._updates > 0, 1.0 - ramp, 1.0) * taken
            self._updates += taken
        else:
            share = taken
        share = share.float()
        torch._foreach_lerp_(self.average, [weight.float() for weight in weights], [share] * len(weights))

    def settle(self) -> None:
        """Wait until the average has taken in all that it was given."""
        if self._offload is not None:
            self._offload.join()

    def before_step(self) -> None:
        """Let the optimizer's next step wait, on the GPU, until the weights have been copied."""
        if self._offload is not None:
            self._offload.hold_back()

    def named_average(self) -> dict[str, Tensor]:
        """This rank's part of the average by parameter name."""
        self.settle()
        return dict(zip(self.shards.names, self.average, strict=True))

    @torch.no_grad()
    def load(self, whole: dict[str, Tensor], updates: int) -> None:
        """Go on from an average that was saved: whole tensors by parameter name, and the updates that it had."""
        self._updates.fill_(updates)
        for index, (name, average) in enumerate(zip(self.shards.names, self.average, strict=True)):
            average.copy_(self.shards.part(index, whole[name]))

    @contextmanager
    def in_place_of_weights(self) -> Iterator[None]:
        """Within the block the model computes with the average; afterwards it has its weights back, bit for bit."""
        self.settle()
        kept = [weight.to("cpu", copy=True) for weight in self._weights]
        with torch.no_grad():
            torch._foreach_copy_(self._weights, self.average)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self._weights, kept)


class _Offload:
    """Copies of the weights in pinned CPU memory, made on a stream of their own, and the thread that waits for them."""

    def __init__(self, weights: Sequence[Tensor], device: torch.device):
        self._weights, self._device = weights, device
        self._copies = [torch.empty_like(weight, device="cpu", pin_memory=True) for weight in weights]
        self._flag = torch.zeros((), pin_memory=True)
        self._stream = torch.cuda.Stream(device)
        self._copied: torch.cuda.Event | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, skipped: Tensor, take_in: Callable[[Sequence[Tensor], Tensor], None]) -> None:
        self.join()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for copy, weight in zip(self._copies, self._weights, strict=True):
                copy.copy_(weight, non_blocking=True)
            self._flag.copy_(skipped, non_blocking=True)
            skipped.record_stream(self._stream)
            self._copied = self._stream.record_event()

        def run() -> None:
            try:
                self._copied.synchronize()
                with torch.no_grad():
                    take_in(self._copies, self._flag)
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=run, name="average", daemon=True)
        self._thread.start()

    def hold_back(self) -> None:
        if self._copied is not None:
            torch.cuda.current_stream(self._device).wait_event(self._copied)

    def join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            raise self._error
