"""q, k and v to and from the buffers of an all-to-all, for attention over a sequence that P ranks share.

Before the exchange a rank holds some tokens with all heads, (B, n, 3, H, D), afterwards all tokens of some heads
(DeepSpeed-Ulysses, Jacobs et al., 2023). Neither N nor H need divide by P: the first N mod P ranks hold one token
more, the first H mod P ranks one head more. 7 tokens and 5 heads over 3 ranks, B = 1, a cell being D numbers:

    rank 1, its projection's output     what it sends: n rows for each rank, q, k, v side by side
       q       k       v                to rank 0             to rank 1             to rank 2
    t3 01234   01234   01234            t3 q0 q1 k0 k1 v0 v1  t3 q2 q3 k2 k3 v2 v3  t3 q4 k4 v4
    t4 01234   01234   01234            t4 q0 q1 k0 k1 v0 v1  t4 q2 q3 k2 k3 v2 v3  t4 q4 k4 v4

    what rank 0 receives, and attention reads in place    the output that it sends back, and what rank 1 receives
    from rank 0  t0 q0 q1 k0 k1 v0 v1                     to rank 0  t0 o0 o1        from rank 0  t3 o0 o1
                 t1 q0 q1 k0 k1 v0 v1                                t1 o0 o1                     t4 o0 o1
                 t2 q0 q1 k0 k1 v0 v1                                t2 o0 o1        from rank 1  t3 o2 o3
    from rank 1  t3 q0 q1 k0 k1 v0 v1                     to rank 1  t3 o0 o1                     t4 o2 o3
                 t4 q0 q1 k0 k1 v0 v1                                t4 o0 o1        from rank 2  t3 o4
    from rank 2  t5 q0 q1 k0 k1 v0 v1                     to rank 2  t5 o0 o1                     t4 o4
                 t6 q0 q1 k0 k1 v0 v1                                t6 o0 o1

    qkv --sequence_pack--> buffer ==all-to-all==> buffer --received_qkv--> q, k, v (views) --attention--> out
    out --pack_output--> buffer ==all-to-all==> buffer --unpack_output--> (B, n, H, D), or --output_pieces--> views

With a batch each row holds its samples one after the other: pieces are (n, B, 3, heads, D), so that what arrives is one
tensor (N, B, 3, heads, D) whatever the ranks' lengths. Where heads attend within skip sets, ranks can be dealt units of
a set and a head instead (`SequenceLayout.sets`): pieces are (n / sets, B, 3, units, D), a row being a place in the
sets, and attention is full among what a rank receives.

`sequence_pack` norms and rotates q and k on the way, as `rope3d` does. The exchange itself is not in here; its split
sizes are `SequenceLayout`'s, and a gradient's exchange has the two lists swapped. bfloat16, float16 and float32, in any
strides with contiguous channels; D is even.

Bytes in 16 bits, each way one read and one write: `sequence_pack` and its gradient 12 B n H D, with norm 4 more
backward; the gradient of `received_qkv` 12 B N h D with the rank's h heads; `pack_output` 4 B N h D, nothing when B is
1 or the output lies that way already; `unpack_output` and its gradient 4 B n H D, nothing if the projection sums over
`output_pieces`.
"""

from collections.abc import Sequence

import torch
from osp_fast.kernels import sequence_pack_ops
from osp_fast.kernels.launch import check_triton, constant_path
from osp_fast.kernels.rope3d import EPS, Rope3D, check_rope, check_weights, parts_of, rms_norm_ref, rotate_ref
from osp_fast.kernels.sequence_pack_layout import SequenceLayout
from torch import Tensor


def sequence_pack(
    qkv: Tensor,
    layout: SequenceLayout,
    rope: Rope3D | None = None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = EPS,
) -> Tensor:
    """This rank's qkv (B, n, 3, H, D) as a flat buffer to send, with `layout.qkv_splits()`.

    rope: of the whole sequence, `layout` says where in it this rank's tokens are; or with the positions of this rank's
    tokens. weights (D,): RMS norm of q and k.
    Triton on CUDA, the reference elsewhere; `OSP_FAST_KERNELS` forces one. Raises ValueError on what does not fit.
    """
    if constant_path(qkv.device) == "triton":
        return sequence_pack_triton(qkv, layout, rope, q_weight, k_weight, eps)
    _check_qkv(qkv, layout, rope, q_weight, k_weight, eps)
    return sequence_pack_ref(qkv, layout, rope, q_weight, k_weight, eps)


def sequence_pack_triton(
    qkv: Tensor,
    layout: SequenceLayout,
    rope: Rope3D | None = None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = EPS,
) -> Tensor:
    """`sequence_pack` by the Triton kernels alone. Raises ValueError also where they cannot run."""
    _check_qkv(qkv, layout, rope, q_weight, k_weight, eps)
    check_triton("sequence_pack", qkv, *(x for x in (q_weight, k_weight) if x is not None))
    return torch.ops.osp_fast.sequence_pack(qkv, *rope_place(rope, layout), q_weight, k_weight, eps, deal_of(layout))


def sequence_pack_rounds(
    qkv: Tensor, layouts: Sequence[SequenceLayout], rope: Rope3D | None = None
) -> tuple[Tensor, ...]:
    """`sequence_pack` of consecutive ranges of the heads, a buffer for each of `layouts`, which differ in heads alone.

    With several, one round can travel while attention computes another. They have one gradient, (B, n, 3, H, D), which
    a launch for each round fills. Rounds are of heads: with several sets there is one. Raises as `sequence_pack`.
    """
    whole = _check_rounds(layouts)
    if len(layouts) == 1:
        return (sequence_pack(qkv, whole, rope),)
    _check_qkv(qkv, whole, rope, None, None, EPS)
    if constant_path(qkv.device) == "triton":
        check_triton("sequence_pack_rounds", qkv)
        heads = [layout.heads for layout in layouts]
        return sequence_pack_ops.PackedRounds.apply(qkv, *rope_place(rope, whole), heads, deal_of(whole))
    return sequence_pack_rounds_ref(qkv, layouts, rope)


def received_qkv(buffer: Tensor, layout: SequenceLayout) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (B, N, h, D) of this rank's h heads: views of what it received. One gradient, ready to send back.

    With several sets (B, N / sets, units, D), see `SequenceLayout.unit_sets`.
    """
    layout.check()
    shape = (layout.tokens // layout.sets, layout.batch, 3, layout.units_of(layout.rank), layout.head_dim)
    _check_buffer(buffer, shape)
    if constant_path(buffer.device) == "triton" and torch.is_grad_enabled() and buffer.requires_grad:
        check_triton("received_qkv", buffer)
        return sequence_pack_ops.ReceivedQKV.apply(buffer, shape)
    return sequence_pack_ops.views(buffer, shape)


def pack_output(out: Tensor, layout: SequenceLayout) -> Tensor:
    """Attention's output, in the shape of what `received_qkv` gave, as a flat buffer for `layout.output_splits()`.

    A view of it when B is 1 and it is contiguous, or when it lies token by token in memory. Raises as `sequence_pack`.
    """
    layout.check()
    shape = (layout.batch, layout.tokens // layout.sets, layout.units_of(layout.rank), layout.head_dim)
    _check_shape("the output", out, shape)
    rows = out.transpose(0, 1)
    if rows.is_contiguous() or constant_path(out.device) != "triton":
        return rows.reshape(-1)
    check_triton("pack_output", out)
    return torch.ops.osp_fast.sequence_pack_parts(None, None, out, [1, 1, 1])


def unpack_output(buffer: Tensor, layout: SequenceLayout) -> Tensor:
    """(B, n, H, D), this rank's tokens with all heads, from the flat buffer that it received."""
    if constant_path(buffer.device) != "triton":
        units = torch.cat(output_pieces(buffer, layout), 2).unflatten(2, (-1, layout.head_dim))
        return _from_units(units, layout).transpose(0, 1)
    layout.check()
    sizes = (layout.batch, layout.tokens_of(layout.rank), layout.heads, layout.head_dim)
    _check_buffer(buffer, sizes)
    check_triton("unpack_output", buffer)
    return torch.ops.osp_fast.sequence_unpack_parts(buffer, sizes, deal_of(layout))


def output_pieces(buffer: Tensor, layout: SequenceLayout) -> list[Tensor]:
    """Views (n, B, heads * D) of what came from each rank: its heads of this rank's tokens.

    The output projection is the sum over ranks of a piece times its columns of the weight, which needs no unpacking:
    `piece_projection.py`. With several sets (n / sets, B, units * D).
    """
    layout.check()
    tokens = layout.tokens_of(layout.rank)
    _check_buffer(buffer, (layout.batch, tokens, layout.heads, layout.head_dim))
    widths = [layout.units_of(rank) * layout.head_dim for rank in range(layout.ranks)]
    pieces = buffer.split(layout.output_splits()[1])
    return [piece.view(tokens // layout.sets, layout.batch, width) for piece, width in zip(pieces, widths, strict=True)]


def sequence_pack_ref(
    qkv: Tensor,
    layout: SequenceLayout,
    rope: Rope3D | None = None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = EPS,
) -> Tensor:
    """The reference of `sequence_pack`."""
    rows = _rows_ref(qkv, layout, rope, q_weight, k_weight, eps)
    units = [layout.units_of(rank) for rank in range(layout.ranks)]
    return torch.cat([piece.flatten() for piece in rows.split(units, 3)])


def sequence_pack_rounds_ref(
    qkv: Tensor, layouts: Sequence[SequenceLayout], rope: Rope3D | None = None
) -> tuple[Tensor, ...]:
    """The reference of `sequence_pack_rounds`: all heads are rotated, then dealt."""
    whole = _check_rounds(layouts)
    units = [layout.units_of(rank) for layout in layouts for rank in range(layout.ranks)]
    pieces = _rows_ref(qkv, whole, rope, None, None, EPS).split(units, 3)
    ranks = whole.ranks
    return tuple(
        torch.cat([piece.flatten() for piece in pieces[ranks * i : ranks * (i + 1)]]) for i in range(len(layouts))
    )


def _rows_ref(
    qkv: Tensor,
    layout: SequenceLayout,
    rope: Rope3D | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
) -> Tensor:
    """(n / sets, B, 3, units, D): all that is sent, normed and rotated, a line for each place in a set."""
    parts = []
    for x, weight in zip(qkv.unbind(2), (q_weight, k_weight, None), strict=True):
        y = x if weight is None else rms_norm_ref(x, weight, eps)
        if rope is not None and len(parts) < 2:
            y = rotate_ref(y, _from_rank(rope, layout))
        parts.append(y.to(x.dtype))
    return _to_units(torch.stack(parts, 2).transpose(0, 1), layout)


def _to_units(x: Tensor, layout: SequenceLayout) -> Tensor:
    """(n, ..., H, D) -> (n / sets, ..., sets * H, D)."""
    if layout.sets == 1:
        return x
    return x.unflatten(0, (-1, layout.sets, layout.run)).movedim(1, -3).flatten(-3, -2).flatten(0, 1)


def _from_units(x: Tensor, layout: SequenceLayout) -> Tensor:
    """The inverse of `_to_units`."""
    if layout.sets == 1:
        return x
    x = x.unflatten(-2, (layout.sets, layout.heads)).unflatten(0, (-1, layout.run))
    return x.movedim(-3, 1).flatten(0, 2)


def _from_rank(rope: Rope3D, layout: SequenceLayout) -> Rope3D:
    """The rope of this rank's tokens."""
    return rope if rope.positions is not None else rope._replace(start=rope.start + layout.first_token())


def rope_place(rope: Rope3D | None, layout: SequenceLayout) -> tuple:
    """A `Rope3D`'s fields for this rank's tokens, as the operations take them."""
    return sequence_pack_ops.NO_ROPE if rope is None else tuple(_from_rank(rope, layout))


def deal_of(layout: SequenceLayout) -> list[int]:
    """How units are made and dealt, as the operations take it."""
    return [layout.ranks, layout.sets, layout.run]


def _check_rounds(layouts: Sequence[SequenceLayout]) -> SequenceLayout:
    """The layout of all rounds' heads. Raises ValueError for rounds that do not go together."""
    if not layouts:
        raise ValueError("layouts must be one or more, one for each round")
    whole = layouts[0]._replace(heads=sum(layout.heads for layout in layouts))
    if any(layout._replace(heads=whole.heads) != whole for layout in layouts):
        raise ValueError("the layouts of all rounds must be alike but for their heads")
    if len(layouts) > 1 and whole.sets > 1:
        raise ValueError(f"{len(layouts)} rounds of {whole.sets} sets: rounds are of heads, so there must be one")
    return whole


def _check_qkv(
    qkv: Tensor,
    layout: SequenceLayout,
    rope: Rope3D | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
) -> None:
    parts_of(qkv)
    layout.check()
    tokens = layout.tokens_of(layout.rank)
    _check_shape("qkv", qkv, (layout.batch, tokens, 3, layout.heads, layout.head_dim))
    if rope is not None:
        check_rope(_from_rank(rope, layout), tokens, layout.head_dim, qkv.device)
    check_weights(q_weight, k_weight, layout.head_dim, qkv.device, eps)


def _check_shape(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    if x.shape != shape:
        raise ValueError(f"{name} {tuple(x.shape)} must be {shape}, as the layout says")
    if shape[-1] % 2:
        raise ValueError(f"head_dim {shape[-1]} must be even")


def _check_buffer(buffer: Tensor, shape: tuple[int, ...]) -> None:
    elements = 1
    for length in shape:
        elements = elements * length
    if buffer.dim() != 1 or buffer.shape[0] != elements:
        raise ValueError(f"the buffer {tuple(buffer.shape)} must be flat, with the {elements} elements of {shape}")
