"""The causal convolution by PyTorch's own convolutions, with as few copies as they allow; autograd is theirs.

PyTorch cannot write into part of a tensor, nor read frames from two tensors, so something is copied or summed:

- 1x1x1 is a matrix product over x as it lies, 1x3x3 a convolution of x: nothing is copied.
- 3x3x3 in float32 and float64 on the CPU, unless frames are small, is the sum of three two-dimensional convolutions of
  views: nothing is copied. Sums in 16 bits would be rounded between the taps, and pass thrice over a GPU's memory.
- 3x3x3 elsewhere: frames are laid one after the other, 2 (T + P) C values per pixel read and written; with fewer output
  than input channels only the P + 2 frames that the first outputs need, and then the outputs, 2 T C_out.

The zeros that stride 2 needs at the right and bottom are not written: two are asked for on every side, and the outputs
of the first row and column dropped; only frames that are laid together on the CPU are padded.

Times against torch.cat and F.conv3d, on one CPU core in float32, channels-last, the best of 5: 8 channels at 64 x 64,
1, 4 and 17 frames: 0.50, 0.32, 0.10; 32 channels at 48 x 48: 0.39, 0.31, 1.13; 128 channels at 32 x 32, 1, 4 and 9
frames: 0.61, 1.04, 1.03; 1x3x3 with 128 channels: 0.56; 1x1x1: 0.67. In bfloat16 sums would take 1.05 to 1.8.
"""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from osp_fast.kernels.causal_conv3d_launch import Stride, output_size, with_adjacent_channels
from torch import Tensor

PRODUCTS_PER_FRAME = 1 << 16  # of each tap; measured on one core


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
    past = list(cache) or [x.select(2, 0)] * (kernel_t - 1)
    bias = None if bias is None else bias.to(x.dtype)
    casts = torch.is_autocast_enabled(x.device.type)
    with torch.autocast(x.device.type, enabled=False) if casts else nullcontext():
        if kernel == 1:
            out = F.linear(x.movedim(1, -1), weight.flatten(1), bias).movedim(-1, 1)
        elif _taps_pay(x, weight, stride, len(past)):
            out = _by_taps(x, weight, bias, stride, past)
        else:
            out = _by_frames(x, weight, bias, stride, past, crops=x.device.type != "cpu")
    out = out.contiguous(memory_format=torch.channels_last_3d)
    if residual is not None:
        out = out + residual
    return out.to(dtype)


def _taps_pay(x: Tensor, weight: Tensor, stride: Stride, past: int) -> bool:
    """Whether to sum over taps: where that is exact, and products outweigh the time of its several small calls."""
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64):
        return False
    frames, height, width = output_size(x.shape[2:], weight.shape[2:], stride, past)
    products = weight.shape[0] * weight.shape[1] * frames * height * width
    return weight.shape[2] == 1 or products >= PRODUCTS_PER_FRAME * min(frames, 4)


def _by_taps(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Stride, past: list[Tensor]) -> Tensor:
    """The sum over the kernel's frames of a convolution of images."""
    size = output_size(x.shape[2:], weight.shape[2:], stride, len(past))
    last = weight.shape[2] - 1

    def convolve(frames: Tensor, tap: int, bias: Tensor | None = None) -> Tensor:
        images = F.conv2d(frames.transpose(1, 2).flatten(0, 1), weight[:, :, tap], bias, stride.space, _padding(stride))
        return _crop(images, stride, size).unflatten(0, (-1, frames.shape[2])).transpose(1, 2)

    def frames_from(first: int, count: int) -> Tensor:
        return x[:, :, first :: stride.time][:, :, :count]

    out = convolve(frames_from(last - len(past), size[0]), last, bias)
    for tap in reversed(range(last)):
        early = min(-(-max(len(past) - tap, 0) // stride.time), size[0])  # outputs whose frame is before x
        for frame in range(early):
            out[:, :, frame].add_(convolve(past[frame * stride.time + tap].unsqueeze(2), tap)[:, :, 0])
        if early < size[0]:
            rest = frames_from(early * stride.time + tap - len(past), size[0] - early)
            out[:, :, early:].add_(convolve(rest, tap))
    return out


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

    if not past:
        return convolve(x)
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
