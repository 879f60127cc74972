"""The samplers by name: from the latents of one timestep to those of the next.

The samplers are diffusers'. They get the betas of training, no clipping and no thresholding. A schedule with zero
terminal SNR is sampled with "trailing" spacing (Lin et al. 2023, arXiv:2305.08891), so that sampling starts at the
last timestep. All that a sampler computes beside its latents is on the CPU, so on a GPU a step makes the host wait for
nothing; noise goes there through pinned memory.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from osp_fast.config import PREDICTION_TYPES
from osp_fast.diffusion.schedule import TRAIN_STEPS, diffusion_betas
from osp_fast.errors import UserError

FLOW_METHOD = "FlowMatchEulerDiscrete"
LEAST_SIGNAL = 2.0**-24  # alpha_bar at zero terminal SNR: keeps sigma finite (4096) where a sampler works with sigma
LEAST_COVERAGE = {"trailing": 0.95, "leading": 0.8}  # see Scheduler._flaw


@dataclass(frozen=True)
class _Method:
    """What differs between diffusers' scheduler classes."""

    class_name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    predictions: tuple[str, ...] = PREDICTION_TYPES
    has_spacing: bool = True
    fixed_stride: bool = False  # its step goes from t to t - 1000 // steps, whatever its next timestep is
    fewest: int = 2
    fewest_zero_snr: int = 0
    most: int = TRAIN_STEPS


_WITHOUT_SAMPLE = ("epsilon", "v_prediction")
_METHODS = {
    "DDIM": _Method("DDIMScheduler", dict(clip_sample=False), fixed_stride=True),
    "EulerDiscrete": _Method("EulerDiscreteScheduler"),
    "DDPM": _Method("DDPMScheduler", dict(clip_sample=False)),
    # At 1000 steps these two would meet sigma_min twice and divide by zero.
    "DPMSolverMultistep": _Method("DPMSolverMultistepScheduler", most=TRAIN_STEPS - 1),
    "DEISMultistep": _Method("DEISMultistepScheduler", most=TRAIN_STEPS - 1),
    # Always spaced from the last timestep to 0, as zero terminal SNR needs it.
    "DPMSolverSinglestep": _Method("DPMSolverSinglestepScheduler", dict(lower_order_final=True), has_spacing=False),
    # Its four Runge-Kutta points and their half strides bound the steps. It averages predictions of different
    # timesteps, which is right for epsilon only, so the others are converted (Scheduler.step). Epsilon tells little of
    # the sample where the signal is near zero: there long strides diverge.
    "PNDM": _Method("PNDMScheduler", fixed_stride=True, fewest=4, fewest_zero_snr=30, most=TRAIN_STEPS // 2),
    "HeunDiscrete": _Method("HeunDiscreteScheduler", fewest=3),
    "EulerAncestralDiscrete": _Method("EulerAncestralDiscreteScheduler", predictions=_WITHOUT_SAMPLE),
    "KDPM2AncestralDiscrete": _Method("KDPM2AncestralDiscreteScheduler", predictions=_WITHOUT_SAMPLE, fewest=3),
    # DDIM without the shift of SNR that CogVideoX itself was trained with.
    "CogVideoX": _Method("CogVideoXDDIMScheduler", dict(clip_sample=False, snr_shift_scale=1.0), fixed_stride=True),
    FLOW_METHOD: _Method("FlowMatchEulerDiscreteScheduler", has_spacing=False, fewest=1),
}


class Scheduler:
    """One of diffusers' samplers behind one interface. `make_scheduler` makes them; `set_steps` starts a run."""

    def __init__(self, method: str, prediction_type: str, rescale_betas_zero_snr: bool):
        import diffusers

        traits = _METHODS[method]
        self.method, self.prediction_type, self._traits = method, prediction_type, traits
        self._fewest = max(traits.fewest, traits.fewest_zero_snr if rescale_betas_zero_snr else 0)
        options = dict(traits.options)
        if method != FLOW_METHOD:
            options["trained_betas"] = diffusion_betas(rescale_betas_zero_snr, LEAST_SIGNAL).tolist()
            options["prediction_type"] = "epsilon" if method == "PNDM" else prediction_type
            if rescale_betas_zero_snr and traits.has_spacing:
                options["timestep_spacing"] = "trailing"
        self._sampler = getattr(diffusers, traits.class_name)(**options)
        self._is_random = "generator" in inspect.signature(self._sampler.step).parameters

    def set_steps(self, steps: int) -> Tensor:
        """Start a run of `steps`; returns the timesteps of its model calls (CPU), of which some methods need more.

        Raises `UserError` for a number of steps with which the method goes wrong.
        """
        fewest, most = self._fewest, self._traits.most
        if not fewest <= steps <= most:
            raise UserError(
                f"--num_sampling_steps {steps} is out of range for {self.method}: "
                f"with this model it takes {fewest} to {most} steps"
            )
        if flaw := self._flaw(steps):
            candidates = sorted(range(fewest, most + 1), key=lambda n: abs(n - steps))
            nearest = next(n for n in candidates if not self._flaw(n))
            raise UserError(f"--num_sampling_steps {steps} {flaw} with {self.method}: use {nearest}")
        self._start(steps)
        if hasattr(self._sampler, "set_begin_index"):
            self._sampler.set_begin_index(0)
        return self._sampler.timesteps

    def initial(self, noise: Tensor) -> Tensor:
        """Standard normal noise scaled to what the method starts from."""
        return noise * float(getattr(self._sampler, "init_noise_sigma", 1.0))

    def model_input(self, latents: Tensor, timestep: Tensor) -> Tensor:
        """The method's latents scaled to what the model was trained on at `timestep`."""
        if self.method == FLOW_METHOD:
            return latents
        return self._sampler.scale_model_input(latents, timestep)

    def step(self, prediction: Tensor, timestep: Tensor, latents: Tensor, generator: torch.Generator | None) -> Tensor:
        """The latents of the next timestep, from the model's float32 prediction at this one."""
        if self.method == "PNDM":
            prediction = self._epsilon(prediction, timestep, latents)
        if not self._is_random:
            return self._sampler.step(prediction, timestep, latents).prev_sample
        with _NoiseToDevice(latents.device):
            return self._sampler.step(prediction, timestep, latents, generator=generator).prev_sample

    def _start(self, steps: int) -> None:
        if self.method == FLOW_METHOD:
            # Equal strides down to 0; by default diffusers spends the last call on going from sigma 0.001 to 0.
            self._sampler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
        else:
            self._sampler.set_timesteps(steps)

    def _flaw(self, steps: int) -> str:
        """Why diffusers' arithmetic fails for this number of steps; empty if it does not."""
        spacing = self._sampler.config.get("timestep_spacing")
        if self._traits.fixed_stride and steps * (TRAIN_STEPS // steps) < LEAST_COVERAGE[spacing] * TRAIN_STEPS:
            # Too little noise would be removed (trailing) or the start be too late (leading).
            return "leaves a part of the 1000 timesteps out"
        if spacing == "trailing":
            # A rounding error adds a timestep -1 behind the last one for some step counts.
            self._sampler.set_timesteps(steps)
            if self._sampler.timesteps.min() < 0:
                return "cannot be spaced evenly"
        return ""

    def _epsilon(self, prediction: Tensor, timestep: Tensor, latents: Tensor) -> Tensor:
        """The noise that a prediction of any type implies."""
        signal_squared = self._sampler.alphas_cumprod[timestep].double()
        signal, noise_level = float(signal_squared.sqrt()), float((1 - signal_squared).sqrt())
        if self.prediction_type == "v_prediction":
            return signal * prediction + noise_level * latents
        if self.prediction_type == "sample":
            return (latents - signal * prediction) / noise_level
        return prediction


class _NoiseToDevice(TorchFunctionMode):
    """Noise that is drawn on the CPU goes to the GPU without a wait.

    diffusers draws with a CPU generator, so that all devices see the same numbers, and copies what it drew from
    pageable memory: the host would wait there until the GPU has done all work before.
    """

    def __init__(self, device: torch.device):
        super().__init__()
        self._device = device

    def __torch_function__(self, func, types, args=(), kwargs=None):
        drawn = func(*args, **(kwargs or {}))
        if func is torch.randn and self._device.type == "cuda":
            return drawn.pin_memory().to(self._device, non_blocking=True)
        return drawn


def make_scheduler(
    method: str, prediction_type: str, rescale_betas_zero_snr: bool = False, rectified_flow: bool = False
) -> Scheduler:
    """The sampler that `--sample_method` names, for a model of the given training.

    Rectified flow has a prediction and a schedule of its own: the other two arguments then play no part. Raises
    `UserError` for an unknown method and for one that cannot sample such a model.
    """
    if method not in _METHODS:
        raise UserError(f"--sample_method {method} is unknown: choose from {', '.join(_METHODS)}")
    if rectified_flow and method != FLOW_METHOD:
        raise UserError(
            f"--sample_method {method} cannot sample a model trained with rectified flow: use {FLOW_METHOD}"
        )
    if method == FLOW_METHOD and not rectified_flow:
        raise UserError(
            f"--sample_method {FLOW_METHOD} needs a model trained with rectified flow (--rf_scheduler): "
            "use EulerAncestralDiscrete"
        )
    if prediction_type not in _METHODS[method].predictions and not rectified_flow:
        raise UserError(
            f"--sample_method {method} cannot sample a model that predicts {prediction_type!r}: use DDIM or "
            "DPMSolverMultistep"
        )
    return Scheduler(method, prediction_type, rescale_betas_zero_snr)
