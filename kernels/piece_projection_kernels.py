"""The output projection of attention from the pieces that ranks have sent, as one matrix product in Triton.

The pieces of one rank after the other are what is summed over, one head in a step: its D channels lie side by side in a
piece and in the weight, where they are columns head * D on, whichever rank they came from. So a step has two parts of
LOW + HIGH channels, 64 + 32 for 96, and no product is wasted at the end of a piece. Pieces have at most two widths, as
the first H mod RANKS ranks have one head more: what is loaded is chosen by a select, from descriptors or pointers.
"""

import triton
import triton.language as tl


@triton.jit
def _load_channels(base, row_stride, row, is_row, START: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """Channels START .. START + WIDTH of a head that begins at `base` in the first of rows `row_stride` apart."""
    channel = START + tl.arange(0, WIDTH)
    mask = is_row[:, None]
    if START + WIDTH > D:
        mask = mask & (channel < D)[None, :]
    return tl.load(base + row.to(tl.int64)[:, None] * row_stride + channel[None, :], mask=mask, other=0.0)


@triton.jit(do_not_specialize=["batch", "tokens"])
def piece_projection_fwd_kernel(
    buffer, weight, bias, add, out,
    more_low_view, more_high_view, low_view, high_view, weight_low_view, weight_high_view,
    weight_stride_row, add_stride_batch, add_stride_token, batch, tokens,
    H: tl.constexpr, D: tl.constexpr, RANKS: tl.constexpr, OUT: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ADD: tl.constexpr,
    DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out (B, n, OUT) contiguous = bias + add + pieces times weight, (OUT, H * D) with rows weight_stride_row apart.

    more views: of the pieces with one head more, as (ranks * n * B, width); the others' views without `more`. Programs
    walk over tiles, first in output channels, so that those that run together share pieces in L2.
    """
    FEWER: tl.constexpr = H // RANKS
    OF_MORE: tl.constexpr = H % RANKS * (FEWER + 1)  # heads of the ranks with one more
    BLOCKS_N: tl.constexpr = (OUT + BLOCK_N - 1) // BLOCK_N
    rows = batch * tokens
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, BLOCK_M) * BLOCKS_N, tl.num_programs(0)):
        first_row = tile // BLOCKS_N * BLOCK_M
        first_out = tile % BLOCKS_N * BLOCK_N
        row = first_row + tl.arange(0, BLOCK_M)
        out_channel = first_out + tl.arange(0, BLOCK_N)
        is_row = row < rows
        is_out = out_channel < OUT
        inside = is_row[:, None]
        if OUT % BLOCK_N:
            inside = inside & is_out[None, :]
        # What is added is where the sums begin: at their end it would want registers that they hold.
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if HAS_ADD:
            line = (row % batch).to(tl.int64) * add_stride_batch + (row // batch).to(tl.int64) * add_stride_token
            sums += tl.load(add + line[:, None] + out_channel[None, :], mask=inside, other=0.0).to(tl.float32)
        for head in tl.range(0, H):
            heads = FEWER
            place = head - OF_MORE
            low, high = low_view, high_view
            begin = OF_MORE
            if OF_MORE == H:
                heads = FEWER + 1
                place = head
                low, high = more_low_view, more_high_view
                begin = 0
            elif OF_MORE > 0:  # noqa: SIM102  known when it is compiled, unlike the next
                if head < OF_MORE:
                    heads = FEWER + 1
                    place = head
                    low, high = more_low_view, more_high_view
                    begin = 0
            rank = place // heads  # among those with as many heads
            column = (place - rank * heads) * D
            if DESCRIPTORS:
                in_view = rank * rows + first_row
                x_low = low.load([in_view, column])
                weight_low = weight_low_view.load([first_out, head * D])
                if HIGH:
                    x_high = high.load([in_view, column + LOW])
                    weight_high = weight_high_view.load([first_out, head * D + LOW])
            else:
                width = heads * D
                base = buffer + (begin + rank * heads).to(tl.int64) * D * rows + column
                x_low = _load_channels(base, width, row, is_row, 0, LOW, D)
                weight_low = _load_channels(weight + head * D, weight_stride_row, out_channel, is_out, 0, LOW, D)
                if HIGH:
                    x_high = _load_channels(base, width, row, is_row, LOW, HIGH, D)
                    weight_high = _load_channels(
                        weight + head * D, weight_stride_row, out_channel, is_out, LOW, HIGH, D
                    )
            # The shorter product first: the compiler awaits it, and loads what comes next under the longer one.
            if HIGH:
                sums = tl.dot(x_high, tl.trans(weight_high), sums, input_precision=PRECISION)
            sums = tl.dot(x_low, tl.trans(weight_low), sums, input_precision=PRECISION)
        if HAS_BIAS:
            sums += tl.load(bias + out_channel, mask=is_out, other=0.0).to(tl.float32)[None, :]
        out_line = ((row % batch).to(tl.int64) * tokens + row // batch) * OUT
        tl.store(out + out_line[:, None] + out_channel[None, :], sums.to(out.dtype.element_ty), mask=inside)
