"""A block of the DiT: self-attention, cross-attention and feed-forward around a residual stream.

Shape suffixes: b batch, n tokens, d width = heads * head dimension.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, noop_context_fn

from osp_fast.kernels.adaln import gate_residual, gate_residual_norm_modulate, norm_modulate
from osp_fast.kernels.rope3d import Rope3D
from osp_fast.models.attention import CrossAttention, SelfAttention, TextKeys, VisibleKeys
from osp_fast.models.token_exchange import TokenExchange

# Makes the two contexts, of forward and of recomputation, that `torch.utils.checkpoint` works in (its `context_fn`).
Recompute = Callable[[], tuple[AbstractContextManager, AbstractContextManager]]


class Pending(NamedTuple):
    """What the last layer made and is still to be added to the residual stream: x + gate * y.

    The norm that follows adds it, in the same pass over memory. y (B, N, d), gate (B, d) or None for 1.
    """

    y: Tensor
    gate: Tensor | None


class Block(nn.Module):
    """Self-attention, cross-attention, feed-forward."""

    def __init__(self, width: int, heads: int, mode: str, sparse_n: int, eps: float, affine: bool):
        """mode, sparse_n: of self-attention, see `skiparse_attention`; eps, affine: of the norms."""
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.empty(6, width))
        self.norm1 = nn.LayerNorm(width, eps, elementwise_affine=affine)
        self.self_attention = SelfAttention(width, heads, mode, sparse_n)
        self.cross_attention = CrossAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps, elementwise_affine=affine)
        self.ff = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        self.recompute: Recompute | None = None
        self.mover: TokenExchange | None = None  # what moves the tokens that the next block has on other ranks

    def forward(
        self,
        x: Tensor,
        pending: Pending | None,
        time: Tensor,
        rope: Rope3D,
        tokens: VisibleKeys,
        text: Tensor | TextKeys,
        text_tokens: VisibleKeys,
    ) -> tuple[Tensor, Pending | None]:
        """x (B, N, d) and what is still to be added to it; time (B, 6, d), text (B, L, d); which of N and L are real.

        In place of the text there may be what `text_keys` made of it.

        Returns the residual stream in x's dtype, without the feed-forward's part, and that part. With `recompute` the
        part is added here: between blocks one tensor is kept then instead of two, at the price of a pass of its own.
        So it is with a `mover`, and other tokens are returned.
        """
        arguments = (x, pending, time, rope, tokens, text, text_tokens)
        if self.recompute is None or not torch.is_grad_enabled():
            return self._forward(*arguments, finish=False)
        options = dict(use_reentrant=False, preserve_rng_state=False)
        if self.mover is not None:  # stopped early, what a move has begun would never be awaited, and stay in memory
            options["early_stop"] = False
        if self.recompute is not noop_context_fn:  # the default, which torch.compile takes only unsaid
            options["context_fn"] = self.recompute
        return checkpoint(self._forward, *arguments, True, **options)

    def text_keys(self, text: Tensor) -> TextKeys:
        """Keys and values of the text (B, L, d) in cross-attention: they depend on nothing else."""
        return self.cross_attention.text_keys(text)

    def _forward(
        self,
        x: Tensor,
        pending: Pending | None,
        time: Tensor,
        rope: Rope3D,
        tokens: VisibleKeys,
        text: Tensor | TextKeys,
        text_tokens: VisibleKeys,
        finish: bool,
    ) -> tuple[Tensor, Pending | None]:
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = time.unbind(1)
        table = self.scale_shift_table.unbind(0)
        x, normed = add_norm_modulate(x, pending, (shift_a, scale_a), table[0:2], self.norm1)
        x = gate_residual(x, gate_a, self.self_attention(normed, rope, tokens), gate_table=table[2])
        added = Pending(self.cross_attention(x, text, text_tokens), None)
        if self.mover is not None:

            def finished(part: slice) -> Tensor:
                y, normed = add_norm_modulate(
                    x[:, part], Pending(added.y[:, part], None), (shift_f, scale_f), table[3:5], self.norm2
                )
                return gate_residual(y, gate_f, self.ff(normed), gate_table=table[5])

            return self.mover.move(finished, x.shape[1]), None
        x, normed = add_norm_modulate(x, added, (shift_f, scale_f), table[3:5], self.norm2)
        if finish:
            return gate_residual(x, gate_f, self.ff(normed), gate_table=table[5]), None
        # The sum with the table's row is made here, in float32 as in the operation: the next block must not need this
        # one's parameters.
        return x, Pending(self.ff(normed), gate_f + table[5].to(torch.promote_types(x.dtype, torch.float32)))


def add_norm_modulate(
    x: Tensor, pending: Pending | None, vectors: Sequence[Tensor], rows: Sequence[Tensor], norm: nn.LayerNorm
) -> tuple[Tensor, Tensor]:
    """x with what was pending added, and its norm modulated, in the dtype that products take.

    vectors: shift and scale of each sample, (B, d); rows: of the table, (d,), added to them.
    """
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    options = dict(shift_table=rows[0], scale_table=rows[1], weight=norm.weight, bias=norm.bias, dtype=dtype)
    if pending is None:
        return x, norm_modulate(x, *vectors, norm.eps, **options)
    return gate_residual_norm_modulate(x, pending.gate, pending.y, *vectors, norm.eps, **options)


def settled(x: Tensor, pending: Pending | None) -> Tensor:
    """x with what was pending added."""
    return x if pending is None else gate_residual(x, pending.gate, pending.y)
