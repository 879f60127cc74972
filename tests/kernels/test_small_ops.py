"""channel_norm against its formula; which path serves."""

import pytest
import torch
import torch.nn.functional as F
from osp_fast.kernels import launch
from osp_fast.kernels.channel_norm import channel_norm_ref
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
