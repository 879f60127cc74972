"""The causal convolution by PyTorch's own convolutions, with as few copies as they allow; autograd is theirs.

PyTorch cannot write into part of a tensor, nor read frames from two tensors, so something is copied or summed:

- 1x1x1 is a matrix product over x as it lies, 1x3x3 a two-dimensional convolution of x's frames: nothing is copied.
- 3x3x3 in float32 and float64 on the CPU is the sum of three two-dimensional convolutions of views
  (`causal_conv3d_sums.py`): nothing is copied. Sums in 16 bits would be rounded between the taps, and pass thrice over
  a GPU's memory.
- 3x3x3 elsewhere: frames are laid one after the other, 2 (T + P) C values per pixel read and written; with fewer output
  than input channels only the P + 2 frames that the first outputs need, and then the outputs, 2 T C_out.

The zeros that stride 2 needs at the right and bottom are not written: two are asked for on every side, and the outputs
of the first row and column dropped; only frames that are laid together on the CPU are padded.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from osp_fast.kernels.causal_conv3d_launch import Stride, output_size, with_adjacent_channels
from osp_fast.kernels.causal_conv3d_sums import convolve_frames, outside_autocast, sum_of_chunk, sum_with_cache
from torch import Tensor


def library_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Stride,
    cache: Sequence[Tensor],
    residual: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The result in channels-last memory. cache: frames (B, C, H, W), oldest first, none at the start of a clip."""
    kernel_t, kernel, _ = weight.shape[2:]
    x = with_adjacent_channels(x)
    bias = None if bias is None else bias.to(x.dtype)
    with outside_autocast(x):
        if kernel == 1:
            out = F.linear(x.movedim(1, -1), weight.flatten(1), bias).movedim(-1, 1)
        elif kernel_t == 1:
            out = convolve_frames(x, weight[:, :, 0], bias, stride.space)
        elif x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64):
            if cache:
                out = sum_with_cache(x, weight, bias, stride, cache)
            else:
                out, _ = sum_of_chunk(x, weight, bias, stride, None, last=True)
        else:
            past = list(cache) or [x.select(2, 0)] * (kernel_t - 1)
            out = _by_frames(x, weight, bias, stride, past, crops=x.device.type != "cpu")
    out = out.contiguous(memory_format=torch.channels_last_3d)
    if residual is not None:
        out += residual
    return out.to(dtype)


def _by_frames(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Stride, past: list[Tensor], crops: bool
) -> Tensor:
    """A convolution of the frames laid one after the other, or of some of them.

    crops: at stride 2 outputs are dropped, rather than frames padded
    """
    size = output_size(x.shape[2:], weight.shape[2:], stride, len(past))
    steps, padding = (stride.time, stride.space, stride.space), (0, _padding(stride), _padding(stride))

    def convolve(frames: Tensor) -> Tensor:
        if stride.space > 1 and not crops:
            return F.conv3d(F.pad(frames, (0, 1, 0, 1)), weight, bias, steps)
        return _crop(F.conv3d(frames, weight, bias, steps, padding), stride, size)

    before = [frame.unsqueeze(2) for frame in past]
    out_channels, channels, kernel_t = weight.shape[:3]
    if stride.time > 1 or out_channels >= channels or x.shape[2] < kernel_t:
        return convolve(torch.cat((*before, x), dim=2))
    first = convolve(torch.cat((*before, x[:, :, : kernel_t - 1]), dim=2))
    return torch.cat((first, convolve(x)), dim=2)


def _padding(stride: Stride) -> int:
    """Of a 3x3 kernel: one zero on each side, at stride 2 two, so that outputs begin where the frame does."""
    return 1 if stride.space == 1 else 2


def _crop(out: Tensor, stride: Stride, size: Sequence[int]) -> Tensor:
    """Drops what `_padding` at stride 2 adds before the first row and column, and after the last."""
    return out if stride.space == 1 else out[..., 1 : size[1] + 1, 1 : size[2] + 1]
