"""cuDNN's convolution in channels-last memory: with the frames laid together first, or with that done; and compiled."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from osp_fast.kernels.causal_conv3d import steps_of
from osp_fast.kernels.causal_conv3d_spec import reference
from torch import Tensor

from bench.accuracy import gradient_leaves
from bench.baselines import PEER, Baseline, compiled_reference, eager_reference


def baselines() -> tuple[Baseline, ...]:
    """The reference as PyTorch runs it, its convolution alone, and torch.compile of the reference."""
    return (
        eager_reference(reference),
        Baseline("conv3d, frames laid together before", PEER, bind_gathered),
        compiled_reference(reference),
    )


def bind_gathered(inputs: dict[str, Any]) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """The convolution and the addition of the residual; copies of the cache and the padding are made before the clock.

    The frames are one leaf, as their gradient is one tensor.
    """
    weight, bias, residual = (inputs.get(name) for name in ("weight", "bias", "residual"))
    kernel_t, kernel, _ = weight.shape[2:]
    steps = steps_of(inputs["stride"])
    x, cache = inputs["x"].detach(), inputs.get("cache")
    before = x[:, :, :1].expand(-1, -1, kernel_t - 1, -1, -1) if cache is None else cache.detach()
    frames = torch.cat((before, x), dim=2)
    padding = (0, kernel // 2, kernel // 2)
    if steps.space > 1:
        frames, padding = F.pad(frames, (0, 1, 0, 1)), 0
    frames = frames.contiguous(memory_format=torch.channels_last_3d).requires_grad_(inputs["x"].requires_grad)

    def call() -> Tensor:
        out = F.conv3d(frames, weight, bias, (steps.time, steps.space, steps.space), padding)
        return out if residual is None else out + residual

    leaves = gradient_leaves({**inputs, "x": frames, "cache": None})
    return call, list(leaves.values())
