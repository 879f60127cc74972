"""The reference, eager and compiled, and Liger-Kernel's LayerNorm where it is the same mathematics.

For one sample LN(x) * (1 + scale) + shift is a LayerNorm with the weight 1 + scale and the bias shift: that is what
Liger-Kernel is given. Its sums and gradients for the tables are left out, in its favour.
"""

from collections.abc import Callable
from typing import Any

from osp_fast.kernels.adaln_spec import reference
from torch import Tensor

from bench.baselines import Baseline, Unavailable, compiled_reference, eager_reference
from bench.results import AS_WRITTEN


def baselines() -> tuple[Baseline, ...]:
    """The reference in two ways, and Liger-Kernel."""
    return (
        eager_reference(reference),
        compiled_reference(reference),
        Baseline("Liger-Kernel LayerNorm", AS_WRITTEN, bind_liger, lambda out, inputs: out),
    )


def bind_liger(inputs: dict[str, Any]) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """A plain norm of one sample, without weights of its own."""
    plain = "y" not in inputs and "weight" not in inputs and inputs["norm"] == "layer"
    if not plain or inputs["x"].shape[0] != 1:
        raise Unavailable("Liger-Kernel has a LayerNorm with a weight and a bias: one sample, no residual")
    try:
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction
    except ImportError:
        raise Unavailable("liger-kernel is not installed") from None
    scale, shift = (inputs[name].detach()[0] + inputs[f"{name}_table"].detach() for name in ("scale", "shift"))
    leaves = [inputs["x"], (1 + scale).requires_grad_(), shift.requires_grad_()]
    return lambda: LigerLayerNormFunction.apply(*leaves, inputs["eps"]), leaves
