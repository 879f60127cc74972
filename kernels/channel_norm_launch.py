"""Launches the kernels of `channel_norm.py`: layouts, configurations, grids and buffers."""

import torch
import triton
from osp_fast.kernels import tuning
from osp_fast.kernels.channel_norm_kernels import (
    channel_norm_bwd_kernel,
    channel_norm_bwd_sums_kernel,
    channel_norm_fwd_kernel,
)
from osp_fast.kernels.launch import architecture, resident_programs
from osp_fast.kernels.tuning import RowConfig
from torch import Tensor

SUM_ROWS, SUM_COLUMNS, SUM_WARPS = 64, 16, 4  # of a block of the small sum
WARP_BYTES = 512  # what one access of a warp moves at best: 16 bytes by 32 threads
MOST_PIXELS = 1 << 30  # of a sample: places of pixels are int32


def candidates(kernel: str, arch: int, channels: int, element: int) -> list[RowConfig]:
    """The configurations worth timing of "channel_norm forward" or "channel_norm backward", the chosen one first.

    element: bytes of an activation. A pixel that a warp can hold in one access is shared by no two warps, so that means
    need no barrier: wider ones go to programs of a single warp. `programs` is what a multiprocessor's registers hold.
    """
    if arch == 0:  # blocks cost time there; the tests force smaller ones too
        return [RowConfig(32, 4, 2, 1)]
    forward = kernel == "channel_norm forward"
    pixel = triton.next_power_of_2(channels) * element

    def config(warps: int, accesses: int, stages: int, programs: int) -> RowConfig:
        rows = max(1, accesses * warps * WARP_BYTES // pixel)
        return RowConfig(rows, warps, stages, programs)

    if pixel <= WARP_BYTES:
        if forward:
            return [config(4, 4, 3, 6), config(4, 8, 3, 4), config(4, 4, 4, 6), config(8, 4, 3, 3)]
        return [config(4, 2, 3, 4), config(4, 4, 3, 2), config(4, 2, 4, 4), config(8, 2, 3, 2)]
    programs = (16 if forward else 12) if pixel > 2 * WARP_BYTES else (24 if forward else 16)
    if forward:
        return [config(1, 4, 3, programs), config(1, 8, 3, programs // 2), config(4, 4, 3, 6)]
    return [config(1, 2, 3, programs), config(1, 2, 3, programs // 2), config(1, 4, 3, 8), config(4, 2, 3, 4)]


def channels_last_empty(x: Tensor) -> Tensor:
    """A dense tensor of x's shape and type, in channels-last memory."""
    return x.new_empty((x.shape[0], *x.shape[2:], x.shape[1])).movedim(-1, 1)


def pixel_rows(x: Tensor) -> Tensor:
    """x (B, C, ...) as (B, pixels, C) with contiguous channels: a view where pixels are evenly spaced, else a copy."""
    x = x.movedim(1, -1)
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        x = x.contiguous()
    return x.flatten(1, -2)


def channel_norm_forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float, silu: bool) -> Tensor:
    """The result, of x's shape and type in channels-last memory."""
    out = channels_last_empty(x)
    if x.numel() == 0:
        return out
    rows = pixel_rows(x)
    batch, pixels, channels = rows.shape
    config = _config("channel_norm forward", x)
    ((x_batch, x_pixel),), batch, pixels = _strides(batch, pixels, rows)
    channel_norm_fwd_kernel[_grid(x, config, batch, pixels)](
        rows, weight.contiguous(), bias.contiguous(), out, x_batch, pixels, eps,
        C=channels, PIXEL=x_pixel, **_blocks(config, channels, silu),
    )  # fmt: skip
    return out


def channel_norm_backward(
    out_grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, in channels-last memory, of weight and of bias, in their types."""
    x_grad = channels_last_empty(x)
    weight_grad, bias_grad = (
        torch.empty_like(vector, memory_format=torch.contiguous_format) for vector in (weight, bias)
    )
    if x.numel() == 0:
        return x_grad, weight_grad.zero_(), bias_grad.zero_()
    grad_rows, rows = pixel_rows(out_grad), pixel_rows(x)
    batch, pixels, channels = rows.shape
    config = _config("channel_norm backward", x)
    ((grad_batch, grad_pixel), (x_batch, x_pixel)), batch, pixels = _strides(batch, pixels, grad_rows, rows)
    grid = _grid(x, config, batch, pixels)
    programs = grid[0] * grid[1]
    partial = torch.empty((programs, 2, channels), dtype=torch.float32, device=x.device)
    channel_norm_bwd_kernel[grid](
        grad_rows, rows, weight.contiguous(), bias.contiguous(), x_grad, partial, grad_batch, x_batch, pixels, eps,
        C=channels, GRAD_PIXEL=grad_pixel, PIXEL=x_pixel, **_blocks(config, channels, silu),
    )  # fmt: skip
    channel_norm_bwd_sums_kernel[(triton.cdiv(channels, SUM_COLUMNS), 2)](
        partial, weight_grad, bias_grad, programs, C=channels, ROWS=SUM_ROWS, COLUMNS=SUM_COLUMNS, num_warps=SUM_WARPS
    )
    return x_grad, weight_grad, bias_grad


def _config(kernel: str, x: Tensor) -> RowConfig:
    return tuning.pick(kernel, candidates(kernel, architecture(x.device), x.shape[1], x.element_size()))


def _strides(batch: int, pixels: int, *tensors: Tensor) -> tuple[list[tuple[int, int]], int, int]:
    """(batch stride, pixel stride) of each, batch, pixels: one sample of all pixels where all are evenly spaced."""
    strides = [(x.stride(0), x.stride(1) if pixels > 1 else x.shape[2]) for x in tensors]
    even = all(batch_stride == pixels * pixel for batch_stride, pixel in strides)
    if batch == 1 or (even and batch * pixels <= MOST_PIXELS):
        return [(0, pixel) for _, pixel in strides], 1, batch * pixels
    return strides, batch, pixels


def _grid(x: Tensor, config: RowConfig, batch: int, pixels: int) -> tuple[int, int]:
    """Programs that share the pixels of a sample, samples: together they fill the GPU once."""
    return resident_programs(x.device, config.programs, batch, triton.cdiv(pixels, config.rows)), batch


def _blocks(config: RowConfig, channels: int, silu: bool) -> dict[str, int | bool]:
    return dict(
        BLOCK=triton.next_power_of_2(channels),
        ROWS=config.rows,
        STAGES=config.num_stages,
        SILU=silu,
        num_warps=config.num_warps,
    )
