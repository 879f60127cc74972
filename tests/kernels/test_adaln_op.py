"""Adaptive layer norm as an operation: tracing, compilation, bytes, what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from osp_fast.kernels import adaln_kernels, adaln_spec
from osp_fast.kernels.adaln import (
    adaln_triton,
    gate_residual,
    gate_residual_norm_modulate,
    gate_residual_norm_modulate_ref,
    norm_modulate,
)

NORM_OPTIONS = [("norm", {"norm": "rms"}), ("norm", {"weighted": True}), ("gate norm", {"weighted": True})]


def small(form, batch=2, tokens=5, width=16, **other):
    return adaln_spec.make_inputs(
        device="cpu", dtype=torch.float32, seed=0, batch=batch, tokens=tokens, width=width, form=form, **other
    )


def op_arguments(inputs):
    names = ("x", "y", "gate", "gate_table", "shift", "scale", "shift_table", "scale_table", "weight", "bias")
    return [inputs.get(name) for name in names], (1e-6, inputs.get("norm") == "rms", torch.float32)


@pytest.mark.parametrize("form, options", [*((form, {}) for form in adaln_spec.FORMS), *NORM_OPTIONS])
def test_opcheck(form, options):
    tensors, options = op_arguments(small(form, **options))
    torch.library.opcheck(torch.ops.osp_fast.adaln.default, (*tensors, *options))
    tensors = [None if x is None else x.detach() for x in tensors]
    residual, modulated, means, inverses = torch.ops.osp_fast.adaln(*tensors, *options)
    grads = [torch.randn_like(x) if x.numel() else None for x in (residual, modulated)]
    saved = [residual if residual.numel() else tensors[0], *tensors[1:]]
    arguments = (*grads, *saved, means, inverses, options[1])
    torch.library.opcheck(torch.ops.osp_fast.adaln_backward.default, arguments)


def block(x, y, time, table):
    """The three uses of a block, in the order of its layers."""
    rows = dict(shift_table=table[0], scale_table=table[1])
    h = norm_modulate(x, time[:, 0], time[:, 1], 1e-6, **rows)
    x = gate_residual(x, time[:, 2], h * y, gate_table=table[2])
    x, h = gate_residual_norm_modulate(x, None, y, time[:, 3], time[:, 4], 1e-6)
    x, h = gate_residual_norm_modulate(x, time[:, 5], h, time[:, 0], time[:, 1], 1e-6, gate_table=table[5], **rows)
    return x * h


def test_compiles_without_breaks_and_once_for_all_lengths(monkeypatch):
    monkeypatch.setenv("OSP_FAST_KERNELS", "triton")
    compiles = []

    def backend(graph, _):
        compiles.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(block, backend=backend, fullgraph=True, dynamic=True)
    time, table = torch.randn(2, 6, 16, requires_grad=True), torch.randn(6, 16, requires_grad=True)
    for tokens in (8, 5, 13, 16):
        x, y = (torch.randn(2, tokens, 16, requires_grad=True) for _ in range(2))
        found, expected = compiled(x, y, time, table), block(x, y, time, table)
        assert torch.equal(found, expected)
        grads = [torch.autograd.grad(out.sum(), (x, y, time, table)) for out in (found, expected)]
        assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))
    assert len(compiles) == 1


def test_compiles_with_aot_autograd_to_the_reference(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 7, 16), (2, 7, 16), (2, 6, 16), (6, 16))
    inputs = [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]
    monkeypatch.setenv("OSP_FAST_KERNELS", "reference")
    expected = block(*inputs)
    expected = [expected, *torch.autograd.grad(expected.square().sum(), inputs)]
    monkeypatch.setenv("OSP_FAST_KERNELS", "triton")
    torch._dynamo.reset()
    found = torch.compile(block, backend="aot_eager", fullgraph=True)(*inputs)
    found = [found, *torch.autograd.grad(found.square().sum(), inputs)]
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_a_new_length_compiles_no_kernel(tmp_path):
    script = Path(__file__).parent / "stand_in_adaln.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    result = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    kernels = ("adaln_fwd_kernel", "adaln_bwd_kernel", "adaln_bwd_sums_kernel")
    assert json.loads(result.stdout) == dict.fromkeys(kernels, 1)


@pytest.mark.parametrize("form, options", [*((form, {}) for form in adaln_spec.FORMS), *NORM_OPTIONS])
def test_bytes_are_those_of_the_spec(form, options, count_traffic, monkeypatch):
    monkeypatch.setenv("OSP_FAST_KERNELS", "triton")
    sizes = dict(batch=2, tokens=11, width=48, form=form, **options)
    inputs = small(**sizes)
    with count_traffic() as moved:
        outs = adaln_spec.operation(**inputs)
    assert moved.loaded + moved.stored == adaln_spec.moved_bytes("forward", **sizes, element=4)
    outs = outs if isinstance(outs, tuple) else (outs,)
    leaves = [x for x in inputs.values() if isinstance(x, torch.Tensor)]
    with count_traffic() as moved:
        torch.autograd.grad(outs, leaves, [torch.randn_like(x) for x in outs])
    # What each sample's one program leaves to the small sum, and what that reads again, is no part of the operation.
    _, gated, modulates = adaln_spec.FORMS[form]
    sums = 2 * (2 * modulates + gated) * 48 * 4
    again = (modulates * 3 + options.get("weighted", False)) * 48 * 4
    assert [launch.kernel for launch in moved.launches] == ["adaln_bwd_kernel", "adaln_bwd_sums_kernel"]
    assert moved.loaded + moved.stored - 2 * sums - again == adaln_spec.moved_bytes("backward", **sizes, element=4)


@pytest.mark.parametrize("shape", [(2, 0, 8), (0, 3, 8)])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("of", ["residual", "modulated", "both"])
def test_nothing_to_do(shape, gated, of):
    x, y = (torch.randn(shape, requires_grad=True) for _ in range(2))
    gate, shift, scale = torch.randn(3, shape[0], 8, requires_grad=True).unbind(0)
    outs = adaln_triton(x, y=y, gate=gate if gated else None, shift=shift, scale=scale, eps=1e-6)
    assert [out.shape for out in outs] == [shape, shape]
    total = {"residual": outs[0].sum(), "modulated": outs[1].sum(), "both": outs[0].sum() + outs[1].sum()}[of]
    leaves = [x, y, *([gate] if gated else [])]
    grads = torch.autograd.grad(total, leaves)
    assert [grad.shape for grad in grads] == [leaf.shape for leaf in leaves]
    assert not any(grad.any() for grad in grads[2:])


def test_kernels_have_no_atomics():
    """Which alone makes the sums of vectors' gradients the same bits each time: an interpreter has one thread."""
    assert "atomic" not in Path(adaln_kernels.__file__).read_text()


def test_path_is_chosen_by_the_environment(monkeypatch, count_traffic):
    inputs = small("gate norm")
    monkeypatch.setenv("OSP_FAST_KERNELS", "reference")
    expected = adaln_spec.operation(**inputs)
    assert torch.equal(expected[1], gate_residual_norm_modulate_ref(**inputs)[1])
    monkeypatch.setenv("OSP_FAST_KERNELS", "triton")
    with count_traffic() as moved:
        assert torch.allclose(adaln_spec.operation(**inputs)[1], expected[1], atol=1e-5)
    assert [launch.kernel for launch in moved.launches] == ["adaln_fwd_kernel"]


def test_what_does_not_fit_is_refused():
    x, v, row = torch.zeros(2, 5, 8), torch.zeros(2, 8), torch.zeros(8)
    for arguments, words in (
        (dict(x=x[0], shift=v, scale=v), "must be \\(B, N, d\\)"),
        (dict(x=x, y=x[:1], gate=v), "y \\(1, 5, 8\\)"),
        (dict(x=x, gate=v, shift=v, scale=v), "a gate needs y"),
        (dict(x=x), "shift needs scale"),
        (dict(x=x, shift=v), "shift needs scale"),
        (dict(x=x, shift=v, scale=row), "scale \\(8,\\) must be"),
        (dict(x=x, shift=v, scale=v, shift_table=row), "go together"),
        (dict(x=x, y=x, gate=v, weight=row), "weight \\(8,\\) must be"),
        (dict(x=x, shift=v, scale=v, norm="batch"), "'batch' is unknown"),
        (dict(x=x, shift=v, scale=v.to("meta")), "must be on cpu"),
        (dict(x=x.double(), shift=v, scale=v), "not float64"),
    ):
        with pytest.raises(ValueError, match=words):
            adaln_triton(**arguments)
    with pytest.raises(ValueError, match="'batch' is unknown"):
        norm_modulate(x, v, v, 1e-6, norm="batch")
    with pytest.raises(ValueError, match="must have x's shape"):
        gate_residual(x, v, x[:, 1:])


def test_needs_a_gpu_or_the_interpreter(monkeypatch):
    monkeypatch.setattr("osp_fast.kernels.launch.interpreting", lambda: False)
    x, v = torch.zeros(1, 2, 8), torch.zeros(1, 8)
    with pytest.raises(ValueError, match="needs an NVIDIA GPU"):
        adaln_triton(x, shift=v, scale=v)
