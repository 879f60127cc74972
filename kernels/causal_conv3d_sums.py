"""The causal convolution over k frames as a sum of k two-dimensional ones, which copies no activation of a single clip.

Each term is a convolution of the frames that are k - 1, .., 1, 0 older: it reads a view of the chunk and is added to
the outputs that it belongs to. Of what went before a chunk either the frames are known, a `cache`, or what they
contribute to the chunk's first outputs, a `Carry`: those sums are computed when their chunk ends ("overlap and add").
A carry owns its memory, where kept frames would hold on to a whole chunk of activations or be copied.

x is (B, C, T, H, W) in channels-last memory, weight (C_out, C, k_t, k, k). Time is causal, the first frame repeated
k_t - 1 times in front; spatial padding is k // 2 zeros on each side at stride 1 and one zero at the right and bottom at
stride 2. Sums of 16-bit terms are rounded after each. Autograd is PyTorch's; autocast plays no part.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from osp_fast.kernels.causal_conv3d_launch import Stride
from torch import Tensor

Carry = list[Tensor]  # unfinished outputs (B, C_out, H', W') of the next chunk, without bias


def sum_of_chunk(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Stride, carry: Carry | None = None, last: bool = False
) -> tuple[Tensor, Carry | None]:
    """The next chunk of a causal convolution: (output, what to carry to the chunk after this one).

    carry: what the chunk before returned, None for the first one; last: no chunk follows, so nothing is to carry.
    Raises ValueError if a chunk is too short to give an output frame, or at stride 2 leaves frames over for the next:
    the first must have an odd number of frames, the others an even one.
    """
    with outside_autocast(x):
        return _sum_of_chunk(x, weight, bias, stride, carry, last)


def _sum_of_chunk(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Stride, carry: Carry | None, last: bool
) -> tuple[Tensor, Carry | None]:
    taps = weight.unbind(2)
    kernel, frames, step = len(taps), x.shape[2], stride.time
    # Frames before this chunk that its first output sees; output t has tap j on frame step * t + j - before.
    before = kernel - (1 if carry is None else step)
    count = _outputs(frames, kernel, step, before)
    if not last and (before + frames - kernel) % step:
        raise ValueError(f"a chunk of {frames} frames does not end where a stride of {step} does, and is not the last")
    if carry is None and frames == 1:  # a picture: every tap sees the same frame
        out = _convolve(x[:, :, 0], weight.sum(2), bias, stride.space).unsqueeze(2)
    else:
        out = _sum_of_own_frames(x, taps, bias, stride, before, count)
        for index in range(min(count, -(-before // step))):
            if carry is None:
                repeated = weight[:, :, : before - step * index].sum(2)
                out[:, :, index].add_(_convolve(x[:, :, 0], repeated, None, stride.space))
            elif index < len(carry):
                out[:, :, index].add_(carry[index])
    after = None if last else _carry(x, taps, stride, before, count, carry)
    return _inside(out, x, weight, stride.space), after


def sum_with_cache(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Stride, cache: Sequence[Tensor]) -> Tensor:
    """The outputs of a chunk behind the frames (B, C, H, W) of a cache, oldest first; at least one."""
    taps, before = weight.unbind(2), len(cache)
    count = _outputs(x.shape[2], len(taps), stride.time, before)
    out = _sum_of_own_frames(x, taps, bias, stride, before, count)
    for index in range(min(count, -(-before // stride.time))):
        for tap in range(min(before - stride.time * index, len(taps))):
            out[:, :, index].add_(_convolve(cache[stride.time * index + tap], taps[tap], None, stride.space))
    return _inside(out, x, weight, stride.space)


def outside_autocast(x: Tensor) -> AbstractContextManager:
    """Within it x's device computes in the types that it is given."""
    casts = x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)
    return torch.autocast(x.device.type, enabled=False) if casts else nullcontext()


def by_frames(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """A function of images (N, C, H, W) applied to frames (B, C, T, H, W): views, but of a part of T only if B is 1."""
    # Flattening a single frame gives a stride by which PyTorch no longer recognises channels-last memory.
    batch, frames = x.shape[0], x.shape[2]
    out = function(x[:, :, 0] if frames == 1 else x.transpose(1, 2).flatten(0, 1))
    return out.unsqueeze(2) if frames == 1 else out.unflatten(0, (batch, frames)).transpose(1, 2)


def convolve_frames(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int = 1) -> Tensor:
    """A 2-D convolution, weight (C_out, C, k, k), of each frame: (B, C, T, H, W) -> (B, C_out, T, H', W')."""
    return _inside(_frame_by_frame(x, weight, bias, stride), x, weight, stride)


def _outputs(frames: int, kernel: int, step: int, before: int) -> int:
    count = (before + frames - kernel) // step + 1
    if count < 1:
        raise ValueError(f"a chunk of {frames} frames is too short for a kernel of {kernel} frames")
    return count


def _sum_of_own_frames(
    x: Tensor, taps: tuple[Tensor, ...], bias: Tensor | None, stride: Stride, before: int, count: int
) -> Tensor:
    """The `count` outputs of a chunk as far as its own frames contribute to them."""
    out, step = None, stride.time
    for tap in reversed(range(len(taps))):  # the newest frame's first, in which every output has a part
        frame = (tap - before) % step
        start = (frame - tap + before) // step
        if tap > before:
            frame, start = tap - before, 0
        part = x[:, :, frame : frame + step * (count - start) : step]
        if part.shape[2]:
            term = _frame_by_frame(part, taps[tap], bias if out is None else None, stride.space)
            if out is None:
                out = term
            else:
                out[:, :, start:].add_(term)  # `+=` on a slice would copy the slice onto itself
    return out


def _carry(
    x: Tensor, taps: tuple[Tensor, ...], stride: Stride, before: int, count: int, carry: Carry | None
) -> Carry | None:
    """The sums over all frames so far of each output of the next chunk that they play a part in."""
    kernel, step = len(taps), stride.time
    unfinished: Carry = []
    for index in range(count, count - (-(kernel - step) // step)):
        # Outputs that even the chunk before contributed to pass through a short chunk.
        total = carry[index] if carry is not None and index < len(carry) else None
        for tap in range(kernel - step * (index - count + 1)):
            frame = step * index + tap - before
            if frame < 0 and carry is not None:
                continue
            term = _convolve(x[:, :, max(frame, 0)], taps[tap], None, stride.space)
            total = term if total is None else total + term
        unfinished.append(total)
    return unfinished or None


def _frame_by_frame(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    return by_frames(x, lambda images: _convolve(images, weight, bias, stride))


def _convolve(images: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    """Padded by half a kernel; at stride 2 by all but one, of which `_inside` cuts the first row and column."""
    size = weight.shape[-1]
    padding = size // 2 if stride == 1 else size - 1
    if images.is_meta:  # there PyTorch's convolution forgets channels-last memory, which it keeps on every real device
        height, width = ((side + 2 * padding - size) // stride + 1 for side in images.shape[2:])
        return images.new_empty((len(images), height, width, len(weight))).movedim(-1, 1)
    return F.conv2d(images, weight, bias, stride, padding)


def _inside(out: Tensor, x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """The outputs of a stride whose windows start at even rows and columns; two zeros in front shifted them by one."""
    if stride == 1:
        return out
    height, width = ((side + 1 - weight.shape[-1]) // stride + 1 for side in x.shape[3:])
    return out[..., 1 : height + 1, 1 : width + 1]
