"""Launches the Triton kernels of 3D RoPE: configurations, grids and buffers."""

import torch
import triton
from osp_fast.kernels import tuning
from osp_fast.kernels.launch import architecture, current, resident_programs, with_contiguous_channels
from osp_fast.kernels.rope3d_kernels import rope3d_bwd_kernel, rope3d_fwd_kernel
from osp_fast.kernels.tuning import RowConfig
from torch import Tensor

KERNELS = ("rope3d forward", "rope3d backward")
Size = tuple[int, int, int]


def tile_constants(head_dim: int, axes: int = 3) -> dict[str, int]:
    """The constants of a tile of pairs; `axes` is 1 where nothing is rotated."""
    return dict(D=head_dim, HALF=head_dim // (2 * axes), PAIRS=triton.next_power_of_2(head_dim // 2))


def tile_rows_of(passes: int, num_warps: int, head_dim: int, dtype: torch.dtype) -> int:
    """Rows of a tile in which each thread holds `passes` times 16 bytes of first halves, and as many of second ones."""
    pairs = tile_constants(head_dim)["PAIRS"]
    return max(1, passes * 32 * num_warps * 16 // dtype.itemsize // pairs)


def candidates(kernel: str, arch: int, dtype: torch.dtype, head_dim: int, norm: bool) -> list[RowConfig]:
    """The configurations worth timing of one of `KERNELS`, the chosen one first.

    A multiprocessor needs some 32 KiB under way. A thread waits for 64 bytes a pass forward, 96 backward, 160 backward
    with norm, and 6 of 8 lanes work; one pass takes 48, 62 and 168 registers (bf16, D = 96, sm_90), which lets 40, 32
    and 12 warps be resident: 60, 72 and 45 KiB. Programs that walk are as many as can be resident.
    """
    if arch == 0:  # the interpreter: several blocks, and one that ends early
        return [RowConfig(16, 1, programs=1)]

    def config(passes: int, num_warps: int, programs: int = 1) -> RowConfig:
        return RowConfig(tile_rows_of(passes, num_warps, head_dim, dtype), num_warps, programs=programs)

    if kernel == "rope3d backward" and norm:
        return [config(1, 4, 2 if arch >= 100 else 3), config(1, 4, 6), config(1, 8, 1)]
    return [config(1, 4), config(2, 4), config(1, 8), config(2, 8)]


def rope3d_forward(
    q: Tensor,
    k: Tensor,
    q_out: Tensor,
    k_out: Tensor,
    axes: Tensor,
    size: Size,
    start: int,
    positions: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
) -> None:
    """Writes rotated q, k (B, N, H, D) into q_out, k_out, which may be q and k themselves."""
    batch, tokens, heads, head_dim = q.shape
    if q.numel() == 0:
        return
    norm = q_weight is not None
    config = tuning.pick(KERNELS[0], candidates(KERNELS[0], architecture(q.device), q.dtype, head_dim, norm))
    with current(q.device):
        rope3d_fwd_kernel[(triton.cdiv(tokens * heads, config.rows), batch)](
            q, k, q_out, k_out, axes, positions, q_weight, k_weight,
            *q.stride()[:3], *k.stride()[:3], *q_out.stride()[:3], *k_out.stride()[:3],
            tokens, start, *size, eps,
            H=heads, **tile_constants(head_dim), POSITIONS=positions is not None, NORM=norm,
            ROWS=config.rows, num_warps=config.num_warps,
        )  # fmt: skip


def rope3d_backward(
    q_grad: Tensor,
    k_grad: Tensor,
    v_grad: Tensor | None,
    axes: Tensor,
    size: Size,
    start: int,
    positions: Tensor | None,
    q: Tensor | None,
    k: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of the inputs, (B, N, 3 or 2, H, D) contiguous, and of both norm weights, (2, D) float32.

    q, k: what was normalised, only with norm; without v_grad the result has q's and k's alone, without norm the second
    one is empty.
    """
    q_grad, k_grad, v_grad, q, k = (with_contiguous_channels(x) for x in (q_grad, k_grad, v_grad, q, k))
    batch, tokens, heads, head_dim = q_grad.shape
    norm = q_weight is not None
    parts = 2 if v_grad is None else 3
    grad = torch.empty((batch, tokens, parts, heads, head_dim), dtype=q_grad.dtype, device=q_grad.device)
    if grad.numel() == 0:
        return grad, grad.new_zeros((2 * norm, head_dim), dtype=torch.float32)
    config = tuning.pick(KERNELS[1], candidates(KERNELS[1], architecture(grad.device), grad.dtype, head_dim, norm))
    blocks = triton.cdiv(tokens * heads, config.rows)
    programs = resident_programs(grad.device, config.programs, batch, blocks) if norm else blocks
    sums = torch.empty((batch * programs, 2, head_dim), dtype=torch.float32, device=grad.device) if norm else None
    no_strides = (0, 0, 0)
    with current(grad.device):
        rope3d_bwd_kernel[(programs, batch)](
            q_grad, k_grad, v_grad, *grad.unbind(2), *((None,) if v_grad is None else ()),
            axes, positions, q, k, q_weight, k_weight, sums,
            *q_grad.stride()[:3], *k_grad.stride()[:3], *(no_strides if v_grad is None else v_grad.stride()[:3]),
            grad.stride(0), grad.stride(1), head_dim,
            *(q.stride()[:3] if norm else no_strides), *(k.stride()[:3] if norm else no_strides),
            tokens, start, *size, blocks, eps,
            H=heads, **tile_constants(head_dim), POSITIONS=positions is not None, NORM=norm, HAS_V=v_grad is not None,
            ROWS=config.rows, num_warps=config.num_warps,
        )  # fmt: skip
    return grad, sums.sum(0) if norm else grad.new_empty((0, head_dim), dtype=torch.float32)
