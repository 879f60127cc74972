"""The packing's kernels as operations that PyTorch can trace and differentiate.

axes, size, start, positions: of the `Rope3D` of the tokens given, axes None where nothing is rotated
deal: `ranks`, `sets` and `run` of a `SequenceLayout`
"""

import torch
from osp_fast.kernels.rope3d import EPS, weight_gradients
from osp_fast.kernels.sequence_pack_launch import pack, pack_backward, rounds_backward, unpack
from torch import Tensor

NO_ROPE = (None, (0, 0, 0), 0, None)


def views(buffer: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    """q, k, v (B, N, heads, D) of a flat buffer, shape being (N, B, 3, heads, D)."""
    return tuple(x.transpose(0, 1) for x in buffer.view(shape).unbind(2))


@torch.library.custom_op("osp_fast::sequence_pack", mutates_args=())
def _pack(
    qkv: Tensor,
    axes: Tensor | None,
    size: list[int],
    start: int,
    positions: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    deal: list[int],
) -> Tensor:
    return pack(*qkv.unbind(2), axes, size, start, positions, q_weight, k_weight, eps, *deal)


@_pack.register_fake
def _(qkv, axes, size, start, positions, q_weight, k_weight, eps, deal):
    return qkv.new_empty((qkv.numel(),))


@torch.library.custom_op("osp_fast::sequence_pack_backward", mutates_args=())
def _pack_backward(
    buffer: Tensor,
    sizes: list[int],
    axes: Tensor | None,
    size: list[int],
    start: int,
    positions: Tensor | None,
    qkv: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    deal: list[int],
) -> tuple[Tensor, Tensor]:
    """See `pack_backward`; sizes are (B, n, H, D)."""
    q, k = (None, None) if qkv is None else qkv.unbind(2)[:2]
    return pack_backward(buffer, sizes, axes, size, start, positions, q, k, q_weight, k_weight, eps, *deal)


@_pack_backward.register_fake
def _(buffer, sizes, axes, size, start, positions, qkv, q_weight, k_weight, eps, deal):
    batch, tokens, heads, head_dim = sizes
    grad = buffer.new_empty((batch, tokens, 3, heads, head_dim))
    return grad, grad.new_empty((0 if q_weight is None else 2, head_dim), dtype=torch.float32)


def _save_pack(ctx, inputs, output) -> None:
    qkv, axes, *ctx.place, positions, q_weight, k_weight, ctx.eps, ctx.deal = inputs
    ctx.sizes = (*qkv.shape[:2], *qkv.shape[3:])
    ctx.save_for_backward(axes, positions, None if q_weight is None else qkv, q_weight, k_weight)


def _pack_gradients(ctx, buffer_grad):
    axes, positions, qkv, q_weight, k_weight = ctx.saved_tensors
    grad, weight_grads = torch.ops.osp_fast.sequence_pack_backward(
        buffer_grad, ctx.sizes, axes, *ctx.place, positions, qkv, q_weight, k_weight, ctx.eps, ctx.deal
    )
    return grad, *(None,) * 4, *weight_gradients(weight_grads, q_weight, k_weight), None, None


_pack.register_autograd(_pack_gradients, setup_context=_save_pack)


@torch.library.custom_op("osp_fast::sequence_pack_rounds_backward", mutates_args=())
def _rounds_backward(
    buffers: list[Tensor],
    sizes: list[int],
    axes: Tensor | None,
    size: list[int],
    start: int,
    positions: Tensor | None,
    heads: list[int],
    deal: list[int],
) -> Tensor:
    """See `rounds_backward`; sizes are (B, n, H, D)."""
    return rounds_backward(buffers, sizes, axes, size, start, positions, heads, *deal)


@_rounds_backward.register_fake
def _(buffers, sizes, axes, size, start, positions, heads, deal):
    batch, tokens, all_heads, head_dim = sizes
    return buffers[0].new_empty((batch, tokens, 3, all_heads, head_dim))


@torch.library.custom_op("osp_fast::sequence_pack_parts", mutates_args=())
def _pack_parts(q: Tensor | None, k: Tensor | None, v: Tensor, deal: list[int]) -> Tensor:
    """Pieces of q, k, v (B, n, H, D), or of v alone, as they are."""
    return pack(q, k, v, *NO_ROPE, None, None, EPS, *deal)


@_pack_parts.register_fake
def _(q, k, v, deal):
    return v.new_empty((v.numel() if q is None else 3 * v.numel(),))


@torch.library.custom_op("osp_fast::sequence_unpack_parts", mutates_args=())
def _unpack_parts(buffer: Tensor, sizes: list[int], deal: list[int]) -> Tensor:
    """(B, n, H, D), `sizes`, from pieces of one tensor."""
    return unpack(buffer, sizes, *deal)


@_unpack_parts.register_fake
def _(buffer, sizes, deal):
    return buffer.new_empty(sizes)


def _save_parts(ctx, inputs, output) -> None:
    q, _, v, ctx.deal = inputs
    ctx.three, ctx.sizes = q is not None, v.shape


def _parts_gradients(ctx, grad):
    if not ctx.three:
        return None, None, torch.ops.osp_fast.sequence_unpack_parts(grad, ctx.sizes, ctx.deal), None
    batch, tokens, heads, head_dim = ctx.sizes
    return *views(grad, (tokens, batch, 3, heads, head_dim)), None


def _save_unpack(ctx, inputs, output) -> None:
    ctx.deal = inputs[2]


_pack_parts.register_autograd(_parts_gradients, setup_context=_save_parts)
_unpack_parts.register_autograd(
    lambda ctx, grad: (torch.ops.osp_fast.sequence_pack_parts(None, None, grad, ctx.deal), None, None),
    setup_context=_save_unpack,
)


class ReceivedQKV(torch.autograd.Function):
    """Views of the buffer with one gradient for all three, which no operation of a library can give."""

    @staticmethod
    def forward(ctx, buffer, shape):
        return views(buffer, shape)

    @staticmethod
    def backward(ctx, q_grad, k_grad, v_grad):
        return torch.ops.osp_fast.sequence_pack_parts(q_grad, k_grad, v_grad, [1, 1, 1]), None


class PackedRounds(torch.autograd.Function):
    """Buffers of consecutive ranges of heads with one gradient, which slices of qkv would not have."""

    @staticmethod
    def forward(ctx, qkv, axes, size, start, positions, heads, deal):
        batch, tokens, _, all_heads, head_dim = qkv.shape
        ctx.save_for_backward(axes, positions)
        ctx.sizes, ctx.place, ctx.deal = (batch, tokens, all_heads, head_dim), (size, start), (heads, deal)
        return tuple(
            torch.ops.osp_fast.sequence_pack(part, axes, size, start, positions, None, None, EPS, deal)
            for part in qkv.split(heads, 3)
        )

    @staticmethod
    def backward(ctx, *buffer_grads):
        axes, positions = ctx.saved_tensors
        grad = torch.ops.osp_fast.sequence_pack_rounds_backward(
            buffer_grads, ctx.sizes, axes, *ctx.place, positions, *ctx.deal
        )
        return grad, *(None,) * 6
