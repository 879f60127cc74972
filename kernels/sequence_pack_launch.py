"""Launches the Triton kernels of the packing for an all-to-all: configurations, grids and buffers."""

from collections.abc import Sequence

import torch
import triton
from osp_fast.kernels import tuning
from osp_fast.kernels.launch import architecture, current, resident_programs, with_contiguous_channels
from osp_fast.kernels.rope3d_launch import Size, tile_constants, tile_rows_of
from osp_fast.kernels.sequence_pack_kernels import sequence_pack_kernel, sequence_unpack_kernel
from osp_fast.kernels.tuning import RowConfig
from torch import Tensor

KERNELS = ("sequence_pack forward", "sequence_pack backward")


def candidates(kernel: str, arch: int, dtype: torch.dtype, head_dim: int, parts: int, norm: bool) -> list[RowConfig]:
    """The configurations worth timing of one of `KERNELS`, the chosen one first.

    parts: 3 for q, k, v, 1 for a tensor alone, of which a thread then takes twice as many rows. As for
    `rope3d_launch.candidates`, the aim is 32 KiB and more under way on a multiprocessor.
    """
    if arch == 0:  # the interpreter: several blocks, and one that ends early
        return [RowConfig(16, 1, programs=1)]

    def config(passes: int, num_warps: int, programs: int = 1) -> RowConfig:
        return RowConfig(tile_rows_of(passes, num_warps, head_dim, dtype), num_warps, programs=programs)

    if kernel == KERNELS[1] and norm:
        return [config(1, 4, 2 if arch >= 100 else 3), config(1, 4, 6), config(1, 8, 1)]
    few = [config(1, 4), config(1, 8), config(2, 4)]
    return few if parts == 3 else [config(2, 4), config(2, 8), *few[:2]]


def pack(
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor,
    axes: Tensor | None,
    size: Size,
    start: int,
    positions: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    ranks: int,
    sets: int,
    run: int,
) -> Tensor:
    """Pieces of q, k, v (B, n, H, D), or of v alone, one after the other in a flat buffer.

    axes, size, start, positions: of a `Rope3D` by which q and k are rotated, axes None for no rotation
    ranks, sets, run: of a `SequenceLayout`
    """
    q, k, v = (with_contiguous_channels(x) for x in (q, k, v))
    parts = 1 if q is None else 3
    batch, tokens, heads, head_dim = v.shape
    buffer = torch.empty(parts * v.numel(), dtype=v.dtype, device=v.device)
    if v.numel() == 0:
        return buffer
    norm = q_weight is not None
    options = candidates(KERNELS[0], architecture(v.device), v.dtype, head_dim, parts, norm)
    config = tuning.pick(KERNELS[0], options)
    with current(v.device):
        sequence_pack_kernel[(triton.cdiv(tokens * heads, config.rows), batch)](
            q, k, v, buffer, axes, positions, q_weight, k_weight,
            *_strides(q), *_strides(k), *_strides(v),
            batch, tokens, start, *size, eps,
            H=heads, **tile_constants(head_dim, 1 if axes is None else 3), RANKS=ranks, SETS=sets, RUN=run,
            QK=parts == 3, ROPE=axes is not None, POSITIONS=positions is not None, NORM=norm,
            ROWS=config.rows, num_warps=config.num_warps,
        )  # fmt: skip
    return buffer


def unpack(buffer: Tensor, sizes: Sequence[int], ranks: int, sets: int, run: int) -> Tensor:
    """(B, n, H, D), `sizes`, from pieces of one tensor: the inverse of `pack` for v alone."""
    out = torch.empty(sizes, dtype=buffer.dtype, device=buffer.device)
    _unpack(buffer, (out,), None, (0, 0, 0), 0, None, None, None, None, None, 1.0, ranks, sets, run)
    return out


def pack_backward(
    buffer: Tensor,
    sizes: Sequence[int],
    axes: Tensor | None,
    size: Size,
    start: int,
    positions: Tensor | None,
    q: Tensor | None,
    k: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    ranks: int,
    sets: int,
    run: int,
) -> tuple[Tensor, Tensor]:
    """Gradients of qkv, (B, n, 3, H, D), and of both norm weights, (2, D) float32, from pieces of gradients.

    sizes: (B, n, H, D); q, k: what was normalised, only with norm; without it the second result is empty.
    """
    grad = _empty_qkv(buffer, sizes)
    rope = (axes, size, start, positions)
    sums = _unpack(buffer, grad.unbind(2), *rope, q, k, q_weight, k_weight, eps, ranks, sets, run)
    head_dim = grad.shape[4]
    if q_weight is None:
        return grad, grad.new_empty((0, head_dim), dtype=torch.float32)
    return grad, grad.new_zeros((2, head_dim), dtype=torch.float32) if sums is None else sums.sum(0)


def rounds_backward(
    buffers: Sequence[Tensor],
    sizes: Sequence[int],
    axes: Tensor | None,
    size: Size,
    start: int,
    positions: Tensor | None,
    heads: Sequence[int],
    ranks: int,
    sets: int,
    run: int,
) -> Tensor:
    """The gradient of qkv, (B, n, 3, H, D), from pieces of each range of `heads` heads: a launch for each."""
    grad = _empty_qkv(buffers[0], sizes)
    for buffer, part in zip(buffers, grad.split(list(heads), 3), strict=True):
        outs = part.unbind(2)
        _unpack(buffer, outs, axes, size, start, positions, None, None, None, None, 1.0, ranks, sets, run)
    return grad


def _empty_qkv(buffer: Tensor, sizes: Sequence[int]) -> Tensor:
    batch, tokens, heads, head_dim = sizes
    return torch.empty((batch, tokens, 3, heads, head_dim), dtype=buffer.dtype, device=buffer.device)


def _unpack(
    buffer: Tensor,
    outs: tuple[Tensor, ...],
    axes: Tensor | None,
    size: Size,
    start: int,
    positions: Tensor | None,
    q: Tensor | None,
    k: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    ranks: int,
    sets: int,
    run: int,
) -> Tensor | None:
    """Writes outs, q, k, v or one tensor (B, n, H, D); the programs' sums for the norm weights, if there are any."""
    buffer, q, k = (with_contiguous_channels(x) for x in (buffer, q, k))
    batch, tokens, heads, head_dim = outs[-1].shape
    if outs[-1].numel() == 0:
        return None
    norm = q_weight is not None
    options = candidates(KERNELS[1], architecture(buffer.device), buffer.dtype, head_dim, len(outs), norm)
    config = tuning.pick(KERNELS[1], options)
    blocks = triton.cdiv(tokens * heads, config.rows)
    programs = resident_programs(buffer.device, config.programs, batch, blocks) if norm else blocks
    sums = None
    if norm:
        sums = torch.empty((batch * programs, 2, head_dim), dtype=torch.float32, device=buffer.device)
    with current(buffer.device):
        sequence_unpack_kernel[(programs, batch)](
            buffer, *(outs if len(outs) == 3 else (None, None, *outs)), axes, positions, q, k, q_weight, k_weight, sums,
            *_strides(outs[-1]), *_strides(q), *_strides(k),
            batch, tokens, start, *size, blocks, eps,
            H=heads, **tile_constants(head_dim, 1 if axes is None else 3), RANKS=ranks, SETS=sets, RUN=run,
            QK=len(outs) == 3, ROPE=axes is not None, POSITIONS=positions is not None, NORM=norm,
            ROWS=config.rows, num_warps=config.num_warps,
        )  # fmt: skip
    return sums


def _strides(x: Tensor | None) -> tuple[int, int, int]:
    """Of batch, token and head; zeros for a tensor that is not there."""
    return (0, 0, 0) if x is None else x.stride()[:3]
