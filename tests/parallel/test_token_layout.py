"""Who holds which tokens: nobody misses one, and moving is one all-to-all of what lies in memory."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from osp_fast.parallel.sequence_plan import SequencePlan
from osp_fast.parallel.token_layout import CONSECUTIVE, GROUP, SINGLE, TokenLayout


@st.composite
def layouts(draw, scoped: bool | None = None) -> TokenLayout:
    sparse_n = draw(st.sampled_from((1, 2, 3, 4, 6)))
    scopes = [scope for scope in range(1, sparse_n + 1) if sparse_n % scope == 0]
    if scoped:
        scopes = scopes[1:] or [1]
    scope = draw(st.sampled_from(scopes))
    plan = SequencePlan(scope * draw(st.integers(1, 5)), scope)
    return TokenLayout(plan, draw(st.integers(1, 700)), sparse_n, scope == 1 and draw(st.booleans()))


def kinds(layout: TokenLayout) -> tuple[str, ...]:
    return (CONSECUTIVE,) if layout.plan.scope == 1 else (SINGLE, GROUP)


@given(layouts())
def test_every_token_is_on_one_rank(layout):
    for kind in kinds(layout):
        every = layout.of_all(kind)
        assert every.sort().values.tolist() == list(range(layout.padded))
        shares = [len(layout.of_rank(kind, rank)) for rank in range(layout.plan.ranks)]
        assert shares == [layout.count(rank) for rank in range(layout.plan.ranks)]
        assert max(shares) - min(shares) <= (layout.grain if layout.plan.scope == 1 else 0)
        assert all(sum(layout.parts) == share for share in shares if layout.plan.scope > 1)
    assert layout.padded - layout.tokens < layout.sparse_n**2 * layout.plan.heads


@given(layouts(scoped=True))
def test_a_scope_has_whole_sets_which_alternate(layout):
    if layout.plan.scope == 1:
        return
    for kind in kinds(layout):
        for rank in range(layout.plan.ranks):
            tokens = layout.of_scope(kind, rank)
            sets = tokens % layout.sparse_n if kind == SINGLE else tokens // layout.sparse_n % layout.sparse_n
            first = rank // layout.plan.heads * layout.sets
            expected = first + torch.arange(len(tokens)) % layout.sets
            assert torch.equal(sets, expected)
            assert len(tokens) == layout.padded // layout.plan.scope


@given(layouts(scoped=True))
def test_what_moves_to_a_rank_lies_together(layout):
    """Of each part the first share of tokens is for the first scope, and so on; places within a scope stay."""
    plan = layout.plan
    for kind, other in ((SINGLE, GROUP), (GROUP, SINGLE)) if plan.scope > 1 else ():
        for rank in range(plan.ranks):
            first = 0
            for part in layout.parts:
                sent = layout.of_rank(kind, rank)[first : first + part].chunk(plan.scope)
                for scope, piece in enumerate(sent):
                    there = layout.of_rank(other, scope * plan.heads + rank % plan.heads)[first : first + part]
                    assert set(piece.tolist()) <= set(there.tolist())
                first += part


def test_the_example_of_the_docstring():
    layout = TokenLayout(SequencePlan(2, 2), 16, 4)
    assert layout.of_rank(SINGLE, 0).tolist() == [0, 1, 4, 5, 8, 9, 12, 13]
    assert layout.of_rank(GROUP, 0).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert layout.of_rank(GROUP, 1).tolist() == [8, 12, 9, 13, 10, 14, 11, 15]
