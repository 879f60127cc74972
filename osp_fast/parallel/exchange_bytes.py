"""How many bytes ranks that share a clip send each other: exact formulas, block by block.

m = scope x heads ranks (`SequencePlan`), B clips, d = H D channels of a token, k skip sets, s bytes of a number. A clip
has N tokens with those that are added (`TokenLayout`), a rank n of them. Bytes that leave a rank, forward:

| | bytes |
|---|---|
| upstream's scheme, every block: q, k, v and output each for itself | 4 B n d s (m - 1) / m |
| attention of a block that exchanges among p ranks | B D s (3 n/S (U - u) + (M - n)/S u) |
| tokens that move between a block that skips singly and one that skips by groups | B n d s (scope - 1) / scope |
| the prediction, c numbers for each token, at the end | B n c s (m - 1) |

In the second row these p ranks hold M tokens, and the rank has u of U = S H units of a set and a head (S = 1: of
heads). A block with full attention exchanges among all: p = m, M = N, S = 1. One that skips exchanges among those of a
scope: p = m / scope, M = N / scope, and where H does not divide by p units of the k / scope sets that they hold; with
p = 1 it sends nothing. With equal shares the row is 4 B n d s (p - 1) / p: Ulysses sends what upstream does, in 2 or 4
messages instead of 4. Tokens move in front of each skipping block but the first, 27 times in the released model, and
once more where a step cache wants them back in the order of the first block, which is not in here.

Backward sends gradients the other way round: where a rank received, it sends. With equal shares these are as many bytes
again, else B D s (3 (M - n)/S u + n/S (U - u)). The prediction's gradient needs no exchange. A block that is recomputed
sends its forward once more.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from osp_fast.models.dit import DiTConfig
from osp_fast.parallel.sequence_plan import SequencePlan, heads_in_rounds
from osp_fast.parallel.token_layout import CONSECUTIVE, TokenLayout


class Sent(NamedTuple):
    """Bytes that leave a rank in one of an attention's two all-to-alls, and in that of its gradient."""

    forward: int
    backward: int


class AttentionBytes(NamedTuple):
    """there: q, k and v on their way to heads or units; home: the output on its way to tokens."""

    there: Sent = Sent(0, 0)
    home: Sent = Sent(0, 0)

    @property
    def forward(self) -> int:
        return self.there.forward + self.home.forward

    @property
    def backward(self) -> int:
        return self.there.backward + self.home.backward


class ClipBytes(NamedTuple):
    """What one rank sends for a micro-batch.

    forward, backward: all; recomputed: once more, where every block is recomputed
    """

    forward: int
    backward: int
    recomputed: int


@dataclass(frozen=True)
class ClipExchange:
    """The exchanges of a micro-batch of `batch` clips of so many tokens; itemsize: bytes of a number.

    plan: of the ranks, which are numbered in order of (scope, heads)
    """

    config: DiTConfig
    plan: SequencePlan
    tokens: int
    batch: int = 1
    itemsize: int = 2

    @property
    def sets(self) -> int:
        """S, skip sets that the ranks of a scope deal out in units of a set and a head; 1: they deal out heads."""
        divides = self.config.num_attention_heads % self.plan.heads == 0
        return 1 if divides else self.config.sparse_n // self.plan.scope

    @property
    def layout(self) -> TokenLayout:
        """Which tokens ranks hold."""
        return TokenLayout(self.plan, self.tokens, self.config.sparse_n, self.plan.scope == 1 and self.sets > 1)

    def units(self, mode: str) -> tuple[int, int, int]:
        """U, p and S of a block that attends in `mode`: so many units are dealt to so many ranks."""
        ranks, sets = (self.plan.ranks, 1) if mode == "full" else (self.plan.heads, self.sets)
        return sets * self.config.num_attention_heads, ranks, sets

    def rounds(self, mode: str) -> list[int]:
        """Heads that travel in each round; units travel in one."""
        units, ranks, sets = self.units(mode)
        return heads_in_rounds(units, ranks) if sets == 1 else [units]

    def attention(self, mode: str, rank: int) -> AttentionBytes:
        """Of a block that attends in `mode`: full, single or group."""
        units, ranks, sets = self.units(mode)
        if ranks == 1:
            return AttentionBytes()
        every = self.layout.padded // (self.plan.ranks // ranks) // sets
        own, mine = self.layout.count(rank) // sets, (units + ranks - 1 - rank % ranks) // ranks
        cell = self.batch * self.config.attention_head_dim * self.itemsize
        kept, given = cell * (every - own) * mine, cell * own * (units - mine)
        return AttentionBytes(Sent(3 * given, 3 * kept), Sent(kept, given))

    def moves(self) -> list[bool]:
        """For each block whether tokens move behind it."""
        modes = [self.config.attention_mode(index) for index in range(self.config.num_layers)]
        kind, kinds = next((mode for mode in modes if mode != "full"), CONSECUTIVE), []
        for mode in modes:
            kind = kind if mode == "full" else mode
            kinds.append(kind)
        return [*(self.plan.scope > 1 and before != after for before, after in pairwise(kinds)), False]

    def move(self, tokens: int) -> int:
        """Of so many of a rank's tokens that move, forward or backward; a rank holds `layout.count(0)`."""
        return self.batch * tokens * self.config.width * self.itemsize * (self.plan.scope - 1) // self.plan.scope

    def gather(self, rank: int) -> int:
        """Of the prediction."""
        cells = self.config.patch_size_t * self.config.patch_size**2 * self.config.out_channels
        return self.batch * self.layout.count(rank) * cells * self.itemsize * (self.plan.ranks - 1)

    def upstream(self) -> float:
        """Of a block in upstream's scheme, which asks for as many tokens and heads on each rank."""
        ranks = self.plan.ranks
        return 4 * self.batch * self.tokens * self.config.width * self.itemsize * (ranks - 1) / ranks**2

    def blocks(self, rank: int) -> Iterator[tuple[AttentionBytes, int]]:
        """Of each block's attention, and of the tokens that move behind it."""
        own = self.layout.count(rank)
        for index, moves in enumerate(self.moves()):
            yield self.attention(self.config.attention_mode(index), rank), self.move(own) if moves else 0

    def total(self, rank: int) -> ClipBytes:
        """Of a micro-batch."""
        forward = backward = recomputed = 0
        for attention, moved in self.blocks(rank):
            forward += attention.forward + moved
            backward += attention.backward + moved
            recomputed += attention.forward + moved
        return ClipBytes(forward + self.gather(rank), backward, recomputed)
