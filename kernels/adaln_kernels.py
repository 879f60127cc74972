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


@triton.jit(do_not_specialize=["batch", "programs"])
def adaln_bwd_sums_kernel(
    partial, scale, scale_table, weight, bias, shift_grad, scale_grad, gate_grad, shift_table_grad, scale_table_grad,
    gate_table_grad, weight_grad, bias_grad, scale_batch, batch, programs,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr, GATED: tl.constexpr,
    GATE_TABLE: tl.constexpr, MODULATES: tl.constexpr, TABLE: tl.constexpr, WEIGHTED: tl.constexpr,
    BIASED: tl.constexpr,
):  # fmt: skip
    """The gradients of all vectors from `partial`: those of samples (B, d), those that samples share (d,).

    Grid: blocks of columns, SUMS: 0 shift, 1 scale, the last the gate. A program walks over the rows of all samples.
    """
    SUMS: tl.constexpr = (2 if MODULATES else 0) + (1 if GATED else 0)
    SHIFT: tl.constexpr = 0 if MODULATES else -1
    SCALE: tl.constexpr = 1 if MODULATES else -1
    GATE: tl.constexpr = SUMS - 1 if GATED else -1
    kind = tl.program_id(1)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < D
    chunks = tl.cdiv(programs, ROWS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    shift_total = tl.zeros([ROWS, COLUMNS], tl.float32)  # beside that of scale, which needs both with a bias
    over_samples = tl.zeros([COLUMNS], tl.float32)
    over_factors = tl.zeros([COLUMNS], tl.float32)  # of the norm's own weight and bias
    for step in tl.range(0, batch * chunks, num_stages=STAGES):
        sample = step // chunks
        rows = (step - sample * chunks) * ROWS + tl.arange(0, ROWS)
        wanted = (rows < programs)[:, None] & inside[None, :]
        where = partial + (sample * programs + rows)[:, None] * (SUMS * D) + columns[None, :]
        total += tl.load(where + kind * D, mask=wanted, other=0.0)
        if BIASED:
            shift_total += tl.load(where, mask=wanted & (kind == SCALE), other=0.0)
        if step % chunks == chunks - 1:  # the sample's last rows
            value = tl.sum(total, 0)
            written = sample * D + columns
            if MODULATES and kind <= SCALE:
                factor = 1.0 + _vector(scale, scale_table, sample, scale_batch, columns, inside, TABLE)
                over_factors += factor * value
            if kind == SHIFT:
                tl.store(shift_grad + written, value.to(shift_grad.dtype.element_ty), mask=inside)
            if kind == SCALE:
                if WEIGHTED:
                    value *= tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
                if BIASED:
                    of_shift = tl.sum(shift_total, 0)
                    value += of_shift * tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
                    shift_total = tl.zeros([ROWS, COLUMNS], tl.float32)
                tl.store(scale_grad + written, value.to(scale_grad.dtype.element_ty), mask=inside)
            if kind == GATE:
                tl.store(gate_grad + written, value.to(gate_grad.dtype.element_ty), mask=inside)
            over_samples += value
            total = tl.zeros([ROWS, COLUMNS], tl.float32)
    if kind == SHIFT:
        if TABLE:
            tl.store(shift_table_grad + columns, over_samples.to(shift_table_grad.dtype.element_ty), mask=inside)
        if BIASED:
            tl.store(bias_grad + columns, over_factors.to(bias_grad.dtype.element_ty), mask=inside)
    if kind == SCALE:
        if TABLE:
            tl.store(scale_table_grad + columns, over_samples.to(scale_table_grad.dtype.element_ty), mask=inside)
        if WEIGHTED:
            tl.store(weight_grad + columns, over_factors.to(weight_grad.dtype.element_ty), mask=inside)
    if GATE_TABLE and kind == GATE:
        tl.store(gate_table_grad + columns, over_samples.to(gate_table_grad.dtype.element_ty), mask=inside)
