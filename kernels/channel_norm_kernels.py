"""Triton kernels of `channel_norm.py`: one pass forward, one pass and a small sum backward.

A block is ROWS pixels by all C channels, padded to a power of two: the padding moves no bytes. Programs walk over the
pixels of one sample with weight and bias in registers, and loads of later blocks are under way while one is computed
(STAGES). Places inside a block are constants; only where it begins is computed, in int64. The backward pass computes
mean and deviation again from x, which it reads anyway, and keeps the sums over pixels in float32 registers.
"""

import triton
import triton.language as tl


@triton.jit
def _vector(vector, channels, inside):
    return tl.load(vector + channels, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _places(rows, channels, PIXEL: tl.constexpr, ROWS: tl.constexpr):
    """Where the values of a block lie behind its first; int64 only for pixels so far apart that it takes that."""
    if ROWS * PIXEL > 2**31 - 1:
        rows = rows.to(tl.int64)
    return rows[:, None] * PIXEL + channels[None, :]


@triton.jit
def _load_block(base, first, places, wanted, PIXEL: tl.constexpr):
    return tl.load(base + first * PIXEL + places, mask=wanted, other=0.0).to(tl.float32)


@triton.jit
def _store_block(base, first, places, wanted, value, C: tl.constexpr):
    tl.store(base + first * C + places, value.to(base.dtype.element_ty), mask=wanted)


@triton.jit
def _normalise(value, inside, eps, C: tl.constexpr, BLOCK: tl.constexpr):
    """(value - mean) / deviation, zero in the padding, and 1 / deviation (ROWS, 1)."""
    value -= (tl.sum(value, 1) * (1.0 / C))[:, None]
    if C < BLOCK:
        value = tl.where(inside[None, :], value, 0.0)
    inverse = tl.rsqrt(tl.sum(value * value, 1) * (1.0 / C) + eps)[:, None]
    return value * inverse, inverse


@triton.jit
def _sigmoid(value):
    """1 / (1 + exp(-value)); a square of a root takes fewer instructions than Triton's division."""
    root = tl.rsqrt(1.0 + tl.exp2(value * -1.4426950408889634))
    return root * root


@triton.jit(do_not_specialize=["pixels"])
def channel_norm_fwd_kernel(
    x, weight, bias, out, x_batch, pixels, eps,
    C: tl.constexpr, PIXEL: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
    SILU: tl.constexpr,
):  # fmt: skip
    """x has strides (x_batch, PIXEL, 1), out (B, pixels, C) is contiguous."""
    sample = tl.program_id(1).to(tl.int64)
    x += sample * x_batch
    out += sample * pixels * C
    rows, channels = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    inside = channels < C
    weight_row, bias_row = _vector(weight, channels, inside), _vector(bias, channels, inside)
    x_places = _places(rows, channels, PIXEL, ROWS)
    places = _places(rows, channels, C, ROWS)
    step = tl.full([], ROWS, tl.int64)
    for block in tl.range(tl.program_id(0), tl.cdiv(pixels, ROWS), tl.num_programs(0), num_stages=STAGES):
        first = block * step
        wanted = (block * ROWS + rows < pixels)[:, None] & inside[None, :]
        value = _load_block(x, first, x_places, wanted, PIXEL)
        normed, _ = _normalise(value, inside, eps, C, BLOCK)
        result = normed * weight_row[None, :] + bias_row[None, :]
        if SILU:
            result *= _sigmoid(result)
        _store_block(out, first, places, wanted, result, C)


@triton.jit(do_not_specialize=["pixels"])
def channel_norm_bwd_kernel(
    out_grad, x, weight, bias, x_grad, partial, out_grad_batch, x_batch, pixels, eps,
    C: tl.constexpr, GRAD_PIXEL: tl.constexpr, PIXEL: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    STAGES: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """x_grad (B, pixels, C) contiguous; partial (B, programs, 2, C): this program's sums for weight and for bias.

    With n = normalised x, g = the gradient of n * weight + bias, h = g * weight and means over channels:
    x_grad = (h - mean(h) - n mean(h n)) / deviation; weight: sum of g n over pixels; bias: sum of g.
    """
    sample = tl.program_id(1).to(tl.int64)
    out_grad += sample * out_grad_batch
    x += sample * x_batch
    x_grad += sample * pixels * C
    rows, channels = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    inside = channels < C
    weight_row, bias_row = _vector(weight, channels, inside), _vector(bias, channels, inside)
    grad_places = _places(rows, channels, GRAD_PIXEL, ROWS)
    x_places = _places(rows, channels, PIXEL, ROWS)
    places = _places(rows, channels, C, ROWS)
    # Sums over pixels stay blocks; their rows are added up once, at the end.
    weight_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    bias_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    step = tl.full([], ROWS, tl.int64)
    for block in tl.range(tl.program_id(0), tl.cdiv(pixels, ROWS), tl.num_programs(0), num_stages=STAGES):
        first = block * step
        wanted = (block * ROWS + rows < pixels)[:, None] & inside[None, :]
        grad = _load_block(out_grad, first, grad_places, wanted, GRAD_PIXEL)
        value = _load_block(x, first, x_places, wanted, PIXEL)
        normed, inverse = _normalise(value, inside, eps, C, BLOCK)
        if SILU:
            result = normed * weight_row[None, :] + bias_row[None, :]
            sigmoid = _sigmoid(result)
            grad *= sigmoid * (1.0 + result * (1.0 - sigmoid))
        weight_sum += grad * normed
        bias_sum += grad
        grad *= weight_row[None, :]
        aligned = (tl.sum(grad * normed, 1) * (1.0 / C))[:, None]
        grad -= (tl.sum(grad, 1) * (1.0 / C))[:, None] + normed * aligned
        _store_block(x_grad, first, places, wanted, grad * inverse, C)
    sums = partial + (sample * tl.num_programs(0) + tl.program_id(0)) * (2 * C) + channels
    tl.store(sums, tl.sum(weight_sum, 0), mask=inside)
    tl.store(sums + C, tl.sum(bias_sum, 0), mask=inside)


@triton.jit(do_not_specialize=["programs"])
def channel_norm_bwd_sums_kernel(
    partial, weight_grad, bias_grad, programs, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """weight_grad and bias_grad (C,) from partial (programs, 2, C), added in the same order every time."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < C
    which = tl.program_id(1)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in tl.range(0, programs, ROWS, num_stages=3):
        rows = start + tl.arange(0, ROWS)
        wanted = (rows < programs)[:, None] & inside[None, :]
        total += tl.load(partial + which * C + rows[:, None] * (2 * C) + columns[None, :], mask=wanted, other=0.0)
    column_sums = tl.sum(total, 0)
    if which == 0:
        tl.store(weight_grad + columns, column_sums.to(weight_grad.dtype.element_ty), mask=inside)
    else:
        tl.store(bias_grad + columns, column_sums.to(bias_grad.dtype.element_ty), mask=inside)
