"""One clip on several ranks: each computes its own tokens, and where all tokens meet its own heads or skip sets.

Norms, products, cross-attention and feed-forward see one token at a time, so a rank of m computes them for N/m tokens
(`token_layout.py`). For self-attention there are two ways, which `SequencePlan` mixes as m = scope x heads:

- Ulysses (Jacobs et al. 2023, arXiv:2309.14509): two all-to-alls turn a rank's tokens with all heads into all tokens of
  its heads, and back. q, k, v travel in one buffer, which attention reads in place (`kernels/sequence_pack.py` draws
  it), and what comes back is multiplied by the output projection as it lies (`kernels/piece_projection.py`). Heads
  travel in two rounds: one is on its way while attention computes the other.
- Scope: ranks hold whole skip sets, so that blocks that skip need no exchange in attention; tokens move once between
  a block that skips singly and one that skips by groups. All but the last eighth move while the feed-forward computes
  the rest. Blocks with full attention are Ulysses over all ranks, in the order that tokens are in: full attention does
  not mind, and RoPE is told each token's position.

Any N, H and m will do. Where H does not divide by the ranks that share heads, and they have several sets in common,
they share units of a set and a head. All of it has gradients, mirrored: a rank's gradients of the weights are its
tokens' part, to be added up over the group. `exchange_bytes.py` has the bytes.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from osp_fast.kernels.piece_projection import project_pieces
from osp_fast.kernels.rope3d import Rope3D, rope3d
from osp_fast.kernels.sequence_pack import (
    SequenceLayout,
    pack_output,
    received_qkv,
    sequence_pack_rounds,
    unpack_output,
)
from osp_fast.models.attention import SelfAttention, VisibleKeys
from osp_fast.parallel.collectives import Splits, all_answering
from osp_fast.parallel.links import Link
from osp_fast.parallel.sequence_plan import SequencePlan, heads_in_rounds
from osp_fast.parallel.shared_clip import SharedClip
from osp_fast.parallel.token_layout import CONSECUTIVE, SINGLE, TokenLayout


class SequenceExchange:
    """A `TokenExchange` of the ranks of a group.

    plan: how many there are, and how they share; rank: which of them this one is; sparse_n: k of the model
    everyone: the way to all of them; scope: to those with this rank's scope; others: to those with its place in the
    other scopes
    """

    def __init__(self, plan: SequencePlan, rank: int, sparse_n: int, everyone: Link, scope: Link, others: Link):
        self.plan, self.rank, self.sparse_n = plan, rank, sparse_n
        self.everyone, self.scope, self.others = everyone, scope, others
        self._clips: dict[tuple, SharedClip] = {}

    def kinds(self, modes: Sequence[str]) -> list[str]:
        """How tokens lie in each block, given how the blocks attend: full, single or group."""
        if self.plan.scope == 1:
            return [CONSECUTIVE] * len(modes)
        kind, kinds = next((mode for mode in modes if mode != "full"), SINGLE), []
        for mode in modes:
            kind = kind if mode == "full" else mode
            kinds.append(kind)
        return kinds

    def answering(self) -> AbstractContextManager:
        """Within it a collective that fails raises `RankLost`."""
        return all_answering()

    def clip(self, tokens: int, heads: int, device: torch.device) -> SharedClip:
        """A clip of so many tokens, in a model of so many heads, on the ranks."""
        key = tokens, heads, device
        if key not in self._clips:
            sets = self.shared_sets(heads)
            self._clips[key] = SharedClip(self._layout(tokens, heads), self.rank, sets, device, self.everyone)
        return self._clips[key]

    def shared_sets(self, heads: int) -> int:
        """How many sets the ranks of a scope deal out in units of a set and a head; 1: they deal out heads."""
        sets = self.sparse_n // self.plan.scope
        return sets if heads % self.plan.heads else 1

    def attend(self, layer: SelfAttention, qkv: Tensor, rope: Rope3D, tokens: VisibleKeys) -> Tensor:
        """qkv (B, n, 3, H, D) of this rank's tokens -> (B, n, width), projected; see `TokenExchange`."""
        skips = layer.mode != "full"
        mode = self._skip_mode(layer) if skips else ("full", 1)
        if skips and self.plan.heads == 1:
            q, k, v = rope3d(qkv, rope, inplace=True)
            return layer.out(layer.attend(q, k, v, tokens, *mode).flatten(2))
        layouts, link = self._exchanged(layer.mode, math.prod(rope.size), qkv)
        buffers = sequence_pack_rounds(qkv, layouts, rope)
        coming = [
            link.begin(x, qkv_splits(each), f"qkv {number}")
            for number, (x, each) in enumerate(zip(buffers, layouts, strict=True))
        ]
        back = []
        for number, (x, each) in enumerate(zip(coming, layouts, strict=True)):
            q, k, v = received_qkv(link.arrived(x, qkv_splits(each)), each)
            if each.sets > 1:
                out = _attend_units(layer, q, k, v, tokens, each)
            else:
                out = layer.attend(q, k, v, tokens, *mode) if q.shape[2] else q
            back.append(link.begin(pack_output(out, each), output_splits(each), f"output {number}"))
        # One after the other: the first is multiplied while the second travels.
        pieces = (link.arrived(x, output_splits(each)) for x, each in zip(back, layouts, strict=True))
        return _project(layer.out, pieces, layouts, qkv.dtype)

    def move(self, compute: Callable[[slice], Tensor], tokens: int) -> Tensor:
        """Let tokens move to where the next block, which skips in the other way, has them.

        compute: of a part of this rank's `tokens` tokens (n,), a slice of them, what moves, (B, part, C)

        Returns (B, n, C), other tokens.
        """
        layout = TokenLayout(self.plan, tokens * self.plan.ranks, self.sparse_n)
        scope, sets, first, coming = self.plan.scope, layout.sets, 0, []
        for number, part in enumerate(layout.parts):
            x = compute(slice(first, first + part))
            batch, _, channels = x.shape
            piece = [part // scope * batch * channels] * scope

            def splits(rank: int, piece: list[int] = piece) -> Splits:
                return Splits(piece, piece)

            flat = x.transpose(0, 1).reshape(-1)
            coming.append((self.others.begin(flat, splits, f"move {number}"), splits))
            first += part
        moved = []
        for x, splits in coming:
            # From each rank: (my sets from now on, periods, its sets until now); a rank's own sets alternate.
            pieces = self.others.arrived(x, splits).view(scope, sets, -1, sets, batch, channels)
            moved.append(pieces.transpose(1, 3).flatten(0, 3))
        # Not what came itself: it is the residual stream, for longer than until the next move.
        return torch.cat(moved).transpose(0, 1)

    def _layout(self, tokens: int, heads: int) -> TokenLayout:
        return TokenLayout(self.plan, tokens, self.sparse_n, self.plan.scope == 1 and self.shared_sets(heads) > 1)

    def _skip_mode(self, layer: SelfAttention) -> tuple[str, int]:
        """How the tokens of a scope attend, in the order that they are in."""
        if self.plan.scope == 1:
            return layer.mode, layer.sparse_n
        sets = self.sparse_n // self.plan.scope
        return ("single", sets) if sets > 1 else ("full", 1)

    def _exchanged(self, mode: str, tokens: int, qkv: Tensor) -> tuple[list[SequenceLayout], Link]:
        """What a block that attends in `mode` exchanges, a layout for each round, and by which way."""
        batch, own, _, heads, head_dim = qkv.shape
        clip = self._layout(tokens, heads)
        if mode == "full":
            layout = SequenceLayout(self.plan.ranks, self.rank, clip.padded, heads, head_dim, batch, clip.grain)
            return _in_rounds(layout), self.everyone
        sets = self.shared_sets(heads)
        run = self.sparse_n if self.plan.scope == 1 and mode == "group" and sets > 1 else 1
        total = clip.padded if self.plan.scope == 1 else own * self.plan.heads
        rank = self.rank % self.plan.heads
        layout = SequenceLayout(self.plan.heads, rank, total, heads, head_dim, batch, clip.grain, sets, run)
        return _in_rounds(layout), self.everyone if self.plan.scope == 1 else self.scope


def qkv_splits(layout: SequenceLayout) -> Callable[[int], Splits]:
    """Of each rank."""
    return lambda rank: Splits(*layout._replace(rank=rank).qkv_splits())


def output_splits(layout: SequenceLayout) -> Callable[[int], Splits]:
    """Of each rank."""
    return lambda rank: Splits(*layout._replace(rank=rank).output_splits())


def _in_rounds(layout: SequenceLayout) -> list[SequenceLayout]:
    heads = heads_in_rounds(layout.heads, layout.ranks) if layout.sets == 1 else [layout.heads]
    return [layout._replace(heads=count) for count in heads]


def _attend_units(
    layer: SelfAttention, q: Tensor, k: Tensor, v: Tensor, tokens: VisibleKeys, layout: SequenceLayout
) -> Tensor:
    """q, k, v (B, M, units, D): M tokens of a set for each unit -> the same shape. tokens: (B, M sets), alternating."""
    if q.shape[2] == 0:
        return q
    if tokens.mask is None:
        return layer.attend(q, k, v, tokens, "full", 1)
    outs = []
    for skip_set, units in layout.unit_sets():
        visible = VisibleKeys(tokens.mask[:, skip_set :: layout.sets])
        outs.append(layer.attend(*(x[:, :, units] for x in (q, k, v)), visible, "full", 1))
    return torch.cat(outs, 2)


def _project(
    out: nn.Module, buffers: Iterable[Tensor], layouts: Sequence[SequenceLayout], dtype: torch.dtype
) -> Tensor:
    """The output projection (B, n, width) of what comes back."""
    # An adapter's layer takes the whole, and so do units, whose sets would have to be interleaved.
    if type(out) is not nn.Linear or layouts[0].sets > 1:
        heads = [unpack_output(buffer, layout) for buffer, layout in zip(buffers, layouts, strict=True)]
        return out((heads[0] if len(heads) == 1 else torch.cat(heads, 2)).flatten(2))
    y, bias = None, out.bias.to(dtype)
    columns = out.weight.to(dtype).split([layout.heads * layout.head_dim for layout in layouts], 1)
    for buffer, weight, layout in zip(buffers, columns, layouts, strict=True):
        y = project_pieces(buffer, weight, bias if y is None else None, layout, y)
    return y
