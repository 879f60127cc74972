"""What a diffusion model is trained on: the noise schedule, the target, the density of timesteps, the loss weight.

Discrete diffusion follows DDPM (Ho et al. 2020): x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise, where a_t is the cumulated
product of 1 - beta_t; SNR_t = a_t / (1 - a_t). Zero terminal SNR is algorithm 1 of Lin et al. 2023
(arXiv:2305.08891), min-SNR weights are from Hang et al. 2023 (arXiv:2303.09556).

Rectified flow follows Esser et al. 2024 (arXiv:2403.03206): x = (1 - sigma) x_0 + sigma noise with sigma in (0, 1],
target noise - x_0, and the model is given the timestep 1000 sigma.
"""

import math

import torch
from torch import Tensor

from osp_fast.config import DiffusionConfig

TRAIN_STEPS = 1000
BETA_FIRST, BETA_LAST = 1e-4, 0.02
MODE_SCALE = 1.29  # s of the mode density in Esser et al.; the density stays monotone up to 2 / (pi - 2)
SIGMA_LEAST = 1 / TRAIN_STEPS  # keeps 1 / sigma^2 finite; the smallest sigma that a flow sampler asks for


def diffusion_betas(rescale_zero_snr: bool = False, least_signal: float = 0.0) -> Tensor:
    """The schedule's betas, (1000,) float64: linear from 1e-4 to 0.02, on request rescaled to zero terminal SNR.

    `least_signal` bounds a_t from below after the rescaling (the bound rises by 0.1 % a step towards t = 0, so that
    a_t stays strictly decreasing). Samplers that work with sigma = sqrt((1 - a) / a) need it to be finite.
    """
    betas = torch.linspace(BETA_FIRST, BETA_LAST, TRAIN_STEPS, dtype=torch.float64)
    if not rescale_zero_snr:
        return betas
    root = torch.cumprod(1 - betas, 0).sqrt()
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    cumulated = root**2
    if least_signal:
        steps_left = torch.arange(TRAIN_STEPS - 1, -1, -1, dtype=torch.float64)
        cumulated = torch.maximum(cumulated, least_signal * (1 + 1e-3 * steps_left))
    alphas = torch.cat([cumulated[:1], cumulated[1:] / cumulated[:-1]])
    return 1 - alphas


def draw_noise(shape: tuple[int, ...], generator: torch.Generator, noise_offset: float = 0.0) -> Tensor:
    """Standard normal noise of `shape` (B, C, ...), float32 on the generator's device.

    With `noise_offset` > 0 one more normal number for each clip and channel, times the offset, is added to all of its
    cells, so that the model learns to change a clip's overall brightness.
    """
    noise = torch.randn(shape, generator=generator, device=generator.device)
    if noise_offset:
        per_channel = (*shape[:2], *(1 for _ in shape[2:]))
        noise += noise_offset * torch.randn(per_channel, generator=generator, device=generator.device)
    return noise


class DiffusionObjective:
    """The training objective of a `DiffusionConfig`: draw timesteps, corrupt latents, score a prediction.

    Rectified flow (`rf_scheduler`) predicts a velocity on its own schedule: `prediction_type`,
    `rescale_betas_zero_snr` and `snr_gamma` then play no part.
    """

    def __init__(self, config: DiffusionConfig, device: torch.device | str = "cpu"):
        self.config = config
        cumulated = torch.cumprod(1 - diffusion_betas(config.rescale_betas_zero_snr), 0)
        snr = cumulated / (1 - cumulated)
        self.signal = cumulated.sqrt().to(device, torch.float32)
        self.noise_level = (1 - cumulated).sqrt().to(device, torch.float32)
        self.weights = _min_snr_weights(snr, config.prediction_type, config.snr_gamma).to(device, torch.float32)

    def timesteps(self, uniform: Tensor, stratum: Tensor | int = 0, strata: int = 1) -> Tensor:
        """Timesteps (B,) from `uniform` (B,), independent draws from [0, 1).

        Stratum r of n gives draws from the r-th n-th of the distribution; `stratum` may be one for each draw, (B,). So
        the clips of a batch, and all ranks together, cover it evenly. Discrete diffusion: int64 in 0..999, uniform.
        Rectified flow: float32, 1000 sigma in [1, 1000]; the strata are quantile ranges of the density that
        `weighting_scheme` names.
        """
        quantile = (uniform.double() + stratum) / strata
        if not self.config.rf_scheduler:
            # min: in float64 the largest quantile may still round up to 1.
            return (quantile * TRAIN_STEPS).long().clamp(max=TRAIN_STEPS - 1)
        sigma = _flow_quantile(quantile, self.config.weighting_scheme)
        return (sigma.clamp(SIGMA_LEAST, 1.0) * TRAIN_STEPS).float()

    def corrupt(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Latents (B, C, T, H, W) mixed with `noise` of the same shape to the level of `timesteps` (B,)."""
        signal, noise_level = self._levels(timesteps, latents)
        return signal * latents + noise_level * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the model should predict, in the latents' shape: noise, x_0, v (Salimans & Ho 2022) or the velocity."""
        if self.config.rf_scheduler:
            return noise - latents
        if self.config.prediction_type == "epsilon":
            return noise
        if self.config.prediction_type == "sample":
            return latents
        signal, noise_level = self._levels(timesteps, latents)
        return signal * noise - noise_level * latents

    def loss(
        self, prediction: Tensor, latents: Tensor, noise: Tensor, timesteps: Tensor, latent_mask: Tensor | None = None
    ) -> Tensor:
        """Weighted mean squared error of each clip, (B,) float32.

        The mean runs over all channels of the cells that `latent_mask` (B, T, H, W) marks as real (1). A clip without
        any real cell gives NaN, for the training loop's check of finite losses to catch.
        """
        target = self.target(latents.float(), noise.float(), timesteps)
        error = (prediction.float() - target).square().mean(1)
        if latent_mask is None:
            mean = error.flatten(1).mean(1)
        else:
            real = latent_mask.to(error.dtype)
            mean = (error * real).flatten(1).sum(1) / real.flatten(1).sum(1)
        return mean * self.weight(timesteps).to(mean.device)

    def weight(self, timesteps: Tensor) -> Tensor:
        """The loss weight of each timestep, (B,) float32: min-SNR, or rectified flow's `weighting_scheme`."""
        if not self.config.rf_scheduler:
            return self.weights[timesteps.to(self.weights.device)]
        sigma = timesteps.float() / TRAIN_STEPS
        if self.config.weighting_scheme == "sigma_sqrt":
            return sigma**-2
        if self.config.weighting_scheme == "cosmap":
            return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
        return torch.ones_like(sigma)

    def _levels(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Factors of the clean latents and of the noise, (B, 1, 1, ...) in the dtype and on the device of `like`."""
        if self.config.rf_scheduler:
            sigma = timesteps.float() / TRAIN_STEPS
            signal, noise_level = 1 - sigma, sigma
        else:
            index = timesteps.to(self.signal.device)
            signal, noise_level = self.signal[index], self.noise_level[index]
        shape = (-1, *(1 for _ in like.shape[1:]))
        return signal.view(shape).to(like), noise_level.view(shape).to(like)


def _min_snr_weights(snr: Tensor, prediction_type: str, gamma: float | None) -> Tensor:
    """min(SNR, gamma) expressed for each prediction type; at SNR 0 the limits 1 (epsilon) and 0 (v, sample)."""
    if gamma is None:
        return torch.ones_like(snr)
    capped = snr.clamp(max=gamma)
    if prediction_type == "epsilon":
        return torch.where(snr > 0, capped / snr, 1.0)
    if prediction_type == "v_prediction":
        return capped / (snr + 1)
    return capped


def _flow_quantile(quantile: Tensor, scheme: str) -> Tensor:
    """Inverse cumulative density of sigma. cosmap and sigma_sqrt draw uniformly and weigh the loss instead."""
    if scheme == "logit_normal":
        return torch.special.ndtri(quantile).sigmoid()
    if scheme == "mode":
        falling = 1 - quantile
        return 1 - falling - MODE_SCALE * (torch.cos(math.pi / 2 * falling) ** 2 - 1 + falling)
    return quantile
