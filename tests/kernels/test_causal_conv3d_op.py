"""The causal convolution as an operation: tracing, compilation, bytes, who serves, what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from osp_fast.kernels import causal_conv3d_launch, causal_conv3d_library, causal_conv3d_spec
from osp_fast.kernels.causal_conv3d import (
    KERNELS,
    SERVES,
    causal_conv3d,
    causal_conv3d_triton,
    next_cache,
    serving_path,
    serving_row,
)
from osp_fast.kernels.causal_conv3d_launch import ConvCall, Stride, candidates, choose_patch, tiles
from osp_fast.kernels.causal_conv3d_spec import SHAPES, SPEC, make_inputs, reference
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from bench.baselines.causal_conv3d import baselines

OPERATION = torch.ops.osp_fast.causal_conv3d.default
LAST = torch.channels_last_3d
SMALL = dict(batch=1, channels=8, out_channels=4, frames=2, height=4, width=6)
SMALL |= dict(kernel=(3, 3, 3), stride=(1, 1, 1), cached=True, residual=True)


def small(dtype=torch.float32, **other):
    return make_inputs(device="cpu", dtype=dtype, seed=0, **SMALL | other)


@pytest.mark.parametrize("stride, cached", [(1, True), (1, False), (2, True)])
def test_opcheck(stride, cached):
    inputs = small(stride=(stride,) * 3, cached=cached, frames=2 if cached else 1, height=2, width=4)
    earlier, previous = (None, None, *(inputs["cache"].detach().unbind(2) if cached else ()))[-2:]
    given = (y.clone().requires_grad_() if y is not None else None for y in (earlier, previous))
    arguments = (inputs["x"], inputs["weight"], inputs["bias"], *given, inputs["residual"])
    torch.library.opcheck(OPERATION, (*arguments, stride, stride, torch.float32, "auto"))


def test_opcheck_of_writing_into_a_clip():
    inputs = {name: y.detach() if isinstance(y, torch.Tensor) else y for name, y in small(frames=2).items()}
    clip = torch.zeros(1, 5, 4, 6, 4).movedim(-1, 1)
    earlier, previous = inputs["cache"].unbind(2)
    arguments = (inputs["x"], inputs["weight"], inputs["bias"], earlier, previous, inputs["residual"], 1, 1)
    torch.library.opcheck(torch.ops.osp_fast.causal_conv3d_into.default, (*arguments, clip[:, :, 1:3], "auto"))


def two_chunks(x, weight, bias, path):
    """A layer over two chunks, the second with the cache of the first, and one with a stride."""
    first, second = x[:, :, :2], x[:, :, 2:]
    begin = causal_conv3d(first, weight, bias, residual=first, path=path)
    end = causal_conv3d(second, weight, bias, 2, next_cache(first, None, 3), path=path)
    return begin.sum() + end


@pytest.mark.parametrize("path", ["triton", "library"])
def test_compiles_without_breaks_and_once_for_all_sizes(path):
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(two_chunks, backend=backend, fullgraph=True, dynamic=True)
    weight, bias = torch.randn(4, 4, 3, 3, 3).requires_grad_(), torch.randn(4).requires_grad_()
    for frames, height, width in ((7, 6, 5), (9, 5, 8)):  # no two sizes alike, as they would be one symbol
        x = torch.randn(1, 4, frames, height, width).contiguous(memory_format=LAST).requires_grad_()
        found, expected = compiled(x, weight, bias, path), two_chunks(x, weight, bias, path)
        assert torch.equal(found, expected)
        grads = (torch.autograd.grad(out.square().sum(), (x, weight, bias)) for out in (found, expected))
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert len(graphs) == 1


def test_compiles_with_aot_autograd_to_the_library():
    torch._dynamo.reset()
    weight, bias = torch.randn(4, 4, 3, 3, 3).requires_grad_(), torch.randn(4).requires_grad_()
    x = torch.randn(1, 4, 3, 2, 3).contiguous(memory_format=LAST).requires_grad_()
    compiled = torch.compile(two_chunks, backend="aot_eager", fullgraph=True)
    results = []
    for function, path in ((compiled, "triton"), (two_chunks, "library")):
        out = function(x, weight, bias, path)
        results.append([out, *torch.autograd.grad(out.square().sum(), (x, weight, bias))])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-3) for a, b in zip(*results, strict=True))


def test_a_new_size_compiles_no_kernel(tmp_path):
    script = Path(__file__).parent / "stand_in_causal_conv3d.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    result = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    # with descriptors and with pointers, each with a cache and without
    assert json.loads(result.stdout) == {"causal_conv3d_fwd_kernel": 4}


@pytest.mark.parametrize(
    "other",
    [
        {},
        {"cached": False, "residual": False},
        {"kernel": (1, 3, 3), "cached": False, "channels": 5, "batch": 2},
        {"stride": (2, 2, 2), "residual": False},
        {"kernel": (1, 1, 1), "cached": False},
    ],
)
def test_bytes_are_those_of_the_spec(other, count_traffic):
    sizes = SMALL | other
    with count_traffic() as moved:
        causal_conv3d_triton(**small(**other))
    assert len(moved.launches) == 1
    assert moved.loaded + moved.stored == causal_conv3d_spec.moved_bytes("forward", **sizes, element=4)


def test_flops_are_counted():
    with FlopCounterMode(display=False) as counter:
        causal_conv3d_triton(**small())
    assert counter.get_total_flops() == SPEC.flops("forward", **SMALL) == 2 * 27 * 8 * 4 * 2 * 4 * 6
    with FlopCounterMode(display=False) as counter:
        causal_conv3d_triton(**small()).sum().backward()
    counted = {str(operation): flops for operation, flops in counter.get_flop_counts()["Global"].items()}
    assert counted["osp_fast.causal_conv3d"] == SPEC.flops("forward", **SMALL)
    assert counted["aten.convolution_backward"] >= SPEC.flops("backward", **SMALL)


class Operations(TorchDispatchMode):
    """The names of the operations that run within it."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


COPIES = ("cat", "constant_pad_nd", "clone", "copy_", "_to_copy", "stack")


@pytest.mark.parametrize("frames", [1, 2, 5])
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_library_copies_no_frames_in_float32_on_the_cpu(kernel, frames):
    sizes = dict(channels=32, out_channels=32, height=8, width=8, frames=frames)
    inputs = small(kernel=kernel, cached=kernel[0] > 1, **sizes)
    with torch.no_grad(), Operations() as seen:
        causal_conv3d(**inputs, path="library")
    assert seen.names and not set(seen.names) & set(COPIES)


def test_the_library_joins_outputs_where_they_are_narrower():
    sizes = []
    cat = torch.cat

    def watched(tensors, dim):
        sizes.append([y.shape[1:3] for y in tensors])
        return cat(tensors, dim=dim)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(causal_conv3d_library.torch, "cat", watched)
        causal_conv3d(**small(torch.float16, frames=5), path="library")
        causal_conv3d(**small(torch.float16, frames=5, out_channels=16), path="library")
    assert sizes == [[(8, 1), (8, 1), (8, 2)], [(4, 2), (4, 3)], [(8, 1), (8, 1), (8, 5)]]


def test_who_serves(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.delenv("OSP_FAST_KERNELS", raising=False)
    call = (torch.bfloat16, 128, 128, (3, 3, 3))
    assert serving_path(cpu, *call) == "library"
    monkeypatch.setattr("osp_fast.kernels.causal_conv3d.architecture", lambda device: 90)
    assert serving_path(cuda, *call) == "triton"
    monkeypatch.setenv("OSP_FAST_KERNELS", "reference")
    assert serving_path(cuda, *call) == "library"
    monkeypatch.setenv("OSP_FAST_KERNELS", "triton")
    assert serving_path(cpu, torch.float32, 3, 8, (1, 1, 1)) == "triton"


def test_the_table_has_a_row_for_every_call():
    for arch in (75, 80, 90, 100, 120):
        for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            for kernel in KERNELS:
                for channels, out_channels in ((8, 512), (24, 128), (128, 24), (128, 128), (512, 640)):
                    row = serving_row(arch, dtype, channels, out_channels, kernel)
                    wide = kernel[0] == 3 or (min(channels, out_channels) >= 64 and kernel[1] == 3)
                    triton = wide and dtype.itemsize == 2 and arch >= 80
                    assert row.path == ("triton" if triton else "library")
    assert all(row.reason for row in SERVES)
    with pytest.raises(ValueError, match="serves no"):
        serving_row(90, torch.int8, 8, 8, (3, 3, 3))


@pytest.mark.parametrize("path", ["triton", "library"])
def test_the_path_is_chosen_by_the_environment(path, monkeypatch, count_traffic):
    monkeypatch.setenv("OSP_FAST_KERNELS", {"triton": "triton", "library": "reference"}[path])
    with count_traffic() as moved:
        causal_conv3d(**small())
    assert len(moved.launches) == (path == "triton")


def test_autocast_changes_nothing():
    inputs = small()
    for path in ("triton", "library"):
        expected = causal_conv3d(**inputs, path=path)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(causal_conv3d(**inputs, path=path), expected)


def test_a_patch_for_the_size():
    """Large patches for large outputs, small ones where large ones leave multiprocessors without work."""
    call = ConvCall(90, torch.bfloat16, 512, 512, True)
    chosen = {
        shape: choose_patch(call, shape, 132).pixels
        for shape in ((1, 512, 5, 80, 80), (1, 512, 1, 80, 80), (1, 512, 1, 44, 80), (1, 512, 1, 16, 16))
    }
    assert list(chosen.values()) == [256, 256, 128, 64]
    assert tiles(candidates(call)[0], (1, 512, 5, 80, 80)) == 5 * 25 * 4
    assert choose_patch(ConvCall(80, torch.bfloat16, 512, 512, False), (1, 512, 5, 80, 80), 108).pixels == 128


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_every_shape_of_the_spec_is_a_call_that_the_library_takes(shape):
    tiny = shape.sizes | dict(frames=min(shape.sizes["frames"], 4), height=4, width=4, channels=4, out_channels=3)
    inputs = make_inputs(device="cpu", dtype=torch.bfloat16, seed=0, **tiny)
    found, expected = SPEC.operation(**inputs), reference(**inputs)
    assert torch.allclose(found, expected, rtol=2e-2, atol=2e-2)
    for direction in ("forward", "backward"):
        seconds = SPEC.predicted(direction, **shape.sizes)
        assert 0 < SPEC.flops(direction, **shape.sizes) / seconds < 700e12
        assert 0 < SPEC.bytes(direction, **shape.sizes) / seconds < 3e12


def test_spec_tunes_what_it_launches():
    inputs = small()
    assert [name for name, _ in SPEC.tunable.candidates(inputs, 90)] == [causal_conv3d_launch.FORWARD] * 1
    out = SPEC.tunable.bind(inputs, causal_conv3d_launch.FORWARD)()
    assert all(torch.allclose(variant(**inputs), out, atol=1e-5) for variant in SPEC.variants.values())


@pytest.mark.parametrize("path", ["triton", "library"])
def test_what_does_not_fit_is_refused(path):
    x, weight = torch.zeros(1, 8, 3, 4, 6), torch.zeros(4, 8, 3, 3, 3)
    frame = x[:, :, 0]
    for arguments, words in (
        ((x[0], weight), "x \\(8, 3, 4, 6\\) must be \\(B, C, T, H, W\\)"),
        ((x, weight[:, :4]), "weight \\(4, 4, 3, 3, 3\\)"),
        ((x, weight[:, :, :2]), "kernel \\(2, 3, 3\\) is unknown"),
        ((x, weight, torch.zeros(3)), "bias \\(3,\\) must be \\(C_out,\\) = \\(4,\\)"),
        ((x, weight, None, 3), "stride 3 is unknown"),
        ((x, weight[..., :1, :1, :1], None, 2), "goes with a kernel larger"),
        ((x, weight[:, :, :1], None, 2), "goes with a kernel larger"),
        ((x, weight, None, 1, [frame] * 3), "up to 2 frames like x's"),
        ((x, weight, None, 1, [frame[..., 1:]]), "up to 2 frames like x's"),
        ((x[:, :, :1], weight, None, 1, [frame]), "a chunk of 1 frames is too short"),
        ((x[:, :, :0], weight, None, 1, [frame] * 2), "too short"),
        ((x, weight, None, 1, None, x), "residual \\(1, 8, 3, 4, 6\\) must be \\(1, 4, 3, 4, 6\\)"),
        ((x, weight.half()), "weight and cache must be torch.float32, as x is"),
    ):
        with pytest.raises(ValueError, match=words):
            causal_conv3d(*arguments, path=path)
    with pytest.raises(ValueError, match="path 'best' is unknown: choose from auto, triton, library"):
        causal_conv3d(x, weight, path="best")


@pytest.mark.parametrize("other", [{}, {"stride": (2, 2, 2), "residual": False}, {"cached": False}])
def test_baselines_compute_the_same(other):
    inputs = small(**other)
    for baseline in baselines()[:2]:  # the third is torch.compile of the first
        call, leaves = baseline.bind(inputs)
        assert torch.allclose(baseline.restore(call(), inputs), reference(**inputs), atol=1e-5)
        assert all(x.requires_grad for x in leaves)


def test_what_triton_does_not_take(monkeypatch):
    x, weight = torch.zeros(1, 3, 1, 4, 6), torch.zeros(4, 3, 3, 3, 3)
    with pytest.raises(ValueError, match="not float64"):
        causal_conv3d_triton(x.double(), weight.double())
    with pytest.raises(ValueError, match="not float64"):
        causal_conv3d_triton(x, weight, dtype=torch.float64)
    with pytest.raises(ValueError, match="cannot be read through descriptors here"):
        causal_conv3d_triton(x, weight, version="descriptor")
    with pytest.raises(ValueError, match="version 'tma' is unknown"):
        causal_conv3d_triton(x, weight, version="tma")
    monkeypatch.setattr(causal_conv3d_launch, "LARGEST_FRAME", 72)
    with pytest.raises(ValueError, match="frames of less than 2\\^31 elements"):
        causal_conv3d_triton(x, weight)
    monkeypatch.setattr("osp_fast.kernels.launch.interpreting", lambda: False)
    with pytest.raises(ValueError, match="needs an NVIDIA GPU"):
        causal_conv3d_triton(x, weight)


def test_an_empty_batch():
    x, weight = torch.zeros(0, 8, 2, 4, 6), torch.zeros(4, 8, 3, 3, 3)
    for path in ("triton", "library"):
        assert causal_conv3d(x, weight, path=path).shape == (0, 4, 2, 4, 6)


def test_sizes_with_strides():
    assert causal_conv3d_launch.output_size((4, 7, 6), (3, 3, 3), Stride(2, 2), 1) == (2, 3, 3)
    assert causal_conv3d_launch.output_size((5, 8, 6), (1, 3, 3), Stride(1, 2), 0) == (5, 4, 3)
