"""Exponential moving average of the weights."""

import torch
from torch import Tensor, nn


class EMA:
    """A float32 average of a module's parameters, for sampling.

    After `start_step` the average follows `average = d * average + (1 - d) * weight` with
    d = min(decay, (1 + n) / (10 + n)), n = averaged steps so far; the ramp (as in diffusers' `EMAModel`, which upstream
    uses) lets a short run forget its first weights. Up to `start_step`, and at n = 0, the average equals the weights.

    With `offload` the average lives in CPU memory, whatever the device of the weights: 4 bytes for each parameter.
    """

    def __init__(self, module: nn.Module, decay: float, start_step: int = 0, offload: bool = False):
        self.decay = decay
        self.start_step = start_step
        self.updates = 0
        self._names = [name for name, _ in module.named_parameters()]
        self._weights = [parameter for _, parameter in module.named_parameters()]
        device = torch.device("cpu") if offload else None
        # `copy=True`: without it a float32 weight on the target device would be shared, not copied.
        self.average = [
            weight.detach().to(device=device or weight.device, dtype=torch.float32, copy=True)
            for weight in self._weights
        ]

    def decay_at(self, updates: int) -> float:
        """The decay of the update that follows `updates` earlier ones; 0 for the first, which copies the weights."""
        return min(self.decay, (1 + updates) / (10 + updates)) if updates > 0 else 0.0

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights as they are after optimizer step `step` (the first step is 1)."""
        decay = 0.0
        if step > self.start_step:
            decay = self.decay_at(self.updates)
            self.updates += 1
        weights = [
            weight.detach().to(device=average.device, dtype=torch.float32)
            for weight, average in zip(self._weights, self.average, strict=True)
        ]
        if decay == 0.0:
            torch._foreach_copy_(self.average, weights)
        else:
            torch._foreach_lerp_(self.average, weights, 1.0 - decay)

    def named_average(self) -> dict[str, Tensor]:
        """The average by parameter name."""
        return dict(zip(self._names, self.average, strict=True))

    @torch.no_grad()
    def load(self, averaged: nn.Module, updates: int) -> None:
        """Go on from an average that was saved: a module with its weights, and the updates that it had taken in."""
        self.updates = updates
        for average, parameter in zip(self.average, averaged.parameters(), strict=True):
            average.copy_(parameter)
