"""Skiparse attention: softmax(q k^T / sqrt(D)) v among the tokens of one set.

Token p is in set 0 (mode "full"), p mod k ("single") or (p div k) mod k ("group"); it attends to the tokens of its own
set. q is (B, N, H, D), k and v are (B, M, H, D) in the token order that the projections write, in any strides with
contiguous channels; M differs from N only in cross-attention (mode "full"). `key_mask` (B, M) is true for keys that may
be seen; `key_lengths` (B,) hides the tokens from there on, without work for them. A query that sees no key gives zero.
N need not divide by k or k^2. bfloat16, float16, float32; D up to 128. Source: the Open-Sora-Plan v1.3 report, section
"Skiparse attention"; the kernels follow Dao, "FlashAttention-2" (2023), and walk the sets in memory.

FLOPs: 4 B H D N M forward in mode full, a k-th of that in the skip modes; backward 2.5 times as many, 3.5 times when it
is deterministic. Bytes: q, k, v and out once, 2 B H D (2 N + 2 M) forward in 16 bits; from clips of 2,000 tokens on the
products bind, not the memory. No gather, padding or mask is ever written.

The kernels: `skiparse_attention_forward.py`, `skiparse_attention_backward.py` over `skiparse_sets.py`, and the unproven
`skiparse_attention_hopper.py`; launched by `skiparse_attention_launch.py`, configured by `tuning.py`; shapes,
tolerances and predicted times in `skiparse_attention_spec.py`.
"""

import torch
import torch.nn.functional as F
from osp_fast.kernels.launch import architecture, constant_path, current
from osp_fast.kernels.skiparse_attention_launch import (
    VERSIONS,
    attention_backward,
    attention_forward,
    choose_version,
    why_unsupported,
)
from osp_fast.kernels.skiparse_sets import count_sets, longest_set
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

MODES = ("full", "single", "group")


def skiparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mode: str = "full",
    sparse_n: int = 4,
    key_mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    deterministic: bool | None = None,
) -> Tensor:
    """Attention within skip sets; see the module's docstring. Returns (B, N, H, D) in q's dtype.

    Triton on CUDA, the reference elsewhere; `OSP_FAST_KERNELS` forces one. `deterministic` asks for gradients that are
    the same bits each time; None takes `torch.are_deterministic_algorithms_enabled()`.
    Raises ValueError on an unknown mode, shapes that do not fit, or lengths that differ in a skip mode.
    """
    if constant_path(q.device) == "triton":
        return skiparse_attention_triton(q, k, v, mode, sparse_n, key_mask, key_lengths, deterministic)
    check_arguments(q, k, v, mode, sparse_n, key_mask, key_lengths)
    return skiparse_attention_ref(q, k, v, mode, sparse_n, key_mask, key_lengths)


def skiparse_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mode: str = "full",
    sparse_n: int = 4,
    key_mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    deterministic: bool | None = None,
    version: str = "auto",
) -> Tensor:
    """`skiparse_attention` by the Triton kernels alone; `version` forces one of `skiparse_attention_launch.VERSIONS`.

    Raises ValueError also where they cannot run: no GPU, another dtype, D above 128, or a version that does not fit.
    """
    check_arguments(q, k, v, mode, sparse_n, key_mask, key_lengths)
    if version not in VERSIONS:
        raise ValueError(f"version {version!r} is unknown: choose from {', '.join(VERSIONS)}")
    if sparse_n == 1 or mode == "full":
        mode, sparse_n = "full", 1
    if torch.is_autocast_enabled(q.device.type):  # as PyTorch's own attention does
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    return torch.ops.osp_fast.skiparse_attention(
        q, k, v, key_mask, key_lengths, mode, sparse_n, deterministic, version
    )[0]


def serving_version(device: torch.device, dtype: torch.dtype, head_dim: int, mode: str, sparse_n: int) -> str:
    """What `skiparse_attention_triton` runs on `device`, for tensors laid out as the projections write them.

    "descriptor" or "pointer", with ", interpreted" on the CPU. Raises ValueError where it cannot run.
    """
    reason = why_unsupported(device, dtype, head_dim)
    if reason:
        raise ValueError(reason)
    version = choose_version(architecture(device), dtype, head_dim, mode, sparse_n)
    return f"{version}, interpreted" if device.type != "cuda" else version


def skiparse_attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mode: str = "full",
    sparse_n: int = 4,
    key_mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
) -> Tensor:
    """The reference: gather each set, run PyTorch's scaled_dot_product_attention on it, scatter back."""
    if key_mask is not None:
        key_mask = key_mask.bool()
    if key_lengths is not None:
        within = torch.arange(k.shape[1], device=k.device) < key_lengths[:, None]
        key_mask = within if key_mask is None else key_mask & within
    if mode == "full" or sparse_n == 1:
        return _dense(q, k, v, key_mask)
    batch, tokens = q.shape[:2]
    period = sparse_n if mode == "single" else sparse_n * sparse_n
    padding = -tokens % period
    if padding and key_mask is None:
        key_mask = q.new_ones((batch, tokens), dtype=torch.bool)
    if padding:
        q, k, v = (F.pad(x, (0, 0, 0, 0, 0, padding)) for x in (q, k, v))
        key_mask = F.pad(key_mask, (0, padding))
    sets = [_to_sets(x, mode, sparse_n) for x in (q, k, v)]
    if key_mask is not None:
        key_mask = _to_sets(key_mask, mode, sparse_n)
    return _from_sets(_dense(*sets, key_mask), mode, sparse_n, batch)[:, :tokens]


def _dense(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
    q_bhnd, k_bhmd, v_bhmd = (x.transpose(1, 2) for x in (q, k, v))
    if key_mask is None:
        return F.scaled_dot_product_attention(q_bhnd, k_bhmd, v_bhmd).transpose(1, 2)
    # Rows without a visible key: let them see all keys, then zero them, so that no backend meets an empty softmax.
    sees_any = key_mask.any(1)[:, None, None, None]
    visible = key_mask[:, None, None, :] | ~sees_any
    out = F.scaled_dot_product_attention(q_bhnd, k_bhmd, v_bhmd, attn_mask=visible)
    return torch.where(sees_any, out, 0.0).transpose(1, 2)


def _to_sets(x: Tensor, mode: str, sparse_n: int) -> Tensor:
    """(B, N, ...) -> (B * k, N / k, ...): each skip set becomes a sequence of its own."""
    if mode == "single":
        sets = x.unflatten(1, (-1, sparse_n)).transpose(1, 2)
    else:
        sets = x.unflatten(1, (-1, sparse_n, sparse_n)).transpose(1, 2).flatten(2, 3)
    return sets.flatten(0, 1)


def _from_sets(x: Tensor, mode: str, sparse_n: int, batch: int) -> Tensor:
    """The inverse of `_to_sets`."""
    sets = x.unflatten(0, (batch, sparse_n))
    if mode == "single":
        return sets.transpose(1, 2).flatten(1, 2)
    return sets.unflatten(2, (-1, sparse_n)).transpose(1, 2).flatten(1, 3)


def check_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mode: str,
    sparse_n: int,
    key_mask: Tensor | None,
    key_lengths: Tensor | None = None,
) -> None:
    """Raises ValueError for arguments that `skiparse_attention` does not take."""
    if mode not in MODES:
        raise ValueError(f"mode {mode!r} is unknown: choose from {', '.join(MODES)}")
    if sparse_n < 1:
        raise ValueError(f"sparse_n {sparse_n} must be at least 1")
    if q.dim() != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise ValueError(f"shapes do not fit: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; (B, N, H, D)")
    others = [x for x in (k, v, key_mask, key_lengths) if x is not None and x.device != q.device]
    if others:
        raise ValueError(f"all tensors must be on {q.device}, where q is, not on {others[0].device}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one dtype, not {q.dtype}, {k.dtype} and {v.dtype}")
    if mode != "full" and q.shape[1] != k.shape[1]:
        raise ValueError(f"mode {mode!r} needs as many keys as queries, not {k.shape[1]} and {q.shape[1]}")
    if key_mask is not None and key_mask.shape != k.shape[:2]:
        raise ValueError(f"key_mask {tuple(key_mask.shape)} must be (B, keys) = {tuple(k.shape[:2])}")
    if key_lengths is not None and (key_lengths.shape != k.shape[:1] or key_lengths.dtype != torch.int32):
        raise ValueError(f"key_lengths {tuple(key_lengths.shape)} {key_lengths.dtype} must be (B,) int32")


@torch.library.custom_op("osp_fast::skiparse_attention", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    key_lengths: Tensor | None,
    mode: str,
    sparse_n: int,
    deterministic: bool,
    version: str,
) -> tuple[Tensor, Tensor]:
    """out and the log-sum-exp of `attention_forward`; `deterministic` is for the backward."""
    reason = why_unsupported(q.device, q.dtype, q.shape[3])
    if reason:
        raise ValueError(reason)
    with current(q.device):
        return attention_forward(q, k, v, key_mask, key_lengths, mode, sparse_n, version)


@_forward.register_fake
def _(q, k, v, key_mask, key_lengths, mode, sparse_n, deterministic, version):
    batch, tokens, heads, _ = q.shape
    lse = (batch, heads, count_sets(mode, sparse_n), longest_set(tokens, mode, sparse_n))
    return q.new_empty(q.shape), q.new_empty(lse, dtype=torch.float32)


@torch.library.custom_op("osp_fast::skiparse_attention_backward", mutates_args=())
def _backward(
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
    with current(q.device):
        return attention_backward(
            out_grad, q, k, v, out, lse, key_mask, key_lengths, mode, sparse_n, deterministic, version
        )


@_backward.register_fake
def _(out_grad, q, k, v, out, lse, key_mask, key_lengths, mode, sparse_n, deterministic, version):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save_for_backward(ctx, inputs, output) -> None:
    q, k, v, key_mask, key_lengths, *ctx.options = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, key_mask, key_lengths)


def _gradients(ctx, out_grad, _):
    if out_grad is None:
        return (None,) * 9
    q, k, v, out, lse, key_mask, key_lengths = ctx.saved_tensors
    grads = torch.ops.osp_fast.skiparse_attention_backward(
        out_grad, q, k, v, out, lse, key_mask, key_lengths, *ctx.options
    )
    return (*grads, *(None,) * 6)


_forward.register_autograd(_gradients, setup_context=_save_for_backward)


def attention_flops(batch: int, queries: int, keys: int, heads: int, head_dim: int, mode: str, sparse_n: int) -> int:
    """Floating-point operations of the forward's two products: 4 D for every pair of a query and a key of its set."""
    if mode == "full":
        return 4 * batch * heads * head_dim * queries * keys
    longest = -(-queries // sparse_n)
    if mode == "single":
        sizes = [longest - (skip_set >= queries % sparse_n > 0) for skip_set in range(sparse_n)]
    else:
        periods, rest = divmod(queries, sparse_n * sparse_n)
        sizes = [periods * sparse_n + min(max(rest - s * sparse_n, 0), sparse_n) for s in range(sparse_n)]
    return 4 * batch * heads * head_dim * sum(size * size for size in sizes)


@register_flop_formula(torch.ops.osp_fast.skiparse_attention)
def _forward_flops(q_shape, k_shape, v_shape, key_mask, key_lengths, mode, sparse_n, *args, **kwargs) -> int:
    batch, queries, heads, head_dim = q_shape
    return attention_flops(batch, queries, k_shape[1], heads, head_dim, mode, sparse_n)


@register_flop_formula(torch.ops.osp_fast.skiparse_attention_backward)
def _backward_flops(out_grad, q_shape, k_shape, v_shape, out, lse, mask, lengths, mode, sparse_n, *args, **kwargs):
    batch, queries, heads, head_dim = q_shape
    return attention_flops(batch, queries, k_shape[1], heads, head_dim, mode, sparse_n) * 5 // 2
