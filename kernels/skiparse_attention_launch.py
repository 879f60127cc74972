"""Launches the Triton kernels of skiparse attention: which version runs, its configuration, grids and buffers.

"descriptor" streams blocks through TMA boxes (sm_90 and sm_100), "pointer" computes every address (sm_80 and newer, and
what descriptors cannot express). `choose_version` is the one place that decides. A third, "warp_specialized", is a
forward scheduled by hand for Hopper; it runs where it is asked for by name, until a GPU has proven it.
"""

import math

import torch
import triton
from osp_fast.kernels import tuning
from osp_fast.kernels.launch import DTYPES, architecture, multiprocessors, obstacle, with_contiguous_channels
from osp_fast.kernels.skiparse_attention_backward import (
    skiparse_attention_bwd_keys_kernel,
    skiparse_attention_bwd_queries_kernel,
    skiparse_attention_bwd_rows_kernel,
)
from osp_fast.kernels.skiparse_attention_forward import skiparse_attention_fwd_kernel
from osp_fast.kernels.skiparse_sets import MODE_NUMBER, count_sets, longest_set, skip_view, split_head_dim
from osp_fast.kernels.spec import UnsupportedCall
from torch import Tensor

LARGEST_HEAD_DIM = 128
VERSIONS = ("auto", "descriptor", "pointer", "warp_specialized")
ROWS_BLOCK = 128  # the row vectors of the backward end on a multiple of this, so that no block needs a bound


def why_unsupported(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why the Triton kernels cannot serve such tensors, in a sentence, or None if they can."""
    reason = obstacle(device)
    if reason is not None:
        return f"the Triton attention kernel {reason}"
    if dtype not in DTYPES:
        return (
            f"the Triton attention kernel takes bfloat16, float16 and float32, not {str(dtype).removeprefix('torch.')}"
        )
    if device.type != "cuda" and dtype == torch.bfloat16:
        return "Triton's interpreter multiplies no bfloat16: use float32 or float16 on the CPU"
    if head_dim > LARGEST_HEAD_DIM:
        return f"the Triton attention kernel takes head dimensions up to {LARGEST_HEAD_DIM}, not {head_dim}"
    return None


def choose_version(arch: int, dtype: torch.dtype, head_dim: int, mode: str, sparse_n: int) -> str:
    """descriptor or pointer: what serves a call on an architecture (90 for Hopper).

    The tensors' strides may still rule descriptors out.
    """
    if not 90 <= arch < 120 or dtype == torch.float32 or sum(split_head_dim(head_dim)) != head_dim or head_dim < 32:
        return "pointer"
    if mode == "group" and sparse_n not in (1, 2, 4, 8, 16):  # a box is a power of two of rows in each dimension
        return "pointer"
    return "descriptor"


def fits_descriptor(x: Tensor) -> bool:
    """Whether x (B, N, H, D) may be viewed through a descriptor: heads side by side, all starts on 16 bytes."""
    batch, _, heads, head_dim = x.shape
    batch_stride, token_stride, head_stride, channel_stride = x.stride()
    side_by_side = channel_stride == 1 and (heads == 1 or head_stride == head_dim)
    apart = token_stride >= heads * head_dim and (batch == 1 or batch_stride >= heads * head_dim)  # not expanded
    strides = (token_stride,) if batch == 1 else (batch_stride, token_stride)
    aligned = all(n % 16 == 0 for n in (x.data_ptr(), *(x.element_size() * n for n in strides)))
    return side_by_side and apart and aligned


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    key_lengths: Tensor | None,
    mode: str,
    sparse_n: int,
    version: str,
) -> tuple[Tensor, Tensor]:
    """out (B, N, H, D) and the natural log-sum-exp (B, H, S, longest set) float32, in set order; -inf for no key."""
    q, k, v = (with_contiguous_channels(x) for x in (q, k, v))
    batch, queries, heads, head_dim = q.shape
    sets, positions = count_sets(mode, sparse_n), longest_set(queries, mode, sparse_n)
    out = torch.empty((batch, queries, heads, head_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, sets, positions), dtype=torch.float32, device=q.device)
    if q.numel() == 0 or k.numel() == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    if version == "warp_specialized":
        from osp_fast.kernels.skiparse_attention_hopper import hopper_forward, supports  # Gluon is an experimental API

        if architecture(q.device) != 90 or key_mask is not None or q.shape != k.shape:
            raise UnsupportedCall("version warp_specialized needs a Hopper GPU, self-attention and no key_mask")
        if not supports(q.dtype, q.shape[3], mode, sparse_n, q.shape[1]):
            raise UnsupportedCall(f"version warp_specialized has no kernel for {q.dtype}, {tuple(q.shape)}, {mode}")
        return hopper_forward(q, k, v, mode, sparse_n, key_lengths)
    call, constants = _call(q, k, v, mode, sparse_n, key_mask, key_lengths, version)
    config = tuning.choose("forward", call)
    work = batch * heads * sets * triton.cdiv(positions, config.block_m)
    residents = multiprocessors(q.device) * max(1, 8 // config.num_warps)  # 255 registers a thread: 8 warps fit
    views = _views(call, mode, sparse_n, config.block_n, k, v)
    skiparse_attention_fwd_kernel[(min(work, residents),)](
        q, k, v, out, lse, _bytes(key_mask), key_lengths, *views,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        batch, heads, queries, k.shape[1], positions, math.log2(math.e) / math.sqrt(head_dim),
        **constants, **_blocks(config),
    )  # fmt: skip
    return out, lse


def attention_backward(
    out_grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    key_mask: Tensor | None,
    key_lengths: Tensor | None,
    mode: str,
    sparse_n: int,
    deterministic: bool,
    version: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, contiguous and in their type. Without descriptors it is always deterministic."""
    if version == "warp_specialized":
        version = "auto"  # it has no backward of its own
    q, k, v = (with_contiguous_channels(x) for x in (q, k, v))
    out = out.contiguous()
    if not fits_descriptor(out_grad):  # a copy costs less than a backward without descriptors
        out_grad = out_grad.contiguous()
    k_grad, v_grad = (torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
    q_grad = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if q.numel() == 0 or k.numel() == 0:
        return q_grad.zero_(), k_grad.zero_(), v_grad.zero_()
    call, constants = _call(q, k, v, mode, sparse_n, key_mask, key_lengths, version)
    batch, queries, heads, head_dim = q.shape
    keys = k.shape[1]
    sets, positions = constants["SETS"], longest_set(queries, mode, sparse_n)
    padded = triton.cdiv(positions, ROWS_BLOCK) * ROWS_BLOCK
    row_lse, row_delta = torch.empty((2, batch, heads, sets, padded), dtype=torch.float32, device=q.device).unbind()
    shared = {name: constants[name] for name in ("MODE", "K", "SETS", "D", "LOW", "HIGH")}
    rows = batch * heads * sets
    skiparse_attention_bwd_rows_kernel[(rows * padded // ROWS_BLOCK,)](
        out, out_grad, lse, row_lse, row_delta, *out_grad.stride()[:3], heads, queries, positions, padded,
        **shared, BLOCK_M=ROWS_BLOCK, num_warps=4,
    )  # fmt: skip

    scale = 1 / math.sqrt(head_dim)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out_grad.stride()[:3])
    mask = _bytes(key_mask)
    fused = call.descriptors and not deterministic
    q_sum = torch.zeros(q.shape, dtype=torch.float32, device=q.device) if fused else None
    config = tuning.choose("keys", call)
    sums = _views(call, mode, sparse_n, config.block_m, q_sum) if fused else (None, None)
    key_positions = longest_set(keys, mode, sparse_n)
    skiparse_attention_bwd_keys_kernel[(rows * triton.cdiv(key_positions, config.block_n),)](
        q, k, v, out_grad, row_lse, row_delta, q_sum, k_grad, v_grad, mask, key_lengths,
        *_views(call, mode, sparse_n, config.block_m, q, out_grad), *sums,
        *strides, heads, queries, keys, key_positions, padded, scale, scale * math.log2(math.e),
        **constants, **_blocks(config), FUSED=fused,
    )  # fmt: skip
    if fused:
        return torch.mul(q_sum, scale, out=q_grad), k_grad, v_grad
    config = tuning.choose("queries", call)
    skiparse_attention_bwd_queries_kernel[(rows * triton.cdiv(positions, config.block_m),)](
        q, k, v, out_grad, row_lse, row_delta, q_grad, mask, key_lengths,
        *_views(call, mode, sparse_n, config.block_n, k, v),
        *strides, heads, queries, keys, positions, padded, scale, scale * math.log2(math.e),
        **constants, **_blocks(config),
    )  # fmt: skip
    return q_grad, k_grad, v_grad


def _call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mode: str,
    sparse_n: int,
    key_mask: Tensor | None,
    key_lengths: Tensor | None,
    version: str,
) -> tuple[tuning.Call, dict]:
    """What the configuration depends on, and the kernels' constants. Raises ValueError for a version that cannot be."""
    head_dim, arch = q.shape[3], architecture(q.device)
    expressible = all(fits_descriptor(x) for x in (q, k, v))
    if version == "auto":
        version = choose_version(arch, q.dtype, head_dim, mode, sparse_n) if expressible else "pointer"
    elif version == "descriptor":
        # The interpreter has no architecture and no bfloat16: there a call is as on Hopper in 16 bits.
        case = (arch, q.dtype) if arch else (90, torch.bfloat16)
        if not expressible or choose_version(*case, head_dim, mode, sparse_n) != "descriptor":
            raise ValueError("these tensors cannot be read through descriptors here: use version pointer, or auto")
    descriptors = version == "descriptor"
    low, high = split_head_dim(head_dim)
    constants = dict(
        MODE=MODE_NUMBER[mode],
        K=sparse_n,
        SETS=count_sets(mode, sparse_n),
        D=head_dim,
        LOW=low,
        HIGH=high,
        HAS_MASK=key_mask is not None,
        HAS_LENGTHS=key_lengths is not None,
        DESCRIPTORS=descriptors,
        PRECISION="tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee",  # of float32 alone
    )
    return tuning.Call(arch, q.dtype, head_dim, mode, key_mask is not None, descriptors), constants


def _views(call: tuning.Call, mode: str, sparse_n: int, rows: int, *tensors: Tensor) -> list:
    """For each tensor its descriptors of the low and the high part of the head dimension; None where there is none."""
    views = []
    for x in tensors:
        for width in split_head_dim(call.head_dim):
            views.append(skip_view(x, mode, sparse_n, rows, width) if call.descriptors and width else None)
    return views


def _blocks(config: tuning.Config) -> dict:
    return dict(
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        TAIL=config.tail,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def _bytes(key_mask: Tensor | None) -> Tensor | None:
    return None if key_mask is None else key_mask.bool().contiguous().view(torch.uint8)
