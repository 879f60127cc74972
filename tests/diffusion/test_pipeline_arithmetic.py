"""Every sampler on the golden DiT against a pipeline as diffusers writes its own: its classes, settings and loop."""

from pathlib import Path

import pytest
import torch

from osp_fast.config import SAMPLE_METHODS
from osp_fast.diffusion.denoise import GuidedModel, Halves, Text, denoise, prepare_text
from osp_fast.diffusion.samplers import FLOW_METHOD, make_scheduler
from osp_fast.models.dit import DiT
from osp_fast.seeding import torch_generator

STEPS, SCALE = 5, 4.0
LINEAR = dict(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
CLASSES = {
    "DDIM": ("DDIMScheduler", dict(clip_sample=False)),
    "EulerDiscrete": ("EulerDiscreteScheduler", {}),
    "DDPM": ("DDPMScheduler", dict(clip_sample=False)),
    "DPMSolverMultistep": ("DPMSolverMultistepScheduler", {}),
    "DPMSolverSinglestep": ("DPMSolverSinglestepScheduler", dict(lower_order_final=True)),
    "PNDM": ("PNDMScheduler", {}),
    "HeunDiscrete": ("HeunDiscreteScheduler", {}),
    "EulerAncestralDiscrete": ("EulerAncestralDiscreteScheduler", {}),
    "DEISMultistep": ("DEISMultistepScheduler", {}),
    "KDPM2AncestralDiscrete": ("KDPM2AncestralDiscreteScheduler", {}),
    "CogVideoX": ("CogVideoXDDIMScheduler", dict(clip_sample=False, snr_shift_scale=1.0)),
    FLOW_METHOD: ("FlowMatchEulerDiscreteScheduler", {}),
}


@pytest.fixture(scope="module")
def dit():
    return DiT.from_pretrained(Path(__file__).parents[1] / "golden/dit").requires_grad_(False).eval()


def inputs(dit):
    generator = torch_generator("pipeline arithmetic")
    noise = torch.randn(1, dit.config.in_channels, 2, 4, 6, generator=generator)
    states = torch.randn(2, 7, dit.config.caption_channels, generator=generator)
    masks = torch.ones(2, 7, dtype=torch.long)
    masks[0, 3:] = 0
    return noise, states, masks


@torch.no_grad()
def of_diffusers(dit, method, options, noise, states, masks):
    """What a pipeline of diffusers does around its network."""
    import diffusers

    name, settings = CLASSES[method]
    flow = method == FLOW_METHOD
    scheduler = getattr(diffusers, name)(**settings, **({} if flow else {**LINEAR, **options}))
    if flow:
        scheduler.set_timesteps(sigmas=torch.linspace(1.0, 1 / STEPS, STEPS).tolist())
    else:
        scheduler.set_timesteps(STEPS)
    latents = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    has_generator = method in ("DDPM", "EulerAncestralDiscrete", "KDPM2AncestralDiscrete")
    extra = dict(generator=torch_generator("steps")) if has_generator else {}
    for timestep in scheduler.timesteps:
        twice = torch.cat([latents] * 2)
        if hasattr(scheduler, "scale_model_input"):
            twice = scheduler.scale_model_input(twice, timestep)
        without, with_prompt = dit(twice, timestep.float().expand(2), states, masks).chunk(2)
        guided = without + SCALE * (with_prompt - without)
        latents = scheduler.step(guided, timestep, latents, **extra, return_dict=False)[0]
    return latents


def ours(dit, method, prediction_type, zero_snr, noise, states, masks, halves):
    scheduler = make_scheduler(method, prediction_type, zero_snr, method == FLOW_METHOD)
    negative, text = (Text(states[row : row + 1], masks[row : row + 1]) for row in (0, 1))
    texts = prepare_text(dit, text, negative, halves)
    model = GuidedModel(dit, texts, scheduler.set_steps(STEPS), SCALE, halves)
    return denoise(model, scheduler, STEPS, noise, torch_generator("steps"))


@pytest.mark.parametrize("halves", [Halves.TOGETHER, Halves.IN_TURNS])
@pytest.mark.parametrize("method", SAMPLE_METHODS)
def test_latents_after_five_steps(dit, method, halves):
    noise, states, masks = inputs(dit)
    expected = of_diffusers(dit, method, {}, noise, states, masks)
    found = ours(dit, method, "epsilon", False, noise, states, masks, halves)
    assert expected.abs().max() > 0.5
    assert (found - expected).norm() / expected.norm() < 1e-5
    assert (found - expected).abs().max() < 1e-5 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("method", ["EulerDiscrete", "EulerAncestralDiscrete"])
def test_zero_terminal_snr_and_velocity(dit, method):
    """Of the other samplers diffusers lets the signal be 0 there, which ours does not: see LEAST_SIGNAL."""
    noise, states, masks = inputs(dit)
    options = dict(rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction")
    expected = of_diffusers(dit, method, options, noise, states, masks)
    found = ours(dit, method, "v_prediction", True, noise, states, masks, Halves.TOGETHER)
    assert (found - expected).norm() / expected.norm() < 1e-5
