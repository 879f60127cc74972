"""Which path of the kernels serves a device."""

import pytest
import torch
from osp_fast.kernels import launch
from osp_fast.kernels.launch import selected_path


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
