"""The tokens of a clip on the ranks that share it: taken from the whole, told where they are, put together again."""

import torch
import torch.nn.functional as F
from torch import Tensor

from osp_fast.kernels.rope3d import Rope3D
from osp_fast.models.attention import VisibleKeys
from osp_fast.parallel.collectives import Splits
from osp_fast.parallel.links import Link
from osp_fast.parallel.token_layout import CONSECUTIVE, TokenLayout


class SharedClip:
    """What the DiT needs of a clip that its rank shares with others: a `SharedTokens`.

    layout: who holds which tokens; rank: which of them this is; everyone: the way to all of them
    sets: that ranks of a scope deal out in units of a set and a head, see `SequenceExchange.shared_sets`
    """

    def __init__(self, layout: TokenLayout, rank: int, sets: int, device: torch.device, everyone: Link):
        self._layout, self._rank, self._sets, self._device, self._everyone = layout, rank, sets, device, everyone
        self._orders: dict[tuple[str, str], Tensor] = {}

    def share(self, x: Tensor, kind: str) -> Tensor:
        """This rank's tokens (B, n, C) of all (B, N, C), as they lie in blocks of that kind."""
        if self._is_plain(kind):
            return x.narrow(1, self._layout.first(self._rank), self._layout.count(self._rank))
        return x.index_select(1, self._order(kind, "own"))

    def place(self, kind: str, mode: str, rope: Rope3D, tokens: VisibleKeys, batch: int) -> tuple[Rope3D, VisibleKeys]:
        """Of all tokens' positions and visibility, what `attend` needs in blocks that attend in `mode`."""
        if not self._is_plain(kind):
            rope = rope._replace(positions=self._order(kind, "positions"))
        return rope, self._visible(kind, mode, tokens, batch)

    def gather(self, x: Tensor, kind: str) -> Tensor:
        """All tokens (B, N, C) on every rank, of this rank's (B, n, C). Each rank's loss must be of all of them."""
        layout = self._layout
        counts = [layout.count(rank) for rank in range(layout.plan.ranks)]
        return _Gathered.apply(x, counts, self._order(kind, "kept"), self._order(kind, "places"), self._everyone)

    def _is_plain(self, kind: str) -> bool:
        """Whether the rank's tokens are consecutive, and none is added."""
        return kind == CONSECUTIVE and self._layout.padded == self._layout.tokens

    def _visible(self, kind: str, mode: str, tokens: VisibleKeys, batch: int) -> VisibleKeys:
        layout = self._layout
        padded = layout.padded != layout.tokens
        units = mode != "full" and self._sets > 1
        if tokens.mask is None and not padded:
            return tokens
        if self._is_plain(kind) and not units:
            return tokens
        order = self._order(kind, f"units {mode}" if units else "full" if mode == "full" else "scope")
        if tokens.mask is None:
            return VisibleKeys.from_mask((order < layout.tokens).expand(batch, -1))
        real = torch.cat((tokens.mask, tokens.mask.new_zeros(len(tokens.mask), layout.padded - layout.tokens)), 1)
        return VisibleKeys.from_mask(real.index_select(1, order))

    def _order(self, kind: str, name: str) -> Tensor:
        """Tokens by place, made once."""
        if (kind, name) not in self._orders:
            self._orders[kind, name] = self._make_order(kind, name).to(self._device)
        return self._orders[kind, name]

    def _make_order(self, kind: str, name: str) -> Tensor:
        layout = self._layout
        own = layout.of_rank(kind, self._rank)
        if name == "kept":  # all that is added comes from behind the clip's last token
            return own.clamp(max=layout.tokens)
        if name in ("own", "positions"):  # what is added repeats it
            own = own.clamp(max=layout.tokens - 1)
            return own if name == "own" else own.to(torch.int32)
        if name == "places":
            return layout.of_all(kind).argsort()[: layout.tokens]
        if name == "full":
            return layout.of_all(kind)
        scope = layout.of_scope(kind, self._rank)
        if name == "scope":
            return scope
        run = layout.sparse_n if kind == CONSECUTIVE and name == "units group" else 1
        return scope.unflatten(0, (-1, self._sets, run)).transpose(1, 2).flatten()


class _Gathered(torch.autograd.Function):
    """Every rank gets the whole and has its gradient, of which its own tokens' part is its own."""

    @staticmethod
    def forward(ctx, x, counts, kept, places, everyone):
        ctx.save_for_backward(kept)
        batch, _, channels = x.shape
        cell = batch * channels
        # Shares may differ, so it is an all-to-all with the same for everyone.
        sent = x.transpose(0, 1).reshape(-1).repeat(len(counts))

        def splits(rank: int) -> Splits:
            return Splits([counts[rank] * cell] * len(counts), [count * cell for count in counts])

        received = everyone.arrived(everyone.begin(sent, splits, "prediction"), splits).view(-1, batch, channels)
        return received.index_select(0, places).transpose(0, 1)

    @staticmethod
    def backward(ctx, grad):
        (kept,) = ctx.saved_tensors
        return F.pad(grad, (0, 0, 0, 1)).index_select(1, kept), None, None, None, None
