"""WF-VAE against recorded numbers, in chunks, and its loading and saving."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from osp_fast.errors import UserError
from osp_fast.models.weights import WEIGHTS
from osp_fast.models.wfvae import WFVAE, WFVAE_CONFIGS, Posterior

GOLDEN = Path(__file__).parents[1] / "golden/vae"


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


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


# In float64, where what chunks change in the order of sums is far below what a wrong frame would change.
@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("mode", ["trilinear", "nearest"])
def test_chunks_equal_the_whole_clip(io, chunk, mode):
    vae = WFVAE.from_pretrained(GOLDEN, torch.float64, t_interpolation=mode).requires_grad_(False)
    video, mean = io["video"].double(), io["mean"].double()
    whole = vae.encode(video)
    chunked = vae.encode(video, tiles=(chunk, None, None))
    assert relative(chunked.mean, whole.mean) < 1e-12
    assert relative(chunked.logvar, whole.logvar) < 1e-12
    decoded = vae.decode(mean)
    assert relative(vae.decode(mean, tiles=(chunk, None, None)), decoded) < 1e-12


@pytest.mark.parametrize("frames", [1, 5, 9, 13, 29])
def test_any_length_in_chunks_of_two(vae, frames):
    video = torch.rand(1, 3, frames, 16, 24, generator=torch.Generator().manual_seed(frames)) * 2 - 1
    whole = vae.encode(video).mean
    assert whole.shape == (1, 8, (frames - 1) // 4 + 1, 2, 3)
    assert relative(vae.encode(video, tiles=(2, None, None)).mean, whole) < 5e-6
    decoded = vae.decode(whole)
    assert decoded.shape == video.shape
    assert relative(vae.decode(whole, tiles=(2, None, None)), decoded) < 5e-6


def test_float32_rounds_no_more_in_chunks(io):
    exact = WFVAE.from_pretrained(GOLDEN, torch.float64).requires_grad_(False).decode(io["mean"].double())
    vae = WFVAE.from_pretrained(GOLDEN).requires_grad_(False)
    for chunk in (None, 1, 2):
        assert relative(vae.decode(io["mean"], tiles=(chunk, None, None)), exact) < 2e-6


def test_pictures_in_bytes_are_pictures_in_numbers(vae):
    video = torch.randint(0, 256, (1, 3, 5, 16, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert relative(vae.encode(video).mean, vae.encode(video / 127.5 - 1).mean) < 5e-6


def test_encoding_is_causal(vae, io):
    assert relative(vae.encode(io["video"][:, :, :9]).mean, io["mean"][:, :, :3]) < 1e-5


def test_normalize_and_back(vae, io):
    latents = vae.normalize(io["mean"])
    assert torch.allclose(latents[:, 1], (io["mean"][:, 1] - 0.01) * 0.3)
    assert torch.allclose(vae.denormalize(latents), io["mean"], atol=1e-6)


def test_posterior_sample_has_its_spread():
    posterior = Posterior(torch.full((8, 4, 16, 16), 3.0), torch.full((8, 4, 16, 16), -2.0))
    sample = posterior.sample(torch.randn(8, 4, 16, 16, generator=torch.Generator().manual_seed(3)))
    assert abs(sample.mean().item() - 3.0) < 0.02
    assert abs(sample.std().item() - torch.tensor(-1.0).exp().item()) < 0.02


def test_save_has_the_names_of_a_real_checkpoint(tmp_path, vae):
    vae.save_pretrained(tmp_path)
    saved, golden = load_file(tmp_path / WEIGHTS), load_file(GOLDEN / WEIGHTS)
    assert saved.keys() == golden.keys()
    assert all(torch.equal(saved[name], golden[name]) for name in golden)
    WFVAE.from_pretrained(tmp_path)


def test_other_wavelets_are_refused(tmp_path):
    tensors = load_file(GOLDEN / WEIGHTS)
    tensors["encoder.wavelet_tranform_l1.ad"] = -tensors["encoder.wavelet_tranform_l1.ad"]
    save_file(tensors, tmp_path / WEIGHTS)
    (tmp_path / "config.json").write_text((GOLDEN / "config.json").read_text())
    with pytest.raises(UserError, match="wavelet_tranform_l1.ad"):
        WFVAE.from_pretrained(tmp_path)


def test_impossible_sizes_are_refused(vae):
    with pytest.raises(ValueError, match="4n\\+1"):
        vae.encode(torch.zeros(1, 3, 4, 16, 16))
    with pytest.raises(ValueError, match="multiples of 8"):
        vae.encode(torch.zeros(1, 3, 5, 12, 16))
    for tiles in ((1,), (0, None, None), ("1", None, None), (1, 2, 0)):
        with pytest.raises(ValueError, match="tiles"):
            vae.decode(torch.zeros(1, 8, 1, 2, 2), tiles=tiles)


def test_released_size_can_be_built_on_meta():
    with torch.device("meta"):
        vae = WFVAE(WFVAE_CONFIGS["WFVAEModel_D8_4x8x8"])
    assert sum(p.numel() for p in vae.parameters()) > 1e8
