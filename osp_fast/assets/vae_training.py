"""How the tiny WF-VAE learns: squared error of the pixels and a weak KL term, on windows of clips that fit into memory.

A posterior's draw is decoded, so that the decoder bears the errors that a diffusion model makes. Training goes on from
the newest state in its folder; what is drawn depends on the seed and the step, so that an interrupted training ends
with the same weights.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from osp_fast.data.quality import Quality
from osp_fast.errors import UserError
from osp_fast.files import whole
from osp_fast.models.wfvae import WFVAE, WFVAEConfig
from osp_fast.progress import Progress
from osp_fast.seeding import python_random, stable_seed, torch_generator

STATE = "vae_training.pt"
ENCODED_AT_ONCE = 16  # clips, where nothing is differentiated
MAX_GRAD_NORM = 0.1  # less than most steps have until they slow down: without it training diverges now and then


@dataclass(frozen=True)
class VAERecipe:
    """How long and how the VAE learns.

    frames, strides: of a window, and every which frame of the clip it has, one of them
    kl: weighs the KL term, nats per latent, against squared error per value. At its minimum the noise of the posterior
    adds about half of it to the error; so much error of a diffusion model the decoder bears.
    """

    steps: int = 2000
    batch: int = 8
    frames: int = 9
    strides: tuple[int, ...] = (1, 2)
    learning_rate: float = 1.5e-3
    warm_up: int = 100
    kl: float = 5e-4
    save_every: int = 200
    seed: int = 0


def train_vae(clips: Sequence[np.ndarray], config: WFVAEConfig, recipe: VAERecipe, work: Path) -> WFVAE:
    """The VAE that the recipe makes of clips, uint8 (T, H, W, 3) of one size; its state is kept in `work`.

    Latents come out with zero mean for each channel and unit variance over all. Raises `UserError` if `work` cannot
    be written or holds the state of another training.
    """
    with torch.random.fork_rng(devices=[]):  # layers initialise themselves from the global state
        torch.manual_seed(stable_seed("tiny vae", recipe.seed))
        vae = WFVAE(config)
    optimizer = torch.optim.AdamW(vae.parameters(), betas=(0.9, 0.99), weight_decay=0.0)
    # All that the weights depend on beside the clips; a state of anything else is no use.
    identity = repr((config, dataclasses.replace(recipe, save_every=0)))
    first = _load(work / STATE, identity, vae, optimizer)
    progress = Progress(recipe.steps, first=first)
    for step in range(first, recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe)
        video = draw_windows(clips, recipe, step)
        posterior = vae.encode(video)
        noise = torch.randn(posterior.mean.shape, generator=torch_generator("vae noise", recipe.seed, step))
        error = F.mse_loss(vae.decode(posterior.sample(noise)), video)
        loss = error + recipe.kl * kl_divergence(posterior.mean, posterior.logvar)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        done = step + 1
        progress.show(done, f"VAE step {done}/{recipe.steps}", f"{psnr(error.item()):.1f} dB")
        if done % recipe.save_every == 0 or done == recipe.steps:
            _save(work / STATE, identity, vae, optimizer, done)
    progress.close()
    return with_unit_latents(vae, [clip[:: max(recipe.strides)][: recipe.frames] for clip in clips])


def learning_rate(step: int, recipe: VAERecipe) -> float:
    """A linear warm-up, then half a cosine down to zero."""
    if step < recipe.warm_up:
        return recipe.learning_rate * (step + 1) / recipe.warm_up
    done = (step - recipe.warm_up) / max(1, recipe.steps - recipe.warm_up)
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def draw_windows(clips: Sequence[np.ndarray], recipe: VAERecipe, step: int) -> Tensor:
    """A step's windows of frames, (B, 3, T, H, W) in [-1, 1]."""
    draw = python_random("vae windows", recipe.seed, step)
    windows = []
    for clip in (clips[draw.randrange(len(clips))] for _ in range(recipe.batch)):
        stride = draw.choice(recipe.strides)
        reach = (recipe.frames - 1) * stride + 1
        begin = draw.randint(0, len(clip) - reach)
        windows.append(as_pixels(clip[begin : begin + reach : stride]))
    return torch.stack(windows)


def as_pixels(frames: np.ndarray) -> Tensor:
    """uint8 (T, H, W, 3) -> (3, T, H, W) in [-1, 1]."""
    return torch.from_numpy(frames).permute(3, 0, 1, 2) / 127.5 - 1


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """Of normals with these means and log-variances from the standard normal, nats, the mean over all of them."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()


def psnr(error: float) -> float:
    """dB of a mean squared error of values in [-1, 1]."""
    return 10 * math.log10(4 / error)


@torch.no_grad()
def with_unit_latents(vae: WFVAE, clips: Sequence[np.ndarray]) -> WFVAE:
    """The VAE with shift and scale of its config set so that the clips' latents have zero means and unit variance.

    One scale for all channels: a faint channel stays faint, and takes no more of a small model's attention than its
    share of the picture.
    """
    parts = [clips[i : i + ENCODED_AT_ONCE] for i in range(0, len(clips), ENCODED_AT_ONCE)]
    means = [vae.encode(torch.stack([as_pixels(clip) for clip in part])).mean for part in parts]
    values = torch.cat(means).transpose(0, 1).flatten(1).double()
    shift = values.mean(1)
    scale = 1 / (values - shift[:, None]).square().mean().sqrt()
    vae.config = dataclasses.replace(
        vae.config, shift=tuple(shift.tolist()), scale=(scale.item(),) * vae.config.latent_dim
    )
    return vae


@torch.no_grad()
def reconstruction_quality(vae: WFVAE, clips: Sequence[np.ndarray]) -> Quality:
    """PSNR and SSIM of clips of 4n + 1 frames, of the posterior's mean decoded."""
    quality = Quality()
    for clip in clips:
        video = as_pixels(clip)[None]
        found = vae.decode(vae.encode(video).mean).clamp(-1, 1)
        quality.add(*((x[0].transpose(0, 1) + 1) / 2 for x in (found, video)))
    return quality


def _save(file: Path, identity: str, vae: WFVAE, optimizer: torch.optim.Optimizer, step: int) -> None:
    state = dict(identity=identity, step=step, vae=vae.state_dict(), optimizer=optimizer.state_dict())
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with whole(file) as unfinished:
            torch.save(state, unfinished)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as the latter
        raise UserError(f"{file} cannot be written ({error}): make room or name another folder") from error


def _load(file: Path, identity: str, vae: WFVAE, optimizer: torch.optim.Optimizer) -> int:
    """Go on from a state, if there is one. Returns the steps done."""
    if not file.exists():
        return 0
    try:
        state = torch.load(file, weights_only=True)
    except Exception as error:  # whatever unpickling says of a damaged file
        raise UserError(f"{file} cannot be read ({error}): remove it to train the VAE anew") from error
    if state["identity"] != identity:
        raise UserError(f"{file} is of a VAE that is trained otherwise: remove it to train anew")
    vae.load_state_dict(state["vae"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]
