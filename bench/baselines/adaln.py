"""The original code's operations, torch.compile of our reference, and others' norms where they compute the same.

For one sample norm(x) * (1 + scale) + shift is a norm with the weight 1 + scale and the bias shift: that is what
Liger-Kernel's LayerNorm and QuACK's norms are given. Liger-Kernel's modulated RMSNorm takes scale and shift. Sums and
gradients for the tables are left out, in their favour.
"""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from osp_fast.kernels.adaln_spec import reference
from torch import Tensor

from bench.baselines import PEER, Baseline, Unavailable, compiled_reference, eager_reference


def baselines() -> tuple[Baseline, ...]:
    """The original's, the compiled reference, which computes in float32 as we do, Liger-Kernel and QuACK."""
    return (
        eager_reference(original),
        compiled_reference(reference),
        Baseline("Liger-Kernel", PEER, bind_liger),
        Baseline("QuACK", PEER, bind_quack),
    )


def original(
    x: Tensor,
    y: Tensor | None = None,
    gate: Tensor | None = None,
    gate_table: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    shift_table: Tensor | None = None,
    scale_table: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 0.0,
    norm: str = "layer",
) -> Tensor | tuple[Tensor, Tensor]:
    """One operation after another in x's type: gate, add, norm, scale, shift."""
    if y is not None:
        x = x + (y if gate is None else (gate + gate_table)[:, None] * y)
    if shift is None:
        return x
    normed = F.layer_norm(x, x.shape[-1:], weight, bias, eps) if norm == "layer" else _rms_norm(x, weight, bias, eps)
    out = normed * (1 + (scale + scale_table)[:, None]) + (shift + shift_table)[:, None]
    return out if y is None else (x, out)


def _rms_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    normed = F.rms_norm(x, x.shape[-1:], weight, eps)
    return normed if bias is None else normed + bias


def bind_liger(inputs: dict[str, Any]) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """A plain norm of one sample."""
    leaves = _one_norm(inputs, "Liger-Kernel")
    try:
        if inputs["norm"] == "layer":
            from liger_kernel.ops.layer_norm import LigerLayerNormFunction

            leaves[1] = (1 + leaves[1].detach()).requires_grad_()
            return lambda: LigerLayerNormFunction.apply(*leaves, inputs["eps"]), leaves
        from liger_kernel.ops.modulated_rms_norm import LigerModulatedRMSNormFunction
    except ImportError:
        raise Unavailable("liger-kernel with this norm is not installed") from None
    x, scale, shift = leaves
    more = dict(offset=0.0, casting_mode="llama", in_place=False).values()
    return lambda: LigerModulatedRMSNormFunction.apply(x, None, scale, shift, inputs["eps"], *more), leaves


def bind_quack(inputs: dict[str, Any]) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """A plain norm of one sample; its LayerNorm has no backward in PyTorch's graph."""
    x, scale, shift = _one_norm(inputs, "QuACK")
    try:
        from quack.rmsnorm import layernorm_fwd, rmsnorm
    except ImportError:
        raise Unavailable("quack-kernels is not installed") from None
    leaves = [x, (1 + scale.detach()).float().requires_grad_(), shift.detach().float().requires_grad_()]
    norm = rmsnorm if inputs["norm"] == "rms" else layernorm_fwd
    return lambda: norm(x[0], leaves[1], leaves[2], eps=inputs["eps"])[None], leaves


def _one_norm(inputs: dict[str, Any], whose: str) -> list[Tensor]:
    """x, scale and shift as leaves of their own, the tables in them. Raises Unavailable for anything but one norm."""
    if "y" in inputs or "weight" in inputs or "shift" not in inputs or inputs["x"].shape[0] != 1:
        raise Unavailable(f"{whose} has a norm and no more: one sample, no residual, no weights beside the modulation")
    both = (inputs[name].detach()[0] + inputs[f"{name}_table"].detach() for name in ("scale", "shift"))
    return [inputs["x"], *(x.requires_grad_() for x in both)]
