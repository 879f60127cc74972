"""WF-VAE through the Triton kernels for norms and wavelets, in the interpreter, against recorded numbers.

Its convolutions, which the interpreter is slow at, and chunks are in test_wfvae_in_place.py.
"""

from pathlib import Path

import pytest
import torch
from osp_fast.kernels import causal_conv3d, channel_norm_launch
from osp_fast.kernels.channel_norm_launch import pixel_rows
from safetensors.torch import load_file

from osp_fast.models import wfvae_layers
from osp_fast.models.wfvae import WFVAE

GOLDEN = Path(__file__).parents[1] / "golden/vae"


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.fixture(autouse=True)
def triton_path(monkeypatch):
    monkeypatch.setenv("OSP_FAST_KERNELS", "triton")
    for module in (wfvae_layers, causal_conv3d):
        monkeypatch.setattr(module, "serving_path", lambda *call: "library")


@pytest.fixture(scope="module")
def io() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "io.safetensors")


@pytest.fixture(scope="module")
def vae() -> WFVAE:
    return WFVAE.from_pretrained(GOLDEN).requires_grad_(False)


def test_golden_encode(vae, io):
    posterior = vae.encode(io["video"])
    assert relative(posterior.mean, io["mean"]) < 1e-5
    assert relative(posterior.logvar, io["logvar"]) < 1e-5


def test_golden_decode(vae, io):
    assert relative(vae.decode(io["mean"]), io["reconstruction"]) < 1e-5


def test_activations_stay_channels_last(vae, io, monkeypatch):
    """As on a GPU, where a convolution's result is channels-last if its input is: no norm has to copy."""
    copied = []
    monkeypatch.setattr(torch.nn.functional, "conv3d", channels_last(torch.nn.functional.conv3d))
    monkeypatch.setattr(torch.nn.functional, "conv2d", channels_last(torch.nn.functional.conv2d))
    monkeypatch.setattr(channel_norm_launch, "pixel_rows", lambda x: copied.append(x.stride(1) != 1) or pixel_rows(x))
    vae.decode(vae.encode(io["video"][:, :, :5, :16, :16]).mean)
    assert len(copied) == 40 and not any(copied)


def channels_last(function):
    """A convolution that follows its input's layout."""

    def follow(x, *arguments, **options):
        out = function(x, *arguments, **options)
        return out.movedim(1, -1).contiguous().movedim(-1, 1) if x.stride(1) == 1 else out

    return follow


def test_an_image(vae, monkeypatch):
    image = torch.rand(2, 3, 1, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean = vae.encode(image).mean
    decoded = vae.decode(mean)
    monkeypatch.setenv("OSP_FAST_KERNELS", "reference")
    assert relative(mean, vae.encode(image).mean) < 1e-5
    assert relative(decoded, vae.decode(mean)) < 1e-5


def test_gradients(io, monkeypatch):
    vae = WFVAE.from_pretrained(GOLDEN)
    video = io["video"][:, :, :5, :16, :16]

    def gradients():
        leaves = [video.clone().requires_grad_(), vae.encoder.down1[0].weight, vae.decoder.connect_l1[-1].weight]
        decoded = vae.decode(vae.encode(leaves[0]).mean)
        return torch.autograd.grad(decoded.square().mean(), leaves)

    found = gradients()
    monkeypatch.setenv("OSP_FAST_KERNELS", "reference")
    for a, b in zip(found, gradients(), strict=True):
        assert relative(a, b) < 1e-4
