"""The projection from pieces: the reference against one product of the unpacked whole, the kernel against float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from osp_fast.kernels.piece_projection import project_pieces, project_pieces_ref, project_pieces_triton
from osp_fast.kernels.piece_projection_spec import SPEC
from osp_fast.kernels.sequence_pack import SequenceLayout, unpack_output


def relative(found, expected):
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))


def test_the_reference_is_the_product_of_what_is_unpacked():
    torch.manual_seed(0)
    layout = SequenceLayout(3, 1, 7, 5, 12, 2)
    weight, bias, add = torch.randn(9, 60), torch.randn(9), torch.randn(2, 2, 9)
    buffer = torch.randn(2 * 2 * 60)
    expected = F.linear(unpack_output(buffer, layout).flatten(2), weight, bias)
    assert torch.allclose(project_pieces(buffer, weight, bias, layout), expected, atol=1e-5)
    assert torch.allclose(project_pieces(buffer, weight, None, layout, add), expected - bias + add, atol=1e-5)


@pytest.mark.parametrize("path", ["triton", "reference"])
def test_sixteen_bits_are_rounded_once(path, monkeypatch):
    """Products that cancel over the pieces: 2049, the first piece's, is no number of sixteen bits."""
    monkeypatch.setenv("OSP_FAST_KERNELS", path)
    layout = SequenceLayout(2, 0, 2, 2, 2)
    buffer, weight = torch.ones(4).half(), torch.tensor([[2048.0, 1, -2048, 0]]).half()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert project_pieces(buffer, weight, None, layout).item() == 1


WEIGHTS = ("dense", "columns", "transposed")
CALLS = dict(
    ranks=st.integers(1, 7),
    place=st.floats(0, 0.99),
    tokens=st.integers(0, 60),
    heads=st.integers(1, 7),
    head_dim=st.sampled_from([6, 16, 24, 48, 96]),
    batch=st.integers(1, 3),
    features=st.sampled_from([1, 32, 43]),
    given_=st.sampled_from(["", "bias", "add", "bias add"]),
    weights=st.sampled_from(WEIGHTS),
    dtype=st.sampled_from((torch.float32, torch.float16)),
)


def drawn(shape, layout, dtype, generator):
    """A weight in one of `WEIGHTS`."""
    rows, columns = shape
    if layout == "columns":  # those of the later heads of a wider one
        return torch.randn(rows, 2 * columns, generator=generator).to(dtype)[:, columns:]
    if layout == "transposed":
        return torch.randn(columns, rows, generator=generator).to(dtype).t()
    return torch.randn(rows, columns, generator=generator).to(dtype)


@given(**CALLS)
@settings(max_examples=25)
@example(3, 0.4, 40, 5, 96, 2, 43, "bias add", "columns", torch.float32)
@example(5, 0.9, 30, 3, 48, 1, 32, "add", "dense", torch.float16)  # ranks without a head
def test_kernel_against_float64(ranks, place, tokens, heads, head_dim, batch, features, given_, weights, dtype):
    generator = torch.Generator().manual_seed(0)
    layout = SequenceLayout(ranks, int(place * ranks), tokens, heads, head_dim, batch)
    own = layout.tokens_of(layout.rank)
    buffer = torch.randn(batch * own * heads * head_dim, generator=generator).to(dtype).requires_grad_()
    weight = drawn((features, heads * head_dim), weights, dtype, generator).requires_grad_()
    bias = torch.randn(features, generator=generator).to(dtype).requires_grad_() if "bias" in given_ else None
    add = torch.randn(own, batch, features, generator=generator).to(dtype).transpose(0, 1).requires_grad_()
    add = add if "add" in given_ else None
    leaves = [x for x in (buffer, weight, bias, add) if x is not None]
    doubles = [None if x is None else x.detach().double().requires_grad_() for x in (buffer, weight, bias, add)]
    expected = project_pieces_ref(*doubles[:3], layout, doubles[3])
    forward, backward = SPEC.tolerances[dtype]
    versions = ["pointer"] + ["descriptor"] * (head_dim % 16 == 0 and weights != "transposed")
    grad = torch.randn(own, batch, features, generator=generator).to(dtype).transpose(0, 1)
    for version in versions:
        found = project_pieces_triton(buffer, weight, bias, layout, add, version)
        assert found.shape == (batch, own, features) and found.dtype == dtype
        assert relative(found, expected) <= forward, version
    gradients = torch.autograd.grad(found, leaves, grad)
    expected = torch.autograd.grad(expected, [x for x in doubles if x is not None], grad.double())
    assert all(relative(a, b) <= backward and a.shape == b.shape for a, b in zip(gradients, expected, strict=True))


def test_what_does_not_fit_is_refused(monkeypatch):
    layout = SequenceLayout(3, 1, 7, 5, 12, 2)
    buffer, weight, bias, add = torch.zeros(240), torch.zeros(9, 60), torch.zeros(9), torch.zeros(2, 2, 9)
    cases = (
        ((buffer[1:], weight, bias, layout), "must be flat"),
        ((buffer, weight, bias, layout._replace(tokens=8, grain=4, sets=2)), "unpack them first"),
        ((buffer, weight[:, 1:], bias, layout), "must be \\(out, 60\\)"),
        ((buffer, weight, bias[1:], layout), "bias \\(8,\\) must be \\(9,\\)"),
        ((buffer, weight, bias, layout, add[:, :1]), "add \\(2, 1, 9\\) must be \\(2, 2, 9\\)"),
        ((buffer, weight.half(), bias, layout), "weight must be torch.float32"),
        ((buffer, weight, bias, layout, add.to("meta")), "add must be torch.float32 on cpu"),
    )
    for path in ("triton", "reference"):
        monkeypatch.setenv("OSP_FAST_KERNELS", path)
        for arguments, words in cases:
            with pytest.raises(ValueError, match=words):
                project_pieces(*arguments)
    with pytest.raises(ValueError, match="not float64"):
        project_pieces_triton(buffer.double(), weight.double(), None, layout)
    with pytest.raises(ValueError, match="'boxes' is unknown"):
        project_pieces_triton(buffer, weight, None, layout, version="boxes")
    with pytest.raises(ValueError, match="use version pointer"):
        project_pieces_triton(buffer, weight, None, layout, version="descriptor")  # heads of 12 channels
