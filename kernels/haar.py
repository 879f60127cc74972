"""Haar wavelets of video: 3D over (time, rows, columns), causal, and 2D per frame; analysis and synthesis.

Kernel and stride are 2. In 3D every coefficient is +-0.3536 (that literal) and the eight bands are ordered LLL, LLH,
LHL, LHH, HLL, HLH, HHL, HHH: letter 1 time, 2 rows, 3 columns; high = first minus second. In 2D it is +-1/2, the bands
are low-low, row 0 - row 1, column 0 - column 1, both. Each band is C channels wide, band-major. Before the first frame
of a clip stands that frame once more (analysis), and synthesis drops the first frame it makes: T = 2m + 1 frames give
m + 1. Later chunks of a clip hold an even number of frames and neither repeat nor drop.

One pass moves each pixel once in and once out.
"""

import torch
from torch import Tensor

COEFFICIENT_3D = 0.3536
COEFFICIENT_2D = 0.5


def haar3d_ref(video: Tensor, first_chunk: bool = True) -> Tensor:
    """Analysis: (B, C, T, H, W) -> (B, 8C, T', H/2, W/2), T' = (T + 1) / 2 in the first chunk, T / 2 after it."""
    if first_chunk:
        video = torch.cat((video[:, :, :1], video), dim=2)
    bands = [video]
    for dim in (2, 3, 4):
        bands = [half for band in bands for half in _split(band, dim)]
    return torch.cat(bands, dim=1) * COEFFICIENT_3D


def inverse_haar3d_ref(bands: Tensor, first_chunk: bool = True) -> Tensor:
    """Synthesis: (B, 8C, T, H, W) -> (B, C, T', 2H, 2W), T' = 2T - 1 in the first chunk, 2T after it."""
    parts = list((bands * COEFFICIENT_3D).chunk(8, dim=1))
    for dim in (4, 3, 2):
        parts = [_merge(low, high, dim) for low, high in zip(parts[0::2], parts[1::2], strict=True)]
    return parts[0][:, :, 1:] if first_chunk else parts[0]


def haar2d_ref(frames: Tensor) -> Tensor:
    """Analysis per frame: (B, C, T, H, W) -> (B, 4C, T, H/2, W/2)."""
    low, high = _split(frames, 3)
    low_low, low_high = _split(low, 4)
    high_low, high_high = _split(high, 4)
    return torch.cat((low_low, high_low, low_high, high_high), dim=1) * COEFFICIENT_2D


def inverse_haar2d_ref(bands: Tensor) -> Tensor:
    """Synthesis per frame: (B, 4C, T, H, W) -> (B, C, T, 2H, 2W)."""
    low_low, high_low, low_high, high_high = (bands * COEFFICIENT_2D).chunk(4, dim=1)
    return _merge(_merge(low_low, low_high, 4), _merge(high_low, high_high, 4), 3)


def _split(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Sums and differences of neighbours along dim."""
    first, second = x.unflatten(dim, (-1, 2)).unbind(dim + 1)
    return first + second, first - second


def _merge(low: Tensor, high: Tensor, dim: int) -> Tensor:
    """The transpose of `_split`."""
    return torch.stack((low + high, low - high), dim=dim + 1).flatten(dim, dim + 1)
