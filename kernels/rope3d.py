"""Rotary position embedding in three axes, by halves.

The head dimension D is three equal parts for time, rows and columns. In each part the two halves are rotated,
(x1, x2) -> (x1 cos a - x2 sin a, x2 cos a + x1 sin a), with a = position / interpolation_scale * 10000^(-2 i / (D/3)).
Tokens are in (t, h, w) order. Source: "RoFormer" (Su et al., 2021).

A fused kernel moves 4 B N H D bytes per tensor in bf16 (one read, one write); the tables are 12 N D bytes at most.
"""

import torch
from torch import Tensor

BASE = 10000.0


def rope3d_table(
    size: tuple[int, int, int],
    head_dim: int,
    interpolation_scale: tuple[float, float, float] = (1.0, 1.0, 1.0),
    device: torch.device | str | None = None,
    round_to: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """cos and sin of every token's angles, each (T*H*W, 3, D/6).

    size is (T, H, W) in tokens. Angles are float32; `round_to` rounds angles, cos and sin to that type, as the released
    checkpoints were trained. Raises ValueError if head_dim is not a multiple of 6.
    """
    if head_dim % 6:
        raise ValueError(f"head_dim {head_dim} is not a multiple of 6: three axes with two halves each")
    part = head_dim // 3
    exponent = torch.arange(0, part, 2, dtype=torch.float32, device=device) / part
    frequency = BASE**-exponent
    per_axis = []
    for axis, (length, scale) in enumerate(zip(size, interpolation_scale, strict=True)):
        position = torch.arange(length, dtype=torch.float32, device=device) / scale
        shape = [1, 1, 1, part // 2]
        shape[axis] = length
        per_axis.append((position[:, None] * frequency).view(shape).expand(*size, part // 2))
    angles = torch.stack(per_axis, dim=3).flatten(0, 2)
    if round_to is not None:
        angles = angles.to(round_to)
    return angles.cos(), angles.sin()


def rope3d_ref(x_bnhd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate queries or keys (B, N, H, D) by a table of `rope3d_table`; the result has x's dtype."""
    batch, tokens, heads, dim = x_bnhd.shape
    first, second = x_bnhd.view(batch, tokens, heads, 3, 2, dim // 6).unbind(4)
    cos, sin = cos[:, None], sin[:, None]
    rotated = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=4)
    return rotated.to(x_bnhd.dtype).view_as(x_bnhd)
