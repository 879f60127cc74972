"""What a training run sets for its whole process."""

import os

import pytest
import torch

from osp_fast.errors import UserError
from osp_fast.training.build import set_determinism

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    """The environment as if the variable was never set, and everything as before afterwards."""
    monkeypatch.setenv(WORKSPACE, "")
    monkeypatch.delenv(WORKSPACE)
    yield
    torch.use_deterministic_algorithms(False)


def test_determinism_is_switched_on_and_off():
    for wanted in (True, False):
        set_determinism(wanted, CPU)
        assert torch.are_deterministic_algorithms_enabled() is wanted
    assert WORKSPACE not in os.environ


def test_cublas_is_told_on_a_gpu_only_where_it_is_wanted(monkeypatch):
    set_determinism(False, CUDA)
    assert WORKSPACE not in os.environ
    set_determinism(True, CUDA)
    assert os.environ[WORKSPACE] == ":4096:8"
    monkeypatch.setenv(WORKSPACE, ":16:8")
    set_determinism(True, CUDA)
    assert os.environ[WORKSPACE] == ":16:8"


def test_an_environment_that_contradicts_is_refused(monkeypatch):
    monkeypatch.setenv(WORKSPACE, ":0:0")
    with pytest.raises(UserError, match="--deterministic does not go with CUBLAS_WORKSPACE_CONFIG=:0:0: unset it"):
        set_determinism(True, CUDA)
