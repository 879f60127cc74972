"""Causal convolution in time, zero-padded in space, that continues from the frames of an earlier chunk in place.

    out[b, :, t, h, w] = bias + residual[b, :, t, h, w] + sum over taps (i, j, k) of
        weight[:, :, i, j, k] frame(s_t t + i - P)[b, :, s h + j - p, s w + k - p]

frame(n) is x's n-th; frame(-1) and frame(-2) are the last ones of the chunk before, `cache`, or x's first where a clip
begins. P is how many of them there are: k_t - 1 at the start, then as many as `next_cache` has handed on, k_t - s_t if
chunks are whole multiples of s_t. Spatial padding is p = k // 2 zeros on each side at stride 1; at stride 2 one zero at
the right and bottom, and p = 0. Kernels are 3x3x3, 1x3x3 (a 3x3 convolution of each frame) and 1x1x1.

x is (B, C, T, H, W) in channels-last memory, (B, T, H, W, C) with channels side by side and everything else in any
strides, as slices have; other layouts are copied first. weight is (C_out, C, k_t, k_h, k_w), read as (C_out, k_t, k_h,
k_w, C): keep it in torch.channels_last_3d memory (4-dimensional weights in channels_last), otherwise each call converts
it. The result is (B, C_out, T', H', W') in channels-last memory. float32 sums; bfloat16, float16, float32. In float32
products are exact or tf32 as `torch.backends.cudnn.conv.fp32_precision` says.

FLOPs: 2 C k_t k_h k_w for each output. Bytes, 16 bits: 2 (B C (T + P) H W + weights + outputs), outputs twice with a
residual; from 64 channels on the products bind, not the memory. The cache is never concatenated, padding never written.
Sources: Chetlur et al., "cuDNN" (2014), for the implicit matrix product; Yu et al., "Language Model Beats Diffusion"
(2023), for the causal layer.

Two paths serve: the Triton kernel of `causal_conv3d_kernels.py`, launched by `causal_conv3d_launch.py`, and PyTorch's
own convolutions, `causal_conv3d_library.py`; `SERVES` says which. The gradients are PyTorch's in both.
"""

import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from osp_fast.kernels.causal_conv3d_launch import (
    VERSIONS,
    Stride,
    conv_forward,
    empty_output,
    is_dense,
    output_size,
    past_frames,
)
from osp_fast.kernels.causal_conv3d_library import library_conv
from osp_fast.kernels.launch import architecture, check_triton, selected_path
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

PATHS = ("auto", "triton", "library")
KERNELS = ((3, 3, 3), (1, 3, 3), (1, 1, 1))
Cache = Tensor | Sequence[Tensor] | None
Steps = int | tuple[int, int, int]


class Serves(NamedTuple):
    """A row of `SERVES`: the calls it holds for, who serves them, and why."""

    archs: range
    dtypes: tuple[torch.dtype, ...]
    kernels: tuple[tuple[int, int, int], ...]
    channels: range  # of both input and output
    path: str
    reason: str


EVERY_ARCH, HALF, ANY = range(0, 1000), (torch.bfloat16, torch.float16), range(1, 1 << 30)
# What serves on a GPU, the first row that holds. Not yet measured on a GPU: these are expectations.
SERVES = (
    Serves(EVERY_ARCH, HALF, ((1, 1, 1),), ANY, "library", "a plain matrix product, no cache: cuBLAS"),
    Serves(
        range(80, 130), HALF, ((3, 3, 3),), ANY, "triton",
        "no copy of the frames, by predictions a seventh of a 128-channel layer's time, and tensor cores busy",
    ),
    Serves(range(80, 130), HALF, ((1, 3, 3),), range(64, 1 << 30), "triton", "tensor cores busy, sums in registers"),
    Serves(
        EVERY_ARCH, HALF, ((3, 3, 3), (1, 3, 3)), ANY, "library",
        "few channels leave most of a block empty, or read pixels once per tap for few products; or an old GPU",
    ),
    Serves(
        EVERY_ARCH, (torch.float32, torch.float64), KERNELS, ANY, "library",
        "the Triton kernel is not tuned for float32, and takes no float64",
    ),
)  # fmt: skip
TRACED_ARCH = 90  # what calls are traced for, without a device, where Triton is to serve them


def causal_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Steps = 1,
    cache: Cache = None,
    residual: Tensor | None = None,
    dtype: torch.dtype | None = None,
    path: str = "auto",
    out: Tensor | None = None,
) -> Tensor:
    """The convolution; see the module's docstring. Returns (B, C_out, T', H', W') in channels-last memory.

    stride: 1, 2, or (1, 2, 2); cache: None at the start of a clip, then what `next_cache` gave: frames (B, C, H, W),
    oldest first, or a tensor of them (B, C, P, H, W); residual: added to the result, in its shape; dtype: of the
    result, x's by default. path: "triton" or "library" force one; "auto" takes `SERVES` on CUDA and the library
    elsewhere, unless `OSP_FAST_KERNELS` forces one (reference stands for the library). Outside of autocast, always.
    out: where the result is written and which is returned, such as some frames of a longer clip's; without gradients.
    Raises ValueError on arguments that do not fit, and on a chunk too short for an output frame.
    """
    if path not in PATHS:
        raise ValueError(f"path {path!r} is unknown: choose from {', '.join(PATHS)}")
    weight = weight.unsqueeze(2) if weight.dim() == 4 else weight
    if path == "auto" and weight.dim() == 5:
        path = serving_path(x.device, x.dtype, weight.shape[1], weight.shape[0], tuple(weight.shape[2:]))
    if path == "triton":
        return causal_conv3d_triton(x, weight, bias, stride, cache, residual, dtype, out=out)
    frames, steps = frames_of(cache), steps_of(stride)
    check_arguments(x, weight, bias, steps, frames, residual)
    check_out(x, weight, steps, frames, dtype or x.dtype, out, bias, residual)
    result = library_conv(x, weight, bias, steps, frames, residual, dtype or x.dtype)
    return result if out is None else out.copy_(result)


def causal_conv3d_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Steps = 1,
    cache: Cache = None,
    residual: Tensor | None = None,
    dtype: torch.dtype | None = None,
    version: str = "auto",
    out: Tensor | None = None,
) -> Tensor:
    """`causal_conv3d` by the Triton kernel alone; `version` forces one of `causal_conv3d_launch.VERSIONS`.

    Raises ValueError also where it cannot run: no GPU, another dtype, or a version that does not fit.
    """
    if version not in VERSIONS:
        raise ValueError(f"version {version!r} is unknown: choose from {', '.join(VERSIONS)}")
    weight = weight.unsqueeze(2) if weight.dim() == 4 else weight
    frames, steps, dtype = frames_of(cache), steps_of(stride), dtype or x.dtype
    given = [y for y in (bias, *frames, residual) if y is not None]
    check_triton("causal_conv3d", x, weight, *given)
    check_triton("causal_conv3d", x.new_empty(0, dtype=dtype))
    check_arguments(x, weight, bias, steps, frames, residual)
    earlier, previous = ((None, None, *frames) if weight.shape[2] > 1 else (None, None))[-2:]
    check_out(x, weight, steps, frames, dtype, out, bias, residual)
    if out is None:
        return torch.ops.osp_fast.causal_conv3d(x, weight, bias, earlier, previous, residual, *steps, dtype, version)
    torch.ops.osp_fast.causal_conv3d_into(x, weight, bias, earlier, previous, residual, *steps, out, version)
    return out


def next_cache(x: Tensor, cache: Cache, kernel: int, stride: int = 1) -> tuple[Tensor, ...]:
    """The `cache` of the chunk after x: views of the frames not yet used up, oldest first, (B, C, H, W) each.

    kernel and stride are those in time. Nothing is copied: with fewer frames in x than the next chunk looks back, the
    older ones are those of `cache`, unchanged. A view keeps the memory of its whole chunk; clone what must outlive it.
    Raises ValueError if x is too short to give an output frame.
    """
    if kernel == 1:
        return ()
    past = list(frames_of(cache)) or [x.select(2, 0)] * (kernel - 1)
    frames, length = x.shape[2], len(past)
    if frames + length < kernel:
        raise ValueError(f"a chunk of {frames} frames is too short for a kernel of {kernel} frames")
    left = kernel - stride + (frames + length - kernel) % stride
    return tuple(x.select(2, frames - i) if i <= frames else past[length + frames - i] for i in range(left, 0, -1))


def causal_conv3d_ref(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Steps = 1, cache: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The reference: frames laid one after the other. Returns (output, cache of the next chunk).

    cache is None for the first chunk of a clip; the returned cache is None if the kernel has one frame. Raises
    ValueError if a chunk is too short to give an output frame.
    """
    kernel_t, kernel_h, kernel_w = weight.shape[2:]
    steps = steps_of(stride)
    # Not one expanded tensor: torch.cat would then lay the result out planar, whatever x is.
    before = (x[:, :, :1],) * (kernel_t - 1) if cache is None else (cache,)
    frames = torch.cat((*before, x), dim=2) if before else x
    if frames.shape[2] < kernel_t:
        raise ValueError(f"a chunk of {x.shape[2]} frames is too short for a kernel of {kernel_t} frames")
    if steps.space == 1:
        out = F.conv3d(frames, weight, bias, padding=(0, kernel_h // 2, kernel_w // 2))
    else:
        out = F.conv3d(F.pad(frames, (0, 1, 0, 1)), weight, bias, stride=(steps.time, steps.space, steps.space))
    used = out.shape[2] * steps.time
    tail = frames[:, :, used:] if used < frames.shape[2] else None
    return out, tail


@torch.compiler.assume_constant_result
def serving_path(
    device: torch.device, dtype: torch.dtype, channels: int, out_channels: int, kernel: tuple[int, int, int]
) -> str:
    """triton or library: what serves such a call where no path is asked for. Graphs take it as a constant."""
    if selected_path(device) == "reference":
        return "library"
    if "OSP_FAST_KERNELS" in os.environ:
        return "triton"
    return serving_row(architecture(device) or TRACED_ARCH, dtype, channels, out_channels, kernel).path


def serving_row(
    arch: int, dtype: torch.dtype, channels: int, out_channels: int, kernel: tuple[int, int, int]
) -> Serves:
    """The row of `SERVES` for such a call. Raises ValueError if there is none."""
    for row in SERVES:
        known = arch in row.archs and dtype in row.dtypes and kernel in row.kernels
        if known and channels in row.channels and out_channels in row.channels:
            return row
    raise ValueError(f"causal_conv3d serves no {dtype} with a kernel of {kernel}: choose from {KERNELS}")


def frames_of(cache: Cache) -> tuple[Tensor, ...]:
    """The frames (B, C, H, W) of a cache, oldest first."""
    if cache is None:
        return ()
    return cache.unbind(2) if isinstance(cache, Tensor) else tuple(cache)


def steps_of(stride: Steps) -> Stride:
    """In time and in space. Raises ValueError unless it is 1, 2 or (1, 2, 2)."""
    steps = (stride,) * 3 if isinstance(stride, int) else tuple(stride)
    if steps not in ((1, 1, 1), (2, 2, 2), (1, 2, 2)):
        raise ValueError(f"stride {stride} is unknown: choose from 1, 2 and (1, 2, 2)")
    return Stride(*steps[:2])


def check_arguments(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Stride, frames: Sequence[Tensor], residual: Tensor | None
) -> None:
    """Raises ValueError for arguments that `causal_conv3d` does not take."""
    if x.dim() != 5 or weight.dim() != 5 or weight.shape[1] != x.shape[1] or not x.shape[1]:
        raise ValueError(
            f"x {tuple(x.shape)} must be (B, C, T, H, W), weight {tuple(weight.shape)} (C_out, C, k, k, k)"
        )
    kernel = tuple(weight.shape[2:])
    if kernel not in KERNELS:
        raise ValueError(f"kernel {kernel} is unknown: choose from {', '.join(map(str, KERNELS))}")
    if stride.space == 2 and (kernel[1] == 1 or kernel[0] < stride.time + 1 > 2):
        raise ValueError(f"stride {tuple(stride)} goes with a kernel larger than it in time and space, not {kernel}")
    if weight.dtype != x.dtype or any(y.dtype != x.dtype for y in frames):
        raise ValueError(f"weight and cache must be {x.dtype}, as x is")
    others = [y for y in (weight, bias, *frames, residual) if y is not None and y.device != x.device]
    if others:
        raise ValueError(f"all tensors must be on {x.device}, where x is, not on {others[0].device}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias {tuple(bias.shape)} must be (C_out,) = {tuple(weight.shape[:1])}")
    if len(frames) > kernel[0] - 1 or any(y.shape != x.shape[:2] + x.shape[3:] for y in frames):
        shapes = [tuple(y.shape) for y in frames]
        raise ValueError(f"cache {shapes} must be up to {kernel[0] - 1} frames like x's, (B, C, H, W)")
    past = len(frames) or kernel[0] - 1
    size = output_size(x.shape[2:], kernel, stride, past)
    if x.shape[2] < 1 or size[0] < 1:
        raise ValueError(f"a chunk of {x.shape[2]} frames is too short for a kernel of {kernel[0]} frames")
    if residual is not None and residual.shape != (x.shape[0], weight.shape[0], *size):
        raise ValueError(f"residual {tuple(residual.shape)} must be {(x.shape[0], weight.shape[0], *size)}")


def check_out(
    x: Tensor,
    weight: Tensor,
    stride: Stride,
    frames: Sequence[Tensor],
    dtype: torch.dtype,
    out: Tensor | None,
    *added: Tensor | None,
) -> None:
    """Raises ValueError for an `out` that the result, of that dtype, cannot be written to. added: bias, residual."""
    if out is None:
        return
    past = len(frames) or weight.shape[2] - 1
    shape = (x.shape[0], weight.shape[0], *output_size(x.shape[2:], weight.shape[2:], stride, past))
    if out.shape != shape or out.dtype != dtype or out.device != x.device:
        raise ValueError(f"out {tuple(out.shape)} of {out.dtype} must be {shape} of {dtype}, on {x.device}")
    if not is_dense(out):
        raise ValueError("out must be whole frames of channels-last memory")
    given = (x, weight, *frames, out, *(y for y in added if y is not None))
    if torch.is_grad_enabled() and any(y.requires_grad for y in given):
        raise ValueError("out takes no gradients: leave it out, or work under torch.no_grad()")


@torch.library.custom_op("osp_fast::causal_conv3d", mutates_args=())
def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    earlier: Tensor | None,
    previous: Tensor | None,
    residual: Tensor | None,
    stride_t: int,
    stride: int,
    dtype: torch.dtype,
    version: str,
) -> Tensor:
    out = empty_output(x, weight, Stride(stride_t, stride), past_frames(weight.shape[2], earlier, previous), dtype)
    conv_forward(x, weight, bias, earlier, previous, residual, Stride(stride_t, stride), out, version)
    return out


@torch.library.custom_op("osp_fast::causal_conv3d_into", mutates_args=("out",))
def _forward_into(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    earlier: Tensor | None,
    previous: Tensor | None,
    residual: Tensor | None,
    stride_t: int,
    stride: int,
    out: Tensor,
    version: str,
) -> None:
    conv_forward(x, weight, bias, earlier, previous, residual, Stride(stride_t, stride), out, version)


@_forward_into.register_fake
def _(x, weight, bias, earlier, previous, residual, stride_t, stride, out, version):
    return None


@_forward.register_fake
def _(x, weight, bias, earlier, previous, residual, stride_t, stride, dtype, version):
    past = past_frames(weight.shape[2], earlier, previous)
    return empty_output(x, weight, Stride(stride_t, stride), past, dtype)


def _save_for_backward(ctx, inputs, output) -> None:
    x, weight, bias, earlier, previous, residual, ctx.stride_t, ctx.stride, *_ = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.save_for_backward(x, weight, earlier, previous)


def _gradients(ctx, out_grad):
    """By PyTorch, on the frames laid one after the other."""
    x, weight, earlier, previous = ctx.saved_tensors
    _, kernel_t, kernel, _ = weight.shape[1:]
    cached = [y.unsqueeze(2) for y in (earlier, previous) if y is not None]
    repeated = [] if cached or kernel_t == 1 else [x[:, :, :1].expand(-1, -1, kernel_t - 1, -1, -1)]
    before = [*cached, *repeated]
    frames = torch.cat((*before, x), dim=2) if before else x
    padding = kernel // 2 if ctx.stride == 1 else 0
    padded = frames if ctx.stride == 1 else F.pad(frames, (0, 1, 0, 1))
    wants_x, wants_weight, wants_bias, wants_earlier, wants_previous, wants_residual, *_ = ctx.needs_input_grad
    wants_frames = wants_x or wants_earlier or wants_previous
    grad, weight_grad, bias_grad = torch.ops.aten.convolution_backward(
        out_grad.to(x.dtype), padded, weight, [weight.shape[0]], [ctx.stride_t, ctx.stride, ctx.stride],
        [0, padding, padding], [1, 1, 1], False, [0, 0, 0], 1, [wants_frames, wants_weight, wants_bias],
    )  # fmt: skip
    x_grad = earlier_grad = previous_grad = None
    if wants_frames:
        grad = grad[..., : x.shape[3], : x.shape[4]]
        past = frames.shape[2] - x.shape[2]
        x_grad = grad[:, :, past:]
        if repeated:
            x_grad = torch.cat((x_grad[:, :, :1] + grad[:, :, :past].sum(2, keepdim=True), x_grad[:, :, 1:]), dim=2)
        earlier_grad = grad[:, :, 0] if wants_earlier else None
        previous_grad = grad[:, :, past - 1] if wants_previous else None
    bias_grad = bias_grad.to(ctx.bias_dtype) if wants_bias else None
    residual_grad = out_grad.to(ctx.residual_dtype) if wants_residual else None
    grads = (x_grad if wants_x else None, weight_grad, bias_grad, earlier_grad, previous_grad, residual_grad)
    return (*grads, *(None,) * 4)


_forward.register_autograd(_gradients, setup_context=_save_for_backward)


def conv_flops(batch: int, frames: int, height: int, width: int, weight_shape: Sequence[int]) -> int:
    """A multiplication and an addition for each weight and position of the output, padding included."""
    products = 2 * batch * frames * height * width
    for size in weight_shape:
        products *= size
    return products


@register_flop_formula([torch.ops.osp_fast.causal_conv3d, torch.ops.osp_fast.causal_conv3d_into])
def _forward_flops(x_shape, weight_shape, bias, earlier, previous, residual, stride_t, stride, *args, **kwargs) -> int:
    past = past_frames(weight_shape[2], earlier, previous)
    size = output_size(x_shape[2:], weight_shape[2:], Stride(stride_t, stride), past)
    return conv_flops(x_shape[0], *size, weight_shape)
