"""The Haar wavelets as operations: tracing, compilation, bytes, what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from osp_fast.kernels import haar_spec
from osp_fast.kernels.haar import (
    haar2d,
    haar3d,
    haar3d_ref,
    haar_triton,
    inverse_haar2d,
    inverse_haar3d,
    inverse_haar3d_ref,
    inverse_haar_triton,
)

ANALYSIS, SYNTHESIS = torch.ops.osp_fast.haar_analysis, torch.ops.osp_fast.haar_synthesis


@pytest.fixture(autouse=True)
def triton_path(monkeypatch):
    monkeypatch.setenv("OSP_FAST_KERNELS", "triton")


@pytest.mark.parametrize("mode, frames", [("frames", 2), ("pairs", 2), ("repeat", 1), ("zero", 3)])
@pytest.mark.parametrize("with_low", [False, True])
def test_opcheck(mode, frames, with_low):
    x = torch.randn(1, 3, frames, 4, 8, requires_grad=True)
    torch.library.opcheck(ANALYSIS.default, (x, mode, torch.float32, 0.5, 0.25, with_low, with_low))
    bands, low = (y.detach().requires_grad_() for y in ANALYSIS(x, mode, torch.float32, 0.5, 0.0, True, True))
    arguments = (bands, low if with_low else None, mode, torch.float32, 0.5, 0.25)
    torch.library.opcheck(SYNTHESIS.default, arguments)


def test_opcheck_with_uint8():
    x = torch.randint(0, 256, (1, 3, 1, 4, 8), dtype=torch.uint8)
    torch.library.opcheck(ANALYSIS.default, (x, "repeat", torch.float16, 0.5, 0.0, True, False))
    bands = torch.randn(1, 24, 1, 2, 4, requires_grad=True)
    torch.library.opcheck(SYNTHESIS.default, (bands, None, "zero", torch.uint8, 0.5, 0.0))


def pyramid(video, first=True):
    """Two levels there and one back."""
    bands, low = haar3d(video, first, normalize=True, with_low=True)
    bands2 = haar2d(low)
    low = inverse_haar2d(bands2 * 2, low=bands2[:, :3])
    return inverse_haar3d(bands * 0.5, first, low=low, denormalize=True)


def test_compiles_without_breaks_and_once_for_all_lengths():
    compiles = []

    def backend(graph, _):
        compiles.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(pyramid, backend=backend, fullgraph=True, dynamic=True)
    for frames in (5, 3):
        x = torch.randn(2, 3, frames, 4, 8, requires_grad=True)
        found, expected = compiled(x), pyramid(x)
        assert torch.equal(found, expected)
        assert torch.equal(*(torch.autograd.grad(out.square().sum(), x)[0] for out in (found, expected)))
    assert len(compiles) == 1


def test_compiles_with_aot_autograd_to_the_reference(monkeypatch):
    x = torch.randn(1, 3, 2, 4, 8, requires_grad=True)
    monkeypatch.setenv("OSP_FAST_KERNELS", "reference")
    expected = pyramid(x, False)
    expected = [expected, *torch.autograd.grad(expected.square().sum(), x)]
    monkeypatch.setenv("OSP_FAST_KERNELS", "triton")
    torch._dynamo.reset()
    found = torch.compile(pyramid, backend="aot_eager", fullgraph=True)(x, False)
    found = [found, *torch.autograd.grad(found.square().sum(), x)]
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)


def test_a_new_length_compiles_no_kernel(tmp_path):
    script = Path(__file__).parent / "stand_in_haar.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    result = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == {"haar_analysis_kernel": 1, "haar_synthesis_kernel": 1}


def same(low, **other):
    return dict(batch=2, frames=3, height=10, width=40, pixels="same", low=low) | other


@pytest.mark.parametrize(
    "sizes",
    [
        *(dict(transform=name, **same(low)) for name in haar_spec.OPERATIONS for low in (True, False)),
        dict(transform="haar3d", **same(True, pixels="uint8", frames=1)),
        dict(transform="inverse_haar3d", **same(True, pixels="uint8", frames=1)),
        dict(transform="haar2d", **same(True, width=38)),  # an odd number of positions
    ],
)
def test_bytes_are_those_of_the_spec(sizes, count_traffic):
    inputs = haar_spec.make_inputs(device="cpu", dtype=torch.float32, seed=0, **sizes)
    with count_traffic() as moved:
        out = haar_spec.call(**inputs)
    assert len(moved.launches) == 1
    assert moved.loaded + moved.stored == haar_spec.moved_bytes("forward", **sizes, element=4)
    leaves = [x for x in inputs.values() if isinstance(x, torch.Tensor) and x.requires_grad]
    assert bool(leaves) == (sizes["pixels"] != "uint8")
    if leaves:
        outs = out if isinstance(out, tuple) else (out,)
        with count_traffic() as moved:
            torch.autograd.grad(outs, leaves, [torch.randn_like(x) for x in outs])
        assert len(moved.launches) == 1
        assert moved.loaded + moved.stored == haar_spec.moved_bytes("backward", **sizes, element=4)


@pytest.mark.parametrize("shape", haar_spec.SHAPES, ids=lambda shape: shape.name)
def test_every_shape_of_the_spec_is_a_call_that_kernels_and_reference_take(shape):
    small = shape.sizes | dict(batch=1, frames=min(shape.sizes["frames"], 3), height=8, width=16)
    inputs = haar_spec.make_inputs(device="cpu", dtype=torch.float32, seed=0, **small)
    found, expected = haar_spec.call(**inputs), haar_spec.call_ref(**inputs)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and torch.allclose(a.float(), b.float(), rtol=1e-5, atol=1e-5)
    assert haar_spec.predicted("forward", **shape.sizes) > haar_spec.LAUNCH_SECONDS


def test_what_is_not_used_costs_nothing_backward(count_traffic):
    x = torch.randn(1, 3, 3, 8, 16, requires_grad=True)
    bands, low = haar3d(x, with_low=True)
    for out, read in ((bands, bands.numel()), (low, low.numel() + 1)):  # one zero stands for unused bands
        with count_traffic() as moved:
            torch.autograd.grad(out, x, torch.randn_like(out), retain_graph=True)
        assert (moved.loaded, moved.stored) == (4 * read, 4 * x.numel())


@pytest.mark.parametrize("path", ["triton", "reference"])
def test_no_frames_of_a_first_chunk(path, monkeypatch):
    monkeypatch.setenv("OSP_FAST_KERNELS", path)
    bands = torch.zeros(1, 24, 0, 2, 4, requires_grad=True)
    out = inverse_haar3d(bands)
    assert out.shape == (1, 3, 0, 4, 8)
    assert torch.autograd.grad(out.sum(), bands)[0].shape == bands.shape


def test_nothing_to_do():
    x = torch.randn(1, 3, 0, 4, 8, requires_grad=True)
    bands, low = haar3d(x, first_chunk=False, with_low=True)
    assert bands.shape == (1, 24, 0, 2, 4) and low.shape == (1, 3, 0, 2, 4)
    out = inverse_haar3d(bands, first_chunk=False, low=low)
    assert out.shape == x.shape and torch.autograd.grad(out.sum(), x)[0].shape == x.shape


def test_path_is_chosen_by_the_environment(monkeypatch, count_traffic):
    x = torch.randn(1, 3, 1, 4, 8)
    with count_traffic() as moved:
        bands = haar3d(x)
        inverse_haar3d(bands)
    assert [launch.kernel for launch in moved.launches] == ["haar_analysis_kernel", "haar_synthesis_kernel"]
    assert bands.is_contiguous(memory_format=torch.channels_last_3d)
    monkeypatch.setenv("OSP_FAST_KERNELS", "reference")
    assert torch.equal(haar3d(x), haar3d_ref(x)) and haar3d(x).is_contiguous()
    assert haar3d(x, channels_last=True).is_contiguous(memory_format=torch.channels_last_3d)
    assert torch.equal(inverse_haar3d(bands), inverse_haar3d_ref(bands))


@pytest.mark.parametrize("path", ["triton", "reference"])
def test_what_does_not_fit_is_refused(path, monkeypatch):
    monkeypatch.setenv("OSP_FAST_KERNELS", path)
    x, bands = torch.zeros(1, 3, 3, 4, 8), torch.zeros(1, 24, 2, 2, 4)
    for call, words in (
        (lambda: haar3d(x[0]), "must be \\(B, C, T, H, W\\)"),
        (lambda: haar3d(x[..., :7]), "even H and W"),
        (lambda: haar2d(x[..., :3, :]), "even H and W"),
        (lambda: haar3d(x[:, :, :2]), "an odd number of frames, not 2"),
        (lambda: haar3d(x, False), "an even number of frames, not 3"),
        (lambda: haar3d(x.int()), "uint8 or floating, not torch.int32"),
        (lambda: haar3d(x, dtype=torch.uint8), "bands must be floating"),
        (lambda: inverse_haar3d(bands[:, :12]), "B, 8 C"),
        (lambda: inverse_haar2d(bands.int()), "must be floating"),
        (lambda: inverse_haar3d(bands, dtype=torch.int8), "uint8 or floating"),
        (lambda: inverse_haar3d(bands, low=x), "low \\(1, 3, 3, 4, 8\\)"),
        (lambda: inverse_haar2d(bands, low=bands[:, :6].to("meta")), "on meta"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def test_what_triton_does_not_take():
    x = torch.zeros(1, 3, 1, 4, 8)
    with pytest.raises(ValueError, match="not float64"):
        haar_triton(x.double(), "repeat")
    with pytest.raises(ValueError, match="not float64"):
        inverse_haar_triton(haar_triton(x, "repeat"), "zero", torch.float64)


def test_needs_a_gpu_or_the_interpreter(monkeypatch):
    monkeypatch.setattr("osp_fast.kernels.launch.interpreting", lambda: False)
    with pytest.raises(ValueError, match="needs an NVIDIA GPU"):
        haar_triton(torch.zeros(1, 3, 1, 4, 8), "repeat")
