"""The training objective against diffusers' schedulers and against its own formulas."""

import itertools
import math

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_loss_weighting_for_sd3, compute_snr

from osp_fast.config import PREDICTION_TYPES, WEIGHTING_SCHEMES, DiffusionConfig
from osp_fast.diffusion.schedule import DiffusionObjective, diffusion_betas, draw_noise
from osp_fast.seeding import torch_generator

SHAPE = (5, 8, 3, 4, 6)
TIMESTEPS = torch.tensor([0, 1, 500, 998, 999])


def tensors():
    generator = torch_generator("test latents")
    return [torch.randn(SHAPE, generator=generator) for _ in range(3)]


def reference(zero_snr):
    return DDPMScheduler(1000, 1e-4, 0.02, "linear", rescale_betas_zero_snr=zero_snr)


@pytest.mark.parametrize("zero_snr", [False, True])
def test_betas_match_diffusers(zero_snr):
    torch.testing.assert_close(diffusion_betas(zero_snr).float(), reference(zero_snr).betas, rtol=1e-4, atol=2e-7)


@pytest.mark.parametrize("zero_snr", [False, True])
def test_corruption_and_velocity_match_diffusers(zero_snr):
    latents, noise, _ = tensors()
    objective = DiffusionObjective(DiffusionConfig(rescale_betas_zero_snr=zero_snr, prediction_type="v_prediction"))
    scheduler = reference(zero_snr)
    noisy = scheduler.add_noise(latents, noise, TIMESTEPS)
    velocity = scheduler.get_velocity(latents, noise, TIMESTEPS)
    torch.testing.assert_close(objective.corrupt(latents, noise, TIMESTEPS), noisy, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(objective.target(latents, noise, TIMESTEPS), velocity, rtol=1e-5, atol=1e-5)


def test_zero_terminal_snr_is_exact():
    latents, noise, _ = tensors()
    objective = DiffusionObjective(DiffusionConfig(rescale_betas_zero_snr=True))
    assert torch.equal(objective.corrupt(latents, noise, TIMESTEPS)[-1], noise[-1])
    first = 1 - diffusion_betas(True)[0]
    assert math.isclose(first, 1 - 1e-4, rel_tol=1e-12)


def test_least_signal_bounds_the_schedule_and_changes_nothing_above_it():
    bound = 2.0**-24
    cumulated = torch.cumprod(1 - diffusion_betas(True, least_signal=bound), 0)
    exact = torch.cumprod(1 - diffusion_betas(True), 0)
    assert math.isclose(cumulated[-1], bound, rel_tol=1e-9)
    assert (cumulated.diff() < 0).all()
    torch.testing.assert_close(cumulated[:990], exact[:990], rtol=1e-10, atol=0)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("zero_snr", [False, True])
def test_min_snr_weights(prediction_type, zero_snr):
    config = DiffusionConfig(prediction_type=prediction_type, snr_gamma=5.0, rescale_betas_zero_snr=zero_snr)
    weight = DiffusionObjective(config).weight(torch.arange(1000))
    assert torch.isfinite(weight).all()
    snr = compute_snr(reference(zero_snr), torch.arange(1000)).double()
    divisor = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones(1000)}[prediction_type]
    expected = (snr.clamp(max=5.0) / divisor).float()
    if zero_snr:
        assert weight[-1] == (1.0 if prediction_type == "epsilon" else 0.0)
        weight, expected = weight[:-1], expected[:-1]
    torch.testing.assert_close(weight, expected, rtol=1e-3, atol=1e-7)


def test_without_gamma_all_steps_weigh_the_same():
    assert (DiffusionObjective(DiffusionConfig()).weight(torch.arange(1000)) == 1).all()


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("flow", [False, True])
def test_prediction_of_the_target_has_no_loss(prediction_type, flow):
    latents, noise, other = tensors()
    objective = DiffusionObjective(DiffusionConfig(prediction_type=prediction_type, rf_scheduler=flow))
    target = objective.target(latents, noise, TIMESTEPS)
    assert (objective.loss(target, latents, noise, TIMESTEPS) == 0).all()
    assert (objective.loss(other, latents, noise, TIMESTEPS) > 0.5).all()


@pytest.mark.parametrize("config", [DiffusionConfig(snr_gamma=5.0), DiffusionConfig(rf_scheduler=True)])
def test_loss_of_a_padded_batch_is_that_of_the_single_clips(config):
    objective = DiffusionObjective(config)
    latents, noise, prediction = tensors()
    timesteps = objective.timesteps(torch.linspace(0.1, 0.9, 5))
    sizes = [(3, 4, 6), (1, 4, 6), (2, 2, 6), (3, 4, 2), (2, 2, 2)]
    mask = torch.zeros(5, 3, 4, 6)
    for clip, (t, h, w) in enumerate(sizes):
        mask[clip, :t, :h, :w] = 1
    batch = objective.loss(prediction, latents, noise, timesteps, mask)
    for clip, (t, h, w) in enumerate(sizes):
        single = [x[clip : clip + 1, :, :t, :h, :w] for x in (prediction, latents, noise)]
        alone = objective.loss(*single, timesteps[clip : clip + 1])
        torch.testing.assert_close(batch[clip : clip + 1], alone)
    # What lies in the padding, gradients included, does not matter.
    prediction = prediction.requires_grad_()
    objective.loss(prediction, latents, noise, timesteps, mask.bool()).sum().backward()
    assert (prediction.grad * (1 - mask[:, None]) == 0).all()


def test_loss_is_taken_in_float32():
    latents, noise, _ = tensors()
    objective = DiffusionObjective(DiffusionConfig(prediction_type="v_prediction"))
    target = objective.target(latents, noise, TIMESTEPS)
    loss = objective.loss(target.bfloat16(), latents, noise, TIMESTEPS)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, (target.bfloat16().float() - target).square().flatten(1).mean(1))


def test_timesteps_are_stratified():
    objective = DiffusionObjective(DiffusionConfig())
    uniform = torch.rand(2000, generator=torch_generator("uniform"))
    for rank in range(4):
        drawn = objective.timesteps(uniform, rank, 4)
        assert drawn.dtype == torch.int64
        assert (drawn.min(), drawn.max()) == (250 * rank, 250 * rank + 249)
    ends = torch.tensor([0.0, math.nextafter(1.0, 0.0)], dtype=torch.float64)
    assert objective.timesteps(ends, 2, 3).tolist() == [666, 999]
    assert objective.timesteps(ends).tolist() == [0, 999]


@pytest.mark.parametrize("strata", [1, 3])
def test_every_discrete_timestep_is_equally_likely(strata):
    objective = DiffusionObjective(DiffusionConfig())
    grid = (torch.arange(3000, dtype=torch.float64) + 0.5) / 3000
    drawn = torch.cat([objective.timesteps(grid, rank, strata) for rank in range(strata)])
    assert (torch.bincount(drawn, minlength=1000) == 3 * strata).all()


@pytest.mark.parametrize("scheme", WEIGHTING_SCHEMES)
def test_flow_timesteps_follow_their_density(scheme):
    objective = DiffusionObjective(DiffusionConfig(rf_scheduler=True, weighting_scheme=scheme))
    grid = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    parts = [objective.timesteps(grid, rank, 4) for rank in range(4)]
    assert all(low.max() <= high.min() for low, high in itertools.pairwise(parts))
    sigma = torch.cat(parts).double() / 1000
    assert sigma.min() >= 1e-3 and sigma.max() <= 1
    uniform = torch.rand(80000, generator=torch_generator("density"), dtype=torch.float64)
    if scheme == "logit_normal":
        direct = torch.sigmoid(torch.randn(80000, generator=torch_generator("normal")).double())
    elif scheme == "mode":
        direct = 1 - uniform - 1.29 * (torch.cos(math.pi * uniform / 2) ** 2 - 1 + uniform)
    else:
        direct = uniform
    torch.testing.assert_close(sigma.sort().values, direct.clamp(1e-3).sort().values, rtol=0, atol=0.01)


@pytest.mark.parametrize("scheme", WEIGHTING_SCHEMES)
def test_flow_weights_match_diffusers(scheme):
    objective = DiffusionObjective(DiffusionConfig(rf_scheduler=True, weighting_scheme=scheme))
    sigma = torch.linspace(1e-3, 1, 50)
    torch.testing.assert_close(objective.weight(1000 * sigma), compute_loss_weighting_for_sd3(scheme, sigma))


def test_flow_endpoints():
    latents, noise, _ = tensors()
    objective = DiffusionObjective(DiffusionConfig(rf_scheduler=True))
    timesteps = torch.tensor([1000.0, 500.0, 250.0, 750.0, 1.0])
    noisy = objective.corrupt(latents, noise, timesteps)
    assert torch.equal(noisy[0], noise[0])
    torch.testing.assert_close(noisy[2], 0.75 * latents[2] + 0.25 * noise[2])
    torch.testing.assert_close(noisy - timesteps.view(5, 1, 1, 1, 1) / 1000 * (noise - latents), latents)


def test_noise_offset_is_one_number_per_clip_and_channel():
    plain = draw_noise((64, 16, 2, 3, 4), torch_generator("noise"))
    shifted = draw_noise((64, 16, 2, 3, 4), torch_generator("noise"), noise_offset=0.1)
    shift = shifted - plain
    assert torch.equal(draw_noise((64, 16, 2, 3, 4), torch_generator("noise")), plain)
    torch.testing.assert_close(shift, shift[:, :, :1, :1, :1].expand_as(shift), rtol=0, atol=1e-6)
    assert abs(shift.std() - 0.1) < 0.01
    four_standard_errors = 4 / math.sqrt(plain.numel())
    assert abs(plain.std() - 1) < four_standard_errors and abs(plain.mean()) < four_standard_errors
