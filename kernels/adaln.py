"""Adaptive layer norm: normalise, then modulate by vectors of the timestep; and the gated residual that follows.

    norm_modulate(x, shift, scale) = LN(x) * (1 + scale) + shift
    gate_residual(x, gate, y)      = x + gate * y

x, y are (B, N, d); shift, scale and gate are (B, d), one vector per sample. The mean and variance are over d.
Source: "Scalable Diffusion Models with Transformers" (Peebles and Xie, 2022), adaLN-Zero; the shared six vectors are
those of PixArt-alpha (Chen et al., 2023).

Bytes moved by a fused norm_modulate in bf16: 4 B N d (one read, one write); by gate_residual: 6 B N d.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def norm_modulate_ref(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, weight: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """LN(x) * (1 + scale) + shift for x (B, N, d), shift and scale (B, d), optional norm weight and bias (d,)."""
    normed = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return normed * (1 + scale[:, None]) + shift[:, None]


def gate_residual_ref(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """x + gate * y for x and y (B, N, d), gate (B, d)."""
    return torch.addcmul(x, gate[:, None], y)
