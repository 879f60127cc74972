"""Which tokens of a clip each rank of a group holds, and in which order.

Token p of a clip is a k^2 + b k + c, with k = sparse_n: it is in set c where blocks skip singly, in set b where they
skip by groups. With a scope of one rank ("Ulysses") ranks hold consecutive tokens. With a larger scope rank (g, u) of
scope x heads holds, between blocks that skip singly, the sets c of scope g, and of them the periods a of u; between
blocks that skip by groups the sets b of g, and the same periods. k = 4 on two ranks of scope 2, one period:

    tokens a = 0     b, c 0  1  2  3        "single": rank 0 holds columns 0 and 1     "group": rank 0 holds rows 0, 1
                      0   0  1  2  3                  rank 1 holds columns 2 and 3              rank 1 holds rows 2, 3
                      1   4  5  6  7        rank 0, in order: 0 1, 4 5, 8 9, 12 13     rank 0: 0 4, 1 5, 2 6, 3 7
                      2   8  9 10 11        the upper half is what rank 0 keeps, the   the upper half came from rank 0,
                      3  12 13 14 15        lower what it sends to rank 1              the lower from rank 1

So tokens are ordered by the rank that has them in the other kind of layout, and re-sharding is one all-to-all of what
lies in memory. Sets of a rank alternate from token to token, so that to attention they are single skip with k / scope
sets, or one set. Where clips do not divide, tokens are added at the end; nothing sees them, and nothing returns them.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from osp_fast.parallel.sequence_plan import SequencePlan

CONSECUTIVE, SINGLE, GROUP = "consecutive", "single", "group"
# The last part of a re-shard is not hidden behind computation: it is this share of the tokens.
LAST_PART = 8


class TokenLayout(NamedTuple):
    """The tokens of a clip on the ranks of `plan`, in order of (scope, heads).

    tokens: of the clip; sparse_n: k; whole_periods: whether ranks hold multiples of k^2 consecutive tokens, with a
    scope of one rank
    """

    plan: SequencePlan
    tokens: int
    sparse_n: int
    whole_periods: bool = False

    @property
    def grain(self) -> int:
        """Tokens are dealt in multiples of it."""
        return self.sparse_n**2 // self.plan.scope if self.plan.scope > 1 or self.whole_periods else 1

    @property
    def padded(self) -> int:
        """How many tokens all ranks hold, with those that are added. With a scope all ranks hold as many."""
        multiple = self.grain * (self.plan.ranks if self.plan.scope > 1 else 1)
        return -(-self.tokens // multiple) * multiple

    @property
    def sets(self) -> int:
        """Skip sets of a rank, with a scope."""
        return self.sparse_n // self.plan.scope

    def count(self, rank: int) -> int:
        """How many tokens a rank holds."""
        periods, ranks = self.padded // self.grain, self.plan.ranks
        return (periods + ranks - 1 - rank) // ranks * self.grain

    def first(self, rank: int) -> int:
        """Which is a rank's first token, where they are consecutive."""
        return sum(self.count(before) for before in range(rank))

    @property
    def parts(self) -> list[int]:
        """Tokens of a rank in each part that is re-sharded for itself: the first is most of them."""
        periods = self.count(0) // self.grain
        last = -(-periods // LAST_PART) if periods >= LAST_PART else 0
        return [part * self.grain for part in (periods - last, last) if part]

    def of_rank(self, kind: str, rank: int) -> Tensor:
        """The tokens (n,) int64 that a rank holds, in its order; those from `tokens` on are added ones."""
        if kind == CONSECUTIVE:
            return torch.arange(self.first(rank), self.first(rank) + self.count(rank))
        group, place = divmod(rank, self.plan.heads)
        k, own = self.sparse_n, torch.arange(group * self.sets, (group + 1) * self.sets)
        pieces, period = [], place * (self.count(rank) // self.grain)
        for tokens in self.parts:
            last = period + tokens // self.grain
            a, other = torch.arange(period, last)[:, None], torch.arange(k)[:, None, None]
            b, c = (other, own) if kind == SINGLE else (own, other)
            pieces.append((a * k * k + b * k + c).flatten())
            period = last
        return torch.cat(pieces)

    def of_scope(self, kind: str, rank: int) -> Tensor:
        """The tokens of the ranks that have the same scope as `rank`, one rank's behind the other's."""
        first = rank // self.plan.heads * self.plan.heads
        return torch.cat([self.of_rank(kind, first + place) for place in range(self.plan.heads)])

    def of_all(self, kind: str) -> Tensor:
        """The tokens of all ranks, one rank's behind the other's."""
        return torch.cat([self.of_rank(kind, rank) for rank in range(self.plan.ranks)])
