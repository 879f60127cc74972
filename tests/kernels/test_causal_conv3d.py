"""The causal convolution: reference against its formula, both paths against float64, chunks, gradients, layouts."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from osp_fast.kernels import causal_conv3d_library as library
from osp_fast.kernels.causal_conv3d import (
    causal_conv3d,
    causal_conv3d_ref,
    causal_conv3d_triton,
    next_cache,
    steps_of,
)
from osp_fast.kernels.causal_conv3d_spec import SPEC, reference

LAST = torch.channels_last_3d
LAYERS = [
    ((3, 3, 3), 1),
    ((1, 3, 3), 1),
    ((1, 1, 1), 1),
    ((3, 3, 3), 2),
    ((1, 3, 3), (1, 2, 2)),
    ((3, 3, 3), (1, 2, 2)),
]


def relative(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def draw_layer(kernel, stride, channels, out_channels, size, batch=1, cached=True, dtype=torch.float32):
    """Arguments of a call with everything in it, channels-last."""
    frames, height, width = size
    x = draw(batch, channels, frames, height, width, dtype=dtype).contiguous(memory_format=LAST)
    weight = draw(out_channels, channels, *kernel, dtype=dtype) / (channels * 9) ** 0.5
    arguments = {"x": x, "weight": weight.contiguous(memory_format=LAST), "stride": stride}
    arguments["bias"] = draw(out_channels, dtype=dtype)
    if cached and kernel[0] > 1:
        before = draw(batch, channels, 3, height, width, seed=1, dtype=dtype).contiguous(memory_format=LAST)
        arguments["cache"] = next_cache(before, None, kernel[0], steps_of(stride).time)
    arguments["residual"] = torch.randn_like(in_float64(arguments)).to(dtype).contiguous(memory_format=LAST)
    return arguments


def in_float64(arguments):
    """What the reference makes of these arguments."""
    wide = {name: y.double() if isinstance(y, torch.Tensor) else y for name, y in arguments.items()}
    if wide.get("cache") is not None:
        wide["cache"] = torch.stack([y.double() for y in wide["cache"]], 2)
    return reference(**wide)


@pytest.mark.parametrize("kernel, stride", LAYERS)
def test_reference_against_explicit_padding(kernel, stride):
    x, weight = torch.randn(1, 2, 9, 6, 8).double(), torch.randn(4, 2, *kernel).double()
    bias = torch.randn(4).double()
    out, _ = causal_conv3d_ref(x, weight, bias, stride)
    padded = torch.cat((x[:, :, :1].expand(-1, -1, kernel[0] - 1, -1, -1), x), 2)
    edge = kernel[1] // 2
    padded = F.pad(padded, (edge,) * 4 if stride == 1 else (0, 1, 0, 1))
    assert torch.allclose(out, F.conv3d(padded, weight, bias, stride))


@pytest.mark.parametrize("stride", [1, 2])
def test_reference_in_chunks_equals_the_whole(stride):
    x, weight = torch.randn(1, 2, 17, 6, 8).double(), torch.randn(4, 2, 3, 3, 3).double()
    whole, _ = causal_conv3d_ref(x, weight, None, stride)
    cache, parts = None, []
    for start, end in ((0, 5), (5, 9), (9, 11), (11, 17)):
        out, cache = causal_conv3d_ref(x[:, :, start:end], weight, None, stride, cache)
        assert cache.shape[2] == 3 - stride
        parts.append(out)
    assert torch.allclose(torch.cat(parts, 2), whole)


@given(
    layer=st.sampled_from(LAYERS),
    channels=st.sampled_from([1, 3, 8, 24]),
    out_channels=st.sampled_from([1, 5, 16]),
    size=st.tuples(st.integers(1, 6), st.integers(2, 11), st.integers(2, 11)),
    batch=st.integers(1, 2),
    cached=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16]),
)
@settings(max_examples=60)
def test_library(layer, channels, out_channels, size, batch, cached, dtype):
    size = (max(size[0], steps_of(layer[1]).time), *size[1:])  # a chunk that gives a frame
    arguments = draw_layer(*layer, channels, out_channels, size, batch, cached, dtype)
    out = causal_conv3d(**arguments, path="library")
    assert out.dtype == dtype and out.is_contiguous(memory_format=LAST)
    tolerance = 1e-12 if dtype == torch.float64 else SPEC.tolerances[dtype][0]
    assert relative(out, in_float64(arguments)) < tolerance


@pytest.mark.parametrize("size", [(3, 4, 6), (2, 7, 5)])
@pytest.mark.parametrize("layer", [layer for layer in LAYERS if layer[0][0] > 1])
def test_library_lays_frames_together_and_crops_what_it_does_not_pad(layer, size):
    """In float32, which it sums over taps."""
    arguments = draw_layer(*layer, 6, 5, size)
    arguments["residual"] = None
    past = list(arguments["cache"])
    given = (arguments[name] for name in ("x", "weight", "bias"))
    out = library._by_frames(*given, steps_of(layer[1]), past, crops=True)
    assert relative(out, in_float64(arguments)) < 1e-6


@pytest.fixture(params=["triton", "library"])
def path(request):
    return request.param


# channels, output channels, (frames, rows, columns), batch, cached: in the interpreter a block is 4 x 8 pixels, 32
# output and 16 input channels
CASES = [
    (3, 5, (1, 5, 7), 2, False),
    (20, 33, (2, 3, 2), 1, True),
    (24, 16, (2, 4, 10), 1, True),
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layer", LAYERS)
def test_pointers(layer, case):
    channels, out_channels, size, batch, cached = case
    arguments = draw_layer(*layer, channels, out_channels, size, batch, cached)
    out = causal_conv3d_triton(**arguments, version="pointer")
    assert out.is_contiguous(memory_format=LAST)
    assert relative(out, in_float64(arguments)) < SPEC.tolerances[torch.float32][0]


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("layer", LAYERS)
def test_descriptors(layer, cached):
    # at stride 2 channels in whole blocks, rows and columns even; elsewhere neither
    channels, size = (24, (1, 5, 9)) if layer[1] == 1 else (32, (3, 6, 18))
    arguments = draw_layer(*layer, channels, 40, size, 1 if layer[0][0] == 3 else 2, cached)
    out = causal_conv3d_triton(**arguments, version="descriptor")
    assert relative(out, in_float64(arguments)) < SPEC.tolerances[torch.float32][0]


@pytest.mark.parametrize("version", ["pointer", "descriptor"])
def test_float16_and_another_output_type(version):
    arguments = draw_layer((3, 3, 3), 1, 16, 12, (2, 3, 5), dtype=torch.float16)
    expected = in_float64(arguments)
    assert relative(causal_conv3d_triton(**arguments, version=version), expected) < SPEC.tolerances[torch.float16][0]
    out = causal_conv3d_triton(**arguments, dtype=torch.float32, version=version)
    assert out.dtype == torch.float32 and relative(out, expected) < SPEC.tolerances[torch.float32][0]
    assert causal_conv3d(**arguments, dtype=torch.float32, path="library").dtype == torch.float32


def test_nothing_added():
    arguments = draw_layer((3, 3, 3), 1, 8, 4, (1, 3, 5))
    arguments |= {"bias": None, "residual": None}
    assert relative(causal_conv3d_triton(**arguments), in_float64(arguments)) < 1e-6
    assert relative(causal_conv3d(**arguments, path="library"), in_float64(arguments)) < 1e-6


@pytest.mark.parametrize("stride, lengths", [(1, (1, 1, 2, 1, 3)), (2, (1, 2, 2, 4)), (2, (2, 1, 3, 3))])
def test_chunks_equal_the_whole(path, stride, lengths):
    weight, bias = draw(4, 8, 3, 3, 3), draw(4)
    x = draw(1, 8, sum(lengths), 4, 6).contiguous(memory_format=LAST)
    expected, _ = causal_conv3d_ref(x.double(), weight.double(), bias.double(), stride)
    cache, parts = None, []
    for chunk in x.split(lengths, 2):
        parts.append(causal_conv3d(chunk, weight, bias, stride, cache, path=path))
        cache = next_cache(chunk, cache, 3, stride)
        assert all(y.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for y in cache)
    assert relative(torch.cat(parts, 2), expected) < SPEC.tolerances[torch.float32][0]


@given(lengths=st.lists(st.integers(1, 5), min_size=1, max_size=6), stride=st.integers(1, 2))
def test_next_cache_is_the_reference_s(lengths, stride):
    lengths = [lengths[0], *(max(length, stride) for length in lengths[1:])]
    x, weight = draw(1, 2, sum(lengths), 2, 2), torch.ones(1, 2, 3, 3, 3)
    cache, expected = None, None
    for chunk in x.split(lengths, 2):
        _, expected = causal_conv3d_ref(chunk, weight, None, stride, expected)
        cache = next_cache(chunk, cache, 3, stride)
        assert torch.equal(torch.stack(cache, 2), expected)
    assert next_cache(x, None, 1) == ()


def test_next_cache_of_nothing():
    with pytest.raises(ValueError, match="a chunk of 1 frames is too short for a kernel of 3 frames"):
        next_cache(draw(1, 2, 1, 2, 2), draw(1, 2, 1, 2, 2), 3, 2)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("cached", [False, True])
def test_gradients(path, layer, cached):
    if cached and layer[0][0] == 1:
        cached = False  # such a layer keeps nothing
    arguments = draw_layer(*layer, 5, 6, (3, 4, 5), 2, cached)
    if path == "triton":
        arguments = draw_layer(*layer, 5, 6, (2, 2, 4), 1, cached)
    if cached:
        arguments["cache"] = [y.clone().requires_grad_() for y in arguments["cache"]]
    names = ["x", "weight", "bias", "residual"]
    leaves = [arguments[name].requires_grad_() for name in names] + list(arguments.get("cache", []))
    wide = [y.detach().double().requires_grad_() for y in leaves]
    wide_arguments = arguments | dict(zip(names, wide, strict=False))
    if cached:
        wide_arguments["cache"] = torch.stack(wide[4:], 2)
    expected = reference(**wide_arguments)
    out = causal_conv3d(**arguments, path=path)
    out_grad = draw(*out.shape, seed=9)
    found = torch.autograd.grad(out, leaves, out_grad)
    wanted = torch.autograd.grad(expected, wide, out_grad.double())
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape and relative(a, b) < SPEC.tolerances[torch.float32][1]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("past", [0, 1, 2])
def test_library_gradcheck(stride, past):
    x = torch.randn(1, 2, 3, 4, 2).double().requires_grad_()
    weight = torch.randn(2, 2, 3, 3, 3).double().requires_grad_()
    frames = [torch.randn(1, 2, 4, 2).double().requires_grad_() for _ in range(past)]

    def call(x, weight, *frames):
        return causal_conv3d(x, weight, None, stride, frames or None, path="library")

    assert torch.autograd.gradcheck(call, (x, weight, *frames))


def test_only_the_wanted_gradients():
    arguments = draw_layer((3, 3, 3), 1, 8, 4, (1, 2, 3))
    cache = [y.clone() for y in arguments.pop("cache")]
    for leaf in (arguments["weight"], cache[0], cache[1]):
        leaf.requires_grad_()
        out = causal_conv3d_triton(**arguments, cache=cache)
        (found,) = torch.autograd.grad(out.sum(), leaf)
        (expected,) = torch.autograd.grad(reference(**arguments, cache=torch.stack(cache, 2)).sum(), leaf)
        assert torch.allclose(found, expected, atol=1e-4)
        leaf.requires_grad_(False)


@pytest.mark.parametrize("version", ["pointer", "descriptor"])
@pytest.mark.parametrize("stride", [1, 2])
def test_channels_of_wider_tensors(version, stride):
    """x, cache and residual are slices; what lies beside them is never used."""
    arguments = draw_layer((3, 3, 3), stride, 16, 8, (2, 4, 6), 1, True)

    def beside(y):
        wide = torch.full((*y.movedim(1, -1).shape[:-1], y.shape[1] + 24), float("nan"))
        part = wide[..., 8 : 8 + y.shape[1]].movedim(-1, 1)
        return part.copy_(y)

    arguments["cache"] = [beside(y) for y in arguments["cache"]]
    arguments |= {name: beside(arguments[name]) for name in ("x", "residual")}
    out = causal_conv3d_triton(**arguments, version=version)
    assert relative(out, in_float64(arguments)) < SPEC.tolerances[torch.float32][0]


def test_other_layouts():
    """Planar x and weights, a planar and an expanded cache, an expanded x, a tensor as cache."""
    arguments = draw_layer((3, 3, 3), 1, 4, 3, (2, 3, 4))
    expected = in_float64(arguments)
    arguments |= {name: arguments[name].contiguous() for name in ("x", "weight", "residual")}
    first, second = arguments.pop("cache")
    caches = [(first.contiguous(), second), torch.stack((first, second), 2)]
    for cache in caches:
        for path in ("triton", "library"):
            out = causal_conv3d(**arguments, cache=cache, path=path)
            assert relative(out, expected) < 1e-6 and out.is_contiguous(memory_format=LAST)
    x, weight = draw(1, 4, 1, 1, 1).expand(1, 4, 2, 3, 4), arguments["weight"]
    expected, _ = causal_conv3d_ref(
        x.double(), weight.double(), None, 1, x[:, :, :1].expand(-1, -1, 2, -1, -1).double()
    )
    for path in ("triton", "library"):
        assert relative(causal_conv3d(x, weight, cache=[x[:, :, 0]] * 2, path=path), expected) < 1e-6


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kernel, stride", LAYERS)
def test_written_into_frames_of_a_clip(path, kernel, stride, batch):
    arguments = draw_layer(kernel, stride, 8, 5, (4, 5, 7), batch)
    expected = in_float64(arguments)
    _, channels, frames, height, width = expected.shape
    clip = torch.full((batch, frames + 3, height, width, channels), 7.0).movedim(-1, 1)
    found = causal_conv3d(**arguments, path=path, out=clip[:, :, 1 : frames + 1])
    assert found.data_ptr() == clip[:, :, 1].data_ptr() and relative(found, expected) < 1e-6
    assert (clip[:, :, 0] == 7).all() and (clip[:, :, frames + 1 :] == 7).all()


def test_what_cannot_be_written_into(path):
    arguments = draw_layer((3, 3, 3), 1, 8, 5, (2, 5, 7))
    out = in_float64(arguments).float()
    with pytest.raises(ValueError, match="must be"):
        causal_conv3d(**arguments, path=path, out=out[:, :, :1])
    with pytest.raises(ValueError, match="must be"):
        causal_conv3d(**arguments, path=path, out=out.double())
    with pytest.raises(ValueError, match="whole frames"):
        causal_conv3d(**arguments, path=path, out=out.contiguous())
    arguments["weight"].requires_grad_()
    with pytest.raises(ValueError, match="no gradients"):
        causal_conv3d(**arguments, path=path, out=out.contiguous(memory_format=LAST))


def test_a_weight_of_images():
    x, weight = draw(1, 8, 2, 3, 4), draw(4, 8, 3, 3).contiguous(memory_format=torch.channels_last)
    expected = F.conv2d(x.transpose(1, 2).flatten(0, 1).double(), weight.double(), padding=1)
    for path in ("triton", "library"):
        out = causal_conv3d(x, weight, path=path)
        assert relative(out.transpose(1, 2).flatten(0, 1), expected) < 1e-6


def test_frames_far_apart():
    """The third frame begins beyond 2^31 elements. Memory that is not touched is not taken."""
    far = (1 << 30) + 8
    space = torch.empty(2 * far + 48, dtype=torch.float16)
    x = space.as_strided((1, 8, 3, 2, 3), (0, 1, far, 24, 8)).copy_(draw(1, 8, 3, 2, 3, dtype=torch.float16))
    weight = draw(4, 8, 1, 3, 3, dtype=torch.float16)
    expected, _ = causal_conv3d_ref(x.double(), weight.double(), None)
    for version in ("pointer", "descriptor"):
        assert relative(causal_conv3d_triton(x, weight, version=version), expected) < 1e-3
