"""Triton kernels of `adaln.py`: one pass forward, one pass and a small sum backward.

Programs walk over the rows of one sample with the sample's vectors in registers, so that a vector is read once per
program and not once per row. Loads of later rows are under way while a row is reduced (STAGES). Sums over rows are kept
in float32 registers and written once per program; the small sum adds them up in a fixed order.

A row is one block, padded to a power of two (4096 for 2304): the padding moves no bytes. Two blocks of 2048 and 256
would save half of the arithmetic but read the second one in pieces of 4 bytes, and each sum over a row would change
layout: with 4 warps 304 instructions a row instead of 326, too few to pay for it.
"""

import triton
import triton.language as tl


@triton.jit
def _vector(vector, table, sample, stride, channels, inside, HAS_TABLE: tl.constexpr):
    """One sample's row of a (B, d) tensor, plus the table's row: float32."""
    value = tl.load(vector + sample * stride + channels, mask=inside, other=0.0).to(tl.float32)
    if HAS_TABLE:
        value += tl.load(table + channels, mask=inside, other=0.0).to(tl.float32)
    return value


@triton.jit
def _load_rows(base, places, stride, channels, wanted):
    return tl.load(base + places * stride + channels[None, :], mask=wanted, other=0.0).to(tl.float32)


@triton.jit
def _store_rows(base, places, channels, wanted, value, D: tl.constexpr):
    tl.store(base + places * D + channels[None, :], value.to(base.dtype.element_ty), mask=wanted)


@triton.jit(do_not_specialize=["tokens"])
def adaln_fwd_kernel(
    x, y, gate, gate_table, shift, scale, shift_table, scale_table, weight, bias, residual, modulated, means, inverses,
    x_batch, x_token, y_batch, y_token, gate_batch, shift_batch, scale_batch, tokens, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
    ADDS: tl.constexpr, GATED: tl.constexpr, GATE_TABLE: tl.constexpr, MODULATES: tl.constexpr, TABLE: tl.constexpr,
    WEIGHTED: tl.constexpr, BIASED: tl.constexpr, RMS: tl.constexpr,
):  # fmt: skip
    """residual, modulated (B, N, d), contiguous; means and inverse deviations of rows (B, N) float32."""
    sample = tl.program_id(1).to(tl.int64)
    first = sample * tokens
    channels = tl.arange(0, BLOCK)
    inside = channels < D
    if GATED:
        gate_row = _vector(gate, gate_table, sample, gate_batch, channels, inside, GATE_TABLE)
    if MODULATES:  # (normed * weight + bias) * (1 + scale) + shift = normed * factor + offset
        factor = 1.0 + _vector(scale, scale_table, sample, scale_batch, channels, inside, TABLE)
        offset = _vector(shift, shift_table, sample, shift_batch, channels, inside, TABLE)
        if BIASED:
            offset += factor * tl.load(bias + channels, mask=inside, other=0.0).to(tl.float32)
        if WEIGHTED:
            factor *= tl.load(weight + channels, mask=inside, other=0.0).to(tl.float32)
    for block in tl.range(tl.program_id(0), tl.cdiv(tokens, ROWS), tl.num_programs(0), num_stages=STAGES):
        rows = block * ROWS + tl.arange(0, ROWS)
        present = rows < tokens
        wanted = present[:, None] & inside[None, :]
        places = rows.to(tl.int64)[:, None]
        value = _load_rows(x + sample * x_batch, places, x_token, channels, wanted)
        if ADDS:
            added = _load_rows(y + sample * y_batch, places, y_token, channels, wanted)
            if GATED:
                added *= gate_row[None, :]
            value += added
            _store_rows(residual + first * D, places, channels, wanted, value, D)
            # What is normalised is what is kept: the residual stream as rounded to its type.
            value = value.to(residual.dtype.element_ty).to(tl.float32)
        if MODULATES:
            if not RMS:
                mean = tl.sum(value, 1) / D
                value = tl.where(inside[None, :], value - mean[:, None], 0.0)
                tl.store(means + first + rows, mean, mask=present)
            inverse = tl.rsqrt(tl.sum(value * value, 1) / D + eps)
            tl.store(inverses + first + rows, inverse, mask=present)
            out = value * inverse[:, None] * factor[None, :] + offset[None, :]
            _store_rows(modulated + first * D, places, channels, wanted, out, D)


@triton.jit(do_not_specialize=["tokens"])
def adaln_bwd_kernel(
    residual_grad, modulated_grad, x, y, gate, gate_table, scale, scale_table, weight, means, inverses,
    x_grad, y_grad, partial,
    residual_grad_batch, residual_grad_token, modulated_grad_batch, modulated_grad_token,
    x_batch, x_token, y_batch, y_token, gate_batch, scale_batch, tokens,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
    FROM_RESIDUAL: tl.constexpr, GATED: tl.constexpr, GATE_TABLE: tl.constexpr, MODULATES: tl.constexpr,
    TABLE: tl.constexpr, WEIGHTED: tl.constexpr, RMS: tl.constexpr,
):  # fmt: skip
    """x is what was normalised; x_grad and y_grad are (B, N, d), contiguous; partial (B, programs, SUMS, d) float32.

    SUMS: of modulated_grad and of modulated_grad * normalised x if it modulates, then of x_grad * y if it is gated.
    """
    sample = tl.program_id(1).to(tl.int64)
    first = sample * tokens
    channels = tl.arange(0, BLOCK)
    inside = channels < D
    # Sums over rows stay blocks; their rows are added up once, at the end.
    if GATED:
        gate_row = _vector(gate, gate_table, sample, gate_batch, channels, inside, GATE_TABLE)
        gate_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    if MODULATES:
        factor = 1.0 + _vector(scale, scale_table, sample, scale_batch, channels, inside, TABLE)
        if WEIGHTED:
            factor *= tl.load(weight + channels, mask=inside, other=0.0).to(tl.float32)
        shift_sum = tl.zeros([ROWS, BLOCK], tl.float32)
        scale_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    for block in tl.range(tl.program_id(0), tl.cdiv(tokens, ROWS), tl.num_programs(0), num_stages=STAGES):
        rows = block * ROWS + tl.arange(0, ROWS)
        present = rows < tokens
        wanted = present[:, None] & inside[None, :]
        places = rows.to(tl.int64)[:, None]
        if MODULATES:
            where = modulated_grad + sample * modulated_grad_batch
            out_grad = _load_rows(where, places, modulated_grad_token, channels, wanted)
            normed = _load_rows(x + sample * x_batch, places, x_token, channels, wanted)
            inverse = tl.load(inverses + first + rows, mask=present, other=0.0)[:, None]
            if not RMS:
                normed -= tl.load(means + first + rows, mask=present, other=0.0)[:, None]
            normed *= inverse  # not zero in the padding, but every use of it is multiplied by out_grad, which is
            shift_sum += out_grad
            scale_sum += out_grad * normed
            out_grad *= factor[None, :]
            grad = out_grad - normed * (tl.sum(out_grad * normed, 1) / D)[:, None]
            if not RMS:
                grad -= (tl.sum(out_grad, 1) / D)[:, None]
            grad *= inverse
        else:
            grad = tl.zeros([ROWS, BLOCK], tl.float32)
        if FROM_RESIDUAL:
            where = residual_grad + sample * residual_grad_batch
            grad += _load_rows(where, places, residual_grad_token, channels, wanted)
        if MODULATES:
            _store_rows(x_grad + first * D, places, channels, wanted, grad, D)
        if GATED:
            gate_sum += grad * _load_rows(y + sample * y_batch, places, y_token, channels, wanted)
            _store_rows(y_grad + first * D, places, channels, wanted, grad * gate_row[None, :], D)
    SUMS: tl.constexpr = (2 if MODULATES else 0) + (1 if GATED else 0)
    sums = partial + (sample * tl.num_programs(0) + tl.program_id(0)) * (SUMS * D) + channels
    if MODULATES:
        tl.store(sums, tl.sum(shift_sum, 0), mask=inside)
        tl.store(sums + D, tl.sum(scale_sum, 0), mask=inside)
    if GATED:
        tl.store(sums + (SUMS - 1) * D, tl.sum(gate_sum, 0), mask=inside)


@triton.jit
def _sum_programs(partial, programs, columns, inside, WHICH: tl.constexpr, SUMS: tl.constexpr, D: tl.constexpr,
                  ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """One of the sums over the programs of a sample, (COLUMNS,)."""
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, programs, ROWS):
        rows = start + tl.arange(0, ROWS)
        where = partial + (rows[:, None] * SUMS + WHICH) * D + columns[None, :]
        total += tl.load(where, mask=(rows < programs)[:, None] & inside[None, :], other=0.0)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["batch", "programs"])
def adaln_bwd_sums_kernel(
    partial, scale, scale_table, weight, bias, shift_grad, scale_grad, gate_grad, shift_table_grad, scale_table_grad,
    gate_table_grad, weight_grad, bias_grad, scale_batch, batch, programs,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GATED: tl.constexpr, GATE_TABLE: tl.constexpr,
    MODULATES: tl.constexpr, TABLE: tl.constexpr, WEIGHTED: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """The gradients of all vectors from `partial`: those of samples (B, d), those that samples share (d,)."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < D
    SUMS: tl.constexpr = (2 if MODULATES else 0) + (1 if GATED else 0)
    shift_total = tl.zeros([COLUMNS], tl.float32)
    scale_total = tl.zeros([COLUMNS], tl.float32)
    gate_total = tl.zeros([COLUMNS], tl.float32)
    weight_total = tl.zeros([COLUMNS], tl.float32)
    bias_total = tl.zeros([COLUMNS], tl.float32)
    for sample in range(0, batch):
        written = sample * D + columns
        if MODULATES:
            shift_sum = _sum_programs(partial, programs, columns, inside, 0, SUMS, D, ROWS, COLUMNS)
            scale_sum = _sum_programs(partial, programs, columns, inside, 1, SUMS, D, ROWS, COLUMNS)
            factor = 1.0 + _vector(scale, scale_table, sample, scale_batch, columns, inside, TABLE)
            weight_total += factor * scale_sum
            bias_total += factor * shift_sum
            if WEIGHTED:
                scale_sum *= tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
            if BIASED:
                scale_sum += shift_sum * tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
            tl.store(shift_grad + written, shift_sum.to(shift_grad.dtype.element_ty), mask=inside)
            tl.store(scale_grad + written, scale_sum.to(scale_grad.dtype.element_ty), mask=inside)
            shift_total += shift_sum
            scale_total += scale_sum
        if GATED:
            gate_sum = _sum_programs(partial, programs, columns, inside, SUMS - 1, SUMS, D, ROWS, COLUMNS)
            tl.store(gate_grad + written, gate_sum.to(gate_grad.dtype.element_ty), mask=inside)
            gate_total += gate_sum
        partial += programs * (SUMS * D)
    if TABLE:
        tl.store(shift_table_grad + columns, shift_total.to(shift_table_grad.dtype.element_ty), mask=inside)
        tl.store(scale_table_grad + columns, scale_total.to(scale_table_grad.dtype.element_ty), mask=inside)
    if GATE_TABLE:
        tl.store(gate_table_grad + columns, gate_total.to(gate_table_grad.dtype.element_ty), mask=inside)
    if WEIGHTED:
        tl.store(weight_grad + columns, weight_total.to(weight_grad.dtype.element_ty), mask=inside)
    if BIASED:
        tl.store(bias_grad + columns, bias_total.to(bias_grad.dtype.element_ty), mask=inside)
