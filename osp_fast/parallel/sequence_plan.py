"""How the ranks of a group divide the work of a clip: by skip sets, by heads, or both."""

import math
import re
from dataclasses import dataclass

from osp_fast.config import SP_GRID, SP_MODES
from osp_fast.errors import UserError

AUTO, ULYSSES, SCOPE = SP_MODES
MOST_ROUNDS = 2


@dataclass(frozen=True)
class SequencePlan:
    """`ranks` = scope x heads: so many groups of ranks each hold whole skip sets, and share the heads among them.

    Rank g * heads + u is number u of group g. A scope of 1 is Ulysses. Raises ValueError if the scope does not divide
    the ranks.
    """

    ranks: int
    scope: int = 1

    def __post_init__(self) -> None:
        if self.ranks < 1 or self.scope < 1 or self.ranks % self.scope:
            raise ValueError(f"a scope of {self.scope} does not divide {self.ranks} ranks")

    @property
    def heads(self) -> int:
        """How many ranks share the heads of a skip set."""
        return self.ranks // self.scope

    def describe(self) -> str:
        """In words."""
        if self.ranks == 1:
            return "one GPU"
        if self.scope == 1:
            return f"Ulysses over {self.ranks} GPUs"
        if self.heads == 1:
            return f"{self.ranks} GPUs hold skip sets"
        groups = f"{self.scope} groups hold skip sets, {self.heads} GPUs of each share the heads"
        return f"{self.scope} x {self.heads}: {groups}"


def sequence_plans(ranks: int, sparse_n: int) -> list[SequencePlan]:
    """All plans for a model with `sparse_n` skip sets (1: none), Ulysses first."""
    common = math.gcd(ranks, sparse_n)
    return [SequencePlan(ranks, scope) for scope in range(1, common + 1) if common % scope == 0]


def heads_in_rounds(heads: int, ranks: int) -> list[int]:
    """Heads that go to so many ranks in each round: one travels while another is computed.

    Every rank has heads of each round, so there is a single one where a rank has one head, or none.
    """
    each = heads // ranks
    rounds = max(1, min(each, MOST_ROUNDS))
    parts = [(each // rounds + (number < each % rounds)) * ranks for number in range(rounds)]
    return [*parts[:-1], heads - sum(parts[:-1])]


def plan_of_mode(mode: str, ranks: int, sparse_n: int) -> SequencePlan | None:
    """The plan that `--sp_mode` names; None for auto, where the fastest is to be chosen.

    Raises `UserError` where so many GPUs cannot divide a clip of `sparse_n` skip sets like that.
    """
    if mode == AUTO:
        return None
    plans = sequence_plans(ranks, sparse_n)
    if mode == ULYSSES:
        return plans[0]
    if mode == SCOPE and len(plans) > 1:
        return plans[-1]
    grid = re.fullmatch(SP_GRID, mode)
    if grid is not None:
        scope, heads = (int(number) for number in grid.groups())
        for plan in plans:
            if (plan.scope, plan.heads) == (scope, heads):
                return plan
    possible = ", ".join(f"{plan.scope}x{plan.heads}" for plan in plans)
    raise UserError(
        f"--sp_mode {mode} does not go with {ranks} GPUs that share tokens and {sparse_n} skip sets: use auto or"
        f" {possible}"
    )
