"""causal_conv3d: the reference against explicit padding, and chunk by chunk; which path serves a device."""

import pytest
import torch
import torch.nn.functional as F
from osp_fast.kernels import launch
from osp_fast.kernels.causal_conv3d import causal_conv3d_ref
from osp_fast.kernels.launch import selected_path


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


def test_a_forced_path_ends_with_its_block(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setenv("OSP_FAST_KERNELS", "reference")
    monkeypatch.setattr(launch, "interpreting", lambda: False)
    with launch.forced_path("triton"):
        assert (selected_path(cpu), selected_path(cuda)) == ("triton", "triton")
        launch.check_triton("op", torch.empty(1, device="meta"))
        with launch.forced_path("reference"):
            assert selected_path(cuda) == "reference"
        assert selected_path(cpu) == "triton"
    assert selected_path(cpu) == "reference"
    with pytest.raises(ValueError, match="needs an NVIDIA GPU"):
        launch.check_triton("op", torch.empty(1, device="meta"))
    with pytest.raises(ValueError, match="'fast' is unknown"), launch.forced_path("fast"):
        pass


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
