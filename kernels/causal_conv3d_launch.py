"""How the causal convolution is launched: sizes, versions, blocks.

"descriptor" reads pixels and weights through TMA boxes (sm_90 and sm_100, 16 bits), "pointer" computes every address
(sm_80 and newer, and what descriptors cannot express). `choose_version` is the one place that decides.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import triton
from osp_fast.kernels import tuning
from osp_fast.kernels.causal_conv3d_kernels import causal_conv3d_fwd_kernel
from osp_fast.kernels.launch import architecture, current, multiprocessors
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

FORWARD = "causal_conv3d forward"  # the kernel's name in `tuning.pick`
# pixels -> (rows and columns of a patch, time of a step of the main loop against the largest patch's): half the pixels
# are half the products, but two thirds of the bytes
PATCHES = {256: ((16, 16), 1.0), 128: ((8, 16), 0.71), 64: ((8, 8), 0.56)}
VERSIONS = ("auto", "descriptor", "pointer")
LARGEST_ALIGNMENT = 8  # elements: 16 bytes, as much as a thread loads at once
LARGEST_FRAME = 1 << 31  # elements: places within a frame are int32


class Stride(NamedTuple):
    """Steps of a convolution in time, and in rows and columns."""

    time: int
    space: int


@dataclass(frozen=True)
class ConvConfig:
    """One way to run the kernel: a patch of pixels, output channels, input channels at a time."""

    block_h: int
    block_w: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    def __str__(self) -> str:
        blocks = f"{self.block_h}x{self.block_w}x{self.block_n}/{self.block_k}"
        return f"{blocks} {self.num_warps} warps {self.num_stages} stages"


@dataclass(frozen=True)
class ConvCall:
    """What the configuration depends on.

    arch: compute capability as a number, 0 in the interpreter
    pixels: of a patch, one of `PATCHES`
    """

    arch: int
    dtype: torch.dtype
    channels: int
    out_channels: int
    descriptors: bool
    pixels: int = 256


def output_size(size: Sequence[int], kernel: Sequence[int], stride: Stride, past: int) -> tuple[int, int, int]:
    """(T', H', W') of x's (T, H, W) behind `past` frames; sizes may be symbols."""
    frames, height, width = size
    if stride.space == 1:
        space = (height, width)
    else:  # one zero at the right and at the bottom
        space = ((height + 1 - kernel[1]) // stride.space + 1, (width + 1 - kernel[2]) // stride.space + 1)
    return ((frames + past - kernel[0]) // stride.time + 1, *space)


def empty_output(x: Tensor, weight: Tensor, stride: Stride, past: int, dtype: torch.dtype) -> Tensor:
    """The output in channels-last memory, not filled; sizes may be symbols."""
    frames, height, width = output_size(x.shape[2:], weight.shape[2:], stride, past)
    out = torch.empty((x.shape[0], frames, height, width, weight.shape[0]), dtype=dtype, device=x.device)
    return out.permute(0, 4, 1, 2, 3)


def is_dense(out: Tensor) -> bool:
    """Whether each sample of out (B, C, T, H, W) is dense with channels last, as frames of such a tensor are."""
    channels, _, height, width = out.shape[1:]
    adjacent = out.stride(1) == 1 or channels == 1
    sample, *strides = strides_of(out)
    return adjacent and strides == [height * width * channels, width * channels, channels] and not sample % channels


def past_frames(kernel_t: int, earlier: Tensor | None, previous: Tensor | None) -> int:
    """Frames that stand before x: those of a cache, or as many repetitions of x's first as the kernel reaches."""
    if previous is None:
        return kernel_t - 1
    return 1 if earlier is None else 2


def conv_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    earlier: Tensor | None,
    previous: Tensor | None,
    residual: Tensor | None,
    stride: Stride,
    out: Tensor,
    version: str,
) -> None:
    """Fill out, (B, C_out, T', H', W'), of which each sample is dense with channels last.

    earlier, previous: (B, C, H, W), or None. Raises ValueError for a version that cannot serve, and for frames of 2^31
    elements.
    """
    out_channels, channels, kernel_t, kernel, _ = weight.shape
    past = past_frames(kernel_t, earlier, previous)
    if not out.numel():
        return
    x = with_adjacent_channels(x)
    earlier, previous = (None if y is None else in_strides_of(x, y).unsqueeze(2) for y in (earlier, previous))
    before = (previous if earlier is None else earlier, previous)
    residual = None if residual is None else with_adjacent_channels(residual)
    weight = weight.permute(0, 2, 3, 4, 1).contiguous()
    _check_frame_sizes(*_given(x, out, residual))
    arch = architecture(x.device)
    descriptors = _reads_through_descriptors(version, arch, weight, stride, _given(x, *before))
    call = choose_patch(
        ConvCall(arch, x.dtype, channels, out_channels, descriptors), out.shape, multiprocessors(x.device)
    )
    config = tuning.pick(FORWARD, candidates(call))
    views = [None] * 4
    if descriptors:
        views = [None if y is None else pixel_view(y, stride, config) for y in (x, *before)]
        views.append(weight_view(weight, config))
    strides = (*strides_of(x), *(0 if y is None else strides_of(y)[0] for y in before))
    strides += (0,) * 4 if residual is None else strides_of(residual)
    aligned = math.gcd(LARGEST_ALIGNMENT, *strides)
    with current(x.device):
        causal_conv3d_fwd_kernel[(tiles(config, out.shape),)](
            x, *before, weight, bias, residual, out, *views,
            *(stride // aligned for stride in strides), past, *x.shape[2:], *out.shape[2:],
            strides_of(out)[0] // out_channels,
            CHANNELS=channels, OUT_CHANNELS=out_channels, KERNEL_T=kernel_t, KERNEL=kernel,
            STRIDE_T=stride.time, STRIDE=stride.space, HAS_CACHE=previous is not None, HAS_BIAS=bias is not None,
            HAS_RESIDUAL=residual is not None, ALIGNED=aligned, DESCRIPTORS=descriptors,
            PRECISION=precision(), **blocks_of(config),
        )  # fmt: skip


def _given(*tensors: Tensor | None) -> list[Tensor]:
    return [x for x in tensors if x is not None]


def _check_frame_sizes(*tensors: Tensor) -> None:
    """Raises ValueError if places within a frame do not fit into 32 bits."""
    for x in tensors:
        if x.shape[3] * strides_of(x)[2] >= LARGEST_FRAME:
            raise ValueError(f"causal_conv3d by Triton takes frames of less than 2^31 elements, not {tuple(x.shape)}")


def tiles(config: ConvConfig, shape: Sequence[int]) -> int:
    """Programs of a launch for an output of this shape."""
    batch, channels, frames, height, width = shape
    patches = triton.cdiv(height, config.block_h) * triton.cdiv(width, config.block_w)
    return batch * frames * patches * triton.cdiv(channels, config.block_n)


def precision() -> str:
    """How float32 is multiplied: as PyTorch would have cuDNN do it."""
    return "tf32" if torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee"


def blocks_of(config: ConvConfig) -> dict[str, int]:
    """The kernel's constants and options of a configuration."""
    return dict(
        BLOCK_H=config.block_h,
        BLOCK_W=config.block_w,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def choose_version(arch: int, dtype: torch.dtype, channels: int) -> str:
    """descriptor or pointer: what serves such tensors on an architecture, if they lie as descriptors need them."""
    return "descriptor" if 90 <= arch < 120 and dtype.itemsize == 2 and channels % 8 == 0 else "pointer"


def _reads_through_descriptors(version: str, arch: int, weight: Tensor, stride: Stride, frames: list[Tensor]) -> bool:
    """Whether descriptors serve. Raises ValueError if they are asked for and cannot."""
    channels = weight.shape[4]
    fits = all(fits_descriptor(y, stride, block_k(channels)) for y in frames)
    # The interpreter has no architecture, and multiplies no bfloat16: there a call is as on Hopper in 16 bits.
    case = (arch, weight.dtype) if arch else (90, torch.bfloat16)
    if version == "descriptor" and not (fits and choose_version(*case, channels) == "descriptor"):
        raise ValueError("these tensors cannot be read through descriptors here: use version pointer, or auto")
    if version == "auto":
        return fits and choose_version(arch, weight.dtype, channels) == "descriptor"
    return version == "descriptor"


def fits_descriptor(x: Tensor, stride: Stride, width: int) -> bool:
    """Whether x (B, C, T, H, W) may be viewed as `pixel_view` does, in boxes `width` channels wide."""
    batch, channels, frames, height, columns = x.shape
    strides = strides_of(x)
    if any(n % 16 for n in (x.data_ptr(), *(x.element_size() * n for n in strides))) or 0 in strides:
        return False
    if stride.space == 1:
        return True
    merged = 1 in (batch, frames) or strides[0] == frames * strides[1]
    return merged and height % 2 == columns % 2 == channels % width == 0


def pixel_view(x: Tensor, stride: Stride, config: ConvConfig) -> TensorDescriptor:
    """A descriptor of x (B, C, T, H, W) whose boxes are what one tap sees of a patch; `_load_box` loads them."""
    batch, channels, frames, height, columns = x.shape
    to_sample, to_frame, to_row, to_column = strides_of(x)
    if stride.space == 1:
        shape, strides = [batch, frames, height, columns, channels], [to_sample, to_frame, to_row, to_column, 1]
        return TensorDescriptor(x, shape, strides, [1, 1, config.block_h, config.block_w, config.block_k])
    shape = [batch * frames, height // 2, 2, columns // 2, to_column + channels]
    strides = [to_sample if frames == 1 else to_frame, 2 * to_row, to_row, 2 * to_column, 1]
    return TensorDescriptor(x, shape, strides, [1, config.block_h, 1, config.block_w, config.block_k])


def weight_view(weight: Tensor, config: ConvConfig) -> TensorDescriptor:
    """A descriptor of weight (C_out, k_t, k_h, k_w, C), dense: boxes of one tap."""
    taps = weight.flatten(1, 3).transpose(0, 1)
    return TensorDescriptor(weight, list(taps.shape), list(taps.stride()), [1, config.block_n, config.block_k])


def strides_of(x: Tensor) -> tuple[int, int, int, int]:
    """From sample to sample, frame, row and column of x (B, C, T, H, W).

    PyTorch leaves the stride of a dimension of size 1 undefined: here it is what it would be in dense memory.
    """
    found, dense = [], x.shape[1]
    for axis in (4, 3, 2, 0):
        found.append(dense if x.shape[axis] == 1 else x.stride(axis))
        dense = found[-1] * x.shape[axis]
    return tuple(reversed(found))


def with_adjacent_channels(x: Tensor) -> Tensor:
    """x if its channels are side by side and no two pixels of a frame share memory, else a copy that is so."""
    adjacent = x.stride(1) == 1 or x.shape[1] == 1
    return x if adjacent and 0 not in strides_of(x)[2:] else x.clone(memory_format=torch.channels_last_3d)


def in_strides_of(x: Tensor, frame: Tensor) -> Tensor:
    """frame (B, C, H, W) with the rows and columns of x as far apart, copied only if they are not."""
    adjacent = frame.stride(1) == 1 or frame.shape[1] == 1
    *_, row, column = strides_of(x)
    if adjacent and strides_of(frame.unsqueeze(2))[2:] == (row, column):
        return frame
    batch, channels, height, _ = frame.shape
    space = frame.new_empty(batch * height * row + channels)
    return space.as_strided(frame.shape, (height * row, 1, row, column)).copy_(frame)


def choose_patch(call: ConvCall, shape: Sequence[int], processors: int) -> ConvCall:
    """The call with the patch that takes least time, every multiprocessor working on one block after another.

    Small ones pay where large ones would leave most multiprocessors without work, as for single small frames.
    """
    if not call.arch:
        return call
    calls = [replace(call, pixels=pixels) for pixels in PATCHES if call.descriptors or pixels < 256]
    return min(
        calls, key=lambda call: triton.cdiv(tiles(candidates(call)[0], shape), processors) * PATCHES[call.pixels][1]
    )


def block_k(channels: int) -> int:
    """Input channels of a step of the main loop, a box's width: 64 fill a line of 128 bytes."""
    return 16 if channels <= 16 else 32 if channels <= 32 else 64


def block_n(out_channels: int, largest: int, smallest: int) -> int:
    """Output channels of a block: the largest power of two that leaves as little over as any does."""
    sizes = [size for size in (128, 64, 32, 16) if smallest <= size <= largest]
    return min(sizes, key=lambda size: (triton.cdiv(out_channels, size) * size, -size))


def candidates(call: ConvCall) -> list[ConvConfig]:
    """The configurations worth timing, the chosen one first."""
    depth = block_k(call.channels)
    if call.arch == 0:
        return [ConvConfig(4, 8, 32, 16, 4, 1)]
    if call.dtype == torch.float32:
        return [ConvConfig(8, 8, block_n(call.out_channels, 64, 16), 16, 4, 2)]
    (height, width), _ = PATCHES[call.pixels]
    if not call.descriptors:
        n, warps = block_n(call.out_channels, 128, 16), 8 if call.pixels > 64 else 4
        depths = {min(depth, 32): 4, depth: 3}  # and stages
        return [ConvConfig(height, width, n, some, warps, stages) for some, stages in depths.items()]
    n = block_n(call.out_channels, 128, 64)  # a product of Hopper's has 64 rows at least
    warps = 8 if n == 128 and call.pixels > 64 else 4
    found = [ConvConfig(height, width, n, depth, warps, stages) for stages in (4, 3)]
    if call.pixels == 256 and n == 128:
        found += [ConvConfig(8, 16, 128, depth, 8, 3), ConvConfig(8, 16, 256, depth, 8, 3)]
    return found
