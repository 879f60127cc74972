"""The DiT's blocks as the original code runs them: what `reference` is in the suites `model`, `train` and `sample`.

PyTorch's kernels one after another, in the type of the weights (its training and sampling have all of the DiT in
bfloat16, and float32 weights only in the optimizer):

- q, k and v are three products, the text's k and v two; norm, scale, shift, gate and sum are operations of their own.
- RoPE goes axis by axis: cos and sin looked up for every token, x * cos + (halves swapped) * sin, the parts joined.
- Every attention is memory-efficient SDPA with an additive mask in the computing type: 0 where a key is real, -10000
  where it is not. It is there although all keys are real, as (batch of sets, heads, 1, keys), broadcast over queries;
  it is made once in a forward.
- In skip blocks clips are padded to a multiple of sparse_n^2 tokens, the padding masked. Single skip needs no copy on
  its way in, group skip rearranges q, k and v, and both come back by one copy at most. Cross-attention does the same,
  with the text's keys and values repeated for every set.

Where the original does more, this does less: its copy of attention's output behind each call, a division by one behind
each output projection, and positions of bfloat16. Patches, embeddings and the head are those of the reference path.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from osp_fast.kernels.rope3d import Rope3D
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from osp_fast.models.attention import VisibleKeys
from osp_fast.models.dit import DiT
from osp_fast.models.dit_block import Block, Pending

HIDDEN, PADDED = -10_000.0, -9_980.0


def use_upstream_blocks(dit: DiT) -> DiT:
    """Let a DiT's blocks compute so; `recompute_blocks` decides what is recomputed still. Returns the model."""
    shared = _Shared()
    for block in dit.transformer_blocks:
        block.forward = partial(_forward, block, shared)
    return dit


class _Shared:
    """Masks of one forward, and tables of angles, that all blocks have together."""

    def __init__(self) -> None:
        self._real: tuple[Any, Any] = (None, None)
        self._masks: dict[tuple, Tensor] = {}
        self._angles: dict[tuple, list[tuple[Tensor, Tensor, Tensor]]] = {}

    def masks(self, x_bnd: Tensor, tokens: VisibleKeys, text: Tensor, text_tokens: VisibleKeys, block: Block) -> Any:
        """Those of self- and cross-attention in such a block, (B, sets * heads, 1, keys)."""
        if self._real[0] is not tokens or self._real[1] is not text_tokens:
            self._real, self._masks = (tokens, text_tokens), {}
        layer = block.self_attention
        key = layer.mode, layer.sparse_n
        if key not in self._masks:
            own = _additive(tokens.mask, x_bnd)
            if layer.mode != "full":
                own = F.pad(own, (0, -own.shape[1] % layer.sparse_n**2), value=PADDED)
            sets = _sets(own[..., None, None], layer.mode, layer.sparse_n).flatten(2).transpose(1, 2)
            of_text = _additive(text_tokens.mask, text)[:, None].expand(-1, sets.shape[1], -1)
            self._masks[key] = tuple(x.repeat_interleave(layer.heads, 1)[:, :, None] for x in (sets, of_text))
        return self._masks[key]

    def angles(self, rope: Rope3D, x: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """For each axis where every token is, and cos and sin of each place, (length, D / 3) in x's type."""
        key = rope.size, x.dtype, x.device
        if key not in self._angles:
            places = torch.cartesian_prod(*(torch.arange(length, device=x.device) for length in rope.size)).unbind(1)
            lines = [torch.cat((part, part), dim=-1).to(x.dtype).split(rope.size) for part in rope.axes]
            self._angles[key] = list(zip(places, *lines, strict=True))
        return self._angles[key]


def _additive(mask: Tensor | None, like: Tensor) -> Tensor:
    """(B, M): 0 where a key is real."""
    if mask is None:
        return like.new_zeros(like.shape[:2])
    return (1 - mask.to(like.dtype)) * HIDDEN


def _forward(
    block: Block,
    shared: _Shared,
    x: Tensor,
    pending: Pending | None,
    time: Tensor,
    rope: Rope3D,
    tokens: VisibleKeys,
    text: Tensor,
    text_tokens: VisibleKeys,
) -> tuple[Tensor, None]:
    """As `Block.forward`, with nothing left to add."""
    run = partial(_block, block, shared)
    arguments = (x, time, rope, tokens, text, text_tokens)
    if block.recompute is None or not torch.is_grad_enabled():
        return run(*arguments), None
    return checkpoint(run, *arguments, use_reentrant=False), None


def _block(
    block: Block,
    shared: _Shared,
    x: Tensor,
    time: Tensor,
    rope: Rope3D,
    tokens: VisibleKeys,
    text: Tensor,
    text_tokens: VisibleKeys,
) -> Tensor:
    shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = (block.scale_shift_table + time).chunk(6, dim=1)
    own, cross, mode = block.self_attention, block.cross_attention, block.self_attention.mode
    skip = own.heads, mode, own.sparse_n
    mask, text_mask = shared.masks(x, tokens, text, text_tokens, block)
    normed = block.norm1(x) * (1 + scale_a) + shift_a
    q, k, v = (part.unflatten(-1, (own.heads, -1)) for part in _products(own.qkv, normed, 3))
    angles = shared.angles(rope, q)
    q, k = _rotated(q, angles), _rotated(k, angles)
    x = gate_a * own.out(_attend(q, *(_gathered(one, mode, own.sparse_n) for one in (k, v)), mask, skip)) + x
    q = cross.q(x).unflatten(-1, (cross.heads, -1))
    k, v = (part.unflatten(-1, (cross.heads, -1)) for part in _products(cross.kv, text, 2))
    if mode != "full":
        k, v = (one.repeat(1, 1, own.sparse_n, 1) for one in (k, v))
    x = cross.out(_attend(q, k, v, text_mask, skip)) + x
    normed = block.norm2(x) * (1 + scale_f) + shift_f
    return gate_f * block.ff(normed) + x


def _products(fused: torch.nn.Linear, x: Tensor, count: int) -> list[Tensor]:
    """The parts of a fused product, one by one."""
    return [F.linear(x, *part) for part in zip(fused.weight.chunk(count), fused.bias.chunk(count), strict=True)]


def _rotated(x_bnhd: Tensor, angles: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    parts = []
    for part, (places, cos, sin) in zip(x_bnhd.chunk(3, dim=-1), angles, strict=True):
        first, second = part.chunk(2, dim=-1)
        swapped = torch.cat((-second, first), dim=-1)
        parts.append(part * F.embedding(places, cos)[:, None] + swapped * F.embedding(places, sin)[:, None])
    return torch.cat(parts, dim=-1)


def _attend(q_bnhd: Tensor, k_bmhd: Tensor, v_bmhd: Tensor, mask: Tensor, skip: tuple[int, str, int]) -> Tensor:
    """(B, N, d) of queries in token order and of keys in sets, which are further heads."""
    _, mode, sparse_n = skip
    tokens = q_bnhd.shape[1]
    queries = (x.transpose(1, 2) for x in (_gathered(q_bnhd, mode, sparse_n), k_bmhd, v_bmhd))
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION if q_bnhd.is_cuda else SDPBackend.MATH):
        out = F.scaled_dot_product_attention(*queries, attn_mask=mask).transpose(1, 2)
    return _scattered(out, mode, sparse_n, tokens, q_bnhd.shape[2]).flatten(2)


def _gathered(x_bnhd: Tensor, mode: str, sparse_n: int) -> Tensor:
    """(B, N, H, D) -> (B, L, sets * H, D), padded by zeros."""
    missing = -x_bnhd.shape[1] % sparse_n**2
    if mode != "full" and missing:
        x_bnhd = F.pad(x_bnhd, (0, 0, 0, 0, 0, missing))
    return _sets(x_bnhd, mode, sparse_n)


def _sets(x_bnhd: Tensor, mode: str, sparse_n: int) -> Tensor:
    if mode == "full":
        return x_bnhd
    if mode == "single":
        return x_bnhd.unflatten(1, (-1, sparse_n)).flatten(2, 3)
    return x_bnhd.unflatten(1, (-1, sparse_n, sparse_n)).transpose(2, 3).flatten(1, 2).flatten(2, 3)


def _scattered(x_blhd: Tensor, mode: str, sparse_n: int, tokens: int, heads: int) -> Tensor:
    """The inverse of `_gathered`."""
    if mode == "full":
        return x_blhd
    sets = x_blhd.unflatten(2, (sparse_n, heads))
    if mode == "group":
        sets = sets.unflatten(1, (-1, sparse_n)).transpose(2, 3).flatten(1, 2)
    return sets.flatten(1, 2)[:, :tokens]
