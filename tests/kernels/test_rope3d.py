"""3D RoPE: the table and the reference against the formula, the Triton kernels against float64."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from osp_fast.kernels.rope3d import (
    Rope3D,
    make_rope3d,
    rope3d,
    rope3d_axes,
    rope3d_qk,
    rope3d_qk_ref,
    rope3d_ref,
    rope3d_triton,
)
from osp_fast.kernels.rope3d_spec import SPEC

DTYPES = (torch.float32, torch.float16)


def relative(found, expected):
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))


def test_angles_follow_the_formula():
    size, scales = (2, 3, 4), (1.0, 2.0, 0.5)
    cos, sin = rope3d_axes(size, 24, scales)
    assert cos.shape == sin.shape == (2 + 3 + 4, 4)
    line = 0
    for length, scale in zip(size, scales, strict=True):
        for position in range(length):
            for i in range(4):
                angle = torch.tensor(position / scale * 10000 ** (-2 * i / 8), dtype=torch.float64)
                assert abs(cos[line, i] - angle.cos()) < 1e-6 and abs(sin[line, i] - angle.sin()) < 1e-6
            line += 1


def scattered(rope, tokens, seed=0):
    """The same clip with tokens from anywhere in it, some of them more than once."""
    frames, height, width = rope.size
    places = torch.randint(frames * height * width, (tokens,), generator=torch.Generator().manual_seed(seed))
    return rope._replace(start=0, positions=places.int())


@pytest.mark.parametrize("start", [0, 5, None])
def test_rotation_by_halves_in_each_part(start):
    """Each pair is a complex number, turned by the position on its axis."""
    scales = (1.0, 0.5, 2.0)
    rope = make_rope3d((3, 2, 4), 18, scales, start=start or 0)
    rope = scattered(rope, 11) if start is None else rope
    q, k = torch.randn(2, 2, 11, 2, 18, dtype=torch.float64)
    for x, out in zip((q, k), rope3d_qk_ref(q, k, rope), strict=True):
        for token in range(11):
            place = int(rope.positions[token]) if start is None else start + token
            for part, position in enumerate((place // 8, place // 4 % 2, place % 4)):
                first, second = x[:, token, :, part * 6 :][..., :3], x[:, token, :, part * 6 + 3 :][..., :3]
                angle = position / scales[part] * 10000.0 ** (-torch.arange(3, dtype=torch.float64) / 3)
                turned = torch.complex(first, second) * torch.polar(torch.ones_like(angle), angle)
                assert torch.allclose(out[:, token, :, part * 6 :][..., :3], turned.real, atol=1e-6)
                assert torch.allclose(out[:, token, :, part * 6 + 3 :][..., :3], turned.imag, atol=1e-6)


def test_norm_stands_in_front():
    rope = make_rope3d((2, 2, 3), 12)
    q, k, q_weight, k_weight = torch.randn(1, 12, 2, 12), torch.randn(1, 12, 2, 12), torch.randn(12), torch.randn(12)
    normed = [torch.nn.functional.rms_norm(x, (12,), w, 1e-2) for x, w in ((q, q_weight), (k, k_weight))]
    for found, expected in zip(
        rope3d_qk_ref(q, k, rope, q_weight, k_weight, 1e-2), rope3d_qk_ref(*normed, rope), strict=True
    ):
        assert torch.allclose(found, expected, atol=1e-6)


def test_products_depend_on_relative_positions_only():
    rope = make_rope3d((6, 1, 1), 12)
    q, k = torch.randn(2, 12)
    q_at, k_at = (x[0, :, 0] for x in rope3d_qk_ref(q.expand(1, 6, 1, 12), k.expand(1, 6, 1, 12), rope))
    products = q_at @ k_at.T
    assert torch.allclose(products.diagonal(2), products[0, 2].expand(4), atol=1e-5)


def test_type_and_rounding():
    x = torch.randn(1, 8, 3, 1, 12, dtype=torch.bfloat16)
    exact, rounded = make_rope3d((2, 2, 2), 12), make_rope3d((2, 2, 2), 12, round_to=torch.bfloat16)
    assert exact.axes.dtype == rounded.axes.dtype == torch.float32
    assert torch.equal(rounded.axes, rounded.axes.bfloat16().float()) and not torch.equal(exact.axes, rounded.axes)
    assert all(part.dtype == torch.bfloat16 for part in rope3d_ref(x, exact))
    # The rounding reaches the angle itself: at position 300 it is off by up to one.
    exact, rounded = rope3d_axes((301, 1, 1), 12), rope3d_axes((301, 1, 1), 12, round_to=torch.bfloat16)
    angle = torch.tensor(299.0).to(torch.bfloat16)
    assert rounded[0, 299, 0] == angle.cos() and abs(exact[0, 299, 0] - torch.tensor(299.0).cos()) < 1e-6


LAYOUTS = ("contiguous", "gaps", "tokens first", "channels apart")
CALLS = dict(
    batch=st.integers(1, 3),
    size=st.sampled_from([(1, 1, 1), (1, 5, 7), (3, 2, 5), (5, 1, 2), (2, 3, 3)]),
    cut=st.tuples(st.integers(0, 12), st.integers(0, 12)),
    heads=st.integers(1, 3),
    head_dim=st.sampled_from([6, 18, 24, 48, 96]),
    norm=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(DTYPES),
    inplace=st.booleans(),
    anywhere=st.booleans(),
)


def laid_out(shape, layout, dtype, seed):
    """Random numbers (B, N, P, H, D) in one of `LAYOUTS`."""
    generator = torch.Generator().manual_seed(seed)
    batch, tokens, parts, heads, dim = shape
    if layout == "gaps":
        x = torch.randn(batch + 1, tokens + 2, parts, heads + 1, dim, generator=generator)
        return x.to(dtype)[1:, 1:-1, :, :-1]
    if layout == "tokens first":
        return torch.randn(tokens, batch, parts, heads, dim, generator=generator).to(dtype).transpose(0, 1)
    if layout == "channels apart":
        return torch.randn(batch, tokens, parts, dim, heads, generator=generator).to(dtype).transpose(3, 4)
    return torch.randn(shape, generator=generator).to(dtype)


def cut_rope(size, cut, head_dim):
    """A clip of which tokens are left out at both ends, and how many are left."""
    total = size[0] * size[1] * size[2]
    start = min(cut[0], total - 1)
    return make_rope3d(size, head_dim, (1.0, 2.0, 0.5), start=start), max(1, total - start - cut[1])


def weights(head_dim):
    generator = torch.Generator().manual_seed(9)
    return [(1 + 0.3 * torch.randn(head_dim, generator=generator)).requires_grad_() for _ in range(2)]


def doubles(*tensors):
    return [x.detach().double().requires_grad_() for x in tensors]


@given(**CALLS)
@settings(max_examples=20)
@example(3, (1, 5, 7), (0, 0), 2, 96, True, "contiguous", torch.float32, True, True)
@example(1, (3, 2, 5), (4, 3), 3, 48, False, "contiguous", torch.float32, True, False)
def test_kernels_against_float64(batch, size, cut, heads, head_dim, norm, layout, dtype, inplace, anywhere):
    rope, tokens = cut_rope(size, cut, head_dim)
    rope = scattered(rope, tokens) if anywhere else rope
    shape = (batch, tokens, 3, heads, head_dim)
    leaf, fresh = (laid_out(shape, layout, dtype, 0) for _ in range(2))
    norms = weights(head_dim) if norm else []
    leaf64, *norms64 = doubles(leaf.requires_grad_(), *norms)
    # What a product has made, in the leaf's layout: a leaf itself would be spared.
    product = torch.empty_strided(leaf.shape, leaf.stride(), dtype=dtype).copy_(leaf)
    found = rope3d_triton(product, rope, *norms, inplace=inplace)
    expected = rope3d_ref(leaf64, rope, *norms64)
    forward, backward = SPEC.tolerances[dtype]
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype and a.shape == (batch, tokens, heads, head_dim) and relative(a, b) <= forward
    grads = [laid_out((batch, tokens, 1, heads, head_dim), name, dtype, 1)[:, :, 0] for name in LAYOUTS[:3]]
    gradients = torch.autograd.grad(found, [leaf, *norms], grads)
    expected = torch.autograd.grad(expected, [leaf64, *norms64], [x.double() for x in grads])
    assert all(relative(a, b) <= backward for a, b in zip(gradients, expected, strict=True))
    with torch.no_grad():
        again = rope3d_triton(fresh, rope, *norms, inplace=inplace)
    assert all(torch.equal(a, b) for a, b in zip(again, found, strict=True))


@pytest.mark.parametrize("norm", [False, True])
def test_separate_tensors_against_float64(norm, monkeypatch):
    rope, tokens = cut_rope((3, 2, 5), (4, 3), 24)
    rope = scattered(rope, tokens) if norm else rope
    q, k = (
        laid_out((2, tokens, 1, 3, 24), layout, torch.float32, 2)[:, :, 0].requires_grad_() for layout in LAYOUTS[1:3]
    )
    norms = weights(24) if norm else []
    q64, k64, *norms64 = doubles(q, k, *norms)
    expected = rope3d_qk_ref(q64, k64, rope, *norms64)
    monkeypatch.setenv("OSP_FAST_KERNELS", "triton")
    found = rope3d_qk(q, k, rope, *norms, inplace=True)  # gradients are wanted: it must not be in place
    copies = [x.detach().clone() for x in (q, k)]
    with torch.no_grad():
        inside = rope3d_qk(*copies, rope, *norms, inplace=True)
    forward, backward = SPEC.tolerances[torch.float32]
    for a, b, c, copy in zip(found, expected, inside, copies, strict=True):
        assert relative(a, b) <= forward and torch.equal(a, c) and c.data_ptr() == copy.data_ptr()
    grads = [torch.randn(x.shape) for x in found]
    gradients = torch.autograd.grad(found, [q, k, *norms], grads)
    expected = torch.autograd.grad(expected, [q64, k64, *norms64], [x.double() for x in grads])
    assert all(relative(a, b) <= backward for a, b in zip(gradients, expected, strict=True))


def test_in_place_overwrites_q_and_k_alone():
    rope = make_rope3d((2, 2, 3), 24)
    qkv = torch.randn(2, 12, 3, 2, 24)
    before = qkv.clone()
    q, k, v = rope3d_triton(qkv, rope)
    assert torch.equal(qkv, before) and v.data_ptr() == qkv[:, :, 2].data_ptr()
    q_in, k_in, v_in = rope3d_triton(qkv, rope, inplace=True)
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip((q_in, k_in, v_in), qkv.unbind(2), strict=True))
    assert torch.equal(q_in, q) and torch.equal(k_in, k) and torch.equal(v_in, before[:, :, 2])


@pytest.mark.parametrize("case", ["leaf", "view of a leaf", "norm", "expanded"])
def test_in_place_spares_what_is_needed(case):
    rope = make_rope3d((2, 2, 3), 24)
    qkv = torch.randn(2, 12, 3 * 2 * 24, requires_grad="leaf" in case).view(2, 12, 3, 2, 24)
    if case == "leaf":
        qkv = qkv.detach().requires_grad_()
    if case == "expanded":
        qkv = qkv[:1].expand(2, -1, -1, -1, -1)
    norms = [torch.ones(24, requires_grad=True) for _ in range(2)] if case == "norm" else []
    before = qkv.detach().clone()
    out = rope3d_triton(qkv, rope, *norms, inplace=True)
    assert torch.equal(qkv, before)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(out, rope3d_ref(qkv, rope, *norms), strict=True))


def test_backward_that_needs_the_overwritten_values_fails():
    qkv = torch.randn(1, 12, 3, 2, 24, requires_grad=True) * 1
    squares = qkv.square().sum()
    q, _, _ = rope3d_triton(qkv, make_rope3d((2, 2, 3), 24), inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (squares + q.sum()).backward()


def test_gradients_of_some_results_and_expanded_ones():
    rope = make_rope3d((2, 2, 3), 24)
    leaf = torch.randn(1, 12, 3, 2, 24, requires_grad=True)
    for pick in (lambda out: out[0].sum(), lambda out: out[2].sum(), lambda out: out[0].square().sum() + out[1].sum()):
        found = torch.autograd.grad(pick(rope3d_triton(leaf * 1, rope, inplace=True)), leaf)[0]
        assert torch.allclose(found, torch.autograd.grad(pick(rope3d_ref(leaf, rope)), leaf)[0], atol=1e-5)


def test_heads_far_apart():
    """The stride of heads is multiplied in 64 bits: here the third is beyond 2^31 elements."""
    q, k = torch.empty(2, 3 << 30, dtype=torch.float16)  # memory that is reserved, and hardly touched
    q, k = (x.as_strided((1, 4, 3, 24), (0, 24, 1 << 30, 1)).copy_(torch.randn(1, 4, 3, 24)) for x in (q, k))
    rope = make_rope3d((1, 2, 2), 24)
    expected = rope3d_qk_ref(q, k, rope)
    arguments = (*rope, None, None, 1e-6)
    found = torch.ops.osp_fast.rope3d(q, k, *arguments)
    assert all(torch.allclose(a, b, atol=2e-3) for a, b in zip(found, expected, strict=True))


def test_nothing_to_rotate():
    for shape in ((0, 12, 3, 2, 24), (1, 0, 3, 2, 24)):
        leaf, norms = torch.zeros(shape, requires_grad=True), [torch.ones(24, requires_grad=True) for _ in range(2)]
        out = rope3d_triton(leaf * 1, make_rope3d((2, 2, 3), 24), *norms)
        assert out[0].shape == out[2].shape == (*shape[:2], 2, 24)
        gradients = torch.autograd.grad([x.sum() for x in out], [leaf, *norms])
        assert gradients[0].shape == shape and not gradients[1].any()


def test_what_does_not_fit_is_refused(monkeypatch):
    qkv, rope, ones = torch.zeros(1, 12, 3, 2, 24), make_rope3d((2, 2, 3), 24), torch.ones(24)
    places = torch.arange(12, dtype=torch.int32)
    with pytest.raises(ValueError, match="multiple of 6"):
        rope3d_axes((1, 1, 1), 64)
    cases = (
        ((qkv, rope._replace(start=1)), "12 tokens from 1 on"),
        ((qkv, rope._replace(start=-1)), "12 tokens from -1 on"),
        ((qkv, rope._replace(start=1, positions=places)), "it must be 0, not 1"),
        ((qkv, rope._replace(positions=places[1:])), "one for each of 12 tokens"),
        ((qkv, rope._replace(positions=places.long())), "must be contiguous int32"),
        ((qkv, rope._replace(positions=places.repeat(2)[::2])), "must be contiguous int32"),
        ((qkv, rope._replace(positions=places.to("meta"))), "positions must be on cpu"),
        ((qkv, make_rope3d((2, 2, 3), 18)), "must be float32"),
        ((qkv, Rope3D(rope.axes.double(), rope.size)), "must be float32"),
        ((qkv, Rope3D(rope.axes.to("meta"), rope.size)), "must be on cpu"),
        ((qkv, rope, ones), "go together"),
        ((qkv, rope, ones, ones[:-1]), "norm weights"),
        ((qkv, rope, ones, ones, 0.0), "must be positive"),
    )
    for path in ("triton", "reference"):
        monkeypatch.setenv("OSP_FAST_KERNELS", path)
        for arguments, words in cases:
            with pytest.raises(ValueError, match=words):
                rope3d(*arguments)
        with pytest.raises(ValueError, match="must be \\(B, N, 3, H, D\\)"):
            rope3d(qkv[:, :, :2], rope)
        with pytest.raises(ValueError, match="must be alike"):
            rope3d_qk(qkv[:, :, 0], qkv[:, :-1, 1], rope)
    with pytest.raises(ValueError, match="not float64"):
        rope3d_triton(qkv.double(), rope)
