"""The skiparse reference against a direct float64 computation from the definition of the sets."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from osp_fast.kernels.skiparse_attention import skiparse_attention, skiparse_attention_ref


def by_definition(q, k, v, mode, sparse_n, key_mask=None):
    """Dense attention with the mask "same set and visible", every product in float64."""
    place = torch.arange(q.shape[1])
    group = {"full": 0 * place, "single": place % sparse_n, "group": place // sparse_n % sparse_n}[mode]
    visible = torch.ones(q.shape[0], q.shape[1], k.shape[1], dtype=torch.bool)
    if mode != "full":
        visible &= group[:, None] == group[None]
    if key_mask is not None:
        visible &= key_mask[:, None].bool()
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / q.shape[-1] ** 0.5
    weights = torch.exp(scores - scores.amax(-1, keepdim=True)) * visible[:, None]
    weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-300)
    return torch.einsum("bhnm,bmhd->bnhd", weights, v)


@settings(max_examples=60)
@given(
    batch=st.integers(1, 2),
    tokens=st.integers(1, 67),
    heads=st.integers(1, 3),
    sparse_n=st.sampled_from([1, 2, 3, 4, 6]),
    mode=st.sampled_from(["full", "single", "group"]),
    mask=st.sampled_from([None, "tail", "random", "empty"]),
    seed=st.integers(0, 2**31),
)
def test_forward_and_gradients(batch, tokens, heads, sparse_n, mode, mask, seed):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(batch, tokens, 3, heads, 12, generator=generator, dtype=torch.float64)
    q, k, v = (x.detach().requires_grad_() for x in base.unbind(2))  # strided, as a fused projection writes them
    key_mask = None
    if mask == "tail":
        key_mask = torch.arange(tokens)[None].expand(batch, -1) < max(1, tokens // 2)
    elif mask == "random":
        key_mask = torch.rand(batch, tokens, generator=generator) < 0.5
    elif mask == "empty":
        key_mask = torch.zeros(batch, tokens)
    weight = torch.randn(batch, tokens, heads, 12, generator=generator, dtype=torch.float64)
    results = []
    for function in (skiparse_attention, by_definition):
        out = function(q, k, v, mode, sparse_n, key_mask)
        results.append((out, *torch.autograd.grad((out * weight).sum(), (q, k, v))))
    for found, expected in zip(*results, strict=True):
        assert torch.allclose(found, expected, rtol=1e-10, atol=1e-10)


def test_group_skip_of_a_small_case_by_hand():
    """k = 2, eight tokens: group skip has the sets {0, 1, 4, 5} and {2, 3, 6, 7}."""
    q = k = torch.zeros(1, 8, 1, 6)
    v = torch.arange(8.0).view(1, 8, 1, 1).expand(1, 8, 1, 6)
    out = skiparse_attention(q, k, v, "group", sparse_n=2)[0, :, 0, 0]
    assert torch.allclose(out, torch.tensor([2.5, 2.5, 4.5, 4.5, 2.5, 2.5, 4.5, 4.5]))
    out = skiparse_attention(q, k, v, "single", sparse_n=2)[0, :, 0, 0]
    assert torch.allclose(out, torch.tensor([3.0, 4.0] * 4))


def test_cross_attention_has_its_own_length():
    q, k = torch.randn(2, 7, 2, 12, dtype=torch.float64), torch.randn(2, 3, 2, 12, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
    out = skiparse_attention_ref(q, k, k, "full", key_mask=mask)
    assert torch.allclose(out, by_definition(q, k, k, "full", 1, mask))
    assert torch.equal(out[1], torch.zeros_like(out[1]))


def test_what_does_not_fit_is_refused():
    x = torch.zeros(1, 8, 2, 12)
    for arguments, words in (
        ((x, x, x, "diagonal"), "diagonal"),
        ((x, x, x, "single", 0), "sparse_n"),
        ((x, x[:, :4], x, "full"), "shapes"),
        ((x, x[:, :4], x[:, :4], "single"), "as many keys"),
        ((x, x, x, "full", 4, torch.ones(1, 3)), "key_mask"),
    ):
        with pytest.raises(ValueError, match=words):
            skiparse_attention(*arguments)
