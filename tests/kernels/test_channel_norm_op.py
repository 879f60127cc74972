"""The channel norm as an operation: tracing, compilation, bytes, what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from osp_fast.kernels import channel_norm_spec as spec
from osp_fast.kernels import tuning
from osp_fast.kernels.channel_norm import channel_norm, channel_norm_ref, channel_norm_triton
from osp_fast.kernels.channel_norm_launch import candidates

SMALL = dict(batch=2, frames=2, rows=3, columns=5, channels=24)


def small(silu=True, **other):
    return spec.make_inputs(device="cpu", dtype=torch.float32, seed=0, **{**SMALL, **other}, silu=silu)


@pytest.mark.parametrize("silu, width", [(False, None), (True, 32)])
@pytest.mark.parametrize("layout", ["channels last", "channels first", "images"])
def test_opcheck(silu, width, layout):
    inputs = small(silu, width=width)
    x = inputs["x"].detach()
    if layout == "channels first":
        x = x.contiguous()
    elif layout == "images":
        x = x[:, :, 0]
    arguments = [x.requires_grad_(), inputs["weight"], inputs["bias"], spec.EPS, silu]
    torch.library.opcheck(torch.ops.osp_fast.channel_norm.default, arguments)
    arguments[:3] = [tensor.detach() for tensor in arguments[:3]]
    torch.library.opcheck(torch.ops.osp_fast.channel_norm_backward.default, (torch.randn_like(x), *arguments))


def block(x, weight, bias):
    """Two norms with a product between them, as around a 1x1x1 convolution."""
    hidden = channel_norm(x, weight, bias, 1e-6, silu=True)
    return channel_norm(hidden * 2 + x, weight, bias, 1e-6)


def test_compiles_without_breaks_and_once_for_all_sizes(monkeypatch):
    monkeypatch.setenv("OSP_FAST_KERNELS", "triton")
    compiles = []

    def backend(graph, _):
        compiles.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(block, backend=backend, fullgraph=True, dynamic=True)
    weight, bias = torch.randn(2, 8, requires_grad=True).unbind()
    for sizes in ((3, 4, 5), (5, 7, 6), (2, 3, 4), (9, 2, 3)):
        x = torch.randn(2, *sizes, 8).movedim(-1, 1).requires_grad_()
        found, expected = compiled(x, weight, bias), block(x, weight, bias)
        assert torch.equal(found, expected)
        grads = [torch.autograd.grad(out.square().sum(), (x, weight, bias)) for out in (found, expected)]
        assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))
    assert len(compiles) == 1


def test_compiles_with_aot_autograd_to_the_reference(monkeypatch):
    inputs = list(small().values())[:3]
    monkeypatch.setenv("OSP_FAST_KERNELS", "reference")
    expected = block(*inputs)
    expected = [expected, *torch.autograd.grad(expected.square().sum(), inputs)]
    monkeypatch.setenv("OSP_FAST_KERNELS", "triton")
    torch._dynamo.reset()
    found = torch.compile(block, backend="aot_eager", fullgraph=True)(*inputs)
    found = [found, *torch.autograd.grad(found.square().sum(), inputs)]
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def test_a_new_size_compiles_no_kernel(tmp_path):
    script = Path(__file__).parent / "stand_in_channel_norm.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    result = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    kernels = ("channel_norm_fwd_kernel", "channel_norm_bwd_kernel", "channel_norm_bwd_sums_kernel")
    assert json.loads(result.stdout) == dict.fromkeys(kernels, 1)


@pytest.mark.parametrize("width", [None, 40])
@pytest.mark.parametrize("silu", [False, True])
def test_bytes_are_those_of_the_spec(silu, width, count_traffic, monkeypatch):
    monkeypatch.setenv("OSP_FAST_KERNELS", "triton")
    inputs = small(silu, width=width)
    with count_traffic() as moved:
        out = channel_norm(**inputs)
    assert moved.loaded + moved.stored == spec.moved_bytes("forward", **SMALL, element=4)
    assert [launch.kernel for launch in moved.launches] == ["channel_norm_fwd_kernel"]
    leaves = [inputs[name] for name in ("x", "weight", "bias")]
    with count_traffic() as moved:
        torch.autograd.grad(out, leaves, torch.randn_like(out))
    assert [launch.kernel for launch in moved.launches] == ["channel_norm_bwd_kernel", "channel_norm_bwd_sums_kernel"]
    # Without SiLU the bias is read for nothing; the two sums of each program are written and read once.
    programs = 2
    expected = spec.moved_bytes("backward", **SMALL, element=4) + 2 * programs * 2 * 24 * 4
    assert moved.loaded + moved.stored == expected


def test_nothing_to_do():
    x, weight, bias = torch.zeros(2, 8, 0, 3, 4, requires_grad=True), *torch.ones(2, 8, requires_grad=True).unbind()
    out = channel_norm_triton(x, weight, bias, 1e-6, True)
    assert out.shape == x.shape
    assert all(not gradient.any() for gradient in torch.autograd.grad(out.sum(), (x, weight, bias)))


def test_path_is_chosen_by_the_environment(monkeypatch, count_traffic):
    inputs = small()
    monkeypatch.setenv("OSP_FAST_KERNELS", "reference")
    expected = channel_norm(**inputs)
    assert torch.equal(expected, channel_norm_ref(**inputs))
    monkeypatch.setenv("OSP_FAST_KERNELS", "triton")
    with count_traffic() as moved:
        assert torch.allclose(channel_norm(**inputs), expected, atol=1e-5)
    assert len(moved.launches) == 1


def test_what_does_not_fit_is_refused(monkeypatch):
    x, row = torch.zeros(2, 8, 1, 3, 4), torch.zeros(8)
    for arguments, words in (
        ((x[0, 0], row, row), "must be \\(B, C, H, W\\) or \\(B, C, T, H, W\\)"),
        ((x, row[1:], row), "weight \\(7,\\) must be \\(C,\\) = \\(8,\\)"),
        ((x, row, x), "bias"),
    ):
        for function in (channel_norm, channel_norm_triton):
            with pytest.raises(ValueError, match=words):
                function(*arguments, 1e-6)
    with pytest.raises(ValueError, match="not float64"):
        channel_norm_triton(x.double(), row, row, 1e-6)
    with pytest.raises(ValueError, match="must be on cpu"):
        channel_norm_triton(x, row.to("meta"), row, 1e-6)
    monkeypatch.setattr("osp_fast.kernels.launch.interpreting", lambda: False)
    with pytest.raises(ValueError, match="needs an NVIDIA GPU"):
        channel_norm_triton(x, row, row, 1e-6)


@pytest.mark.parametrize("arch", [0, 80, 90])
@pytest.mark.parametrize("channels", [8, 24, 128, 192, 320, 640, 2048])
def test_configurations_fit_the_machine(arch, channels):
    for kernel in ("channel_norm forward", "channel_norm backward"):
        found = candidates(kernel, arch, channels, 2)
        assert len(set(found)) == len(found)
        for config in found:
            assert config.rows >= 1 and config.programs * config.num_warps <= 48  # sm_89 has no more than 48 warps


def test_tuning_reaches_both_kernels():
    inputs = small()
    for kernel, config in spec.tune_candidates(inputs, 0):
        call = spec.tune_call(inputs, kernel)
        with tuning.forced(kernel, config) as override:
            call()
        assert override.used


def test_the_spec_is_bound_by_memory_everywhere():
    for shape in spec.SHAPES:
        for direction in ("forward", "backward"):
            moved, seconds = (cost(direction, **shape.sizes) for cost in (spec.moved_bytes, spec.predicted))
            assert spec.flops(direction, **shape.sizes) / moved < 10
            assert 0.7 * 3.0e12 < moved / seconds < 3.0e12
