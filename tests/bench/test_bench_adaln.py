"""What adaptive layer norm is timed beside."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from osp_fast.kernels.adaln_spec import SHAPES, SPEC, make_inputs

from bench.baselines import Unavailable
from bench.baselines.adaln import baselines


def inputs_of(form, batch=1, **other):
    return make_inputs(
        device="cpu", dtype=torch.float32, seed=0, batch=batch, tokens=5, width=16, form=form, **other
    )  # fmt: skip


@pytest.fixture
def liger(monkeypatch):
    """A module in the place of liger-kernel's that computes the same."""

    class LayerNorm:
        @staticmethod
        def apply(x, weight, bias, eps):
            return F.layer_norm(x, weight.shape, weight, bias, eps)

    module = types.SimpleNamespace(LigerLayerNormFunction=LayerNorm)
    monkeypatch.setitem(sys.modules, "liger_kernel", types.SimpleNamespace())
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", types.SimpleNamespace())
    monkeypatch.setitem(sys.modules, "liger_kernel.ops.layer_norm", module)


def test_liger_computes_the_norm_of_one_sample(liger):
    baseline = baselines()[-1]
    inputs = inputs_of("norm")
    call, leaves = baseline.bind(inputs)
    assert torch.allclose(call(), SPEC.reference(**inputs), atol=1e-5)
    assert all(x.requires_grad for x in leaves)
    for other in (inputs_of("norm", batch=2), inputs_of("norm", norm="rms"), inputs_of("gate"), inputs_of("add norm")):
        with pytest.raises(Unavailable, match="one sample"):
            baseline.bind(other)


def test_liger_that_is_not_installed_is_unavailable():
    with pytest.raises(Unavailable, match="not installed"):
        baselines()[-1].bind(inputs_of("norm"))


def test_every_shape_moves_what_its_passes_say():
    passes = {"norm": (2, 3), "gate": (3, 3), "gate norm": (4, 6), "add norm": (4, 4)}
    for shape in SHAPES:
        sizes = shape.sizes
        row = 2 * sizes["batch"] * sizes["tokens"] * sizes["width"]
        for direction, count in zip(("forward", "backward"), passes[sizes["form"]], strict=True):
            assert count * row <= SPEC.bytes(direction, **sizes) <= 1.02 * count * row
            assert SPEC.predicted(direction, **sizes) > SPEC.bytes(direction, **sizes) / 3e12
