"""Haar wavelets: references against the definition, the Triton kernels against float64, and chunk by chunk."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from osp_fast.kernels.haar import (
    haar2d,
    haar2d_ref,
    haar3d,
    haar3d_ref,
    haar_triton,
    inverse_haar2d_ref,
    inverse_haar3d_ref,
    inverse_haar_triton,
)
from osp_fast.kernels.haar_launch import INTERLEAVED, PLANAR, STRIDED, pixel_layout
from osp_fast.kernels.haar_spec import SPEC

LAYOUTS = ("planar", "channels last", "slice", "crop")
SIZES = dict(
    batch=st.integers(1, 2),
    colours=st.sampled_from((3, 3, 3, 1, 2, 4)),
    steps=st.integers(1, 2),
    rows=st.sampled_from((1, 2, 4, 5)),
    columns=st.sampled_from((1, 2, 7, 16, 20)),  # of a block there are 16
)


@pytest.fixture(autouse=True)
def triton_path(monkeypatch):
    monkeypatch.setenv("OSP_FAST_KERNELS", "triton")


def relative(found, expected):
    norm = expected.double().norm()
    difference = (found.double() - expected.double()).norm()
    return float((difference / norm if norm else difference).detach())


def laid_out(x, layout):
    """The same values in other strides: as they are, channels last, three of more channels, part of larger frames."""
    if layout == "planar":
        return x.contiguous()
    if layout == "channels last":
        return x.contiguous(memory_format=torch.channels_last_3d)
    if layout == "slice":
        return torch.cat((x, x), 1).contiguous(memory_format=torch.channels_last_3d)[:, : x.shape[1]]
    return torch.cat((x, x), 4)[..., : x.shape[4]]


def frame_count(mode, steps):
    return {"frames": steps, "pairs": 2 * steps}.get(mode, 2 * steps - 1)


def reference(mode, inverse):
    if mode == "frames":
        return inverse_haar2d_ref if inverse else haar2d_ref
    function = inverse_haar3d_ref if inverse else haar3d_ref
    return lambda x, **options: function(x, mode != "pairs", **options)


def check(found, expected, leaves, leaves64, dtype):
    """Results and gradients against float64 within the spec's tolerances."""
    forward, backward = SPEC.tolerances[dtype]
    found, expected = ((x if isinstance(x, tuple) else (x,)) for x in (found, expected))
    cotangents = [torch.randn_like(x) for x in found]
    for a, b in zip(found, expected, strict=True):
        assert relative(a, b) <= forward
    grads = torch.autograd.grad(found, leaves, cotangents)
    grads64 = torch.autograd.grad(expected, leaves64, [x.double() for x in cotangents])
    for leaf, a, b in zip(leaves, grads, grads64, strict=True):
        assert a.dtype == leaf.dtype and relative(a, b) <= backward


def test_haar3d_bands_by_hand():
    video = torch.randn(1, 1, 3, 2, 2).double()
    box = video[0, 0, 1:3]  # the second output frame sees frames 1 and 2
    out = haar3d_ref(video)[0, :, 1, 0, 0]
    signs = {"L": (1, 1), "H": (1, -1)}
    for band, letters in enumerate(("LLL", "LLH", "LHL", "LHH", "HLL", "HLH", "HHL", "HHH")):
        kernel = torch.einsum("t,h,w->thw", *(torch.tensor(signs[letter]).double() for letter in letters))
        assert torch.allclose(out[band], 0.3536 * (box * kernel).sum())
    first = haar3d_ref(video)[0, :, 0, 0, 0]
    assert torch.allclose(first[0], 0.3536 * 2 * video[0, 0, 0].sum()) and torch.all(first[4:] == 0)


def test_haar2d_bands_by_hand():
    frame = torch.randn(1, 1, 1, 2, 2)
    (a, b), (c, d) = frame[0, 0, 0]
    expected = torch.stack((a + b + c + d, a + b - c - d, a - b + c - d, a - b - c + d)) / 2
    assert torch.allclose(haar2d_ref(frame)[0, :, 0, 0, 0], expected)


def test_haar_synthesis_inverts_analysis():
    video = torch.randn(2, 3, 9, 8, 6).double()
    assert torch.allclose(inverse_haar2d_ref(haar2d_ref(video)), video)
    scale = 8 * 0.3536**2  # the literal is not quite 1 / sqrt 8
    assert torch.allclose(inverse_haar3d_ref(haar3d_ref(video)), video * scale)


def test_haar_chunks_equal_the_whole():
    video = torch.randn(1, 3, 13, 4, 4)
    bands = haar3d_ref(video)
    parts = [haar3d_ref(video[:, :, :5]), haar3d_ref(video[:, :, 5:9], False), haar3d_ref(video[:, :, 9:], False)]
    assert torch.equal(torch.cat(parts, 2), bands)
    parts = [inverse_haar3d_ref(bands[:, :, :3]), inverse_haar3d_ref(bands[:, :, 3:], False)]
    assert torch.equal(torch.cat(parts, 2), inverse_haar3d_ref(bands))


@given(
    mode=st.sampled_from(("frames", "pairs", "repeat")),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from((torch.float32, torch.float32, torch.float16)),
    to_float32=st.booleans(),
    normalize=st.booleans(),
    with_low=st.booleans(),
    channels_last=st.booleans(),
    **SIZES,
)
@settings(max_examples=16)
def test_analysis_against_float64(
    mode, layout, dtype, to_float32, normalize, with_low, channels_last, batch, colours, steps, rows, columns
):
    torch.manual_seed(0)
    x = torch.randn(batch, colours, frame_count(mode, steps), 2 * rows, 2 * columns).to(dtype)
    x = laid_out(x, layout).requires_grad_()
    x64 = x.detach().double().requires_grad_()
    options = {"normalize": normalize, "with_low": with_low, "channels_last": channels_last}
    out_dtype = torch.float32 if to_float32 else dtype
    found = haar_triton(x, mode, out_dtype, **options)
    bands = found[0] if with_low else found
    form = torch.channels_last_3d if channels_last else torch.contiguous_format
    assert bands.dtype == out_dtype and bands.is_contiguous(memory_format=form)
    check(found, reference(mode, False)(x64, **options), [x], [x64], dtype)


@given(
    mode=st.sampled_from(("frames", "pairs", "zero")),
    layout=st.sampled_from(LAYOUTS),
    low_layout=st.sampled_from((None, *LAYOUTS)),
    dtype=st.sampled_from((torch.float32, torch.float32, torch.float16)),
    denormalize=st.booleans(),
    **SIZES,
)
@settings(max_examples=16)
def test_synthesis_against_float64(mode, layout, low_layout, dtype, denormalize, batch, colours, steps, rows, columns):
    torch.manual_seed(0)
    count = 4 if mode == "frames" else 8
    bands = laid_out(torch.randn(batch, count * colours, steps, rows, columns).to(dtype), layout).requires_grad_()
    leaves, low, low64 = [bands], None, None
    leaves64 = [bands.detach().double().requires_grad_()]
    if low_layout:
        low = laid_out(torch.randn(batch, colours, steps, rows, columns).to(dtype), low_layout).requires_grad_()
        low64 = low.detach().double().requires_grad_()
        leaves, leaves64 = [bands, low], [*leaves64, low64]
    found = inverse_haar_triton(bands, mode, None, low, denormalize)
    assert found.dtype == dtype and found.is_contiguous()
    expected = reference(mode, True)(leaves64[0], low=low64, denormalize=denormalize)
    check(found, expected, leaves, leaves64, dtype)


@pytest.mark.parametrize("mode", ["frames", "pairs", "repeat"])
@pytest.mark.parametrize("layout", [PLANAR, INTERLEAVED, STRIDED])
def test_uint8_pixels(mode, layout):
    """STRIDED as a crop of (T, H, W, C) frames whose width is no multiple of eight."""
    columns = 36 if layout == STRIDED else 40
    x = torch.randint(0, 256, (2, frame_count(mode, 1), 10, columns, 3), dtype=torch.uint8).permute(0, 4, 1, 2, 3)
    x = x.contiguous() if layout == PLANAR else x
    assert pixel_layout(x, packed=True) == layout
    for normalize in (True, False):
        found = haar_triton(x, mode, normalize=normalize)
        assert found.dtype == torch.float32
        assert relative(found, reference(mode, False)(x, normalize=normalize, dtype=torch.float64)) < 1e-6


def test_float32_frames_of_a_decoder_are_loaded_one_value_at_a_time():
    """Three vectors of eight would be 96 bytes a thread."""
    x = torch.randn(1, 1, 4, 24, 3).permute(0, 4, 1, 2, 3)
    assert pixel_layout(x, packed=True) == STRIDED
    assert relative(haar3d(x), haar3d_ref(x.double())) < 1e-6


def far_apart(sizes, dim, dtype):
    """Random values whose last index along dim is 2^31 elements from the first; memory between is not touched."""
    strides = [1, 1, 1, 1, 1]
    rest = [i for i in (4, 3, 2, 1, 0) if i != dim]
    for after, i in itertools.pairwise(rest):
        strides[i] = strides[after] * sizes[after]
    strides[dim] = -(-(2**31) // (sizes[dim] - 1))
    extent = 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    x = torch.empty(extent, dtype=dtype).as_strided(sizes, strides)
    return x.copy_(torch.randint(0, 256, sizes) if dtype == torch.uint8 else torch.randn(sizes))


@pytest.mark.parametrize("dim", range(5))
@pytest.mark.parametrize("packed", [True, False])
def test_analysis_of_pixels_beyond_2_to_the_31_elements(dim, packed):
    x = far_apart((2, 3, 4, 12, 6), dim, torch.uint8)
    found = haar3d(x, first_chunk=False, channels_last=packed)
    assert relative(found, haar3d_ref(x, first_chunk=False)) < 1e-6


@pytest.mark.parametrize("dim", range(5))
@pytest.mark.parametrize("far", ["bands", "low"])
def test_synthesis_of_bands_beyond_2_to_the_31_elements(dim, far):
    sizes = (2, 24, 2, 6, 3)
    bands = far_apart(sizes, dim, torch.float16) if far == "bands" else torch.randn(sizes).half()
    sizes = (2, 3, 2, 6, 3)
    low = far_apart(sizes, dim, torch.float16) if far == "low" else torch.randn(sizes).half()
    found = inverse_haar_triton(bands, "pairs", torch.float32, low)
    assert relative(found, inverse_haar3d_ref(bands, False, torch.float32, low)) < 1e-6


def test_float16_frames_of_a_decoder():
    x = torch.randn(1, 1, 4, 24, 3, dtype=torch.float16).permute(0, 4, 1, 2, 3)
    assert pixel_layout(x, packed=True) == INTERLEAVED
    assert relative(haar3d(x, dtype=torch.float32), haar3d_ref(x.double())) < 1e-6


@pytest.mark.parametrize("mode, inverse", [("frames", "frames"), ("pairs", "pairs"), ("repeat", "zero")])
def test_uint8_there_and_back(mode, inverse):
    x = torch.randint(0, 256, (1, 3, frame_count(mode, 2), 6, 20), dtype=torch.uint8)
    bands, low = haar_triton(x, mode, normalize=True, with_low=True)
    assert torch.equal(low, bands[:, :3])
    assert torch.equal(inverse_haar_triton(bands, inverse, torch.uint8, denormalize=True), x)
    bands[:, :3] = 0
    assert torch.equal(inverse_haar_triton(bands, inverse, torch.uint8, low, denormalize=True), x)
    assert torch.equal(reference(mode, True)(bands, low=low, dtype=torch.uint8, denormalize=True), x)


def test_uint8_is_clamped_and_rounded_to_even():
    values = torch.tensor([-7.0, 0.5, 1.5, 2.5, 254.5, 255.5, 1e9, -1e9])
    bands = torch.zeros(1, 4, 1, 1, 8)
    bands[0, 0, 0, 0] = 2 * values
    expected = torch.tensor([0, 0, 2, 2, 254, 255, 255, 0], dtype=torch.uint8)
    for function in (inverse_haar_triton, lambda bands, _, dtype: inverse_haar2d_ref(bands, dtype)):
        assert torch.equal(function(bands, "frames", torch.uint8)[0, 0, 0, 0, ::2], expected)


@pytest.mark.parametrize("images", [1, 3])
def test_an_image_has_no_high_band_in_time(images):
    x = torch.rand(images, 3, 1, 6, 8)
    bands = haar3d(x, normalize=True)
    assert bands.shape == (images, 24, 1, 3, 4) and not bands[:, 12:].any()
    assert torch.allclose(inverse_haar_triton(bands, "zero", denormalize=True), x, atol=1e-3)


def test_kernels_chunk_by_chunk():
    video = torch.randn(1, 3, 9, 4, 8)
    bands = haar_triton(video, "repeat")
    parts = [haar_triton(video[:, :, :3], "repeat"), haar_triton(video[:, :, 3:5], "pairs")]
    parts.append(haar_triton(video[:, :, 5:], "pairs"))
    assert torch.equal(torch.cat(parts, 2), bands)
    parts = [inverse_haar_triton(bands[:, :, :2], "zero"), inverse_haar_triton(bands[:, :, 2:], "pairs")]
    assert torch.equal(torch.cat(parts, 2), inverse_haar_triton(bands, "zero"))


@pytest.mark.parametrize("mode", ["frames", "pairs", "repeat"])
def test_gradients_can_be_differentiated(mode):
    """The gradient is linear in what it is taken of: its gradient is the analysis again."""
    x = torch.randn(1, 3, frame_count(mode, 2), 4, 6, requires_grad=True)
    bands = haar_triton(x, mode)
    cotangent, direction = torch.randn_like(bands, requires_grad=True), torch.randn_like(x)
    (grad,) = torch.autograd.grad(bands, x, cotangent, create_graph=True)
    (again,) = torch.autograd.grad(grad, cotangent, direction)
    assert torch.allclose(again, haar_triton(direction, mode), atol=1e-6)


def test_only_low_is_used():
    x = torch.randn(1, 3, 1, 4, 6, requires_grad=True)
    low = haar2d(x, with_low=True)[1]
    assert torch.allclose(torch.autograd.grad(low.sum(), x)[0], torch.full_like(x, 0.5))
