"""The attention layers of the DiT over the skiparse operation.

Shape suffixes: b batch, n tokens, h heads, d head dimension, l text tokens.
"""

from torch import Tensor, nn

from osp_fast.kernels.rope3d import rope3d_ref
from osp_fast.kernels.skiparse_attention import skiparse_attention_ref


class SelfAttention(nn.Module):
    """Skiparse self-attention with 3D RoPE on queries and keys; q, k, v are one product."""

    def __init__(self, width: int, heads: int, mode: str, sparse_n: int):
        super().__init__()
        self.heads, self.mode, self.sparse_n = heads, mode, sparse_n
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], key_mask: Tensor | None) -> Tensor:
        """x (B, N, width), rope = (cos, sin) tables, key_mask (B, N) or None -> (B, N, width)."""
        q_bnhd, k_bnhd, v_bnhd = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        q_bnhd, k_bnhd = rope3d_ref(q_bnhd, *rope), rope3d_ref(k_bnhd, *rope)
        return self.out(skiparse_attention_ref(q_bnhd, k_bnhd, v_bnhd, self.mode, self.sparse_n, key_mask).flatten(2))


class CrossAttention(nn.Module):
    """Every token attends to the real text tokens; keys and values are one product."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, text: Tensor, text_mask: Tensor | None) -> Tensor:
        """x (B, N, width), text (B, L, width), text_mask (B, L) or None -> (B, N, width)."""
        q_bnhd = self.q(x).unflatten(-1, (self.heads, -1))
        k_blhd, v_blhd = self.kv(text).unflatten(-1, (2, self.heads, -1)).unbind(2)
        return self.out(skiparse_attention_ref(q_bnhd, k_blhd, v_blhd, "full", key_mask=text_mask).flatten(2))
