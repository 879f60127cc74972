"""What is logged of a run beside its loss and its pace: the GPU's sensors, and what its memory is full of."""

from collections.abc import Callable

import torch
from torch import Tensor

from osp_fast.engine.telemetry import Telemetry, memory_by_kind
from osp_fast.parallel.shards import local_part
from osp_fast.training.optimizer import states
from osp_fast.training.step import Update

GIB = 1 << 30


class Observer:
    """Callable: facts for a line of metrics.jsonl, asked without a wait for the GPU.

    `memory_KIND_gib` of weights, gradients, optimizer, ema, activations_and_other, peak and, on a GPU, allocated and
    reserved; `power_w`, `sm_clock_mhz`, `temperature_c`, `utilisation`, `throttle` of an NVIDIA GPU.
    """

    def __init__(self, update: Update, weights: list[Tensor], device: torch.device, report: Callable[[str], None]):
        self._device = device
        self._telemetry = Telemetry(device, report) if device.type == "cuda" else None
        moments = [value for state in states(update.optimizer).values() for value in state.values()]
        self._kinds = dict(
            weights=self._bytes([local_part(weight) for weight in weights]),
            gradients=self._bytes(update.shards.local),
            optimizer=self._bytes(moments),
            ema=0 if update.ema is None else self._bytes(update.ema.average),
        )

    def _bytes(self, tensors: list[Tensor]) -> int:
        """Of those that are on the device."""
        return sum(tensor.nbytes for tensor in tensors if tensor.device.type == self._device.type)

    def __call__(self) -> dict[str, float | str]:
        memory = memory_by_kind(self._device, **self._kinds)
        facts = {f"memory_{kind}_gib": held / GIB for kind, held in memory.items()}
        return facts if self._telemetry is None else {**facts, **self._telemetry.read()}

    def close(self) -> None:
        """Give the sensors back."""
        if self._telemetry is not None:
            self._telemetry.close()
