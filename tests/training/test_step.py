"""The loss of a batch: what is drawn depends on seed, step and slot; padding and accumulation change nothing."""

from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import noop_context_fn

from osp_fast.config import TrainConfig
from osp_fast.seeding import torch_generator
from osp_fast.training.prepare import pad_to_largest
from osp_fast.training.step import accumulate_gradients

SLOTS = 4  # clips of the steps that these clips are taken from


@pytest.fixture
def loss(make_loss):
    return make_loss()


def gradients(loss, clips, micro_batch: int, step: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    loss.dit.zero_grad(set_to_none=True)
    parts = [clips[first : first + micro_batch] for first in range(0, len(clips), micro_batch)]
    losses = accumulate_gradients(loss.loss, [loss.make(part, step, SLOTS) for part in parts])
    return losses, torch.cat([parameter.grad.flatten() for parameter in loss.dit.parameters()])


@pytest.mark.parametrize("micro_batch", [1, 2, 3])
def test_micro_batches_change_rounding_only(loss, make_clip, micro_batch):
    clips = [make_clip(slot) for slot in range(4)]
    whole, expected = gradients(loss, clips, 4)
    losses, found = gradients(loss, clips, micro_batch)
    torch.testing.assert_close(losses, whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert expected.norm() > 1e-3


def test_the_gradient_is_that_of_the_mean_over_clips(loss, make_clip):
    clips = [make_clip(slot) for slot in range(3)]
    _, found = gradients(loss, clips, 2)
    alone = [gradients(loss, [one], 1)[1] for one in clips]
    torch.testing.assert_close(found, torch.stack(alone).mean(0), rtol=1e-4, atol=1e-6)


def test_clips_of_other_sizes_in_the_batch_change_rounding_only(loss, make_loss, make_clip):
    # Without skiparse: its sets are counted in the padded grid, so there the size of the batch does play a part.
    loss = make_loss(shape=replace(loss.dit.config, sparse1d=False))
    clips = [make_clip(0), make_clip(1, (1, 48, 32)), make_clip(2, (9, 32, 64)), make_clip(3)]
    together, expected = gradients(loss, clips, 4)
    alone, found = gradients(loss, clips, 1)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_draws_are_named_by_step_and_slot(loss, make_clip):
    same, again, other_slot = make_clip(0), make_clip(0), make_clip(0)
    other_slot.slot = 1
    first, _ = gradients(loss, [same], 1, step=3)
    second, _ = gradients(loss, [again], 1, step=3)
    assert torch.equal(first, second)
    assert not torch.equal(first, gradients(loss, [again], 1, step=4)[0])
    assert not torch.equal(first, gradients(loss, [other_slot], 1, step=3)[0])


def test_latents_are_normalised_samples_of_the_posterior(loss, make_clip, vae):
    clips = [make_clip(0), make_clip(1, (1, 32, 32)), make_clip(2)]
    latents = loss.maker.encode(clips, step=0)
    assert [tuple(latent.shape) for latent in latents] == [(8, 2, 4, 4), (8, 1, 4, 4), (8, 2, 4, 4)]
    posterior = vae.encode(clips[2].pixels[None].float() / 127.5 - 1)
    noise = torch.randn(posterior.mean.shape, generator=torch_generator("posterior", 42, 0, 2))
    expected = vae.normalize(posterior.mean + torch.exp(0.5 * posterior.logvar) * noise)[0]
    torch.testing.assert_close(latents[2], expected, rtol=1e-5, atol=1e-5)


def test_tiled_encoding_gives_the_same_latents(loss, make_loss, make_clip):
    config = TrainConfig()
    config.model.enable_tiling = True
    long = [make_clip(0, (41, 16, 16))]
    torch.testing.assert_close(
        make_loss(config).maker.encode(long, 0)[0], loss.maker.encode(long, 0)[0], rtol=0, atol=1e-5
    )


def test_encoding_keeps_to_the_memory_that_is_named(make_loss, make_clip, capsys):
    config = TrainConfig()
    config.model.vae_memory = 6 << 20
    clips = [make_clip(0, (17, 64, 64)), make_clip(1, (17, 64, 64))]
    small = make_loss(config)
    found = small.maker.encode(clips, 0)
    assert "VAE encode of 2 clips of 17x64x64: " in capsys.readouterr().err
    small.maker.encode(clips, 1)
    assert not capsys.readouterr().err  # a plan for each size, once
    for one, other in zip(found, make_loss().maker.encode(clips, 0), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


def test_the_caption_matters_and_padding_does_not(loss, make_clip):
    red, blue = make_clip(0), make_clip(0)
    blue.caption = "blue"
    assert not torch.equal(gradients(loss, [red], 1)[0], gradients(loss, [blue], 1)[0])
    padded, mask = pad_to_largest([torch.ones(8, 2, 4, 4), torch.ones(8, 1, 6, 2)])
    assert padded.shape == (2, 8, 2, 6, 4) and mask.shape == (2, 2, 6, 4)
    assert mask.flatten(1).sum(1).tolist() == [32, 12] and torch.equal(padded, mask[:, None].expand_as(padded))
    assert pad_to_largest([torch.ones(8, 2, 4, 4)] * 2)[1] is None


def test_gradient_checkpointing_changes_nothing(loss, make_clip):
    clips = [make_clip(0), make_clip(1)]
    _, expected = gradients(loss, clips, 2)
    loss.dit.recompute_blocks(noop_context_fn)
    assert torch.equal(gradients(loss, clips, 2)[1], expected)


def test_bf16_keeps_float32_weights_and_gradients(make_loss, make_clip):
    config = TrainConfig()
    config.model.mixed_precision = "bf16"
    losses, found = gradients(make_loss(config), [make_clip(0)], 1)
    exact, expected = gradients(make_loss(), [make_clip(0)], 1)
    assert losses.dtype == found.dtype == torch.float32
    torch.testing.assert_close(losses, exact, rtol=0.05, atol=0)
    assert 0 < (found - expected).norm() < 0.1 * expected.norm()


def test_flow_and_noise_offset_train_too(make_loss, make_clip):
    for name, value in (("rf_scheduler", True), ("noise_offset", 0.5)):
        config = TrainConfig()
        setattr(config.diffusion, name, value)
        losses, found = gradients(make_loss(config), [make_clip(0)], 1)
        assert losses.isfinite().all() and found.isfinite().all()
        assert not torch.equal(losses, gradients(make_loss(), [make_clip(0)], 1)[0])


@pytest.mark.parametrize("flow", [False, True])
def test_timesteps_are_stratified_over_the_slots_of_a_step(make_loss, make_clip, flow):
    config = TrainConfig()
    config.diffusion.rf_scheduler, config.diffusion.weighting_scheme = flow, "uniform"
    make = make_loss(config).make
    clips = [make_clip(slot, (1, 16, 16)) for slot in range(8)]
    for step in range(3):
        whole = make(clips, step, 8).timesteps
        assert [int(8 * t / 1000.001) for t in whole.tolist()] == list(range(8))
        # Whoever makes a part of the batch draws the same.
        assert torch.equal(torch.cat([make(part, step, 8).timesteps for part in (clips[:3], clips[3:])]), whole)
