"""How the projection from pieces is launched: versions, blocks, views; and its gradients, which are PyTorch's products.

"descriptor" reads pieces and weight through TMA boxes (sm_90 and sm_100, 16 bits), "pointer" computes every address
(sm_80 and newer, and what descriptors cannot express). `choose_version` decides.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from osp_fast.kernels import tuning
from osp_fast.kernels.launch import architecture, current, multiprocessors
from osp_fast.kernels.piece_projection_kernels import piece_projection_fwd_kernel
from osp_fast.kernels.skiparse_sets import split_head_dim
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

FORWARD = "piece_projection forward"  # the kernel's name in `tuning.pick`
VERSIONS = ("auto", "descriptor", "pointer")


@dataclass(frozen=True)
class ProductConfig:
    """One way to run the kernel: rows and output channels of a tile. A step sums over one head."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    def __str__(self) -> str:
        return f"{self.block_m}x{self.block_n} {self.num_warps} warps {self.num_stages} stages"


class Pieces(NamedTuple):
    """Pieces of equal width, which follow each other.

    more: whether they are those of the ranks with one head more; begin: of the first in the buffer, in elements
    ranks: how many; heads: of each, one or more; head: the first of the first
    """

    more: bool
    begin: int
    ranks: int
    heads: int
    head: int


def pieces_of(sizes: Sequence[int], ranks: int) -> list[Pieces]:
    """The one or two kinds of pieces that a buffer for (B, n, H, D), `sizes`, consists of."""
    batch, tokens, heads, head_dim = sizes
    fewer, with_more = heads // ranks, heads % ranks
    head = with_more * (fewer + 1)
    found = [Pieces(True, 0, with_more, fewer + 1, 0)] if with_more else []
    if fewer:
        found.append(Pieces(False, head * head_dim * batch * tokens, ranks - with_more, fewer, head))
    return found


def rows_of(buffer: Tensor, pieces: Pieces, sizes: Sequence[int]) -> Tensor:
    """(ranks, n * B, heads * D), a view of these pieces."""
    batch, tokens, _, head_dim = sizes
    width = pieces.heads * head_dim
    end = pieces.begin + pieces.ranks * batch * tokens * width
    return buffer[pieces.begin : end].view(pieces.ranks, batch * tokens, width)


def columns_of(weight: Tensor, pieces: Pieces, head_dim: int) -> Tensor:
    """(ranks, out, heads * D), the columns of weight (out, H * D) that belong to these pieces: a view."""
    first, width = pieces.head * head_dim, pieces.heads * head_dim
    return weight[:, first : first + pieces.ranks * width].unflatten(1, (pieces.ranks, width)).transpose(0, 1)


def product_forward(
    buffer: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    add: Tensor | None,
    sizes: Sequence[int],
    ranks: int,
    version: str,
) -> Tensor:
    """The projection (B, n, out). Raises ValueError for a version that cannot serve."""
    batch, tokens, heads, head_dim = sizes
    features = weight.shape[0]
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    add = add if add is None or add.stride(2) == 1 else add.contiguous()
    buffer = buffer.contiguous()
    out = torch.empty((batch, tokens, features), dtype=buffer.dtype, device=buffer.device)
    if out.numel() == 0:
        return out
    descriptors = reads_through_descriptors(version, buffer, weight, head_dim)
    arch = architecture(buffer.device)
    config = tuning.pick(FORWARD, candidates(arch, buffer.dtype, head_dim, descriptors))
    low, high = split_head_dim(head_dim)
    views: list[TensorDescriptor | None] = [None] * 6
    if descriptors:
        views = _views(buffer, weight, sizes, ranks, config)
    tiles = triton.cdiv(batch * tokens, config.block_m) * triton.cdiv(features, config.block_n)
    with current(buffer.device):
        piece_projection_fwd_kernel[(min(tiles, multiprocessors(buffer.device)),)](
            buffer, weight, bias, add, out, *views,
            weight.stride(0), *((0, 0) if add is None else add.stride()[:2]), batch, tokens,
            H=heads, D=head_dim, RANKS=ranks, OUT=features, LOW=low, HIGH=high,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, HAS_BIAS=bias is not None, HAS_ADD=add is not None,
            DESCRIPTORS=descriptors, PRECISION=precision(),
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return out


def buffer_gradient(rows_grad: Tensor, weight: Tensor, sizes: Sequence[int], ranks: int) -> Tensor:
    """The gradient of the buffer, in its layout, from the output's (n * B, out): a product for each width of pieces."""
    batch, tokens, heads, head_dim = sizes
    grad = torch.empty(batch * tokens * heads * head_dim, dtype=rows_grad.dtype, device=rows_grad.device)
    for pieces in pieces_of(sizes, ranks):
        many = rows_grad.expand(pieces.ranks, -1, -1)
        torch.bmm(many, columns_of(weight, pieces, head_dim), out=rows_of(grad, pieces, sizes))
    return grad


def weight_gradient(rows_grad: Tensor, buffer: Tensor, sizes: Sequence[int], ranks: int) -> Tensor:
    """The gradient of the weight (out, H * D): a product for each width of pieces, which gives their columns."""
    _, _, heads, head_dim = sizes
    grad = torch.empty((rows_grad.shape[1], heads * head_dim), dtype=rows_grad.dtype, device=rows_grad.device)
    for pieces in pieces_of(sizes, ranks):
        many = rows_grad.t().expand(pieces.ranks, -1, -1)
        torch.bmm(many, rows_of(buffer, pieces, sizes), out=columns_of(grad, pieces, head_dim))
    return grad


def precision() -> str:
    """How float32 is multiplied: as PyTorch would multiply matrices."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def choose_version(arch: int, dtype: torch.dtype, head_dim: int) -> str:
    """descriptor or pointer: what serves on an architecture, if tensors lie as descriptors need them."""
    whole = sum(split_head_dim(head_dim)) == head_dim  # a box sees no mask: it would reach into the next head
    return "descriptor" if 90 <= arch < 120 and dtype.itemsize == 2 and whole else "pointer"


def reads_through_descriptors(version: str, buffer: Tensor, weight: Tensor, head_dim: int) -> bool:
    """Whether descriptors serve. Raises ValueError if they are asked for and cannot."""
    arch = architecture(buffer.device)
    starts = (buffer.data_ptr(), weight.data_ptr(), weight.stride(0) * weight.element_size())
    fits = not any(start % 16 for start in starts) and weight.stride(0) >= weight.shape[1]
    # The interpreter has no architecture, and multiplies no bfloat16: there a call is as on Hopper in 16 bits.
    case = (arch, buffer.dtype) if arch else (90, torch.bfloat16)
    fits = fits and choose_version(*case, head_dim) == "descriptor"
    if version == "descriptor" and not fits:
        raise ValueError("these tensors cannot be read through descriptors here: use version pointer, or auto")
    return fits and (version == "descriptor" or (version == "auto" and arch > 0))


def candidates(arch: int, dtype: torch.dtype, head_dim: int, descriptors: bool) -> list[ProductConfig]:
    """The configurations worth timing, the chosen one first."""
    if arch == 0:  # the interpreter: several blocks, and one that ends early
        return [ProductConfig(16, 32, 4, 1)]
    if dtype == torch.float32:
        return [ProductConfig(64, 64, 8, 1), ProductConfig(64, 32, 4, 2)]
    if not descriptors:
        return [ProductConfig(128, 128, 8, 3), ProductConfig(128, 128, 8, 2), ProductConfig(128, 64, 4, 3)]
    if arch >= 100:
        return [ProductConfig(128, 128, 8, 3), ProductConfig(128, 256, 8, 2)]
    large = [ProductConfig(128, 256, 8, 3)] if head_dim <= 96 else []  # of shared memory
    return [*large, ProductConfig(128, 256, 8, 2), ProductConfig(128, 128, 8, 3)]


def _views(
    buffer: Tensor, weight: Tensor, sizes: Sequence[int], ranks: int, config: ProductConfig
) -> list[TensorDescriptor | None]:
    """Descriptors of the pieces with one head more, of the others, and of the weight: boxes of LOW, then of HIGH."""
    low, high = split_head_dim(sizes[3])
    found: dict[bool, list[TensorDescriptor | None]] = {True: [None, None], False: [None, None]}
    for pieces in pieces_of(sizes, ranks):
        rows = rows_of(buffer, pieces, sizes).flatten(0, 1)
        found[pieces.more] = _boxes(rows, config.block_m, low, high)
    return [*found[True], *found[False], *_boxes(weight, config.block_n, low, high)]


def _boxes(x: Tensor, rows: int, low: int, high: int) -> list[TensorDescriptor | None]:
    shape, strides = list(x.shape), [x.stride(0), 1]
    return [TensorDescriptor(x, shape, strides, [rows, width]) if width else None for width in (low, high)]
