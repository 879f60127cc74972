"""Forward of skiparse attention in Triton: out and the log-sum-exp of every row.

One program walks over (batch, head, set, block of queries), the block fastest, so that the programs that run together
share keys and values in L2. Scores are kept in units of log2 (exp2 is one instruction). Full blocks of keys come
through tensor descriptors (TMA boxes of one set) or through pointers; the rest of a set always through pointers.
"""

import triton
import triton.language as tl
from osp_fast.kernels.skiparse_sets import (
    add_product,
    load_boxes,
    load_rows,
    product,
    set_length,
    store_rows,
    token_of,
)

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _attend(
    q_low, q_high, k_low, k_high, v_low, v_high, highest, total, out_low, out_high, scale_log2, visible,
    MASKED: tl.constexpr, HIGH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of keys into the running maximum, sum and output of a block of queries."""
    scores = product(q_low, q_high, k_low, k_high, HIGH, PRECISION)
    if MASKED:
        scores = tl.where(visible[None, :], scores, float("-inf"))
    raised = tl.maximum(highest, tl.max(scores, 1) * scale_log2)
    shift = raised
    if MASKED:  # a row that has seen nothing yet: subtract 0, not -inf
        shift = tl.where(raised == float("-inf"), 0.0, raised)
    weights = tl.exp2(scores * scale_log2 - shift[:, None])
    shrink = tl.exp2(highest - shift)
    total = total * shrink + tl.sum(weights, 1)
    out_low = out_low * shrink[:, None]
    if HIGH:
        out_high = out_high * shrink[:, None]
    out_low, out_high = add_product(weights.to(v_low.dtype), v_low, v_high, out_low, out_high, HIGH, PRECISION)
    return raised, total, out_low, out_high


@triton.jit(
    do_not_specialize=["batch", "queries", "keys", "positions"],
    do_not_specialize_on_alignment=["key_mask", "key_lengths"],
)
def skiparse_attention_fwd_kernel(
    q, k, v, out, lse, key_mask, key_lengths, k_low_view, k_high_view, v_low_view, v_high_view,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    batch, heads, queries, keys, positions, scale_log2,
    MODE: tl.constexpr, K: tl.constexpr, SETS: tl.constexpr, D: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out (B, N, H, D) contiguous, lse (B, H, S, positions) natural, in set order."""
    blocks = tl.cdiv(positions, BLOCK_M)
    for work in tl.range(tl.program_id(0), batch * heads * SETS * blocks, tl.num_programs(0)):
        block = work % blocks
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

        position = block * BLOCK_M + tl.arange(0, BLOCK_M)
        tokens = token_of(position, skip_set, MODE, K)
        inside = position < set_length(queries, skip_set, MODE, K)
        q_base = q + sample64 * q_batch + head64 * q_head
        q_low, q_high = load_rows(q_base, tokens, inside, q_token, LOW, HIGH, D)
        highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        out_low = tl.zeros([BLOCK_M, LOW], tl.float32)
        out_high = tl.zeros([BLOCK_M, HIGH if HIGH else LOW], tl.float32)

        full = key_count // BLOCK_N * BLOCK_N
        for start in tl.range(0, full, BLOCK_N):
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
            highest, total, out_low, out_high = _attend(
                q_low, q_high, k_low, k_high, v_low, v_high, highest, total, out_low, out_high, scale_log2, visible,
                HAS_MASK, HIGH, PRECISION,
            )  # fmt: skip
        for start in tl.range(full, key_count, TAIL, num_stages=1):  # the rest of the set
            column = start + tl.arange(0, TAIL)
            key = token_of(column, skip_set, MODE, K)
            visible = column < key_count
            k_low, k_high = load_rows(k_base, key, visible, k_token, LOW, HIGH, D)
            v_low, v_high = load_rows(v_base, key, visible, v_token, LOW, HIGH, D)
            if HAS_MASK:
                visible = tl.load(mask_base + key, mask=visible, other=0) != 0
            highest, total, out_low, out_high = _attend(
                q_low, q_high, k_low, k_high, v_low, v_high, highest, total, out_low, out_high, scale_log2, visible,
                True, HIGH, PRECISION,
            )  # fmt: skip

        total = tl.where(total > 0, total, 1.0)  # a row without a visible key: 0 / 1, and a log-sum-exp of -inf
        out_base = out + (sample64 * queries * heads + head) * D
        store_rows(
            out_base, tokens, inside, heads * D, out_low / total[:, None], out_high / total[:, None], LOW, HIGH, D
        )
        row = (sample64 * heads + head) * SETS + skip_set
        row_lse = tl.where(inside, (highest + tl.log2(total)) * LN2, float("-inf"))
        tl.store(lse + row * positions + position, row_lse, mask=position < positions)
