"""The channel norm of others: the reference, eager and compiled, and Liger-Kernel's LayerNorm on rows of channels."""

from collections.abc import Callable
from typing import Any

from osp_fast.kernels.channel_norm import channel_norm_ref
from torch import Tensor

from bench.accuracy import gradient_leaves
from bench.baselines import PEER, Baseline, Unavailable, compiled_reference, eager_reference


def baselines() -> tuple[Baseline, ...]:
    """The reference in two forms, and Liger-Kernel."""
    return eager_reference(channel_norm_ref), compiled_reference(channel_norm_ref), liger()


def liger() -> Baseline:
    """LigerLayerNormFunction over the last dimension of (B, ..., C), which is how the pixels lie; it has no SiLU."""

    def bind(inputs: dict[str, Any]) -> tuple[Callable[[], Tensor], list[Tensor]]:
        if inputs["silu"]:
            raise Unavailable("Liger-Kernel's LayerNorm has no SiLU behind it")
        try:
            from liger_kernel.ops.layer_norm import LigerLayerNormFunction
        except ImportError:
            raise Unavailable("Liger-Kernel is not installed: pip install liger-kernel") from None

        def call() -> Tensor:
            rows = inputs["x"].movedim(1, -1)
            return LigerLayerNormFunction.apply(rows, inputs["weight"], inputs["bias"], inputs["eps"]).movedim(-1, 1)

        return call, list(gradient_leaves(inputs).values())

    return Baseline("Liger-Kernel", PEER, bind)
