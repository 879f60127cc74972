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
tensor (N, B, 3, heads, D) whatever the ranks' lengths. `sequence_pack` norms and rotates q and k on the way, as
`rope3d` does. The exchange itself is not in here; its split sizes are `SequenceLayout`'s, and a gradient's exchange has
the two lists swapped. bfloat16, float16 and float32, in any strides with contiguous channels; D is even.

Bytes in 16 bits, each way one read and one write: `sequence_pack` and its gradient 12 B n H D, with norm 4 more
backward; the gradient of `received_qkv` 12 B N h D with the rank's h heads; `pack_output` 4 B N h D, nothing when B is
1 or the output lies that way already; `unpack_output` and its gradient 4 B n H D, nothing if the projection sums over
`output_pieces`.
"""

from typing import NamedTuple

import torch
from osp_fast.kernels.launch import check_triton, constant_path
from osp_fast.kernels.rope3d import (
    EPS,
    Rope3D,
    check_rope,
    check_weights,
    parts_of,
    rms_norm_ref,
    rotate_ref,
    weight_gradients,
)
from osp_fast.kernels.sequence_pack_launch import pack, pack_backward, unpack
from torch import Tensor

Splits = tuple[list[int], list[int]]


class SequenceLayout(NamedTuple):
    """Who holds what, seen from one rank.

    ranks, rank: how many share the sequence, and which of them this is; tokens, heads: of the whole sequence
    """

    ranks: int
    rank: int
    tokens: int
    heads: int
    head_dim: int
    batch: int = 1

    def tokens_of(self, rank: int) -> int:
        """How many tokens a rank holds before the exchange."""
        return (self.tokens + self.ranks - 1 - rank) // self.ranks

    def heads_of(self, rank: int) -> int:
        """How many heads a rank holds after the exchange; none if there are more ranks than heads."""
        return (self.heads + self.ranks - 1 - rank) // self.ranks

    def first_token(self) -> int:
        """Where in the sequence this rank's tokens start."""
        return self.rank * (self.tokens // self.ranks) + torch.sym_min(self.rank, self.tokens % self.ranks)

    def first_head(self) -> int:
        """Which is the first of this rank's heads."""
        return self.rank * (self.heads // self.ranks) + torch.sym_min(self.rank, self.heads % self.ranks)

    def qkv_splits(self) -> Splits:
        """Elements of q, k, v to and from each rank: `all_to_all_single`'s input_split_sizes, output_split_sizes."""
        to, back = self.output_splits()
        return [3 * size for size in back], [3 * size for size in to]

    def output_splits(self) -> Splits:
        """The same for attention's output on its way back."""
        cell = self.batch * self.head_dim
        own_tokens, own_heads = self.tokens_of(self.rank), self.heads_of(self.rank)
        sent = [self.tokens_of(rank) * own_heads * cell for rank in range(self.ranks)]
        return sent, [own_tokens * self.heads_of(rank) * cell for rank in range(self.ranks)]


def sequence_pack(
    qkv: Tensor,
    layout: SequenceLayout,
    rope: Rope3D | None = None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = EPS,
) -> Tensor:
    """This rank's qkv (B, n, 3, H, D) as a flat buffer to send, with `layout.qkv_splits()`.

    rope: of the whole sequence, `layout` says where in it this rank's tokens are; weights (D,): RMS norm of q and k.
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
    axes, size, start = (None, (0, 0, 0), 0) if rope is None else _from_rank(rope, layout)
    return torch.ops.osp_fast.sequence_pack(qkv, axes, size, start, q_weight, k_weight, eps, layout.ranks)


def received_qkv(buffer: Tensor, layout: SequenceLayout) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (B, N, h, D) of this rank's h heads: views of what it received. One gradient, ready to send back."""
    shape = (layout.tokens, layout.batch, 3, layout.heads_of(layout.rank), layout.head_dim)
    _check_buffer(buffer, shape)
    if constant_path(buffer.device) == "triton" and torch.is_grad_enabled() and buffer.requires_grad:
        check_triton("received_qkv", buffer)
        return _ReceivedQKV.apply(buffer, shape)
    return _views(buffer, shape)


def pack_output(out: Tensor, layout: SequenceLayout) -> Tensor:
    """Attention's output (B, N, h, D) as a flat buffer to send, with `layout.output_splits()`.

    A view of it when B is 1 and it is contiguous, or when it lies token by token in memory. Raises as `sequence_pack`.
    """
    _check_shape("the output", out, (layout.batch, layout.tokens, layout.heads_of(layout.rank), layout.head_dim))
    rows = out.transpose(0, 1)
    if rows.is_contiguous() or constant_path(out.device) != "triton":
        return rows.reshape(-1)
    check_triton("pack_output", out)
    return torch.ops.osp_fast.sequence_pack_parts(None, None, out, 1)


def unpack_output(buffer: Tensor, layout: SequenceLayout) -> Tensor:
    """(B, n, H, D), this rank's tokens with all heads, from the flat buffer that it received."""
    if constant_path(buffer.device) != "triton":
        return torch.cat(output_pieces(buffer, layout), 2).transpose(0, 1).unflatten(2, (-1, layout.head_dim))
    sizes = (layout.batch, layout.tokens_of(layout.rank), layout.heads, layout.head_dim)
    _check_buffer(buffer, sizes)
    check_triton("unpack_output", buffer)
    return torch.ops.osp_fast.sequence_unpack_parts(buffer, *sizes, layout.ranks)


def output_pieces(buffer: Tensor, layout: SequenceLayout) -> list[Tensor]:
    """Views (n, B, heads * D) of what came from each rank: its heads of this rank's tokens.

    The output projection is the sum over ranks of a piece times its columns of the weight, which needs no unpacking:
    sum(piece @ part.T for piece, part in zip(pieces, weight.split([piece.shape[2] ...], 1))) + bias, (n, B, width).
    """
    tokens = layout.tokens_of(layout.rank)
    _check_buffer(buffer, (layout.batch, tokens, layout.heads, layout.head_dim))
    widths = [layout.heads_of(rank) * layout.head_dim for rank in range(layout.ranks)]
    pieces = buffer.split(layout.output_splits()[1])
    return [piece.view(tokens, layout.batch, width) for piece, width in zip(pieces, widths, strict=True)]


def sequence_pack_ref(
    qkv: Tensor,
    layout: SequenceLayout,
    rope: Rope3D | None = None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = EPS,
) -> Tensor:
    """The reference of `sequence_pack`."""
    parts = []
    for x, weight in zip(qkv.unbind(2), (q_weight, k_weight, None), strict=True):
        y = x if weight is None else rms_norm_ref(x, weight, eps)
        if rope is not None and len(parts) < 2:
            y = rotate_ref(y, _from_rank(rope, layout))
        parts.append(y.to(x.dtype))
    rows = torch.stack(parts, 3).transpose(0, 1).transpose(2, 3)  # (n, B, 3, H, D)
    heads = [layout.heads_of(rank) for rank in range(layout.ranks)]
    return torch.cat([piece.flatten() for piece in rows.split(heads, 3)])


def _from_rank(rope: Rope3D, layout: SequenceLayout) -> Rope3D:
    return rope._replace(start=rope.start + layout.first_token())


def _views(buffer: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    return tuple(x.transpose(0, 1) for x in buffer.view(shape).unbind(2))


def _check_qkv(
    qkv: Tensor,
    layout: SequenceLayout,
    rope: Rope3D | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
) -> None:
    parts_of(qkv)
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


@torch.library.custom_op("osp_fast::sequence_pack", mutates_args=())
def _pack(
    qkv: Tensor,
    axes: Tensor | None,
    size: list[int],
    start: int,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    ranks: int,
) -> Tensor:
    return pack(*qkv.unbind(2), axes, size, start, q_weight, k_weight, eps, ranks)


@_pack.register_fake
def _(qkv, axes, size, start, q_weight, k_weight, eps, ranks):
    return qkv.new_empty((qkv.numel(),))


@torch.library.custom_op("osp_fast::sequence_pack_backward", mutates_args=())
def _pack_backward(
    buffer: Tensor,
    sizes: list[int],
    axes: Tensor | None,
    size: list[int],
    start: int,
    qkv: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    ranks: int,
) -> tuple[Tensor, Tensor]:
    """See `pack_backward`; sizes are (B, n, H, D)."""
    q, k = (None, None) if qkv is None else qkv.unbind(2)[:2]
    return pack_backward(buffer, *sizes, axes, size, start, q, k, q_weight, k_weight, eps, ranks)


@_pack_backward.register_fake
def _(buffer, sizes, axes, size, start, qkv, q_weight, k_weight, eps, ranks):
    batch, tokens, heads, head_dim = sizes
    grad = buffer.new_empty((batch, tokens, 3, heads, head_dim))
    return grad, grad.new_empty((0 if q_weight is None else 2, head_dim), dtype=torch.float32)


def _save_pack(ctx, inputs, output) -> None:
    qkv, axes, *ctx.place, q_weight, k_weight, ctx.eps, ctx.ranks = inputs
    ctx.sizes = (*qkv.shape[:2], *qkv.shape[3:])
    ctx.save_for_backward(axes, None if q_weight is None else qkv, q_weight, k_weight)


def _pack_gradients(ctx, buffer_grad):
    axes, qkv, q_weight, k_weight = ctx.saved_tensors
    grad, weight_grads = torch.ops.osp_fast.sequence_pack_backward(
        buffer_grad, ctx.sizes, axes, *ctx.place, qkv, q_weight, k_weight, ctx.eps, ctx.ranks
    )
    return grad, None, None, None, *weight_gradients(weight_grads, q_weight, k_weight), None, None


_pack.register_autograd(_pack_gradients, setup_context=_save_pack)


@torch.library.custom_op("osp_fast::sequence_pack_parts", mutates_args=())
def _pack_parts(q: Tensor | None, k: Tensor | None, v: Tensor, ranks: int) -> Tensor:
    """Pieces of q, k, v (B, n, H, D) for one rank, or of v alone for `ranks`, as they are."""
    return pack(q, k, v, None, (0, 0, 0), 0, None, None, EPS, ranks)


@_pack_parts.register_fake
def _(q, k, v, ranks):
    return v.new_empty((v.numel() if q is None else 3 * v.numel(),))


@torch.library.custom_op("osp_fast::sequence_unpack_parts", mutates_args=())
def _unpack_parts(buffer: Tensor, batch: int, tokens: int, heads: int, head_dim: int, ranks: int) -> Tensor:
    """(B, n, H, D) from pieces of one tensor."""
    return unpack(buffer, batch, tokens, heads, head_dim, ranks)


@_unpack_parts.register_fake
def _(buffer, batch, tokens, heads, head_dim, ranks):
    return buffer.new_empty((batch, tokens, heads, head_dim))


def _save_parts(ctx, inputs, output) -> None:
    q, _, v, ctx.ranks = inputs
    ctx.three, ctx.sizes = q is not None, v.shape


def _parts_gradients(ctx, grad):
    if not ctx.three:
        return None, None, torch.ops.osp_fast.sequence_unpack_parts(grad, *ctx.sizes, ctx.ranks), None
    batch, tokens, heads, head_dim = ctx.sizes
    return *_views(grad, (tokens, batch, 3, heads, head_dim)), None


def _save_unpack(ctx, inputs, output) -> None:
    ctx.ranks = inputs[5]


_pack_parts.register_autograd(_parts_gradients, setup_context=_save_parts)
_unpack_parts.register_autograd(
    lambda ctx, grad: (torch.ops.osp_fast.sequence_pack_parts(None, None, grad, ctx.ranks), *(None,) * 5),
    setup_context=_save_unpack,
)


class _ReceivedQKV(torch.autograd.Function):
    """Views of the buffer with one gradient for all three, which no operation of a library can give."""

    @staticmethod
    def forward(ctx, buffer, shape):
        return _views(buffer, shape)

    @staticmethod
    def backward(ctx, q_grad, k_grad, v_grad):
        return torch.ops.osp_fast.sequence_pack_parts(q_grad, k_grad, v_grad, 1), None
