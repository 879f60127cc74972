"""Skiparse attention: softmax(q k^T / sqrt(D)) v among the tokens of one set.

Token p is in set 0 (mode "full"), p mod k ("single") or (p div k) mod k ("group"); it attends to the tokens of its own
set. q is (B, N, H, D), k and v are (B, M, H, D) in the token order that the projections write; M differs from N only in
cross-attention (mode "full"). `key_mask` (B, M) is true for keys that may be seen; a query that sees no key gives zero.
N need not divide by k or k^2. Source: the Open-Sora-Plan v1.3 report, section "Skiparse attention".

FLOPs: 4 B H D N M forward in mode full, a k-th of that in the skip modes. Bytes of a kernel without gathers, in bf16:
2 B H D (2 N + 2 M) forward.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

MODES = ("full", "single", "group")


def skiparse_attention(
    q: Tensor, k: Tensor, v: Tensor, mode: str = "full", sparse_n: int = 4, key_mask: Tensor | None = None
) -> Tensor:
    """Attention within skip sets; see the module's docstring. Returns (B, N, H, D) in q's dtype.

    Raises ValueError on an unknown mode, shapes that do not fit, or lengths that differ in a skip mode.
    """
    _check(q, k, v, mode, sparse_n, key_mask)
    return skiparse_attention_ref(q, k, v, mode, sparse_n, key_mask)


def skiparse_attention_ref(
    q: Tensor, k: Tensor, v: Tensor, mode: str = "full", sparse_n: int = 4, key_mask: Tensor | None = None
) -> Tensor:
    """The reference: gather each set, run PyTorch's scaled_dot_product_attention on it, scatter back."""
    if key_mask is not None:
        key_mask = key_mask.bool()
    if mode == "full" or sparse_n == 1:
        return _dense(q, k, v, key_mask)
    batch, tokens = q.shape[:2]
    period = sparse_n if mode == "single" else sparse_n * sparse_n
    padding = -tokens % period
    if padding and key_mask is None:
        key_mask = q.new_ones((batch, tokens), dtype=torch.bool)
    sets = [_to_sets(F.pad(x, (0, 0, 0, 0, 0, padding)), mode, sparse_n) for x in (q, k, v)]
    if key_mask is not None:
        key_mask = _to_sets(F.pad(key_mask, (0, padding)), mode, sparse_n)
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


def _check(q: Tensor, k: Tensor, v: Tensor, mode: str, sparse_n: int, key_mask: Tensor | None) -> None:
    if mode not in MODES:
        raise ValueError(f"mode {mode!r} is unknown: choose from {', '.join(MODES)}")
    if sparse_n < 1:
        raise ValueError(f"sparse_n {sparse_n} must be at least 1")
    if q.dim() != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise ValueError(f"shapes do not fit: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; (B, N, H, D)")
    if mode != "full" and q.shape[1] != k.shape[1]:
        raise ValueError(f"mode {mode!r} needs as many keys as queries, not {k.shape[1]} and {q.shape[1]}")
    if key_mask is not None and key_mask.shape != k.shape[:2]:
        raise ValueError(f"key_mask {tuple(key_mask.shape)} must be (B, keys) = {tuple(k.shape[:2])}")
