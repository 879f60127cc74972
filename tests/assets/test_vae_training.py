"""The tiny VAE's training: it learns, goes on where it stopped, and leaves latents of zero mean and unit variance."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from osp_fast.assets.shapes import Scene
from osp_fast.assets.vae_training import (
    STATE,
    VAERecipe,
    as_pixels,
    draw_windows,
    kl_divergence,
    learning_rate,
    psnr,
    reconstruction_quality,
    train_vae,
)
from osp_fast.errors import UserError
from osp_fast.models.wfvae import WFVAEConfig

CONFIG = WFVAEConfig(
    latent_dim=4,
    base_channels=4,
    encoder_num_resblocks=1,
    encoder_energy_flow_hidden_size=8,
    decoder_num_resblocks=1,
    decoder_energy_flow_hidden_size=8,
    scale=(1.0,) * 4,
    shift=(0.0,) * 4,
)
RECIPE = VAERecipe(steps=30, batch=2, frames=5, warm_up=3, save_every=10)


@pytest.fixture(scope="module")
def clips() -> list[np.ndarray]:
    return [Scene.draw(number, 0).frames(9, 32) for number in range(12)]


@pytest.fixture(scope="module")
def trained(clips, tmp_path_factory):
    work = tmp_path_factory.mktemp("vae")
    return train_vae(clips, CONFIG, RECIPE, work), work


def test_it_learns(clips, trained):
    with torch.random.fork_rng():
        fresh = train_vae(clips, CONFIG, dataclasses.replace(RECIPE, steps=1), trained[1] / "fresh")
    before, after = (reconstruction_quality(vae, clips).psnr for vae in (fresh, trained[0]))
    assert after > before + 3, (before, after)


def test_latents_are_centred_with_one_scale(clips, trained):
    vae, _ = trained
    with torch.no_grad():
        latents = vae.normalize(vae.encode(torch.stack([as_pixels(clip[::2]) for clip in clips])).mean)
    assert latents.mean((0, 2, 3, 4)).abs().max() < 1e-4
    assert latents.square().mean().item() == pytest.approx(1, abs=1e-3)
    assert len(set(vae.config.scale)) == 1


def test_windows_of_every_stride():
    counting = np.arange(33, dtype=np.uint8)[:, None, None, None].repeat(3, -1)
    recipe = dataclasses.replace(RECIPE, batch=400)
    frames = (draw_windows([counting], recipe, 0)[:, 0, :, 0, 0] + 1) * 127.5
    strides = frames.diff(dim=1).round()
    assert (strides == strides[:, :1]).all() and frames.shape == (400, recipe.frames)
    for stride in recipe.strides:
        begins = frames[strides[:, 0] == stride, 0].round()
        assert set(begins.tolist()) == set(range(33 - stride * (recipe.frames - 1)))


def test_it_goes_on_where_it_stopped(clips, trained, tmp_path, monkeypatch):
    vae, _ = trained
    calls = []

    def stops(clips, recipe, step):
        calls.append(step)
        if calls.count(step) == 1 and step == 17:
            raise KeyboardInterrupt
        return draw_windows(clips, recipe, step)

    monkeypatch.setattr("osp_fast.assets.vae_training.draw_windows", stops)
    with pytest.raises(KeyboardInterrupt):
        train_vae(clips, CONFIG, RECIPE, tmp_path)
    again = train_vae(clips, CONFIG, RECIPE, tmp_path)
    assert calls[18] == 10  # from the state of step 10
    expected = vae.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())


def test_states_of_others_and_damaged_ones_are_refused(clips, trained, tmp_path):
    with pytest.raises(UserError, match="trained otherwise: remove it"):
        train_vae(clips, CONFIG, dataclasses.replace(RECIPE, kl=1e-3), trained[1])
    (tmp_path / STATE).write_bytes((trained[1] / STATE).read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be read"):
        train_vae(clips, CONFIG, RECIPE, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        train_vae(clips, CONFIG, dataclasses.replace(RECIPE, steps=1), tmp_path / "file")


def test_arithmetic():
    rates = [learning_rate(step, VAERecipe(steps=100, warm_up=10, learning_rate=2.0)) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and max(rates) == pytest.approx(2.0) and 0 < rates[-1] < 0.01
    assert rates[55] == pytest.approx(1.0)
    mean, deviation = torch.tensor([0.0, 2.0]), torch.tensor([1.0, 0.5])
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, deviation), torch.distributions.Normal(0.0, 1.0)
    )
    torch.testing.assert_close(kl_divergence(mean, 2 * deviation.log()), expected.mean())
    assert psnr(4e-3) == pytest.approx(30) and math.isclose(psnr(4.0), 0.0, abs_tol=1e-9)
