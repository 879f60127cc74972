"""channel_norm, haar, causal_conv3d: references against their formulas, and chunk by chunk."""

import pytest
import torch
import torch.nn.functional as F
from osp_fast.kernels import launch
from osp_fast.kernels.causal_conv3d import causal_conv3d_ref
from osp_fast.kernels.channel_norm import channel_norm_ref
from osp_fast.kernels.haar import haar2d_ref, haar3d_ref, inverse_haar2d_ref, inverse_haar3d_ref
from osp_fast.kernels.launch import selected_path


def normed(x, dim, eps):
    mean = x.mean(dim, keepdim=True)
    return (x - mean) / ((x - mean).square().mean(dim, keepdim=True) + eps).sqrt()


@pytest.mark.parametrize("shape", [(2, 6, 4, 5), (1, 6, 3, 4, 5)])
def test_channel_norm(shape):
    x, weight, bias = torch.randn(shape).double(), torch.randn(6).double(), torch.randn(6).double()
    view = (1, 6) + (1,) * (len(shape) - 2)
    expected = normed(x, 1, 1e-6) * weight.view(view) + bias.view(view)
    assert torch.allclose(channel_norm_ref(x, weight, bias, 1e-6), expected)
    assert torch.allclose(channel_norm_ref(x, weight, bias, 1e-6, silu=True), F.silu(expected))


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


@pytest.mark.parametrize("kernel, stride", [((3, 3, 3), 1), ((1, 3, 3), 1), ((1, 1, 1), 1), ((3, 3, 3), 2)])
def test_causal_conv_against_explicit_padding(kernel, stride):
    x, weight = torch.randn(1, 2, 9, 6, 8).double(), torch.randn(4, 2, *kernel).double()
    bias = torch.randn(4).double()
    out, _ = causal_conv3d_ref(x, weight, bias, stride)
    padded = torch.cat((x[:, :, :1].expand(-1, -1, kernel[0] - 1, -1, -1), x), 2)
    edge = kernel[1] // 2
    padded = F.pad(padded, (edge,) * 4 if stride == 1 else (0, 1, 0, 1))
    assert torch.allclose(out, F.conv3d(padded, weight, bias, stride))


@pytest.mark.parametrize("stride", [1, 2])
def test_causal_conv_chunks_equal_the_whole(stride):
    x, weight = torch.randn(1, 2, 17, 6, 8).double(), torch.randn(4, 2, 3, 3, 3).double()
    whole, _ = causal_conv3d_ref(x, weight, None, stride)
    cache, parts = None, []
    for start, end in ((0, 5), (5, 9), (9, 11), (11, 17)):
        out, cache = causal_conv3d_ref(x[:, :, start:end], weight, None, stride, cache)
        assert cache.shape[2] == 3 - stride
        parts.append(out)
    assert torch.allclose(torch.cat(parts, 2), whole)


def test_kernel_path(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.delenv("OSP_FAST_KERNELS", raising=False)
    assert (selected_path(cpu), selected_path(cuda)) == ("reference", "triton")
    monkeypatch.setenv("OSP_FAST_KERNELS", "reference")
    assert (selected_path(cpu), selected_path(cuda)) == ("reference", "reference")
    monkeypatch.setenv("OSP_FAST_KERNELS", "cuda")
    with pytest.raises(ValueError, match="OSP_FAST_KERNELS='cuda' is unknown: use triton or reference"):
        selected_path(cpu)


@pytest.mark.parametrize("interpreter", [False, True])
def test_triton_on_the_cpu_needs_the_interpreter(monkeypatch, interpreter):
    monkeypatch.setenv("OSP_FAST_KERNELS", "triton")
    monkeypatch.setattr(launch, "interpreting", lambda: interpreter)
    assert selected_path(torch.device("cuda")) == "triton"
    if interpreter:
        assert selected_path(torch.device("cpu")) == "triton"
    else:
        with pytest.raises(ValueError, match="needs an NVIDIA GPU"):
            selected_path(torch.device("cpu"))
