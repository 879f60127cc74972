"""The Haar wavelets by PyTorch: the reference eagerly, compiled, and as a strided convolution."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from osp_fast.kernels.haar import COEFFICIENT_2D, COEFFICIENT_3D
from osp_fast.kernels.haar_spec import call_ref
from torch import Tensor

from bench.accuracy import gradient_leaves
from bench.baselines import PEER, Baseline, Unavailable, compiled, forget_compiled
from bench.results import REFERENCE, STRONG

Function = Callable[..., Tensor | tuple[Tensor, Tensor]]


def baselines() -> tuple[Baseline, ...]:
    """All write what ours writes, analysis channels-last; nothing else that is installed has these wavelets."""
    return (
        _baseline(REFERENCE, REFERENCE, lambda: call_ref),
        _baseline(STRONG, STRONG, _compiled),
        _baseline("convolution", PEER, lambda: convolve),
    )


def convolve(transform: str, x: Tensor, **options: Any) -> Tensor:
    """The wavelets as convolutions of one channel with fixed filters, in the dtype of the bands.

    Raises Unavailable for a call with more to it: another dtype, normalisation, low.
    """
    if any(options.get(name) for name in ("normalize", "denormalize", "with_low")) or options.get("low") is not None:
        raise Unavailable("a convolution neither normalises nor splits off or adds low")
    if x.dtype != options["dtype"]:
        raise Unavailable("a convolution keeps its dtype")
    three_d, inverse = transform.endswith("3d"), transform.startswith("inverse")
    weight = filters(three_d, x.dtype, x.device)
    stride = weight.shape[2:]
    if inverse:
        bands = x.unflatten(1, (len(weight), -1)).transpose(1, 2).flatten(0, 1)
        pixels = F.conv_transpose3d(bands, weight, stride=stride).unflatten(0, (len(x), -1)).squeeze(2)
        return pixels[:, :, 1:] if three_d else pixels
    if three_d:
        x = torch.cat((x[:, :, :1], x), dim=2)
    bands = F.conv3d(x.flatten(0, 1)[:, None], weight, stride=stride).unflatten(0, (len(x), -1))
    return bands.transpose(1, 2).flatten(1, 2).contiguous(memory_format=torch.channels_last_3d)


@functools.cache
def filters(three_d: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(8 or 4, 1, 2 or 1, 2, 2), in the order of the bands."""
    low, high = torch.tensor([1.0, 1.0]), torch.tensor([1.0, -1.0])
    if three_d:
        boxes = [torch.einsum("t,h,w->thw", t, h, w) for t in (low, high) for h in (low, high) for w in (low, high)]
        weight = torch.stack(boxes) * COEFFICIENT_3D
    else:
        boxes = [torch.einsum("h,w->hw", h, w)[None] for w in (low, high) for h in (low, high)]
        weight = torch.stack(boxes) * COEFFICIENT_2D
    return weight[:, None].to(device, dtype)


def _compiled() -> Function:
    forget_compiled()
    return compiled(call_ref)


def _baseline(name: str, role: str, make: Callable[[], Function]) -> Baseline:
    def bind(inputs: dict[str, Any]) -> tuple[Callable[[], Any], list[Tensor]]:
        function = make()
        options = {} if inputs["transform"].startswith("inverse") else {"channels_last": True}
        if function is convolve:
            options = {}
        return lambda: function(**inputs, **options), list(gradient_leaves(inputs).values())

    return Baseline(name, role, bind, compiled=role == STRONG)
