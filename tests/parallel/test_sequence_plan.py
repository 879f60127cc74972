"""How the ranks of a group divide a clip's work, and what `--sp_mode` may name."""

import pytest

from osp_fast.errors import UserError
from osp_fast.parallel.sequence_plan import SequencePlan, heads_in_rounds, plan_of_mode, sequence_plans


def test_ranks_are_scope_times_heads():
    plan = SequencePlan(8, 4)
    assert (plan.scope, plan.heads) == (4, 2) and SequencePlan(6).heads == 6
    for ranks, scope in ((8, 3), (4, 8), (0, 1), (4, 0)):
        with pytest.raises(ValueError, match=f"a scope of {scope} does not divide {ranks} ranks"):
            SequencePlan(ranks, scope)


def test_plans_in_words():
    assert SequencePlan(1).describe() == "one GPU"
    assert SequencePlan(8).describe() == "Ulysses over 8 GPUs"
    assert SequencePlan(4, 4).describe() == "4 GPUs hold skip sets"
    assert SequencePlan(8, 4).describe() == "4 x 2: 4 groups hold skip sets, 2 GPUs of each share the heads"


@pytest.mark.parametrize(
    "ranks, sparse_n, scopes",
    [
        (1, 4, [1]),
        (2, 4, [1, 2]),
        (3, 4, [1]),
        (4, 4, [1, 2, 4]),
        (6, 4, [1, 2]),
        (64, 4, [1, 2, 4]),
        (8, 1, [1]),
        (6, 6, [1, 2, 3, 6]),
        (8, 12, [1, 2, 4]),
    ],
)
def test_a_scope_divides_ranks_and_skip_sets(ranks, sparse_n, scopes):
    plans = sequence_plans(ranks, sparse_n)
    assert [plan.scope for plan in plans] == scopes and {plan.ranks for plan in plans} == {ranks}


def test_heads_travel_in_rounds_of_which_every_rank_has_some():
    rounds = {(24, 8): [16, 8], (24, 2): [12, 12], (24, 24): [24], (24, 32): [24], (25, 2): [12, 13], (5, 2): [2, 3]}
    assert {key: heads_in_rounds(*key) for key in rounds} == rounds
    assert all(len(parts) == 1 or min(parts) >= ranks for (_, ranks), parts in rounds.items())


def test_what_the_flag_names():
    assert plan_of_mode("auto", 8, 4) is None
    assert plan_of_mode("ulysses", 8, 4) == SequencePlan(8)
    assert plan_of_mode("scope", 8, 4) == SequencePlan(8, 4) == plan_of_mode("4x2", 8, 4)
    assert plan_of_mode("scope", 6, 4) == SequencePlan(6, 2) == plan_of_mode("2x3", 6, 4)
    assert plan_of_mode("1x5", 5, 4) == SequencePlan(5)


@pytest.mark.parametrize(
    "mode, ranks, sparse_n, possible",
    [
        ("scope", 3, 4, "use auto or 1x3"),  # no scope divides 3 GPUs and 4 sets
        ("scope", 8, 1, "use auto or 1x8"),  # nothing skips
        ("4x2", 4, 4, "use auto or 1x4, 2x2, 4x1"),  # as many GPUs as 4 x 2 are not there
        ("8x1", 8, 4, "use auto or 1x8, 2x4, 4x2"),  # more groups than sets
        ("3x2", 6, 4, "use auto or 1x6, 2x3"),
    ],
)
def test_what_it_cannot_be(mode, ranks, sparse_n, possible):
    words = f"--sp_mode {mode} does not go with {ranks} GPUs that share tokens and {sparse_n} skip sets: {possible}"
    with pytest.raises(UserError) as caught:
        plan_of_mode(mode, ranks, sparse_n)
    assert str(caught.value) == words
