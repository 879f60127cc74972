"""What adaptive layer norm is timed beside."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from osp_fast.kernels.adaln_spec import SHAPES, SPEC, make_inputs

from bench.accuracy import named
from bench.baselines import Unavailable
from bench.baselines.adaln import baselines, original


def inputs_of(form, batch=1, **other):
    return make_inputs(
        device="cpu", dtype=torch.float32, seed=0, batch=batch, tokens=5, width=16, form=form, **other
    )  # fmt: skip


class LayerNorm:
    @staticmethod
    def apply(x, weight, bias, eps):
        return F.layer_norm(x, weight.shape, weight, bias, eps)


class ModulatedRMSNorm:
    @staticmethod
    def apply(x, weight, scale, shift, eps, offset, casting_mode, in_place):
        assert weight is None and offset == 0 and not in_place  # inputs rotate: they must survive
        return F.rms_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift


def rms_norm(x, weight, bias, eps):
    assert x.dim() == 2 and weight.dtype == bias.dtype == torch.float32
    return F.rms_norm(x, x.shape[-1:], weight, eps) + bias


def layer_norm(x, weight, bias, eps):
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


@pytest.fixture
def packages(monkeypatch):
    """Modules in the places of liger-kernel's and quack-kernels' that compute the same."""
    for name, contents in {
        "liger_kernel": {},
        "liger_kernel.ops": {},
        "liger_kernel.ops.layer_norm": {"LigerLayerNormFunction": LayerNorm},
        "liger_kernel.ops.modulated_rms_norm": {"LigerModulatedRMSNormFunction": ModulatedRMSNorm},
        "quack": {},
        "quack.rmsnorm": {"rmsnorm": rms_norm, "layernorm_fwd": layer_norm},
    }.items():
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**contents))


def test_the_original_computes_every_form():
    for shape in SPEC.small:
        inputs = SPEC.make_inputs(device="cpu", dtype=torch.float64, seed=0, **shape.sizes)
        expected, found = named(SPEC.reference(**inputs)), named(original(**inputs))
        assert found.keys() == expected.keys()
        assert all(torch.allclose(x, expected[name]) for name, x in found.items()), shape.name


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_peers_compute_the_norm_of_one_sample(packages, norm):
    peers = baselines()[2:]
    assert [one.name for one in peers] == ["Liger-Kernel", "QuACK"]
    for peer in peers:
        inputs = inputs_of("norm", norm=norm)
        call, leaves = peer.bind(inputs)
        assert torch.allclose(call(), SPEC.reference(**inputs), atol=1e-5)
        assert leaves[0] is inputs["x"] and all(x.requires_grad and x.is_leaf for x in leaves)
        for other in (inputs_of("norm", batch=2), inputs_of("gate"), inputs_of("add norm")):
            with pytest.raises(Unavailable, match="one sample"):
                peer.bind(other)


def test_peers_that_are_not_installed_are_unavailable(monkeypatch):
    for module in ("liger_kernel.ops.layer_norm", "liger_kernel.ops.modulated_rms_norm", "quack.rmsnorm"):
        monkeypatch.setitem(sys.modules, module, None)
    for norm in ("layer", "rms"):
        for peer in baselines()[2:]:
            with pytest.raises(Unavailable, match="not installed"):
                peer.bind(inputs_of("norm", norm=norm))


def test_every_shape_moves_what_its_passes_say():
    passes = {"norm": (2, 3), "gate": (3, 3), "gate norm": (4, 6), "add norm": (4, 4)}
    for shape in SHAPES:
        sizes = shape.sizes
        row = 2 * sizes["batch"] * sizes["tokens"] * sizes["width"]
        for direction, count in zip(("forward", "backward"), passes[sizes["form"]], strict=True):
            assert count * row <= SPEC.bytes(direction, **sizes) <= 1.02 * count * row
            assert SPEC.predicted(direction, **sizes) > SPEC.bytes(direction, **sizes) / 3e12
