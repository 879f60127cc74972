"""3D RoPE as the original code runs it, and torch.compile of our reference, which computes in float32 as we do.

Liger-Kernel's rotary embedding turns all of a head by one angle's multiples for a token; three axes in three parts of
a head are other mathematics, so it is not among these.
"""

import torch
import torch.nn.functional as F
from osp_fast.kernels.rope3d import EPS, Rope3D, rope3d_ref, token_angles
from torch import Tensor

from bench.baselines import Baseline, compiled_reference, eager_reference


def baselines() -> tuple[Baseline, ...]:
    """Both, with the operation's own arguments."""
    return eager_reference(original), compiled_reference(rope3d_ref)


def original(
    qkv: Tensor, rope: Rope3D, q_weight: Tensor | None = None, k_weight: Tensor | None = None, eps: float = EPS
) -> tuple[Tensor, Tensor, Tensor]:
    """Axis by axis in q's type: x * cos + (halves swapped) * sin, the axes' parts joined."""
    q, k, v = qkv.unbind(2)
    cos, sin = (
        torch.cat((part, part), dim=-1).to(q.dtype).unbind(2) for part in token_angles(rope, q.shape[1])
    )  # of each axis (N, 1, D / 3)
    found = []
    for x, weight in ((q, q_weight), (k, k_weight)):
        x = x if weight is None else F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps)
        parts = []
        for part, cos_n, sin_n in zip(x.chunk(3, dim=-1), cos, sin, strict=True):
            first, second = part.chunk(2, dim=-1)
            parts.append(part * cos_n + torch.cat((-second, first), dim=-1) * sin_n)
        found.append(torch.cat(parts, dim=-1))
    return (*found, v)
