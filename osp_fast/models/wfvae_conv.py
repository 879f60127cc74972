"""Convolutions of the WF-VAE on frames in channels-last memory, none of which copies an activation to pad or to carry.

A convolution over k frames is a sum of k two-dimensional ones, each on the frames that are k - 1, .., 1, 0 older:
every term reads a view of the chunk and is added to the outputs that it belongs to. What a chunk's frames contribute to
outputs of the next chunk is computed when the chunk ends and carried as those few unfinished output frames ("overlap
and add"): they own their memory, while kept input frames would hold on to a whole chunk of activations or be copied.

x is (B, C, T, H, W), weight (C_out, C, k_t, k, k). Time is causal, the first frame repeated k_t - 1 times in front;
spatial padding is k // 2 zeros on each side at stride 1 and one zero at the right and bottom at stride 2.
"""

import torch.nn.functional as F
from torch import Tensor

Carry = list[Tensor]  # unfinished outputs (B, C_out, H', W') of the next chunk, without bias


def frames_of(x: Tensor) -> Tensor:
    """(B, C, T, H, W) -> images (B * T, C, H, W): a view of channels-last memory (of a part of T if B is 1)."""
    # Flattening a single frame gives a stride by which PyTorch no longer recognises channels-last memory.
    return x[:, :, 0] if x.shape[2] == 1 else x.transpose(1, 2).flatten(0, 1)


def video_of(frames: Tensor, batch: int) -> Tensor:
    """The inverse of `frames_of`, a view."""
    return frames.unsqueeze(2) if len(frames) == batch else frames.unflatten(0, (batch, -1)).transpose(1, 2)


def frame_conv(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int = 1) -> Tensor:
    """A 2-D convolution, weight (C_out, C, k, k), of each frame: (B, C, T, H, W) -> (B, C_out, T, H', W')."""
    return _inside(video_of(_conv2d(frames_of(x), weight, bias, stride), x.shape[0]), stride)


def point_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A 1x1x1 convolution, weight (C_out, C, 1, 1, 1): a matrix product over channels."""
    return F.linear(x.movedim(1, -1), weight.flatten(1), bias).movedim(-1, 1)


def causal_conv3d(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int = 1, carry: Carry | None = None, last: bool = False
) -> tuple[Tensor, Carry | None]:
    """The next chunk of a causal convolution: (output, what to carry to the chunk after this one).

    carry: what the chunk before returned, None for the first one; last: no chunk follows, so nothing is to carry.
    Raises ValueError if a chunk is too short to give an output frame.
    """
    taps = weight.unbind(2)
    kernel, frames = len(taps), x.shape[2]
    # Frames before this chunk that its first output sees; output t has tap j on frame stride * t + j - before.
    before = kernel - (1 if carry is None else stride)
    count = (before + frames - kernel) // stride + 1
    if count < 1:
        raise ValueError(f"a chunk of {frames} frames is too short for a kernel of {kernel} frames")
    if carry is None and frames == 1:  # a picture: every tap sees the same frame
        out = _conv2d(x[:, :, 0], weight.sum(2), bias, stride).unsqueeze(2)
    else:
        out = _chunk_sum(x, taps, bias, stride, before, count)
        _add_earlier(out, x, weight, stride, before, carry)
    after = None if last else _carry(x, taps, stride, before, count, carry)
    return _inside(out, stride), after


def _chunk_sum(
    x: Tensor, taps: tuple[Tensor, ...], bias: Tensor | None, stride: int, before: int, count: int
) -> Tensor:
    """The `count` outputs of a chunk as far as its own frames contribute to them."""
    out = None
    for tap in reversed(range(len(taps))):  # the newest frame's first, in which every output has a part
        frame = (tap - before) % stride
        start = (frame - tap + before) // stride
        part = x[:, :, frame : frame + stride * (count - start) : stride]
        if part.shape[2]:
            term = video_of(_conv2d(frames_of(part), taps[tap], bias if out is None else None, stride), x.shape[0])
            if out is None:
                out = term
            else:
                out[:, :, start:].add_(term)  # `+=` on a slice would copy the slice onto itself
    return out


def _add_earlier(out: Tensor, x: Tensor, weight: Tensor, stride: int, before: int, carry: Carry | None) -> None:
    """Add to `out` what frames before this chunk contribute: the carry, or the first frame repeated."""
    for index in range(min(out.shape[2], -(-before // stride))):
        if carry is None:
            out[:, :, index].add_(_conv2d(x[:, :, 0], weight[:, :, : before - stride * index].sum(2), None, stride))
        elif index < len(carry):
            out[:, :, index].add_(carry[index])


def _carry(
    x: Tensor, taps: tuple[Tensor, ...], stride: int, before: int, count: int, carry: Carry | None
) -> Carry | None:
    """The sums over all frames so far of each output of the next chunk that they play a part in."""
    kernel = len(taps)
    unfinished: Carry = []
    for index in range(count, count - (-(kernel - stride) // stride)):
        # Outputs that even the chunk before contributed to pass through a short chunk.
        total = carry[index] if carry is not None and index < len(carry) else None
        for tap in range(kernel - stride * (index - count + 1)):
            frame = stride * index + tap - before
            if frame < 0 and carry is not None:
                continue
            term = _conv2d(x[:, :, max(frame, 0)], taps[tap], None, stride)
            total = term if total is None else total + term
        unfinished.append(total)
    return unfinished or None


def _conv2d(frames: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    """Images, padded by half a kernel; at stride 2 by all but one, of which `_inside` cuts the first row and column."""
    size = weight.shape[-1]
    return F.conv2d(frames, weight, bias, stride, padding=size // 2 if stride == 1 else size - 1)


def _inside(out: Tensor, stride: int) -> Tensor:
    """The outputs of a stride whose windows start at even rows and columns; two zeros in front shifted them by one."""
    return out if stride == 1 else out[..., 1:, 1:]
