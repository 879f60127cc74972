"""The VAE's channel norm: the reference against its formula, the Triton kernels against float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from osp_fast.kernels import channel_norm_launch as launch
from osp_fast.kernels import tuning
from osp_fast.kernels.channel_norm import channel_norm_ref, channel_norm_triton
from osp_fast.kernels.channel_norm_spec import SPEC
from osp_fast.kernels.tuning import RowConfig

EPS = 1e-6
SLICES = {  # name -> (larger by (batch, frames, rows, columns, channels), where the tensor begins in it)
    "channels last": ((0, 0, 0, 0, 0), (0, 0, 0, 0, 0)),
    "channels of more": ((0, 0, 0, 0, 8), (0, 0, 0, 0, 3)),
    "frames of more": ((0, 2, 0, 0, 0), (0, 1, 0, 0, 0)),
    "samples of more": ((2, 0, 0, 0, 0), (1, 0, 0, 0, 0)),
    "a crop": ((0, 0, 1, 2, 0), (0, 0, 1, 1, 0)),
}
LAYOUTS = (*SLICES, "channels first", "one value")


def relative(found, expected):
    return ((found.detach().double() - expected.detach()).norm() / expected.detach().norm()).item()


def make(layout, sizes, generator, dtype=torch.float32):
    """(B, C, T, H, W) of sizes (B, T, H, W, C)."""
    if layout == "one value":  # as the gradient of a sum
        return torch.randn((), generator=generator).to(dtype).expand(sizes).movedim(-1, 1)
    if layout == "channels first":
        batch, *space, channels = sizes
        return torch.randn(batch, channels, *space, generator=generator).to(dtype)
    more, starts = SLICES[layout]
    x = torch.randn([size + extra for size, extra in zip(sizes, more, strict=True)], generator=generator).to(dtype)
    return x[tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))].movedim(-1, 1)


@pytest.mark.parametrize("shape", [(2, 6, 4, 5), (1, 6, 3, 4, 5)])
def test_the_reference_follows_its_formula(shape):
    x, weight, bias = torch.randn(shape).double(), torch.randn(6).double(), torch.randn(6).double()
    view = (1, 6) + (1,) * (len(shape) - 2)
    normed = (x - x.mean(1, True)) / (x.var(1, correction=0, keepdim=True) + EPS).sqrt()
    expected = normed * weight.view(view) + bias.view(view)
    assert torch.allclose(channel_norm_ref(x, weight, bias, EPS), expected)
    assert torch.allclose(channel_norm_ref(x, weight, bias, EPS, silu=True), expected * torch.sigmoid(expected))


def test_the_reference_computes_16_bits_in_float32_and_rounds_once():
    x, weight, bias = (torch.randn(shape).bfloat16() for shape in ((1, 96, 4, 5), (96,), (96,)))
    for silu in (False, True):
        found = channel_norm_ref(x, weight, bias, EPS, silu)
        wide = channel_norm_ref(x.float(), weight.float(), bias.float(), EPS, silu)
        assert found.dtype == torch.bfloat16 and torch.equal(found, wide.bfloat16())
        assert found.is_contiguous(memory_format=torch.channels_last)


@st.composite
def cases(draw):
    """Sizes (B, T, H, W, C), layouts of x and of the gradient, whether they are images, SiLU, pixels of a block."""
    sizes = [
        draw(st.integers(1, 3)),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 5)),
        draw(st.sampled_from((1, 4, 7))),
    ]
    sizes.append(draw(st.sampled_from((5, 8, 13, 16, 24, 37, 48))))  # of two channels the gradient is all rounding
    options = (draw(st.sampled_from(LAYOUTS[:-1])), draw(st.sampled_from(LAYOUTS)), draw(st.booleans()))
    return sizes, *options, draw(st.booleans()), draw(st.sampled_from((1, 4, 32))), draw(st.integers(0, 2**31))


@settings(max_examples=40)
@given(cases())
def test_kernels_against_float64(case):
    sizes, layout, grad_layout, images, silu, rows, seed = case
    generator = torch.Generator().manual_seed(seed)
    x, out_grad = (make(name, sizes, generator) for name in (layout, grad_layout))
    if images:
        x, out_grad = x[:, :, -1], out_grad[:, :, -1]
    x = x.detach().requires_grad_()
    weight, bias = torch.randn(2, sizes[-1], generator=generator).requires_grad_().unbind()
    inputs = (x, weight, bias)
    config = RowConfig(rows, 4, 2, 1)
    with tuning.forced("channel_norm forward", config), tuning.forced("channel_norm backward", config):
        out = channel_norm_triton(*inputs, EPS, silu)
        found = torch.autograd.grad(out, inputs, out_grad)
    assert out.is_contiguous(memory_format=torch.channels_last if images else torch.channels_last_3d)
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = channel_norm_ref(*wide, EPS, silu)
    forward, gradient = SPEC.tolerances[torch.float32]
    assert out.dtype == torch.float32 and relative(out, expected) < forward
    expected_grads = torch.autograd.grad(expected, wide, out_grad.double())
    for name, a, b in zip(("x", "weight", "bias"), found, expected_grads, strict=True):
        assert a.shape == b.shape and relative(a, b) < gradient, name


@pytest.mark.parametrize("silu", [False, True])
def test_float16(silu):
    generator = torch.Generator().manual_seed(3)
    x = make("channels of more", (2, 2, 3, 5, 40), generator, torch.float16).detach().requires_grad_()
    weight, bias = (torch.randn(40, generator=generator).half().requires_grad_() for _ in range(2))
    out = channel_norm_triton(x, weight, bias, EPS, silu)
    wide = [tensor.detach().double().requires_grad_() for tensor in (x, weight, bias)]
    expected = channel_norm_ref(*wide, EPS, silu)
    forward, gradient = SPEC.tolerances[torch.float16]
    assert out.dtype == torch.float16 and relative(out, expected) < forward
    out_grad = torch.randn(out.shape, generator=generator).half()
    found = torch.autograd.grad(out, (x, weight, bias), out_grad)
    for a, b in zip(found, torch.autograd.grad(expected, wide, out_grad.double()), strict=True):
        assert a.dtype == torch.float16 and relative(a, b) < gradient


def test_weights_may_be_wider_than_activations():
    x = torch.randn(1, 24, 2, 3, 4).half()
    weight, bias = torch.randn(2, 24, requires_grad=True).unbind()
    out = channel_norm_triton(x, weight, bias, EPS, True)
    expected = channel_norm_ref(x.double(), weight.double(), bias.double(), EPS, True)
    assert out.dtype == torch.float16 and relative(out, expected) < SPEC.tolerances[torch.float16][0]
    assert all(x.dtype == torch.float32 for x in torch.autograd.grad(out.sum(), (weight, bias)))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # where SiLU is zero
@pytest.mark.parametrize("silu", [False, True])
def test_numbers_at_the_edge_of_their_range(silu):
    """A mean far from zero, channels that are equal, results that saturate SiLU."""
    x = torch.randn(1, 16, 1, 2, 4, generator=torch.Generator().manual_seed(5))
    x[..., 0] += 1e4
    x[..., 1] *= 1e-12
    x[..., 2] = 7.0
    x[..., 3] *= 1e15
    weight, bias = torch.full((16,), 200.0), torch.full((16,), -50.0)
    found = channel_norm_triton(x, weight, bias, EPS, silu)
    expected = channel_norm_ref(x.double(), weight.double(), bias.double(), EPS, silu)
    assert found.isfinite().all()
    assert relative(found[..., 1:], expected[..., 1:]) < 1e-5
    # The mean of numbers of 1e4, where float32 is 2^-10 apart, is off by one such step; the result's slope is at most
    # weight / deviation, and 1.1 times that behind SiLU.
    slope = 1.1 * 200 / x[..., 0].double().std(1, correction=0, keepdim=True)
    assert ((found[..., 0] - expected[..., 0]).abs() <= 2**-10 * slope).all()


def test_gradients_do_not_vary():
    inputs = [torch.randn(shape, requires_grad=True) for shape in ((2, 24, 3, 5, 7), (24,), (24,))]
    grads = [torch.autograd.grad(channel_norm_triton(*inputs, EPS, True).square().sum(), inputs) for _ in range(2)]
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))


@pytest.mark.parametrize("layout", SLICES)
def test_what_is_read_in_place(layout):
    x = make(layout, (2, 3, 4, 5, 16), torch.Generator())
    rows = launch.pixel_rows(x)
    assert torch.equal(rows, x.movedim(1, -1).flatten(1, -2))
    assert (rows.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()) == (layout != "a crop")


def test_frames_as_images_are_read_in_place():
    """What `per_frame` hands to 2D layers, and what it makes of their results."""
    x = make("channels last", (2, 3, 4, 5, 16), torch.Generator())
    images = x.transpose(1, 2).flatten(0, 1)
    for tensor in (images, images.unflatten(0, (2, 3)).transpose(1, 2)):
        assert launch.pixel_rows(tensor).data_ptr() == x.data_ptr()


@pytest.mark.parametrize("rows", [4, 64])
def test_pixels_beyond_2_to_the_31_elements(rows):
    """Pixels of x and of the gradient far apart, in later blocks and within one; memory between is not touched."""
    apart = 2**26
    memory = torch.empty(39 * apart + 16, dtype=torch.float16)
    x, out_grad = (memory.as_strided((1, 8, 5, 2, 4), (0, 1, 8 * apart, 4 * apart, apart), at) for at in (0, 8))
    x.copy_(torch.randn(x.shape))
    out_grad.copy_(torch.randn(x.shape))
    weight, bias = torch.randn(2, 8).half().unbind()
    config = RowConfig(rows, 4, 2, 1)
    with tuning.forced("channel_norm forward", config), tuning.forced("channel_norm backward", config):
        out = channel_norm_triton(x, weight, bias, EPS, True)
        grads = torch.ops.osp_fast.channel_norm_backward(out_grad, x, weight, bias, EPS, True)
    wide = [tensor.double().requires_grad_() for tensor in (x, weight, bias)]
    expected = channel_norm_ref(*wide, EPS, True)
    forward, gradient = SPEC.tolerances[torch.float16]
    assert relative(out, expected) < forward
    for a, b in zip(grads, torch.autograd.grad(expected, wide, out_grad.double()), strict=True):
        assert relative(a, b) < gradient


def test_a_sample_that_starts_beyond_2_to_the_31_elements():
    """Both samples and their results lie in memory that is reserved and never touched in between."""
    apart = 2**31 + 64
    x = torch.empty(apart + 80, dtype=torch.float16).as_strided((2, 16, 1, 1, 5), (apart, 1, 80, 80, 16))
    x.copy_(torch.randn(x.shape))
    weight, bias = torch.randn(16), torch.randn(16)
    found = channel_norm_triton(x, weight, bias, EPS, True)
    expected = F.silu(F.layer_norm(x.double().movedim(1, -1), (16,), weight.double(), bias.double(), EPS)).movedim(
        -1, 1
    )
    assert relative(found, expected) < SPEC.tolerances[torch.float16][0]
