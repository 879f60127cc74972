"""Who holds which tokens and heads of a sequence that ranks share, and how many elements they send each other."""

from typing import NamedTuple

import torch

Splits = tuple[list[int], list[int]]


class SequenceLayout(NamedTuple):
    """Who holds what, seen from one rank.

    ranks, rank: how many share the sequence, and which of them this is
    tokens, heads: of the whole sequence; batch: samples, whose tokens and heads all ranks hold alike
    grain: tokens are dealt in multiples of it, and `tokens` is one
    sets, run: a rank's tokens t are in `sets` sets, (t // run) % sets, for which attention computes each head by
        itself: it is then units of a set and a head, unit = set * heads + head, that are dealt to the ranks, and not
        heads. grain is a multiple of run * sets, so that the sets of every rank are whole and as large as each other.
    """

    ranks: int
    rank: int
    tokens: int
    heads: int
    head_dim: int
    batch: int = 1
    grain: int = 1
    sets: int = 1
    run: int = 1

    def tokens_of(self, rank: int) -> int:
        """How many tokens a rank holds before the exchange."""
        return (self.tokens // self.grain + self.ranks - 1 - rank) // self.ranks * self.grain

    def units_of(self, rank: int) -> int:
        """How many units, heads with one set, a rank holds after the exchange; none if there are more ranks."""
        return (self.sets * self.heads + self.ranks - 1 - rank) // self.ranks

    def first_token(self) -> int:
        """Where in the sequence this rank's tokens start."""
        periods = self.tokens // self.grain
        return (self.rank * (periods // self.ranks) + torch.sym_min(self.rank, periods % self.ranks)) * self.grain

    def first_unit(self) -> int:
        """Which is the first of this rank's units."""
        units = self.sets * self.heads
        return self.rank * (units // self.ranks) + torch.sym_min(self.rank, units % self.ranks)

    def unit_sets(self) -> list[tuple[int, slice]]:
        """The sets that this rank's units are of, in order, and which of its units are of each.

        The units of set s are its heads from `first_unit() + units.start - s * heads` on.
        """
        first, last = self.first_unit(), self.first_unit() + self.units_of(self.rank)
        found = []
        for index in range(self.sets):
            start, stop = max(first, index * self.heads), min(last, (index + 1) * self.heads)
            if start < stop:
                found.append((index, slice(start - first, stop - first)))
        return found

    def qkv_splits(self) -> Splits:
        """Elements of q, k, v to and from each rank: `all_to_all_single`'s input_split_sizes, output_split_sizes."""
        to, back = self.output_splits()
        return [3 * size for size in back], [3 * size for size in to]

    def output_splits(self) -> Splits:
        """The same for attention's output on its way back."""
        cell = self.batch * self.head_dim
        own_tokens, own_units = self.tokens_of(self.rank) // self.sets, self.units_of(self.rank)
        sent = [self.tokens_of(rank) // self.sets * own_units * cell for rank in range(self.ranks)]
        return sent, [own_tokens * self.units_of(rank) * cell for rank in range(self.ranks)]

    def check(self) -> None:
        """Raises ValueError for a layout in which a rank's sets are not whole."""
        if self.grain % (self.sets * self.run) or self.tokens % self.grain:
            raise ValueError(
                f"{self.tokens} tokens must be a multiple of the grain {self.grain}, and that of {self.sets} sets in "
                f"runs of {self.run}"
            )
