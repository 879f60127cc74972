"""The output projection of attention straight from the pieces that an all-to-all has brought, without unpacking them.

    y[b, t] = bias + add[b, t] + sum over ranks r of  piece_r[t, b] . weight[:, columns of r]

A piece holds this rank's n tokens of the heads of rank r, (n, B, heads_r * D); pieces follow each other in one flat
buffer, as `sequence_pack.output_pieces` views it. Head h is columns h D .. h D + D - 1 of weight (out, H * D); its rows
may be farther apart than that, as the heads of one round are some columns of a wider matrix. `add` (B, n, out) is what
another round has given. bfloat16, float16 and float32; summed in float32 over all pieces and rounded once. Units of
several skip sets are not pieces of heads: they have to be unpacked.

FLOPs: 2 B n H D out, backward twice as many. Bytes in 16 bits: 2 B n H D + 2 H D out + 2 B n out, `add` 2 B n out more.
For n = 4800 tokens, 8 ranks and d = H D = out = 2304 that is 51 GFLOP and 55 MB, 64 us at the rate of a large matrix
product: it is bound by products. Predicted on one H100 SXM, not yet measured on a GPU:

    this kernel                                                         107 us   474 TFLOP/s
    unpacking (21 us), then one product by cuBLAS (90 us)               111 us   22 MB more memory, 44 MB more traffic
    a product of cuBLAS for each piece, adding to y (8 times 25 us)     200 us   y read and rounded 7 times more

So there is little time to win over unpacking, unless the kernel does better than the cautious model of its spec; what
it surely saves is the unpacked copy and a launch. Adding piece by piece loses on all counts: each of eight products of
288 columns reads and writes y, 44 MB, and takes as long as that does. Two rounds of heads, with an exchange in between,
read and write y once more, either way.

The gradient of the buffer is written in its own layout and that of the weight by columns, each by one batched product
of PyTorch for pieces of equal width, of which there are one or two kinds. Nothing is copied with one sample; with
several the output's gradient is first laid out as the tokens are. The method is the plain sum of a product by parts.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from osp_fast.kernels.launch import check_triton, constant_path
from osp_fast.kernels.piece_projection_launch import VERSIONS, buffer_gradient, product_forward, weight_gradient
from osp_fast.kernels.sequence_pack import output_pieces
from osp_fast.kernels.sequence_pack_layout import SequenceLayout
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


def project_pieces(
    buffer: Tensor, weight: Tensor, bias: Tensor | None, layout: SequenceLayout, add: Tensor | None = None
) -> Tensor:
    """(B, n, out) of the flat buffer that this rank received, with weight (out, H * D), bias (out,), add (B, n, out).

    All in one type. Triton on CUDA, the reference elsewhere; `OSP_FAST_KERNELS` forces one. Raises ValueError on
    shapes, types and devices that do not fit, and on a layout with several sets.
    """
    if constant_path(buffer.device) == "triton":
        return project_pieces_triton(buffer, weight, bias, layout, add)
    _check(buffer, weight, bias, layout, add)
    return project_pieces_ref(buffer, weight, bias, layout, add)


def project_pieces_triton(
    buffer: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layout: SequenceLayout,
    add: Tensor | None = None,
    version: str = "auto",
) -> Tensor:
    """`project_pieces` by the Triton kernel alone; `version` forces one of `piece_projection_launch.VERSIONS`.

    Raises ValueError also where it cannot run.
    """
    if version not in VERSIONS:
        raise ValueError(f"version {version!r} is unknown: choose from {', '.join(VERSIONS)}")
    _check(buffer, weight, bias, layout, add)
    check_triton("project_pieces", buffer)
    sizes = [layout.batch, layout.tokens_of(layout.rank), layout.heads, layout.head_dim]
    return torch.ops.osp_fast.piece_projection(buffer, weight, bias, add, sizes, layout.ranks, version)


def project_pieces_ref(
    buffer: Tensor, weight: Tensor, bias: Tensor | None, layout: SequenceLayout, add: Tensor | None = None
) -> Tensor:
    """The reference: pieces side by side, one product in at least float32, outside of autocast."""
    wide = torch.promote_types(buffer.dtype, torch.float32)
    with torch.autocast(buffer.device.type, enabled=False):
        rows = torch.cat(output_pieces(buffer, layout), 2).transpose(0, 1).to(wide)
        y = F.linear(rows, weight.to(wide), None if bias is None else bias.to(wide))
    return (y if add is None else y + add).to(buffer.dtype)


def _check(buffer: Tensor, weight: Tensor, bias: Tensor | None, layout: SequenceLayout, add: Tensor | None) -> None:
    if layout.sets > 1:
        raise ValueError(f"pieces of {layout.sets} sets are no pieces of heads: unpack them first")
    output_pieces(buffer, layout)
    width = layout.heads * layout.head_dim
    if weight.dim() != 2 or weight.shape[1] != width:
        raise ValueError(f"weight {tuple(weight.shape)} must be (out, {width}), as the layout says")
    for name, x, shape in (
        ("bias", bias, weight.shape[:1]),
        ("add", add, (layout.batch, layout.tokens_of(layout.rank), weight.shape[0])),
    ):
        if x is not None and x.shape != shape:
            raise ValueError(f"{name} {tuple(x.shape)} must be {tuple(shape)}")
    for name, x in (("weight", weight), ("bias", bias), ("add", add)):
        if x is not None and (x.dtype != buffer.dtype or x.device != buffer.device):
            raise ValueError(f"{name} must be {buffer.dtype} on {buffer.device}, as the buffer is, not {x.dtype}")


@torch.library.custom_op("osp_fast::piece_projection", mutates_args=())
def _forward(
    buffer: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    add: Tensor | None,
    sizes: list[int],
    ranks: int,
    version: str,
) -> Tensor:
    """sizes: (B, n, H, D)."""
    return product_forward(buffer, weight, bias, add, sizes, ranks, version)


@_forward.register_fake
def _(buffer, weight, bias, add, sizes, ranks, version):
    return buffer.new_empty((*sizes[:2], weight.shape[0]))


@torch.library.custom_op("osp_fast::piece_projection_buffer_gradient", mutates_args=())
def _buffer_gradient(rows_grad: Tensor, weight: Tensor, sizes: list[int], ranks: int) -> Tensor:
    """See `buffer_gradient`."""
    return buffer_gradient(rows_grad, weight, sizes, ranks)


@_buffer_gradient.register_fake
def _(rows_grad, weight, sizes, ranks):
    batch, tokens, heads, head_dim = sizes
    return rows_grad.new_empty((batch * tokens * heads * head_dim,))


@torch.library.custom_op("osp_fast::piece_projection_weight_gradient", mutates_args=())
def _weight_gradient(rows_grad: Tensor, buffer: Tensor, sizes: list[int], ranks: int) -> Tensor:
    """See `weight_gradient`."""
    return weight_gradient(rows_grad, buffer, sizes, ranks)


@_weight_gradient.register_fake
def _(rows_grad, buffer, sizes, ranks):
    return rows_grad.new_empty((rows_grad.shape[1], sizes[2] * sizes[3]))


def _save_for_backward(ctx, inputs, output) -> None:
    buffer, weight, _, _, ctx.sizes, ctx.ranks, _ = inputs
    ctx.save_for_backward(buffer, weight)


def _gradients(ctx, grad):
    buffer, weight = ctx.saved_tensors
    wants_buffer, wants_weight, wants_bias, wants_add, *_ = ctx.needs_input_grad
    rows = grad.transpose(0, 1).reshape(-1, weight.shape[0])  # as tokens lie in the pieces
    ours = torch.ops.osp_fast
    return (
        ours.piece_projection_buffer_gradient(rows, weight, ctx.sizes, ctx.ranks) if wants_buffer else None,
        ours.piece_projection_weight_gradient(rows, buffer, ctx.sizes, ctx.ranks) if wants_weight else None,
        grad.sum((0, 1)) if wants_bias else None,
        grad if wants_add else None,
        *(None,) * 3,
    )


_forward.register_autograd(_gradients, setup_context=_save_for_backward)


def product_flops(sizes: Sequence[int], features: int) -> int:
    """Of the product, and of each of its two gradients; sizes: (B, n, H, D)."""
    batch, tokens, heads, head_dim = sizes
    return 2 * batch * tokens * heads * head_dim * features


@register_flop_formula(torch.ops.osp_fast.piece_projection)
def _forward_flops(buffer_shape, weight_shape, bias_shape, add_shape, sizes, *args, **kwargs) -> int:
    return product_flops(sizes, weight_shape[0])


@register_flop_formula(
    [torch.ops.osp_fast.piece_projection_buffer_gradient, torch.ops.osp_fast.piece_projection_weight_gradient]
)
def _backward_flops(rows_grad_shape, other_shape, sizes, *args, **kwargs) -> int:
    return product_flops(sizes, rows_grad_shape[1])
