"""Skiparse attention: the reference against the definition of the sets, the Triton kernels against float64."""

import functools

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from osp_fast.kernels import skiparse_attention as op
from osp_fast.kernels import tuning
from osp_fast.kernels.skiparse_attention import (
    attention_flops,
    skiparse_attention,
    skiparse_attention_ref,
    skiparse_attention_triton,
)
from osp_fast.kernels.skiparse_attention_launch import attention_forward, choose_version, fits_descriptor
from osp_fast.kernels.skiparse_attention_spec import SPEC, make_inputs
from osp_fast.kernels.skiparse_sets import count_sets, longest_set

FORWARD, GRADIENTS = SPEC.tolerances[torch.float32]


def sets_of(tokens: int, mode: str, sparse_n: int) -> torch.Tensor:
    """The set of every token, from the definition."""
    place = torch.arange(tokens)
    return {"full": 0 * place, "single": place % sparse_n, "group": place // sparse_n % sparse_n}[mode]


def visible_pairs(q, k, mode, sparse_n, key_mask=None, key_lengths=None):
    """(B, N, M): which query may see which key."""
    visible = torch.ones(q.shape[0], q.shape[1], k.shape[1], dtype=torch.bool)
    if mode != "full":
        group = sets_of(q.shape[1], mode, sparse_n)
        visible &= group[:, None] == group[None]
    if key_mask is not None:
        visible &= key_mask[:, None].bool()
    if key_lengths is not None:
        visible &= (torch.arange(k.shape[1]) < key_lengths[:, None])[:, None]
    return visible


def by_definition(q, k, v, mode, sparse_n, key_mask=None, key_lengths=None):
    """Dense attention with the mask "same set and visible", every product in float64."""
    q, k, v = q.double(), k.double(), v.double()
    visible = visible_pairs(q, k, mode, sparse_n, key_mask, key_lengths)[:, None]
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / q.shape[-1] ** 0.5
    scores = scores.masked_fill(~visible, -1e300)  # 300 orders below any score: exp is zero unless all are hidden
    weights = torch.exp(scores - scores.amax(-1, keepdim=True)) * visible
    weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-300)
    return torch.einsum("bhnm,bmhd->bnhd", weights, v)


def output_and_gradients(function, q, k, v, weight, *arguments):
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = function(q, k, v, *arguments)
    return (out.detach(), *torch.autograd.grad((out * weight).sum(), (q, k, v)))


def relative_error(found, expected, floor=1e-12):
    return float((found.double() - expected).norm() / expected.norm().clamp_min(floor))


def assert_close(found, expected):
    """Within the tolerances of the spec. A gradient that cancels (a row that sees one key has dq = 0) leaves the
    rounding of its summands, and is held to a hundredth of the size of all gradients instead of to nothing.
    """
    floor = max(1e-12, float(torch.stack([x.norm() for x in expected[1:]]).norm()) / 100)
    errors = [relative_error(a, b, floor) for a, b in zip(found[1:], expected[1:], strict=True)]
    assert relative_error(found[0], expected[0]) <= FORWARD and max(errors, default=0) <= GRADIENTS, errors
    (out, dq, dk, dv), (expected_out, _, _, expected_dv) = found, expected
    for ours, zero in ((out, expected_out), (dq, expected_out), (dk, expected_dv), (dv, expected_dv)):
        assert not ours[zero.abs().sum(-1) == 0].any()  # rows that see nothing, keys that nothing sees


def draw_mask(kind: str | None, batch: int, keys: int, generator: torch.Generator):
    """(key_mask, key_lengths) of a kind."""
    if kind == "random":
        return torch.rand(batch, keys, generator=generator) < 0.5, None
    if kind == "empty":
        return torch.zeros(batch, keys), None
    lengths = torch.randint(0, keys + 3, (batch,), generator=generator, dtype=torch.int32)
    if kind == "lengths":
        return None, lengths
    if kind == "both":
        return torch.rand(batch, keys, generator=generator) < 0.7, lengths
    return None, None


@settings(max_examples=60)
@given(
    batch=st.integers(1, 2),
    tokens=st.integers(1, 67),
    heads=st.integers(1, 3),
    sparse_n=st.sampled_from([1, 2, 3, 4, 6]),
    mode=st.sampled_from(op.MODES),
    mask=st.sampled_from([None, "lengths", "random", "empty", "both"]),
    seed=st.integers(0, 2**31),
)
def test_reference_forward_and_gradients(batch, tokens, heads, sparse_n, mode, mask, seed):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(batch, tokens, 3, heads, 12, generator=generator, dtype=torch.float64)
    arguments = (mode, sparse_n, *draw_mask(mask, batch, tokens, generator))
    weight = torch.randn(batch, tokens, heads, 12, generator=generator, dtype=torch.float64)
    found = output_and_gradients(skiparse_attention, *base.unbind(2), weight, *arguments)
    expected = output_and_gradients(by_definition, *base.unbind(2), weight, *arguments)
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-10)


# Blocks of queries and keys, and rows at a time of what is left: small, so that short clips have several of each.
BLOCKS = [tuning.Config(32, 16, 16, 4, 1), tuning.Config(16, 32, 16, 4, 1), tuning.Config(64, 64, 16, 4, 2)]


@st.composite
def token_counts(draw, block: int, sparse_n: int):
    """1 to 3 blocks, primes, multiples of k and of k squared, and one more or less than those."""
    base = draw(
        st.one_of(
            st.integers(1, 3 * block),
            st.sampled_from([2, 3, 5, 7, 13, 31, 37, 61, 67, 97]),
            st.integers(1, 8).map(lambda n: n * sparse_n),
            st.integers(1, 6).map(lambda n: n * sparse_n * sparse_n),
        )
    )
    return max(1, base + draw(st.sampled_from([0, 0, 0, 1, -1])))


# No shrinking: an example takes a second, and what was drawn is printed.
@settings(max_examples=45, phases=(Phase.explicit, Phase.generate))
@given(data=st.data())
def test_kernels_forward_and_gradients(data):
    """The grid that the operation promises, both versions, both backwards, against float64."""
    draw = data.draw
    config = draw(st.sampled_from(BLOCKS))
    sparse_n = draw(st.sampled_from([1, 2, 3, 4, 6]))
    mode = draw(st.sampled_from(op.MODES))
    head_dim = draw(st.sampled_from([24, 32, 48, 64, 96, 128]))
    tokens = draw(token_counts(max(config.block_m, config.block_n), sparse_n))
    batch, heads = draw(st.sampled_from([(1, 1), (1, 2), (2, 1), (2, 2)]))
    kind = draw(st.sampled_from([None, None, "lengths", "random", "empty", "both"]))
    layout = draw(st.sampled_from(["fused", "separate", "heads first", "channels apart"]))
    deterministic = draw(st.booleans())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    if layout == "fused":
        q, k, v = torch.randn(batch, tokens, 3, heads, head_dim, generator=generator).unbind(2)
    elif layout == "separate":
        q, k, v = (torch.randn(batch, tokens, heads, head_dim, generator=generator) for _ in range(3))
    elif layout == "heads first":
        q, k, v = (torch.randn(batch, heads, tokens, head_dim, generator=generator).transpose(1, 2) for _ in range(3))
    else:
        q, k, v = torch.randn(batch, tokens, heads, head_dim, 3, generator=generator).unbind(-1)
    key_mask, key_lengths = draw_mask(kind, batch, tokens, generator)
    weight = torch.randn(batch, heads, tokens, head_dim, generator=generator).transpose(1, 2)
    describable = choose_version(90, torch.bfloat16, head_dim, mode if sparse_n > 1 else "full", sparse_n)
    fits = layout == "channels apart" or all(fits_descriptor(x) for x in (q, k, v))
    versions = ["auto", "pointer", "descriptor"] if fits and describable == "descriptor" else ["auto", "pointer"]
    version = draw(st.sampled_from(versions))
    arguments = (mode, sparse_n, key_mask, key_lengths)
    function = functools.partial(skiparse_attention_triton, deterministic=deterministic, version=version)
    with tuning.forced("forward", config), tuning.forced("keys", config), tuning.forced("queries", config):
        found = output_and_gradients(function, q, k, v, weight, *arguments)
    assert_close(found, output_and_gradients(by_definition, q, k, v, weight, *arguments))


@pytest.mark.parametrize("mode", op.MODES)
def test_float16(mode):
    inputs = make_inputs(device="cpu", dtype=torch.float16, seed=4, batch=1, tokens=70, heads=2, head_dim=96,
                         mode=mode, sparse_n=4)  # fmt: skip
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    weight = torch.randn(q.shape, generator=torch.Generator().manual_seed(5)).half()
    expected = output_and_gradients(by_definition, q, k, v, weight, mode, 4)
    forward, gradients = SPEC.tolerances[torch.float16]
    for version in ("pointer", "descriptor"):
        function = functools.partial(skiparse_attention_triton, version=version)
        found = output_and_gradients(function, q, k, v, weight, mode, 4)
        assert {x.dtype for x in found} == {torch.float16} and relative_error(found[0], expected[0]) <= forward
        assert max(relative_error(a, b) for a, b in zip(found, expected, strict=True)) <= gradients


@pytest.mark.parametrize("version, head_dim", [("pointer", 24), ("descriptor", 48), ("descriptor", 96)])
def test_cross_attention_has_its_own_length(version, head_dim):
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(3, 45, 2, head_dim, generator=generator)
    k, v = torch.randn(3, 37, 2, 2, head_dim, generator=generator).unbind(2)
    weight = torch.randn(q.shape, generator=generator)
    lengths = torch.tensor([37, 18, 0], dtype=torch.int32)
    for deterministic in (False, True):
        function = functools.partial(skiparse_attention_triton, deterministic=deterministic, version=version)
        found = output_and_gradients(function, q, k, v, weight, "full", 1, None, lengths)
        assert_close(found, output_and_gradients(by_definition, q, k, v, weight, "full", 1, None, lengths))
        assert not found[0][2].any() and not found[2][1, 18:].any()


@pytest.mark.parametrize("mode", op.MODES)
@pytest.mark.parametrize("size", [60.0, 1e4])
def test_large_scores_do_not_overflow(mode, size):
    """Scores of thousands, all of one sign for some rows: nothing is infinite and gradients stay right."""
    generator = torch.Generator().manual_seed(5)
    q, k, v = torch.randn(1, 41, 3, 1, 32, generator=generator).unbind(2)
    q, k = q.abs() * size**0.5, -k.abs() * size**0.5
    mask = torch.arange(41)[None] % 5 != 1
    weight = torch.randn(q.shape, generator=generator)
    expected = output_and_gradients(by_definition, q, k, v, weight, mode, 4, mask)
    for version in ("pointer", "descriptor"):
        for deterministic in (False, True):
            function = functools.partial(skiparse_attention_triton, deterministic=deterministic, version=version)
            found = output_and_gradients(function, q, k, v, weight, mode, 4, mask)
            assert all(torch.isfinite(x).all() for x in found)
            # The scores themselves carry a rounding of 2^-24 of their size, and the softmax passes it on.
            assert relative_error(found[0], expected[0]) <= max(FORWARD, 1e-6 * size)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("version", ["pointer", "descriptor"])
def test_cross_attention_with_mask_and_lengths(version, deterministic):
    """As the DiT calls it: queries and keys of their own numbers, a mask with a hole, and lengths."""
    generator = torch.Generator().manual_seed(7)
    q = torch.randn(2, 70, 2, 48, generator=generator)
    k, v = torch.randn(2, 41, 2, 2, 48, generator=generator).unbind(2)
    weight = torch.randn(q.shape, generator=generator)
    lengths = torch.tensor([40, 11], dtype=torch.int32)
    mask = (torch.arange(41) < lengths[:, None]) & (torch.arange(41) != 5)
    function = functools.partial(skiparse_attention_triton, deterministic=deterministic, version=version)
    found = output_and_gradients(function, q, k, v, weight, "full", 1, mask, lengths)
    assert_close(found, output_and_gradients(by_definition, q, k, v, weight, "full", 1, mask, lengths))


def test_gradients_of_the_output_in_any_layout():
    q, k, v = torch.randn(1, 37, 3, 2, 32, generator=torch.Generator().manual_seed(8)).unbind(2)
    layouts = (
        torch.ones(()).expand(q.shape),
        torch.randn(1, 1, 2, 32).expand(q.shape),
        torch.randn(1, 32, 37, 2).permute(0, 2, 3, 1),
    )
    for weight in layouts:
        for version in ("pointer", "descriptor"):
            function = functools.partial(skiparse_attention_triton, version=version)
            found = output_and_gradients(function, q, k, v, weight, "single", 4)
            assert_close(found, output_and_gradients(by_definition, q, k, v, weight, "single", 4))


def test_autocast_casts_as_for_pytorchs_own_attention():
    q, k, v = torch.randn(1, 20, 3, 1, 16).unbind(2)
    with torch.autocast("cpu", torch.float16):
        assert skiparse_attention_triton(q, k, v).dtype == skiparse_attention_ref(q, k, v).dtype == torch.float16


def test_no_gradient_of_the_gradient():
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 1, 9, 1, 16))
    grad = torch.autograd.grad(skiparse_attention_triton(q, k, v).sum(), q, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="autograd"):
        grad.sum().backward()


def test_precision_of_float32_follows_pytorchs_settings(monkeypatch):
    """Also where the newer setting has been used, after which PyTorch refuses to read the older one."""
    x = torch.randn(1, 20, 1, 16)
    expected = skiparse_attention_triton(x, x, x)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        assert torch.allclose(skiparse_attention_triton(x, x, x), expected)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_log_sum_exp_is_in_set_order():
    q, k, v = torch.randn(2, 39, 3, 2, 32, generator=torch.Generator().manual_seed(1)).unbind(2)
    lengths = torch.tensor([39, 6], dtype=torch.int32)
    for mode in op.MODES:
        _, lse = attention_forward(q, k, v, None, lengths, mode, 4 if mode != "full" else 1, "pointer")
        scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / 32**0.5
        scores = scores.masked_fill(~visible_pairs(q, k, mode, 4, None, lengths)[:, None], -torch.inf)
        expected = scores.logsumexp(-1)
        group = sets_of(39, mode, 4)
        for skip_set in range(count_sets(mode, 4)):
            members = expected[..., group == skip_set]
            assert torch.allclose(lse[:, :, skip_set, : members.shape[-1]], members, atol=1e-5)
        assert lse.shape[-1] == longest_set(39, mode, 4) == int((group == 0).sum())


def test_backward_is_the_same_bits_when_it_should_be():
    inputs = make_inputs(device="cpu", dtype=torch.float32, seed=0, batch=1, tokens=70, heads=2, head_dim=48,
                         mode="group", sparse_n=4)  # fmt: skip
    weight = torch.randn(1, 70, 2, 48, generator=torch.Generator().manual_seed(2))

    def gradients():
        out = skiparse_attention_triton(**inputs, version="descriptor")
        return torch.autograd.grad((out * weight).sum(), (inputs["q"], inputs["k"], inputs["v"]))

    torch.use_deterministic_algorithms(True)
    try:
        first, second = gradients(), gradients()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], gradients()[0])  # the fused sum of dQ rounds in another order: it did run


def test_flops_are_those_of_the_pairs_that_see_each_other():
    for mode in op.MODES:
        for tokens in (1, 15, 16, 38, 64, 71):
            q = torch.zeros(2, tokens, 3, 8)
            pairs = int(visible_pairs(q, q, mode, 4)[0].sum())
            assert attention_flops(2, tokens, tokens, 3, 8, mode, 4) == 4 * 2 * 3 * 8 * pairs
