"""Backward of skiparse attention in Triton: gradients of q, k and v from out, its gradient and the log-sum-exp.

With P = softmax(q k^T c), c = 1 / sqrt(D), and G the gradient of out: dV = P^T G, dP = G V^T, delta = rowsum(out G),
dS = P (dP - delta), dQ = c dS K, dK = c dS^T Q. P is computed again from the log-sum-exp (Dao et al., FlashAttention).

- `rows`: delta and the log-sum-exp in log2 units, one pass over out and G, padded to whole blocks: +inf makes P zero.
- `keys`: a program holds a block of keys and walks over the queries of its set: dK and dV. Fused, it adds its share of
  dQ to a float32 buffer as it goes (five products a block; the order of the sum varies from run to run). That takes the
  TMA unit's reduction: without descriptors the additions would cost more than the two products they save.
- `queries`: a program holds a block of queries and walks over the keys: dQ alone, for the deterministic backward, which
  computes scores and dP twice (seven products a block) and gives the same bits each time.
"""

import triton
import triton.language as tl
from osp_fast.kernels.skiparse_sets import (
    add_boxes,
    add_product,
    add_rows,
    load_boxes,
    load_rows,
    product,
    set_length,
    store_rows,
    token_of,
)

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["queries", "positions", "padded"])
def skiparse_attention_bwd_rows_kernel(
    out, out_grad, lse, row_lse, row_delta, grad_batch, grad_token, grad_head, heads, queries, positions, padded,
    MODE: tl.constexpr, K: tl.constexpr, SETS: tl.constexpr, D: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """row_lse, row_delta (B, H, S, padded) float32. out (B, N, H, D) is contiguous, its gradient need not be."""
    blocks = padded // BLOCK_M
    work = tl.program_id(0)
    skip_set = work // blocks % SETS
    head = work // (blocks * SETS) % heads
    sample64 = (work // (blocks * SETS) // heads).to(tl.int64)
    head64 = head.to(tl.int64)
    position = work % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    tokens = token_of(position, skip_set, MODE, K)
    inside = position < set_length(queries, skip_set, MODE, K)
    out_base = out + (sample64 * queries * heads + head) * D
    grad_base = out_grad + sample64 * grad_batch + head64 * grad_head
    o_low, o_high = load_rows(out_base, tokens, inside, heads * D, LOW, HIGH, D)
    g_low, g_high = load_rows(grad_base, tokens, inside, grad_token, LOW, HIGH, D)
    delta = tl.sum(o_low.to(tl.float32) * g_low.to(tl.float32), 1)
    if HIGH:
        delta += tl.sum(o_high.to(tl.float32) * g_high.to(tl.float32), 1)
    row = (sample64 * heads + head) * SETS + skip_set
    natural = tl.load(lse + row * positions + position, mask=inside, other=float("-inf"))
    # Rows past the end and rows that see no key: exp2(score - inf) = 0.
    tl.store(row_lse + row * padded + position, tl.where(natural == float("-inf"), float("inf"), natural * LOG2E))
    tl.store(row_delta + row * padded + position, delta)


@triton.jit
def _key_gradients(
    q_low, q_high, g_low, g_high, k_low, k_high, v_low, v_high, row_lse, row_delta,
    k_grad_low, k_grad_high, v_grad_low, v_grad_high, scale_log2, HIGH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of queries into dK and dV of a block of keys; also returns dS^T. Everything is keys x queries."""
    p = tl.exp2(product(k_low, k_high, q_low, q_high, HIGH, PRECISION) * scale_log2 - row_lse[None, :])
    v_grad_low, v_grad_high = add_product(p.to(q_low.dtype), g_low, g_high, v_grad_low, v_grad_high, HIGH, PRECISION)
    s_grad = p * (product(v_low, v_high, g_low, g_high, HIGH, PRECISION) - row_delta[None, :])
    k_grad_low, k_grad_high = add_product(
        s_grad.to(q_low.dtype), q_low, q_high, k_grad_low, k_grad_high, HIGH, PRECISION
    )
    return s_grad, k_grad_low, k_grad_high, v_grad_low, v_grad_high


@triton.jit
def _query_share(s_grad, visible, k_low, k_high, HIGH: tl.constexpr, PRECISION: tl.constexpr):
    """What a block of keys adds to dQ / c: dS K, from s_grad = dS^T."""
    # Rows of unseen keys hold exp2(0 - lse), which may overflow: out with them.
    s_cast = tl.trans(tl.where(visible[:, None], s_grad, 0.0).to(k_low.dtype))
    low = tl.dot(s_cast, k_low, input_precision=PRECISION)
    high = low
    if HIGH:
        high = tl.dot(s_cast, k_high, input_precision=PRECISION)
    return low, high


@triton.jit(
    do_not_specialize=["queries", "keys", "key_positions", "padded"],
    do_not_specialize_on_alignment=["key_mask", "key_lengths"],
)
def skiparse_attention_bwd_keys_kernel(
    q, k, v, out_grad, row_lse, row_delta, q_sum, k_grad, v_grad, key_mask, key_lengths,
    q_low_view, q_high_view, grad_low_view, grad_high_view, sum_low_view, sum_high_view,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head, grad_batch, grad_token, grad_head,
    heads, queries, keys, key_positions, padded, scale, scale_log2,
    MODE: tl.constexpr, K: tl.constexpr, SETS: tl.constexpr, D: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, DESCRIPTORS: tl.constexpr, FUSED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """k_grad, v_grad (B, M, H, D) contiguous; FUSED (needs DESCRIPTORS) adds dS K to q_sum (B, N, H, D),
    float32 and contiguous."""
    blocks = tl.cdiv(key_positions, BLOCK_N)
    work = tl.program_id(0)
    first = work % blocks * BLOCK_N
    skip_set = work // blocks % SETS
    head = work // (blocks * SETS) % heads
    sample = work // (blocks * SETS) // heads
    sample64 = sample.to(tl.int64)
    head64 = head.to(tl.int64)
    q_base = q + sample64 * q_batch + head64 * q_head
    grad_base = out_grad + sample64 * grad_batch + head64 * grad_head
    if FUSED:
        sum_base = q_sum + (sample64 * queries * heads + head) * D
    row = ((sample64 * heads + head) * SETS + skip_set) * padded
    bound = keys
    if HAS_LENGTHS:
        bound = tl.minimum(tl.load(key_lengths + sample), keys)
    key_count = set_length(bound, skip_set, MODE, K)
    column = first + tl.arange(0, BLOCK_N)
    key = token_of(column, skip_set, MODE, K)
    visible = column < key_count
    if HAS_MASK:
        visible = visible & (tl.load(key_mask + sample64 * keys + key, mask=visible, other=0) != 0)
    k_base = k + sample64 * k_batch + head64 * k_head
    v_base = v + sample64 * v_batch + head64 * v_head
    k_low, k_high = load_rows(k_base, key, visible, k_token, LOW, HIGH, D)
    v_low, v_high = load_rows(v_base, key, visible, v_token, LOW, HIGH, D)
    k_grad_low = tl.zeros([BLOCK_N, LOW], tl.float32)
    v_grad_low = tl.zeros([BLOCK_N, LOW], tl.float32)
    k_grad_high = tl.zeros([BLOCK_N, HIGH if HIGH else LOW], tl.float32)
    v_grad_high = tl.zeros([BLOCK_N, HIGH if HIGH else LOW], tl.float32)

    query_count = set_length(queries, skip_set, MODE, K)
    if first >= key_count:
        query_count = 0  # past the last visible key: the gradients stay zero
    full = query_count // BLOCK_M * BLOCK_M
    for start in tl.range(0, full, BLOCK_M, disable_licm=True):
        position = start + tl.arange(0, BLOCK_M)
        if DESCRIPTORS:
            q_low, q_high = load_boxes(
                q_low_view, q_high_view, sample, skip_set, head, start, MODE, K, BLOCK_M, LOW, HIGH, D
            )
            g_low, g_high = load_boxes(
                grad_low_view, grad_high_view, sample, skip_set, head, start, MODE, K, BLOCK_M, LOW, HIGH, D
            )
        else:
            tokens = token_of(position, skip_set, MODE, K)
            inside = position < query_count
            q_low, q_high = load_rows(q_base, tokens, inside, q_token, LOW, HIGH, D)
            g_low, g_high = load_rows(grad_base, tokens, inside, grad_token, LOW, HIGH, D)
        s_grad, k_grad_low, k_grad_high, v_grad_low, v_grad_high = _key_gradients(
            q_low, q_high, g_low, g_high, k_low, k_high, v_low, v_high,
            tl.load(row_lse + row + position), tl.load(row_delta + row + position),
            k_grad_low, k_grad_high, v_grad_low, v_grad_high, scale_log2, HIGH, PRECISION,
        )  # fmt: skip
        if FUSED:
            low, high = _query_share(s_grad, visible, k_low, k_high, HIGH, PRECISION)
            add_boxes(
                sum_low_view, sum_high_view, sample, skip_set, head, start, low, high, MODE, K, BLOCK_M, LOW, HIGH, D
            )
    for start in tl.range(full, query_count, TAIL, num_stages=1, disable_licm=True):  # the rest of the set
        position = start + tl.arange(0, TAIL)
        tokens = token_of(position, skip_set, MODE, K)
        inside = position < query_count
        q_low, q_high = load_rows(q_base, tokens, inside, q_token, LOW, HIGH, D)
        g_low, g_high = load_rows(grad_base, tokens, inside, grad_token, LOW, HIGH, D)
        s_grad, k_grad_low, k_grad_high, v_grad_low, v_grad_high = _key_gradients(
            q_low, q_high, g_low, g_high, k_low, k_high, v_low, v_high,
            tl.load(row_lse + row + position), tl.load(row_delta + row + position),
            k_grad_low, k_grad_high, v_grad_low, v_grad_high, scale_log2, HIGH, PRECISION,
        )  # fmt: skip
        if FUSED:
            low, high = _query_share(s_grad, visible, k_low, k_high, HIGH, PRECISION)
            add_rows(sum_base, tokens, inside, heads * D, low, high, LOW, HIGH, D)

    there = column < set_length(keys, skip_set, MODE, K)
    seen = visible[:, None]
    offset = (sample64 * keys * heads + head) * D
    v_grad_low = tl.where(seen, v_grad_low, 0.0)
    v_grad_high = tl.where(seen, v_grad_high, 0.0)
    store_rows(v_grad + offset, key, there, heads * D, v_grad_low, v_grad_high, LOW, HIGH, D)
    k_grad_low = tl.where(seen, k_grad_low * scale, 0.0)
    k_grad_high = tl.where(seen, k_grad_high * scale, 0.0)
    store_rows(k_grad + offset, key, there, heads * D, k_grad_low, k_grad_high, LOW, HIGH, D)


@triton.jit
def _query_gradients(
    q_low, q_high, g_low, g_high, k_low, k_high, v_low, v_high, row_lse, row_delta, q_grad_low, q_grad_high,
    scale_log2, visible, MASKED: tl.constexpr, HIGH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of keys into dQ of a block of queries; everything is queries x keys."""
    p = tl.exp2(product(q_low, q_high, k_low, k_high, HIGH, PRECISION) * scale_log2 - row_lse[:, None])
    if MASKED:
        p = tl.where(visible[None, :], p, 0.0)
    s_grad = p * (product(g_low, g_high, v_low, v_high, HIGH, PRECISION) - row_delta[:, None])
    return add_product(s_grad.to(k_low.dtype), k_low, k_high, q_grad_low, q_grad_high, HIGH, PRECISION)


@triton.jit(
    do_not_specialize=["queries", "keys", "positions", "padded"],
    do_not_specialize_on_alignment=["key_mask", "key_lengths"],
)
def skiparse_attention_bwd_queries_kernel(
    q, k, v, out_grad, row_lse, row_delta, q_grad, key_mask, key_lengths,
    k_low_view, k_high_view, v_low_view, v_high_view,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head, grad_batch, grad_token, grad_head,
    heads, queries, keys, positions, padded, scale, scale_log2,
    MODE: tl.constexpr, K: tl.constexpr, SETS: tl.constexpr, D: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """q_grad (B, N, H, D) contiguous."""
    blocks = tl.cdiv(positions, BLOCK_M)
    work = tl.program_id(0)
    skip_set = work // blocks % SETS
    head = work // (blocks * SETS) % heads
    sample = work // (blocks * SETS) // heads
    sample64 = sample.to(tl.int64)
    head64 = head.to(tl.int64)
    k_base = k + sample64 * k_batch + head64 * k_head
    v_base = v + sample64 * v_batch + head64 * v_head
    mask_base = key_mask
    if HAS_MASK:
        mask_base = key_mask + sample64 * keys
    bound = keys
    if HAS_LENGTHS:
        bound = tl.minimum(tl.load(key_lengths + sample), keys)
    key_count = set_length(bound, skip_set, MODE, K)

    position = work % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    tokens = token_of(position, skip_set, MODE, K)
    inside = position < set_length(queries, skip_set, MODE, K)
    q_base = q + sample64 * q_batch + head64 * q_head
    grad_base = out_grad + sample64 * grad_batch + head64 * grad_head
    q_low, q_high = load_rows(q_base, tokens, inside, q_token, LOW, HIGH, D)
    g_low, g_high = load_rows(grad_base, tokens, inside, grad_token, LOW, HIGH, D)
    row = ((sample64 * heads + head) * SETS + skip_set) * padded + position
    lse_rows = tl.load(row_lse + row)
    delta_rows = tl.load(row_delta + row)
    q_grad_low = tl.zeros([BLOCK_M, LOW], tl.float32)
    q_grad_high = tl.zeros([BLOCK_M, HIGH if HIGH else LOW], tl.float32)

    full = key_count // BLOCK_N * BLOCK_N
    for start in tl.range(0, full, BLOCK_N, disable_licm=True):
        column = start + tl.arange(0, BLOCK_N)
        visible = column < key_count
        if HAS_MASK or not DESCRIPTORS:
            key = token_of(column, skip_set, MODE, K)
        if DESCRIPTORS:
            k_low, k_high = load_boxes(
                k_low_view, k_high_view, sample, skip_set, head, start, MODE, K, BLOCK_N, LOW, HIGH, D
            )
            v_low, v_high = load_boxes(
                v_low_view, v_high_view, sample, skip_set, head, start, MODE, K, BLOCK_N, LOW, HIGH, D
            )
        else:
            k_low, k_high = load_rows(k_base, key, visible, k_token, LOW, HIGH, D)
            v_low, v_high = load_rows(v_base, key, visible, v_token, LOW, HIGH, D)
        if HAS_MASK:
            visible = tl.load(mask_base + key) != 0
        q_grad_low, q_grad_high = _query_gradients(
            q_low, q_high, g_low, g_high, k_low, k_high, v_low, v_high, lse_rows, delta_rows,
            q_grad_low, q_grad_high, scale_log2, visible, HAS_MASK, HIGH, PRECISION,
        )  # fmt: skip
    for start in tl.range(full, key_count, TAIL, num_stages=1, disable_licm=True):  # the rest of the set
        column = start + tl.arange(0, TAIL)
        key = token_of(column, skip_set, MODE, K)
        visible = column < key_count
        k_low, k_high = load_rows(k_base, key, visible, k_token, LOW, HIGH, D)
        v_low, v_high = load_rows(v_base, key, visible, v_token, LOW, HIGH, D)
        if HAS_MASK:
            visible = tl.load(mask_base + key, mask=visible, other=0) != 0
        q_grad_low, q_grad_high = _query_gradients(
            q_low, q_high, g_low, g_high, k_low, k_high, v_low, v_high, lse_rows, delta_rows,
            q_grad_low, q_grad_high, scale_log2, visible, True, HIGH, PRECISION,
        )  # fmt: skip
    q_grad_low *= scale
    q_grad_high *= scale
    offset = (sample64 * queries * heads + head) * D
    store_rows(q_grad + offset, tokens, inside, heads * D, q_grad_low, q_grad_high, LOW, HIGH, D)
