"""A clip on several ranks the way upstream shares it, for comparison: heads only, and a copy around every send.

Each rank holds consecutive tokens in every block. q, k and v are put in order by heads, sent, and put in order by
tokens, each by itself, and attention's output the other way: four all-to-alls and eight copies in a block, none of them
hidden behind computing. Tokens and heads must divide by the ranks.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from osp_fast.kernels.rope3d import Rope3D, rope3d
from torch import Tensor

from osp_fast.errors import UserError
from osp_fast.models.attention import SelfAttention, VisibleKeys
from osp_fast.parallel.collectives import Splits, all_answering
from osp_fast.parallel.links import Link
from osp_fast.parallel.sequence_plan import SequencePlan
from osp_fast.parallel.shared_clip import SharedClip
from osp_fast.parallel.token_layout import CONSECUTIVE, TokenLayout


class UpstreamExchange:
    """A `TokenExchange` of `ranks` ranks, of which this is number `rank`; everyone: the way to all of them."""

    def __init__(self, ranks: int, rank: int, sparse_n: int, everyone: Link):
        self.ranks, self.rank, self.sparse_n, self.everyone = ranks, rank, sparse_n, everyone

    def kinds(self, modes: Sequence[str]) -> list[str]:
        """Tokens never move."""
        return [CONSECUTIVE] * len(modes)

    def answering(self) -> AbstractContextManager:
        """Within it a collective that fails raises `RankLost`."""
        return all_answering()

    def clip(self, tokens: int, heads: int, device: torch.device) -> SharedClip:
        """A clip of so many tokens. Raises `UserError` where tokens or heads do not divide."""
        if tokens % self.ranks or heads % self.ranks:
            raise UserError(
                f"{tokens} tokens or {heads} heads do not divide among {self.ranks} ranks, as upstream asks"
            )
        layout = TokenLayout(SequencePlan(self.ranks), tokens, self.sparse_n)
        return SharedClip(layout, self.rank, 1, device, self.everyone)

    def attend(self, layer: SelfAttention, qkv: Tensor, rope: Rope3D, tokens: VisibleKeys) -> Tensor:
        """qkv (B, n, 3, H, D) of this rank's tokens -> (B, n, width), projected."""
        own = qkv.shape[1]
        positions = torch.arange(self.rank * own, (self.rank + 1) * own, dtype=torch.int32, device=qkv.device)
        q, k, v = rope3d(qkv, rope._replace(positions=positions), inplace=True)
        out = layer.attend(*(self._to_heads(x) for x in (q, k, v)), tokens)
        return layer.out(self._to_tokens(out).flatten(2))

    def move(self, compute: Callable[[slice], Tensor], tokens: int) -> Tensor:
        """Tokens never move: this is never asked for."""
        raise AssertionError("tokens that lie in one order in all blocks were told to move")

    def _to_heads(self, x: Tensor) -> Tensor:
        """(B, n, H, D) -> all tokens (B, N, H / ranks, D)."""
        by_rank = x.unflatten(2, (self.ranks, -1)).permute(2, 0, 1, 3, 4).contiguous()
        return torch.cat(self._sent(by_rank).unbind(), dim=1)

    def _to_tokens(self, x: Tensor) -> Tensor:
        """(B, N, H / ranks, D) -> (B, n, H, D)."""
        by_rank = x.unflatten(1, (self.ranks, -1)).transpose(0, 1).contiguous()
        return torch.cat(self._sent(by_rank).unbind(), dim=2)

    def _sent(self, by_rank: Tensor) -> Tensor:
        """(ranks, ...), a piece for each rank -> the same shape, a piece from each."""
        piece = [by_rank[0].numel()] * self.ranks

        def splits(rank: int) -> Splits:
            return Splits(piece, piece)

        coming = self.everyone.begin(by_rank.flatten(), splits, "upstream")
        return self.everyone.arrived(coming, splits).view(by_rank.shape)
