"""Triton kernels between a rank's tokens with all heads, (B, n, H, D), and the pieces that it exchanges.

A piece holds n tokens of a rank's heads as (n, B, PARTS, heads, D), PARTS being q, k, v or one tensor; the pieces of
ranks 0 .. RANKS - 1 follow each other. With SETS > 1 a piece is (n / SETS, B, PARTS, units, D): see `as_units`. Tiles
are those of `rope3d_kernels`.
"""

import triton
import triton.language as tl
from osp_fast.kernels.rope3d_kernels import (
    clip_places,
    first_channels,
    load_pair,
    load_weights,
    norm_and_rotate,
    norm_backward,
    rope_angles,
    rotate_back,
    store_pair,
    store_weight_terms,
    strided,
    tile_rows,
)


@triton.jit
def as_units(token, head, H: tl.constexpr, SETS: tl.constexpr, RUN: tl.constexpr):
    """The place in its set and the unit, set * H + head, of each row; tokens are in SETS sets by runs of RUN."""
    if SETS > 1:
        head += token // RUN % SETS * H
        token = token // (RUN * SETS) * RUN + token % RUN
    return token, head


@triton.jit
def piece_rows(
    batch, token, head, batches, tokens,
    H: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr, RANKS: tl.constexpr, SETS: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Where each row of the first part starts in the buffer, and how far the next part is from it, (ROWS,) each.

    The first (SETS * H) mod RANKS ranks hold one unit more than the others. With one set a unit is a head.
    """
    token, head = as_units(token, head, H, SETS, RUN)
    fewer: tl.constexpr = SETS * H // RANKS
    ranks_with_more: tl.constexpr = SETS * H % RANKS
    heads_of_these: tl.constexpr = ranks_with_more * (fewer + 1)
    divisor: tl.constexpr = fewer if fewer > 0 else 1
    rank = tl.where(head < heads_of_these, head // (fewer + 1), ranks_with_more + (head - heads_of_these) // divisor)
    heads = tl.where(rank < ranks_with_more, fewer + 1, fewer)
    first = rank * fewer + tl.minimum(rank, ranks_with_more)
    line = token.to(tl.int64) * batches + batch
    before = first.to(tl.int64) * (tokens // SETS * batches * PARTS)  # rows of the pieces in front
    return (before + line * (PARTS * heads) + (head - first)) * D, heads * D


@triton.jit(do_not_specialize=["batches", "tokens", "start", "frames", "height", "width"])
def sequence_pack_kernel(
    q, k, v, buffer, axes, positions, q_weight, k_weight,
    q_stride_batch, q_stride_token, q_stride_head, k_stride_batch, k_stride_token, k_stride_head,
    v_stride_batch, v_stride_token, v_stride_head,
    batches, tokens, start, frames, height, width, eps,
    H: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr, RANKS: tl.constexpr,
    SETS: tl.constexpr, RUN: tl.constexpr, QK: tl.constexpr, ROPE: tl.constexpr, POSITIONS: tl.constexpr,
    NORM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """buffer = pieces of q, k, v, with norm and rotation of q and k; of v alone without QK. Grid: blocks, batch."""
    PARTS: tl.constexpr = 3 if QK else 1
    batch = tl.program_id(1)
    token, head, is_row = tile_rows(tl.program_id(0), tokens * H, H, ROWS)
    pair, channel = first_channels(HALF, PAIRS)
    is_pair = pair < D // 2
    inside = is_row[:, None] & is_pair[None, :]
    if QK:
        q_offsets = strided(batch, token, head, channel, q_stride_batch, q_stride_token, q_stride_head)
        k_offsets = strided(batch, token, head, channel, k_stride_batch, k_stride_token, k_stride_head)
        q_first, q_second = load_pair(q, q_offsets, inside, HALF)
        k_first, k_second = load_pair(k, k_offsets, inside, HALF)
    v_offsets = strided(batch, token, head, channel, v_stride_batch, v_stride_token, v_stride_head)
    v_first, v_second = load_pair(v, v_offsets, inside, HALF)
    row, part = piece_rows(batch, token, head, batches, tokens, H, D, PARTS, RANKS, SETS, RUN)
    place = row[:, None] + channel[None, :]
    if QK:
        if ROPE:
            in_clip = clip_places(positions, start, token, is_row, POSITIONS)
            cos, sin = rope_angles(axes, in_clip, pair, inside, frames, height, width, HALF)
        else:
            cos, sin = 1.0, 0.0
        if NORM:
            q_weights = load_weights(q_weight, channel, is_pair, HALF)
            k_weights = load_weights(k_weight, channel, is_pair, HALF)
        else:
            q_weights = (1.0, 1.0)
            k_weights = (1.0, 1.0)
        if ROPE or NORM:
            q_first, q_second = norm_and_rotate(
                q_first, q_second, cos, sin, q_weights[0], q_weights[1], eps, D, NORM, ROPE
            )
            k_first, k_second = norm_and_rotate(
                k_first, k_second, cos, sin, k_weights[0], k_weights[1], eps, D, NORM, ROPE
            )
        store_pair(buffer, place, inside, q_first, q_second, HALF)
        store_pair(buffer, place + part[:, None], inside, k_first, k_second, HALF)
        store_pair(buffer, place + 2 * part[:, None], inside, v_first, v_second, HALF)
    else:
        store_pair(buffer, place, inside, v_first, v_second, HALF)


@triton.jit(do_not_specialize=["batches", "tokens", "start", "frames", "height", "width", "blocks"])
def sequence_unpack_kernel(
    buffer, q_out, k_out, v_out, axes, positions, q, k, q_weight, k_weight, weight_sums,
    out_stride_batch, out_stride_token, out_stride_head,
    q_stride_batch, q_stride_token, q_stride_head, k_stride_batch, k_stride_token, k_stride_head,
    batches, tokens, start, frames, height, width, blocks, eps,
    H: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr, RANKS: tl.constexpr,
    SETS: tl.constexpr, RUN: tl.constexpr, QK: tl.constexpr, ROPE: tl.constexpr, POSITIONS: tl.constexpr,
    NORM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """From pieces back: v_out, and with QK the gradients q_out, k_out before rotation and norm. Grid: programs, batch.

    With norm programs walk over blocks and keep the sums for the weights, weight_sums (B * programs, 2, D), in
    registers; without it there is a program for each block of rows.
    """
    PARTS: tl.constexpr = 3 if QK else 1
    batch = tl.program_id(1)
    pair, channel = first_channels(HALF, PAIRS)
    is_pair = pair < D // 2
    if NORM:
        q_weights = load_weights(q_weight, channel, is_pair, HALF)
        k_weights = load_weights(k_weight, channel, is_pair, HALF)
        q_first_sum = tl.zeros((ROWS, PAIRS), tl.float32)
        q_second_sum = tl.zeros((ROWS, PAIRS), tl.float32)
        k_first_sum = tl.zeros((ROWS, PAIRS), tl.float32)
        k_second_sum = tl.zeros((ROWS, PAIRS), tl.float32)
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        token, head, is_row = tile_rows(block, tokens * H, H, ROWS)
        inside = is_row[:, None] & is_pair[None, :]
        row, part = piece_rows(batch, token, head, batches, tokens, H, D, PARTS, RANKS, SETS, RUN)
        place = row[:, None] + channel[None, :]
        out = strided(batch, token, head, channel, out_stride_batch, out_stride_token, out_stride_head)
        if QK:
            q_first, q_second = load_pair(buffer, place, inside, HALF)
            k_first, k_second = load_pair(buffer, place + part[:, None], inside, HALF)
            v_first, v_second = load_pair(buffer, place + 2 * part[:, None], inside, HALF)
            if NORM:
                q_offsets = strided(batch, token, head, channel, q_stride_batch, q_stride_token, q_stride_head)
                k_offsets = strided(batch, token, head, channel, k_stride_batch, k_stride_token, k_stride_head)
                q_x_first, q_x_second = load_pair(q, q_offsets, inside, HALF)
                k_x_first, k_x_second = load_pair(k, k_offsets, inside, HALF)
            if ROPE:
                in_clip = clip_places(positions, start, token, is_row, POSITIONS)
                cos, sin = rope_angles(axes, in_clip, pair, inside, frames, height, width, HALF)
            else:
                cos, sin = 1.0, 0.0
            if ROPE or NORM:
                q_first, q_second = rotate_back(q_first, q_second, cos, sin, ROPE)
                k_first, k_second = rotate_back(k_first, k_second, cos, sin, ROPE)
            if NORM:
                q_first, q_second, first_term, second_term = norm_backward(
                    q_first, q_second, q_x_first, q_x_second, q_weights[0], q_weights[1], eps, D
                )
                q_first_sum += first_term
                q_second_sum += second_term
                k_first, k_second, first_term, second_term = norm_backward(
                    k_first, k_second, k_x_first, k_x_second, k_weights[0], k_weights[1], eps, D
                )
                k_first_sum += first_term
                k_second_sum += second_term
            store_pair(q_out, out, inside, q_first, q_second, HALF)
            store_pair(k_out, out, inside, k_first, k_second, HALF)
        else:
            v_first, v_second = load_pair(buffer, place, inside, HALF)
        store_pair(v_out, out, inside, v_first, v_second, HALF)
    if NORM:
        program = batch * tl.num_programs(0) + tl.program_id(0)
        store_weight_terms(weight_sums, program, 0, q_first_sum, q_second_sum, channel, is_pair, D, HALF)
        store_weight_terms(weight_sums, program, 1, k_first_sum, k_second_sum, channel, is_pair, D, HALF)
