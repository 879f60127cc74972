"""Forward of skiparse attention, scheduled by hand for Hopper (sm_90) in Gluon. Not yet measured on a GPU.

out = softmax(q k^T / sqrt(D)) v inside each skip set, and lse, the natural log-sum-exp of every row, straight from
(B, N, H, D); bf16 or fp16; D = 64, 96 (as 64 + 32, an accumulator each) or 128. q, k and v may be strided: heads and
channels contiguous, batch and token strides multiples of 16 bytes. A row that sees no key gives zero and -inf.

Schedule, after "FlashAttention-3" (Shah et al., 2024): a persistent grid over (batch, head, set, query block), the
query block fastest so that concurrent blocks share K and V in L2. One warp issues TMA copies into rings of K and V;
two warpgroups own 64 queries each. A warpgroup issues q k^T of the next key block, then p v of the current one, and
computes the next softmax while p v runs; p stays in registers. The two take turns at issuing, so that the softmax of
one overlaps the products of the other.

Memory: a five-dimensional view of the token axis makes a block of any set one TMA box; nothing is gathered. A view's
last row may lie past the end of memory. So the last box of a set ends with the set's last visible key, starts before
the set's first if the set is shorter than a box (TMA fills in zeros), and overlaps its predecessor, whose columns are
masked in it. It is taken first: no other box needs a mask. Query boxes do the same; rows that the previous query block
owns are not stored.

Counted for a block of 128 keys and 128 queries (both warpgroups) against what a multiprocessor does in a clock: 4096
bf16 FLOP, 16 exp2 (CUDA guide: 16 special-function results), 4 warp instructions, 128 bytes of shared memory:

| D | FLOP | products | exp2 | issue | shared memory |
|---|---|---|---|---|---|
| 64 | 4.19 M | 1024 clk | 1024 clk | 640 clk | 112 KiB, 896 clk |
| 96 | 6.29 M | 1536 clk | 1024 clk | 672 clk | 168 KiB, 1344 clk |
| 128 | 8.39 M | 2048 clk | 1024 clk | 704 clk | 224 KiB, 1792 clk |

At the 798 TFLOP/s that a matrix product was measured to reach, a tile of 128 queries and n key blocks takes at least
0.69 n, 1.04 n, 1.39 n us. Predicted with 60, 75, 80 % of that: 1.16 n, 1.39 n, 1.73 n us, or 480, 600, 640 TFLOP/s, and
2 us more a tile to fill and drain. D = 64 is bound by exp2.
"""
# ruff: noqa: RUF005 - Triton knows no unpacking

import math
from dataclasses import dataclass
from typing import Any

import torch
from osp_fast.kernels.launch import multiprocessors
from osp_fast.kernels.spec import KernelBuild
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

MODES = ("full", "single", "group")
HEAD_DIMS = {64: ((64,), 4), 96: ((64, 32), 3), 128: ((128,), 2)}  # D -> widths of its parts, stages of K and V
DTYPES = (torch.bfloat16, torch.float16)
LOG2_E = gl.constexpr(math.log2(math.e))
NEGATIVE_INFINITY = gl.constexpr(float("-inf"))


@dataclass(frozen=True)
class Plan:
    """What a build of the kernel is specialised to; its attributes are compile-time values inside the kernel.

    widths: channels in each part of D, one or two powers of two
    stages: slots in the ring of K and in that of V
    sparse_n, unit: position i of set s is token (i div unit * sparse_n + s) * unit + i mod unit; unit is sparse_n in
        group skip and 1 in single skip; full attention is a single skip by 1
    rows, keys: queries of a warpgroup, keys of a block; tests shrink them
    """

    widths: tuple[int, ...]
    stages: int
    sparse_n: int
    unit: int
    rows: int = 64
    keys: int = 128

    @property
    def head_dim(self) -> int:
        return sum(self.widths)

    @property
    def period(self) -> int:
        """Tokens after which the sets repeat."""
        return self.sparse_n * self.unit

    def registers(self, width: int) -> gl.NVMMADistributedLayout:
        """Registers of a (rows, width) product of one warpgroup."""
        return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, width, 16])


@gluon.jit
def _set_length(tokens, skip_set, plan: gl.constexpr):
    """How many of the first `tokens` tokens are in set `skip_set`."""
    rest = tokens % plan.period - skip_set * plan.unit
    return tokens // plan.period * plan.unit + gl.minimum(gl.maximum(rest, 0), plan.unit)


@gluon.jit
def _locate(tile, work, key_lengths, plan: gl.constexpr):
    """(batch, head, set); first row of the box of queries, first that is the tile's own; visible keys, blocks of keys,
    at least 1, first row of the last of them, which ends with the last visible key's unit."""
    tokens, heads, query_blocks, _ = work
    rest = tile // query_blocks
    skip_set = rest % plan.sparse_n
    head = rest // plan.sparse_n % heads
    batch = rest // plan.sparse_n // heads
    length = tokens
    if key_lengths is not None:
        length = gl.minimum(gl.maximum(gl.load(key_lengths + batch), 0), tokens)
    own = tile % query_blocks * 2 * plan.rows
    first = gl.minimum(own, _set_length(tokens, skip_set, plan) - 2 * plan.rows)
    visible = _set_length(length, skip_set, plan)
    blocks = gl.maximum(gl.cdiv(visible, plan.keys), 1)
    last_block = gl.cdiv(visible, plan.unit) * plan.unit - plan.keys
    return (batch, head, skip_set), first, own, visible, blocks, last_block


@gluon.jit
def _load(views, buffers, slots: gl.constexpr, step, full, empty, place, row, plan: gl.constexpr):
    """Copy number `step` into a ring: once its slot is empty, start the copy of the box at `row`."""
    batch, head, skip_set = place
    slot = step % slots
    barrier = full.index(slot)
    hopper.mbarrier.wait(empty.index(slot), step // slots & 1 ^ 1)
    hopper.mbarrier.expect(barrier, views[0].block_type.nbytes * plan.head_dim // plan.widths[0])
    for part in gl.static_range(len(buffers)):
        corner = [batch, row // plan.unit, skip_set, 0, head * plan.head_dim + part * plan.widths[0]]
        hopper.tma.async_copy_global_to_shared(views[part], corner, barrier, buffers[part].index(slot))


@gluon.jit
def _produce(views, buffers, barriers, key_lengths, work, plan: gl.constexpr):
    """The copying warp: queries of both warpgroups, then K and V in the order of use, the last block first."""
    q_views, k_views, v_views = views
    q, k, v = buffers
    q_full, q_empty, k_full, k_empty, v_full, v_empty, _turns = barriers
    step = 0
    q_step = 0
    for tile in range(gl.program_id(0), work[3], gl.num_programs(0)):
        place, first, _own, _visible, blocks, row = _locate(tile, work, key_lengths, plan)
        _load(q_views, q, 2, q_step, q_full, q_empty, place, first, plan)
        _load(q_views, q, 2, q_step + 1, q_full, q_empty, place, first + plan.rows, plan)
        q_step += 2
        _load(k_views, k, plan.stages, step, k_full, k_empty, place, row, plan)
        for block in range(1, blocks):
            next_row = (block - 1) * plan.keys
            _load(k_views, k, plan.stages, step + 1, k_full, k_empty, place, next_row, plan)
            _load(v_views, v, plan.stages, step, v_full, v_empty, place, row, plan)
            row = next_row
            step += 1
        _load(v_views, v, plan.stages, step, v_full, v_empty, place, row, plan)
        step += 1


@gluon.jit
def _start_scores(q, k, consumer, slot, plan: gl.constexpr):
    """Issue q k^T: (rows, keys), a group in flight for each part of D."""
    s = gl.full([plan.rows, plan.keys], 0.0, gl.float32, plan.registers(plan.keys))
    for part in gl.static_range(len(q)):
        left = q[part].index(consumer).reshape([plan.rows, plan.widths[part]])
        right = k[part].index(slot).reshape([plan.keys, plan.widths[part]]).permute((1, 0))
        s = hopper.warpgroup_mma(left, right, s, use_acc=part > 0, is_async=True)
    return s


@gluon.jit
def _start_values(p, v, slot, o, plan: gl.constexpr):
    """Issue o + p v, a group in flight for each part of D."""
    started = ()
    for part in gl.static_range(len(v)):
        left = gl.convert_layout(p, gl.DotOperandLayout(0, plan.registers(plan.widths[part]), 2))
        right = v[part].index(slot).reshape([plan.keys, plan.widths[part]])
        started = started + (hopper.warpgroup_mma(left, right, o[part], is_async=True),)
    return started


@gluon.jit
def _finish_values(o, total):
    """Wait for o. `total` passes through, so that the softmax it sums is computed before the wait, not after it."""
    done = hopper.warpgroup_mma_wait(0, deps=(total,) + o)
    return done[1:], done[0]


@gluon.jit
def _scale_rows(o, factor, plan: gl.constexpr):
    scaled = ()
    for part in gl.static_range(len(o)):
        column = gl.convert_layout(factor, gl.SliceLayout(1, plan.registers(plan.widths[part])))[:, None]
        scaled = scaled + (o[part] * column,)
    return scaled


@gluon.jit
def _store(out, o, place, first, own, tokens, heads, channel, plan: gl.constexpr):
    """Write one part of the output, the channels from `channel` on, of the rows from `own` on."""
    batch, head, skip_set = place
    width: gl.constexpr = o.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // width, width // 8], [4, 1], [1, 0])  # 16 bytes a thread
    o = gl.convert_layout(o.to(out.dtype.element_ty), layout)
    row = first + gl.arange(0, plan.rows, gl.SliceLayout(1, layout))
    token = (row // plan.unit * plan.sparse_n + skip_set) * plan.unit + row % plan.unit
    column = channel + gl.arange(0, width, gl.SliceLayout(0, layout))
    offsets = (batch.to(gl.int64) * tokens + token)[:, None] * (heads * plan.head_dim) + column[None, :]
    gl.store(out + head * plan.head_dim + offsets, o, mask=(row >= own)[:, None])


@gluon.jit
def _consume(consumer: gl.constexpr, buffers, barriers, key_lengths, result, work, plan: gl.constexpr):
    """A warpgroup: softmax and products of its rows of every tile."""
    q, k, v = buffers
    q_full, q_empty, k_full, k_empty, v_full, v_empty, turns = barriers
    out, lse, scale, longest = result
    tokens, heads, _, tiles = work
    p_layout: gl.constexpr = gl.DotOperandLayout(0, plan.registers(plan.widths[0]), 2)
    log2_scale = scale * LOG2_E
    step = 0  # blocks of keys before the current one, over all tiles: slot and phase of the rings
    turn_phase = consumer ^ 1  # the first warpgroup starts without being told to
    q_phase = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        place, first, own, visible, blocks, last_block = _locate(tile, work, key_lengths, plan)
        first += consumer * plan.rows
        slot = step % plan.stages
        hopper.mbarrier.wait(q_full.index(consumer), q_phase)
        hopper.mbarrier.wait(k_full.index(slot), step // plan.stages & 1)
        s = hopper.warpgroup_mma_wait(0, deps=(_start_scores(q, k, consumer, slot, plan),))
        hopper.mbarrier.arrive(k_empty.index(slot), count=1)
        column = last_block + gl.arange(0, plan.keys, gl.SliceLayout(0, plan.registers(plan.keys)))
        seen = (column >= (blocks - 1) * plan.keys) & (column < visible)
        s = gl.where(seen[None, :], s, NEGATIVE_INFINITY)
        top = gl.max(s, 1)
        top = gl.where(top == NEGATIVE_INFINITY, 0.0, top)  # no visible key: subtract 0, not -inf
        p = gl.exp2(s * log2_scale - (top * log2_scale)[:, None])
        total = gl.sum(p, 1)
        p_left = gl.convert_layout(p.to(k[0].dtype), p_layout)
        o = ()
        for part in gl.static_range(len(v)):
            o = o + (gl.full([plan.rows, plan.widths[part]], 0.0, gl.float32, plan.registers(plan.widths[part])),)
        next_slot = (step + 1) % plan.stages
        hopper.mbarrier.wait(k_full.index(next_slot), (step + 1) // plan.stages & 1, pred=blocks > 1)
        for block in range(1, blocks):
            hopper.mbarrier.wait(turns.index(consumer), turn_phase)
            turn_phase ^= 1
            s = _start_scores(q, k, consumer, next_slot, plan)
            hopper.mbarrier.wait(v_full.index(slot), step // plan.stages & 1)
            o = _start_values(p_left, v, slot, o, plan)
            hopper.mbarrier.arrive(turns.index(1 - consumer), count=1)
            s = hopper.warpgroup_mma_wait(len(v), deps=(s,))  # all but the groups of p v
            hopper.mbarrier.arrive(k_empty.index(next_slot), count=1)
            raised = gl.maximum(top, gl.max(s, 1))
            p = gl.exp2(s * log2_scale - (raised * log2_scale)[:, None])
            shrink = gl.exp2((top - raised) * log2_scale)
            total = total * shrink + gl.sum(p, 1)
            top = raised
            # A loop between softmax and wait: without it ptxas hoists the wait above the softmax, and nothing overlaps.
            next_slot = (step + 2) % plan.stages
            hopper.mbarrier.wait(k_full.index(next_slot), (step + 2) // plan.stages & 1, pred=block + 1 < blocks)
            o, total = _finish_values(o, total)
            hopper.mbarrier.arrive(v_empty.index(slot), count=1)
            o = _scale_rows(o, shrink, plan)
            p_left = gl.convert_layout(p.to(k[0].dtype), p_layout)
            step += 1
            slot = step % plan.stages
        hopper.mbarrier.arrive(q_empty.index(consumer), count=1)
        q_phase ^= 1
        hopper.mbarrier.wait(v_full.index(slot), step // plan.stages & 1)
        o, total = _finish_values(_start_values(p_left, v, slot, o, plan), total)
        hopper.mbarrier.arrive(v_empty.index(slot), count=1)
        step += 1
        divisor = gl.where(total == 0.0, 1.0, total)
        o = _scale_rows(o, 1.0 / divisor, plan)
        for part in gl.static_range(len(o)):
            _store(out, o[part], place, first, own, tokens, heads, part * plan.widths[0], plan)
        batch, head, skip_set = place
        row = first + gl.arange(0, plan.rows, gl.SliceLayout(1, plan.registers(plan.keys)))
        set_number = (batch * heads + head) * plan.sparse_n + skip_set
        value = gl.where(total == 0.0, NEGATIVE_INFINITY, top * scale + gl.log(divisor))
        gl.store(lse + set_number.to(gl.int64) * longest + row, value, mask=row >= own)


@gluon.jit
def _allocate(views, slots: gl.constexpr, plan: gl.constexpr):
    """Shared memory for `slots` boxes of each part of D."""
    buffers = ()
    for part in gl.static_range(len(plan.widths)):
        view = views[part]
        buffers = buffers + (gl.allocate_shared_memory(view.dtype, [slots] + view.block_type.shape, view.layout),)
    return buffers


@gluon.jit
def _barriers(slots: gl.constexpr, arrivals: gl.constexpr):
    barriers = gl.allocate_shared_memory(gl.int64, [slots, 1], hopper.mbarrier.MBarrierLayout())
    for slot in gl.static_range(slots):
        hopper.mbarrier.init(barriers.index(slot), count=arrivals)
    return barriers


@gluon.jit(do_not_specialize=["tokens", "heads", "query_blocks", "tiles", "longest"])
def skiparse_attention_hopper_fwd_kernel(
    q_low, q_high, k_low, k_high, v_low, v_high, key_lengths, out, lse, scale, tokens, heads, query_blocks, tiles,
    longest, plan: gl.constexpr,
):  # fmt: skip
    """Persistent programs of three partitions; see the module's docstring. `*_high` are unused where D has one part."""
    views = ((q_low, q_high), (k_low, k_high), (v_low, v_high))
    stages: gl.constexpr = plan.stages
    buffers = (_allocate(views[0], 2, plan), _allocate(views[1], stages, plan), _allocate(views[2], stages, plan))
    # full: one arrival, with the bytes of the copies; empty: one arrival of each warpgroup that reads the slot
    barriers = (_barriers(2, 1), _barriers(2, 1), _barriers(stages, 1), _barriers(stages, 2),
                _barriers(stages, 1), _barriers(stages, 2), _barriers(2, 1))  # fmt: skip
    hopper.fence_async_shared()  # the copy engine must see the barriers initialised
    work = (tokens, heads, query_blocks, tiles)
    result = (out, lse, scale, longest)
    gl.warp_specialize(
        [
            (_consume, (0, buffers, barriers, key_lengths, result, work, plan)),
            (_consume, (1, buffers, barriers, key_lengths, result, work, plan)),
            (_produce, (views, buffers, barriers, key_lengths, work, plan)),
        ],
        [4, 1],  # warps of the second warpgroup and of the copies; the first has the program's own four
        [240, 24],  # registers; the first warpgroup gets what is left, 240
    )  # fmt: skip


def supports(dtype: torch.dtype, head_dim: int, mode: str, sparse_n: int, tokens: int) -> bool:
    """Whether `hopper_forward` can serve such a call; group skip needs whole groups of sparse_n tokens."""
    whole = mode != "group" or (sparse_n in (1, 2, 4) and tokens % sparse_n == 0)
    return dtype in DTYPES and head_dim in HEAD_DIMS and mode in MODES and sparse_n >= 1 and tokens >= 1 and whole


def make_plan(head_dim: int, mode: str, sparse_n: int) -> Plan:
    """The plan for D = head_dim; full attention is a skip by 1."""
    sparse_n = 1 if mode == "full" else sparse_n
    return Plan(*HEAD_DIMS[head_dim], sparse_n=sparse_n, unit=sparse_n if mode == "group" else 1)


def _view(x: Tensor, rows: int, width: int, plan: Plan) -> TensorDescriptor:
    """The set-wise view of x (B, N, H, D) whose boxes are `rows` positions of one set by `width` channels."""
    batch, tokens, heads, head_dim = x.shape
    token_stride = x.stride(1) if tokens > 1 else heads * head_dim  # PyTorch leaves strides of single items undefined
    batch_stride = x.stride(0) if batch > 1 else tokens * token_stride
    rows_contiguous = x.stride(3) == 1 and (heads == 1 or x.stride(2) == head_dim)
    if not rows_contiguous or (x.data_ptr() | 2 * token_stride | 2 * batch_stride) % 16:
        raise ValueError(f"strides {x.stride()}: heads and channels must be contiguous, the rest multiples of 16 bytes")
    shape = [batch, -(-tokens // plan.period), plan.sparse_n, plan.unit, heads * head_dim]
    strides = [batch_stride, plan.period * token_stride, plan.unit * token_stride, token_stride, 1]
    memory = gl.NVMMASharedLayout(swizzle_byte_width=min(128, 2 * width), element_bitwidth=16, rank=5)
    return TensorDescriptor(x, shape, strides, [1, rows // plan.unit, 1, plan.unit, width], memory)


def kernel_arguments(q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor | None, plan: Plan) -> dict[str, Any]:
    """Every argument of the kernel by name; out (B, N, H, D) and lse (B, H, S, longest set) are allocated here."""
    batch, tokens, heads, head_dim = q.shape
    longest = tokens // plan.period * plan.unit + min(tokens % plan.period, plan.unit)
    query_blocks = -(-longest // (2 * plan.rows))
    views = {}
    for name, x, rows in (("q", q, plan.rows), ("k", k, plan.keys), ("v", v, plan.keys)):
        views[f"{name}_low"] = _view(x, rows, plan.widths[0], plan)
        views[f"{name}_high"] = _view(x, rows, plan.widths[-1], plan)
    return views | dict(
        key_lengths=key_lengths, out=q.new_empty(q.shape),
        lse=q.new_full((batch, heads, plan.sparse_n, longest), -math.inf, dtype=torch.float32),
        scale=head_dim**-0.5, tokens=tokens, heads=heads, query_blocks=query_blocks,
        tiles=batch * heads * plan.sparse_n * query_blocks, longest=longest, plan=plan,
    )  # fmt: skip


def hopper_forward(
    q: Tensor, k: Tensor, v: Tensor, mode: str = "full", sparse_n: int = 4, key_lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """out (B, N, H, D) contiguous in q's dtype, lse (B, H, S, longest set) float32, -inf past a shorter set's end.

    q, k, v are (B, N, H, D) of one shape and dtype on a Hopper GPU, key_lengths (B,) int32 or None. Raises ValueError
    where `supports` says no, on shapes and dtypes that do not fit, and on strides that the copy engine cannot address.
    """
    if not q.shape == k.shape == v.shape or not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v differ in shape or dtype: {[(tuple(x.shape), x.dtype) for x in (q, k, v)]}")
    if key_lengths is not None and (key_lengths.shape != q.shape[:1] or key_lengths.dtype != torch.int32):
        raise ValueError(f"key_lengths {tuple(key_lengths.shape)} {key_lengths.dtype} must be int32 ({q.shape[0]},)")
    if not supports(q.dtype, q.shape[3], mode, sparse_n, q.shape[1]):
        raise ValueError(f"no Hopper kernel for {q.dtype}, {tuple(q.shape)}, mode {mode!r}, sparse_n {sparse_n}")
    arguments = kernel_arguments(q, k, v, key_lengths, make_plan(q.shape[3], mode, sparse_n))
    grid = min(multiprocessors(q.device), arguments["tiles"])
    skiparse_attention_hopper_fwd_kernel[(grid,)](**arguments, num_warps=4)
    return arguments["out"], arguments["lse"]


def builds(arch: int) -> list[KernelBuild]:
    """What to compile ahead of time, with GluonASTSource: each D in each mode for sm_90, nothing elsewhere."""
    found, kernel = [], skiparse_attention_hopper_fwd_kernel
    cases = [(head_dim, mode) for head_dim in HEAD_DIMS for mode in MODES if arch == 90]
    for head_dim, mode in cases:
        plan = make_plan(head_dim, mode, sparse_n=4)
        types = dict(key_lengths="*i32", out="*bf16", lse="*fp32", scale="fp32", plan="constexpr")
        x = torch.empty(1, 16, 1, head_dim, dtype=torch.bfloat16)
        for name, view in kernel_arguments(x, x, x, None, plan).items():
            if isinstance(view, TensorDescriptor):
                types[name] = f"tensordesc<bf16{view.block_shape},{view.layout!r}>"
        signature = {name: types.get(name, "i32") for name in kernel.arg_names}
        config = f"{2 * plan.rows}x{plan.keys} D{head_dim} {mode} bf16 gluon"
        expects = ("HGMMA", "UTMALDG", "USETMAXREG")
        found.append(
            KernelBuild(kernel, arch, config, signature, {"plan": plan}, ("out", "lse"), 4, plan.stages, expects)
        )
    return found
