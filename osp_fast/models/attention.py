"""The attention layers of the DiT over the skiparse operation.

Shape suffixes: b batch, n tokens, h heads, d head dimension, l text tokens.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from osp_fast.kernels.rope3d import Rope3D, rope3d
from osp_fast.models.attention_backends import BY_DEVICE, AttentionBackend
from osp_fast.models.token_exchange import TokenExchange

MODE_WORDS = {"full": "full", "single": "single skip", "group": "group skip"}


class VisibleKeys(NamedTuple):
    """Which keys attention may see: `mask` (B, M), true = visible, and `lengths` (B,), int32; None = all.

    The mask says it all. Keys from `lengths` on cost no work, so that padding at the end is free.
    """

    mask: Tensor | None = None
    lengths: Tensor | None = None

    @classmethod
    def from_mask(cls, mask: Tensor | None) -> "VisibleKeys":
        """Of a mask (B, M), 1 = real token, or None; the lengths end behind the last real token of each sample."""
        if mask is None:
            return cls()
        mask = mask.bool()
        places = torch.arange(1, mask.shape[1] + 1, dtype=torch.int32, device=mask.device)
        return cls(mask, torch.where(mask, places, 0).amax(1))


class TextKeys(NamedTuple):
    """Keys and values of a text in one block's cross-attention, (B, L, H, D) each."""

    keys: Tensor
    values: Tensor


class SelfAttention(nn.Module):
    """Skiparse self-attention with 3D RoPE on queries and keys; q, k, v are one product."""

    def __init__(self, width: int, heads: int, mode: str, sparse_n: int):
        super().__init__()
        self.heads, self.mode, self.sparse_n = heads, mode, sparse_n
        self.backend: AttentionBackend = BY_DEVICE
        self.exchange: TokenExchange | None = None
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, rope: Rope3D, tokens: VisibleKeys) -> Tensor:
        """x (B, N, width) -> (B, N, width); with an exchange this rank's tokens, where `tokens` are all of the clip."""
        qkv_bn3hd = self.qkv(x).unflatten(-1, (3, self.heads, -1))
        if self.exchange is not None:
            return self.exchange.attend(self, qkv_bn3hd, rope, tokens)
        q_bnhd, k_bnhd, v_bnhd = rope3d(qkv_bn3hd, rope, inplace=True)
        return self.out(self.attend(q_bnhd, k_bnhd, v_bnhd, tokens).flatten(2))

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, tokens: VisibleKeys, mode: str | None = None, sparse_n: int | None = None
    ) -> Tensor:
        """q and k, already rotated, and v (B, N, h, D) of any number of heads -> (B, N, h, D).

        mode, sparse_n: instead of the layer's, where the tokens are in another order or are those of some sets
        """
        return self.backend.function(q, k, v, mode or self.mode, sparse_n or self.sparse_n, *tokens)


class CrossAttention(nn.Module):
    """Every token attends to the real text tokens; keys and values are one product."""

    mode, sparse_n = "full", 1

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.backend: AttentionBackend = BY_DEVICE
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def text_keys(self, text: Tensor) -> TextKeys:
        """text (B, L, width) -> its keys and values."""
        return TextKeys(*self.kv(text).unflatten(-1, (2, self.heads, -1)).unbind(2))

    def forward(self, x: Tensor, text: Tensor | TextKeys, text_tokens: VisibleKeys) -> Tensor:
        """x (B, N, width), text (B, L, width) or its keys and values -> (B, N, width)."""
        q_bnhd = self.q(x).unflatten(-1, (self.heads, -1))
        k_blhd, v_blhd = text if isinstance(text, TextKeys) else self.text_keys(text)
        out_bnhd = self.backend.function(q_bnhd, k_blhd, v_blhd, self.mode, self.sparse_n, *text_tokens)
        return self.out(out_bnhd.flatten(2))


def describe_attention(layers: Iterable[tuple[SelfAttention, CrossAttention]]) -> str:
    """Which backend serves the attention layers of which block, in words; `layers` are those of each block in turn."""
    serves: dict[str, dict[str, list[int]]] = {}
    blocks = 0
    for block, (self_attention, cross_attention) in enumerate(layers):
        blocks += 1
        for layer, kind in ((self_attention, MODE_WORDS[self_attention.mode]), (cross_attention, "cross")):
            backend = layer.backend
            name = f"{backend.name} ({backend.version(layer.mode, layer.sparse_n)})"
            serves.setdefault(name, {}).setdefault(kind, []).append(block)
    sentences = []
    for name, kinds in serves.items():
        cross = kinds.pop("cross", [])
        parts = []
        if kinds:
            listed = ", ".join(f"{block_ranges(indices)} ({kind})" for kind, indices in kinds.items())
            plural = "s" * (sum(map(len, kinds.values())) > 1)
            parts.append(f"self-attention of block{plural} {listed}")
        if cross:
            which = "all" if len(cross) == blocks else f"block{'s' * (len(cross) > 1)} {block_ranges(cross)}"
            parts.append(f"cross-attention of {which}")
        sentences.append(f"{name} serves " + ", and ".join(parts))
    return "; ".join(sentences)


def block_ranges(indices: Sequence[int]) -> str:
    """Ascending block numbers in short: "0-1, 30-31", "2-28 even", "3-29 odd"."""
    if len(indices) > 2 and all(after - before == 2 for before, after in pairwise(indices)):
        return f"{indices[0]}-{indices[-1]} {'odd' if indices[0] % 2 else 'even'}"
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
