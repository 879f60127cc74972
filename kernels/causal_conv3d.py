"""Causal convolution in time, zero-padded in space, that can continue from the frames of an earlier chunk.

A kernel of k_t frames sees the current frame and the k_t - 1 before it; before the first frame of a clip stands that
frame, repeated. Spatial padding is k // 2 zeros on each side at stride 1; at stride 2 one zero at the right and bottom.
A clip may be given in chunks: each call returns, beside its output, the frames that the next chunk still needs, the
k_t - stride_t last ones. x is (B, C, T, H, W); weight is (C_out, C, k_t, k_h, k_w). FLOPs: 2 C k_t k_h k_w per output.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_conv3d_ref(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int = 1, cache: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Returns (output, cache of the next chunk).

    cache is None for the first chunk of a clip; the returned cache is None if the kernel has one frame. Raises
    ValueError if a chunk is too short to give an output frame.
    """
    kernel_t, kernel_h, kernel_w = weight.shape[2:]
    # Not one expanded tensor: torch.cat would then lay the result out planar, whatever x is.
    before = (x[:, :, :1],) * (kernel_t - 1) if cache is None else (cache,)
    frames = torch.cat((*before, x), dim=2) if before else x
    if frames.shape[2] < kernel_t:
        raise ValueError(f"a chunk of {x.shape[2]} frames is too short for a kernel of {kernel_t} frames")
    if stride == 1:
        out = F.conv3d(frames, weight, bias, padding=(0, kernel_h // 2, kernel_w // 2))
    else:
        out = F.conv3d(F.pad(frames, (0, 1, 0, 1)), weight, bias, stride=stride)
    used = out.shape[2] * stride
    tail = frames[:, :, used:] if used < frames.shape[2] else None
    return out, tail
