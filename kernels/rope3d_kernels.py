"""Triton kernels of 3D RoPE, and the tile that they share with the packing of q, k and v.

A tile is rows x pairs. A row is one head of one token, the heads of a token in turn; a pair is the two channels that
are rotated together. Pair c is channels c // HALF * 2 HALF + c % HALF and HALF further on, where HALF is D / 6 (three
axes with two halves each), or D / 2 where nothing is rotated. A thread holds both channels of its pairs: 16 bytes of
first halves, 16 of second ones, one cosine and one sine for both, and it may write where it has read. Pairs are padded
to a power of two (48 -> 64); the padding costs lanes, no bytes.
"""

import triton
import triton.language as tl


@triton.jit
def tile_rows(block, batch_rows, H: tl.constexpr, ROWS: tl.constexpr):
    """Token and head (ROWS,) of a block of rows, and which rows there are."""
    row = block * ROWS + tl.arange(0, ROWS)
    return row // H, row % H, row < batch_rows


@triton.jit
def first_channels(HALF: tl.constexpr, PAIRS: tl.constexpr):
    """Pair numbers and the channel of each pair's first partner, (PAIRS,)."""
    pair = tl.arange(0, PAIRS)
    return pair, pair // HALF * (2 * HALF) + pair % HALF


@triton.jit
def strided(batch, token, head, channel, batch_stride, token_stride, head_stride):
    """Offsets (ROWS, PAIRS) in a tensor (B, N, H, D) with contiguous channels."""
    row = batch.to(tl.int64) * batch_stride + token.to(tl.int64) * token_stride + head.to(tl.int64) * head_stride
    return row[:, None] + channel[None, :]


@triton.jit
def load_pair(x, offsets, inside, HALF: tl.constexpr):
    """Both partners of each pair, in x's type."""
    first = tl.load(x + offsets, mask=inside, other=0.0)
    second = tl.load(x + offsets + HALF, mask=inside, other=0.0)
    return first, second


@triton.jit
def store_pair(x, offsets, inside, first, second, HALF: tl.constexpr):
    """The inverse of `load_pair`, in x's type."""
    tl.store(x + offsets, first.to(x.dtype.element_ty), mask=inside)
    tl.store(x + offsets + HALF, second.to(x.dtype.element_ty), mask=inside)


@triton.jit
def load_weights(weight, channel, is_pair, HALF: tl.constexpr):
    """The norm's weights of each pair, (1, PAIRS) float32 twice."""
    first = tl.load(weight + channel, mask=is_pair, other=0.0).to(tl.float32)
    second = tl.load(weight + channel + HALF, mask=is_pair, other=0.0).to(tl.float32)
    return first[None, :], second[None, :]


@triton.jit
def clip_places(positions, start, token, is_row, POSITIONS: tl.constexpr):
    """Where in the whole clip each row's token is, (ROWS,): at positions[token], or `start` further on."""
    place = start + token
    if POSITIONS:
        place = tl.load(positions + token, mask=is_row, other=0)
    return place


@triton.jit
def rope_angles(axes, token, pair, inside, frames, height, width, HALF: tl.constexpr):
    """cos and sin (ROWS, PAIRS) at `token`, its place in the whole clip, from a table of `rope3d_axes`."""
    frame = token // (height * width)
    place = token - frame * (height * width)
    row = place // width
    column = place - row * width
    axis = (pair // HALF)[None, :]
    behind_frames = tl.where(axis == 1, (frames + row)[:, None], (frames + height + column)[:, None])
    line = tl.where(axis == 0, frame[:, None], behind_frames)
    offsets = line * HALF + (pair % HALF)[None, :]
    cos = tl.load(axes + offsets, mask=inside, other=0.0)
    sin = tl.load(axes + (frames + height + width) * HALF + offsets, mask=inside, other=0.0)
    return cos, sin


@triton.jit
def inverse_rms(first, second, eps, D: tl.constexpr):
    """1 / sqrt(mean of squares + eps) of each row, (ROWS, 1)."""
    return tl.rsqrt(tl.sum(first * first + second * second, 1) / D + eps)[:, None]


@triton.jit
def norm_and_rotate(
    first, second, cos, sin, first_weight, second_weight, eps, D: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr
):
    """RMS norm and rotation of a tile in float32, each if asked for."""
    first, second = first.to(tl.float32), second.to(tl.float32)
    if NORM:
        scale = inverse_rms(first, second, eps, D)
        first = first * scale * first_weight
        second = second * scale * second_weight
    if ROPE:
        rotated = first * cos - second * sin
        second = second * cos + first * sin
        first = rotated
    return first, second


@triton.jit
def rotate_back(first, second, cos, sin, ROPE: tl.constexpr):
    """The rotation's gradient in float32: a rotation by the negative angle."""
    first, second = first.to(tl.float32), second.to(tl.float32)
    if ROPE:
        rotated = first * cos + second * sin
        second = second * cos - first * sin
        first = rotated
    return first, second


@triton.jit
def norm_backward(first, second, x_first, x_second, first_weight, second_weight, eps, D: tl.constexpr):
    """Gradients of the RMS norm's input x, and this tile's terms of its weights' gradients."""
    x_first, x_second = x_first.to(tl.float32), x_second.to(tl.float32)
    scale = inverse_rms(x_first, x_second, eps, D)
    x_first *= scale
    x_second *= scale
    first_term, second_term = first * x_first, second * x_second
    first *= first_weight
    second *= second_weight
    mean = (tl.sum(first * x_first + second * x_second, 1) / D)[:, None]
    return scale * (first - mean * x_first), scale * (second - mean * x_second), first_term, second_term


@triton.jit
def store_weight_terms(
    sums, program, part: tl.constexpr, first, second, channel, is_pair, D: tl.constexpr, HALF: tl.constexpr
):
    """A program's sums over its rows into sums (programs, 2, D), part 0 for q and 1 for k."""
    line = sums + (program * 2 + part) * D + channel
    tl.store(line, tl.sum(first, 0), mask=is_pair)
    tl.store(line + HALF, tl.sum(second, 0), mask=is_pair)


@triton.jit(do_not_specialize=["tokens", "start", "frames", "height", "width"])
def rope3d_fwd_kernel(
    q, k, q_out, k_out, axes, positions, q_weight, k_weight,
    q_stride_batch, q_stride_token, q_stride_head, k_stride_batch, k_stride_token, k_stride_head,
    q_out_stride_batch, q_out_stride_token, q_out_stride_head,
    k_out_stride_batch, k_out_stride_token, k_out_stride_head,
    tokens, start, frames, height, width, eps,
    H: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr,
    POSITIONS: tl.constexpr, NORM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """q_out, k_out = rotated q, k; the outputs may be the inputs. Grid: blocks of rows, batch."""
    batch = tl.program_id(1)
    token, head, is_row = tile_rows(tl.program_id(0), tokens * H, H, ROWS)
    pair, channel = first_channels(HALF, PAIRS)
    is_pair = pair < D // 2
    inside = is_row[:, None] & is_pair[None, :]
    q_first, q_second = load_pair(
        q, strided(batch, token, head, channel, q_stride_batch, q_stride_token, q_stride_head), inside, HALF
    )
    k_first, k_second = load_pair(
        k, strided(batch, token, head, channel, k_stride_batch, k_stride_token, k_stride_head), inside, HALF
    )
    place = clip_places(positions, start, token, is_row, POSITIONS)
    cos, sin = rope_angles(axes, place, pair, inside, frames, height, width, HALF)
    if NORM:
        q_weights = load_weights(q_weight, channel, is_pair, HALF)
        k_weights = load_weights(k_weight, channel, is_pair, HALF)
    else:
        q_weights = (1.0, 1.0)
        k_weights = (1.0, 1.0)
    q_first, q_second = norm_and_rotate(q_first, q_second, cos, sin, q_weights[0], q_weights[1], eps, D, NORM, True)
    k_first, k_second = norm_and_rotate(k_first, k_second, cos, sin, k_weights[0], k_weights[1], eps, D, NORM, True)
    q_offsets = strided(batch, token, head, channel, q_out_stride_batch, q_out_stride_token, q_out_stride_head)
    k_offsets = strided(batch, token, head, channel, k_out_stride_batch, k_out_stride_token, k_out_stride_head)
    store_pair(q_out, q_offsets, inside, q_first, q_second, HALF)
    store_pair(k_out, k_offsets, inside, k_first, k_second, HALF)


@triton.jit(do_not_specialize=["tokens", "start", "frames", "height", "width", "blocks"])
def rope3d_bwd_kernel(
    q_grad, k_grad, v_grad, q_out, k_out, v_out, axes, positions, q, k, q_weight, k_weight, weight_sums,
    q_grad_stride_batch, q_grad_stride_token, q_grad_stride_head,
    k_grad_stride_batch, k_grad_stride_token, k_grad_stride_head,
    v_grad_stride_batch, v_grad_stride_token, v_grad_stride_head,
    out_stride_batch, out_stride_token, out_stride_head,
    q_stride_batch, q_stride_token, q_stride_head, k_stride_batch, k_stride_token, k_stride_head,
    tokens, start, frames, height, width, blocks, eps,
    H: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr,
    POSITIONS: tl.constexpr, NORM: tl.constexpr, HAS_V: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Gradients of q and k before norm and rotation, and v's own, side by side. Grid: programs, batch.

    Without norm there is a program for each block of rows; with it programs walk over blocks and keep the sums for
    the weights, weight_sums (B * programs, 2, D), in registers.
    """
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
        out = strided(batch, token, head, channel, out_stride_batch, out_stride_token, out_stride_head)
        q_first, q_second = load_pair(
            q_grad,
            strided(batch, token, head, channel, q_grad_stride_batch, q_grad_stride_token, q_grad_stride_head),
            inside,
            HALF,
        )
        k_first, k_second = load_pair(
            k_grad,
            strided(batch, token, head, channel, k_grad_stride_batch, k_grad_stride_token, k_grad_stride_head),
            inside,
            HALF,
        )
        if HAS_V:
            v_offsets = strided(
                batch, token, head, channel, v_grad_stride_batch, v_grad_stride_token, v_grad_stride_head
            )
            v_first, v_second = load_pair(v_grad, v_offsets, inside, HALF)
        if NORM:
            q_x_first, q_x_second = load_pair(
                q, strided(batch, token, head, channel, q_stride_batch, q_stride_token, q_stride_head), inside, HALF
            )
            k_x_first, k_x_second = load_pair(
                k, strided(batch, token, head, channel, k_stride_batch, k_stride_token, k_stride_head), inside, HALF
            )
        place = clip_places(positions, start, token, is_row, POSITIONS)
        cos, sin = rope_angles(axes, place, pair, inside, frames, height, width, HALF)
        q_first, q_second = rotate_back(q_first, q_second, cos, sin, True)
        k_first, k_second = rotate_back(k_first, k_second, cos, sin, True)
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
        if HAS_V:
            store_pair(v_out, out, inside, v_first, v_second, HALF)
    if NORM:
        program = batch * tl.num_programs(0) + tl.program_id(0)
        store_weight_terms(weight_sums, program, 0, q_first_sum, q_second_sum, channel, is_pair, D, HALF)
        store_weight_terms(weight_sums, program, 1, k_first_sum, k_second_sum, channel, is_pair, D, HALF)
