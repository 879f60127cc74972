"""The gated residual and the modulated norm: references against formulas, Triton kernels against float64."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from osp_fast.kernels import adaln_spec
from osp_fast.kernels.adaln import (
    adaln_triton,
    gate_residual_norm_modulate_ref,
    gate_residual_ref,
    norm_modulate_ref,
)

FORWARD, GRADIENT = adaln_spec.SPEC.tolerances[torch.float32]


def relative(found, expected):
    return ((found.detach().double() - expected.detach()).norm() / expected.detach().norm()).item()


def normed(x, eps, norm="layer"):
    mean = x.mean(-1, keepdim=True) if norm == "layer" else 0.0
    return (x - mean) / ((x - mean).square().mean(-1, keepdim=True) + eps).sqrt()


def test_references_follow_their_formulas():
    x, y = torch.randn(2, 2, 5, 7).double()
    gate, shift, scale = torch.randn(3, 2, 7).double()
    gate_row, shift_row, scale_row, weight, bias = torch.randn(5, 7).double()
    assert torch.allclose(gate_residual_ref(x, gate, y), x + gate[:, None] * y)
    assert torch.allclose(gate_residual_ref(x, None, y), x + y)
    tables = dict(shift_table=shift_row, scale_table=scale_row)
    for norm in ("layer", "rms"):
        plain = normed(x, 1e-6, norm)
        found = norm_modulate_ref(x, shift, scale, 1e-6, norm=norm)
        assert torch.allclose(found, plain * (1 + scale[:, None]) + shift[:, None])
        found = norm_modulate_ref(x, shift, scale, 1e-6, weight=weight, bias=bias, norm=norm, **tables)
        expected = (plain * weight + bias) * (1 + (scale + scale_row)[:, None]) + (shift + shift_row)[:, None]
        assert torch.allclose(found, expected)
    residual, modulated = gate_residual_norm_modulate_ref(x, gate, y, shift, scale, 1e-6, gate_table=gate_row)
    assert torch.allclose(residual, x + (gate + gate_row)[:, None] * y)
    assert torch.allclose(modulated, normed(residual, 1e-6) * (1 + scale[:, None]) + shift[:, None])


def test_references_compute_16_bits_in_float32():
    x, y = torch.randn(2, 1, 4, 96).bfloat16()
    gate, shift, scale = torch.randn(3, 1, 96).bfloat16()
    residual, modulated = gate_residual_norm_modulate_ref(x, gate, y, shift, scale, 1e-6)
    assert residual.dtype == modulated.dtype == torch.bfloat16
    wide = (one.float() for one in (x, gate, y))
    assert torch.equal(residual, gate_residual_ref(*wide).bfloat16())
    assert torch.equal(modulated, norm_modulate_ref(residual.float(), shift.float(), scale.float(), 1e-6).bfloat16())
    assert (
        gate_residual_norm_modulate_ref(x, gate, y, shift, scale, 1e-6, dtype=torch.float32)[1].dtype == torch.float32
    )


@st.composite
def cases(draw):
    """A form of the operation, its sizes, and which tensors are strided, shared or without a gradient."""
    form = draw(st.sampled_from(list(adaln_spec.FORMS)))
    return dict(
        form=form,
        batch=draw(st.integers(1, 3)),
        tokens=draw(st.sampled_from([1, 2, 3, 7, 13])),
        width=draw(st.sampled_from([3, 8, 37, 48, 64, 144])),
        tables=draw(st.booleans()),
        weighted=draw(st.booleans()) and adaln_spec.FORMS[form][2],
        norm=draw(st.sampled_from(["layer", "rms"])),
        strided=draw(st.booleans()),
        only=draw(st.sampled_from(["all", "residual", "modulated"])),
    )


def make(case, seed=0):
    """Arguments of `adaln_triton`, float32; x and y may be slices of a wider tensor, y in another order of strides."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    batch, tokens, width = case["batch"], case["tokens"], case["width"]
    adds, gated, modulates = adaln_spec.FORMS[case["form"]]
    time, table = normal(batch, 6, width), normal(6, width)
    inputs = {"x": normal(batch, tokens, width + 3)[..., 2:-1] if case["strided"] else normal(batch, tokens, width)}
    if adds:
        shape = (tokens, batch, width) if case["strided"] else (batch, tokens, width)
        inputs["y"] = normal(*shape).transpose(0, 1) if case["strided"] else normal(*shape)
    if gated:
        inputs["gate"] = time[:, 2]
    if modulates:
        inputs |= {"shift": time[:, 0], "scale": time[:, 1]}
    if case["tables"]:
        rows = {"gate": table[2], "shift": table[0], "scale": table[1]}
        inputs |= {f"{name}_table": row for name, row in rows.items() if name in inputs}
    if case["weighted"]:
        inputs |= {"weight": normal(width), "bias": normal(width)}
    return {name: tensor.requires_grad_() for name, tensor in inputs.items()}


def expected_results(inputs, norm):
    """(residual, modulated) of the references; None for what the form does not have."""
    options = {name: x for name, x in inputs.items() if name not in ("x", "y", "gate", "shift", "scale", "gate_table")}
    x, table = inputs["x"], inputs.get("gate_table")
    residual = gate_residual_ref(x, inputs.get("gate"), inputs["y"], gate_table=table) if "y" in inputs else None
    if "scale" not in inputs:
        return residual, None
    source = x if residual is None else residual
    return residual, norm_modulate_ref(source, inputs["shift"], inputs["scale"], 1e-6, norm=norm, **options)


@settings(max_examples=60)
@given(cases())
def test_triton_against_float64(case):
    inputs = make(case)
    exact = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    expected = expected_results(exact, case["norm"])
    found = adaln_triton(**inputs, eps=1e-6, norm=case["norm"])
    pairs = [(a, b) for a, b in zip(found, expected, strict=True) if b is not None]
    assert all(not a.numel() for a, b in zip(found, expected, strict=True) if b is None)
    for a, b in pairs:
        assert a.dtype == torch.float32 and relative(a, b) <= FORWARD
    if case["only"] != "all" and len(pairs) == 2:
        pairs = pairs[:1] if case["only"] == "residual" else pairs[1:]
    cotangents = [torch.randn(a.shape, generator=torch.Generator().manual_seed(1)) for a, _ in pairs]
    found = torch.autograd.grad([a for a, _ in pairs], list(inputs.values()), cotangents, allow_unused=True)
    exact_cotangents = [x.double() for x in cotangents]
    expected = torch.autograd.grad([b for _, b in pairs], list(exact.values()), exact_cotangents, allow_unused=True)
    for name, a, b in zip(inputs, found, expected, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            assert relative(a, b) <= GRADIENT, name


def test_constant_rows_large_means_and_huge_values():
    """Where a variance by squares would cancel, and where squares are largest."""
    vectors = dict(shift=torch.zeros(1, 48), scale=torch.zeros(1, 48))
    assert not adaln_triton(torch.full((1, 3, 48), 7.0), **vectors, eps=1e-6)[1].any()
    for x in (torch.randn(1, 5, 48) + 1000, torch.randn(1, 5, 48) * 1e15):
        found = adaln_triton(x, **vectors, eps=1e-6)[1]
        assert relative(found, normed(x.double(), 1e-6)) < 1e-4


def test_what_is_normalised_is_the_rounded_residual():
    x, y = torch.randn(2, 1, 6, 64).half()
    gate, shift, scale = torch.randn(3, 1, 64).half()
    residual, modulated = adaln_triton(x, y=y, gate=gate, shift=shift, scale=scale, eps=1e-6)
    assert torch.equal(residual, gate_residual_ref(x, gate, y))
    assert relative(modulated, norm_modulate_ref(residual.double(), shift.double(), scale.double(), 1e-6)) < 5e-4


def test_types_may_differ():
    """A float32 stream, what 16-bit products made, vectors of both types, a 16-bit result: as under autocast."""
    x, y = torch.randn(2, 5, 48, requires_grad=True), torch.randn(2, 5, 48).half().requires_grad_()
    gate = torch.randn(2, 48).half().requires_grad_()
    shift, scale, row = torch.randn(2, 48), torch.randn(2, 48), torch.randn(48, requires_grad=True)
    arguments = dict(gate=gate, shift=shift, scale=scale, gate_table=row, eps=1e-6, dtype=torch.float16)
    residual, modulated = adaln_triton(x, y=y, **arguments)
    assert residual.dtype == torch.float32 and modulated.dtype == torch.float16
    expected = gate_residual_norm_modulate_ref(x, gate, y, shift, scale, 1e-6, gate_table=row, dtype=torch.float16)
    assert torch.allclose(residual, expected[0], atol=1e-6) and torch.allclose(modulated, expected[1], atol=2e-3)
    leaves = (x, y, gate, row)
    found = torch.autograd.grad(residual.sum() + modulated.float().square().sum(), leaves)
    exact = torch.autograd.grad(expected[0].sum() + expected[1].float().square().sum(), leaves)
    for a, b, leaf in zip(found, exact, leaves, strict=True):
        assert a.dtype == leaf.dtype and relative(a, b.double()) < 2e-3


def test_gradients_are_the_same_bits_each_time():
    case = dict(form="gate norm", batch=2, tokens=13, width=37, tables=True, weighted=True, strided=False)
    runs = []
    for _ in range(2):
        inputs = make(case)
        residual, modulated = adaln_triton(**inputs, eps=1e-6)
        runs.append(torch.autograd.grad(residual.sum() + modulated.square().sum(), list(inputs.values())))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
