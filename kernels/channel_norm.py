"""The VAE's norm: LayerNorm over channels at each pixel, optionally followed by SiLU.

x is (B, C, T, H, W) or (B, C, H, W); weight and bias are (C,); mean and variance are over C. A fused kernel in bf16
moves 4 bytes per element (one read, one write).
"""

import torch.nn.functional as F
from torch import Tensor


def channel_norm_ref(x: Tensor, weight: Tensor, bias: Tensor, eps: float, silu: bool = False) -> Tensor:
    """LayerNorm over dimension 1 of x with affine weights (C,), then SiLU if asked for."""
    normed = F.layer_norm(x.movedim(1, -1), weight.shape, weight, bias, eps).movedim(-1, 1)
    return F.silu(normed) if silu else normed
