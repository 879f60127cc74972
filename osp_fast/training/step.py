"""One training step: clips -> latents -> noise -> prediction -> loss -> gradients.

Shape suffixes: b clips of a micro-batch, c latent channels, t latent frames, h latent rows, w latent columns.

Whatever is drawn for a clip is named by (seed, step, slot), its slot being its place in the step's whole batch: how
the batch is cut into micro-batches, or where a run was resumed, changes nothing that is drawn.
"""

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor

from osp_fast.config import TrainConfig
from osp_fast.data.dataset import LoadedClip
from osp_fast.data.latent_cache import padded_states
from osp_fast.diffusion.schedule import DiffusionObjective, draw_noise
from osp_fast.models.dit import DiT
from osp_fast.models.text_encoder import TextEncoder
from osp_fast.models.wfvae import WFVAE, Posterior
from osp_fast.models.wfvae_plan import Task
from osp_fast.seeding import torch_generator
from osp_fast.training.build import vae_planner


class ClipLoss:
    """Callable: clips and the step's number -> the loss of each clip, (B,) float32, with gradients for the DiT.

    The VAE and the text encoder run without gradients, in the dtype that they were loaded in. Clips from a latent cache
    need no text encoder, and of the VAE only its scale and shift.
    """

    def __init__(
        self, dit: DiT, vae: WFVAE, text_encoder: TextEncoder | None, config: TrainConfig, device: torch.device
    ):
        self.dit = dit
        self.vae = vae
        self.text_encoder = text_encoder
        self.objective = DiffusionObjective(config.diffusion, device)
        self.device = device
        self._seed = config.run.seed
        self._noise_offset = config.diffusion.noise_offset
        self._bf16 = config.model.mixed_precision == "bf16"
        self._max_length = config.model.model_max_length
        self._plan = vae_planner(vae, config.model, device, lambda line: print(line, file=sys.stderr, flush=True))

    def __call__(self, clips: Sequence[LoadedClip], step: int) -> Tensor:
        latents = self.encode(clips, step)
        noise = [
            self._noise("noise", latent.shape, step, clip.slot, self._noise_offset)
            for latent, clip in zip(latents, clips, strict=True)
        ]
        latents_bcthw, latent_mask_bthw = pad_to_largest(latents)
        noise_bcthw, _ = pad_to_largest(noise)
        timesteps_b = self._timesteps(clips, step)
        noisy_bcthw = self.objective.corrupt(latents_bcthw, noise_bcthw, timesteps_b)
        text, text_mask = self._text(clips)
        with self._autocast():
            prediction_bcthw = self.dit(noisy_bcthw, timesteps_b, text, text_mask, latent_mask_bthw)
        return self.objective.loss(prediction_bcthw, latents_bcthw, noise_bcthw, timesteps_b, latent_mask_bthw)

    @torch.no_grad()
    def encode(self, clips: Sequence[LoadedClip], step: int) -> list[Tensor]:
        """The normalised latent (C, T, H, W), float32, of each clip: a sample of the VAE's posterior.

        Clips of equal size pass through the VAE together.
        """
        by_size: dict[tuple[int, ...], list[int]] = {}
        for index, clip in enumerate(clips):
            by_size.setdefault(tuple(_contents(clip).shape), []).append(index)
        latents: dict[int, Tensor] = {}
        for indices in by_size.values():
            contents = torch.stack([_contents(clips[index]) for index in indices]).to(self.device, non_blocking=True)
            if contents.dtype == torch.uint8:
                batch, _, *size = contents.shape
                posterior = self.vae.encode(contents, self._plan(Task("encode", *size, batch)))
            else:
                posterior = Posterior(*contents.chunk(2, dim=1))
            shape = posterior.mean.shape[1:]
            drawn = [self._noise("posterior", shape, step, clips[index].slot) for index in indices]
            raw = posterior.sample(torch.stack(drawn))
            latents.update(zip(indices, self.vae.normalize(raw).unbind(0), strict=True))
        return [latents[index] for index in range(len(clips))]

    @torch.no_grad()
    def _text(self, clips: Sequence[LoadedClip]) -> tuple[Tensor, Tensor]:
        """States (B, tokens, width) of the captions and their mask (B, tokens)."""
        if self.text_encoder is not None:
            return self.text_encoder([clip.caption for clip in clips])
        text, mask = padded_states([clip.text for clip in clips], self._max_length)
        return text.to(self.device, non_blocking=True), mask.to(self.device, non_blocking=True)

    def _noise(self, purpose: str, shape: Sequence[int], step: int, slot: int, noise_offset: float = 0.0) -> Tensor:
        generator = torch_generator(purpose, self._seed, step, slot)
        return draw_noise((1, *shape), generator, noise_offset)[0].to(self.device, non_blocking=True)

    def _timesteps(self, clips: Sequence[LoadedClip], step: int) -> Tensor:
        uniform = [torch.rand((), generator=torch_generator("timestep", self._seed, step, clip.slot)) for clip in clips]
        return self.objective.timesteps(torch.stack(uniform)).to(self.device, non_blocking=True)

    def _autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self._bf16)


def _contents(clip: LoadedClip) -> Tensor:
    """Pixels (3, T, H, W), uint8, or the moments from a latent cache."""
    return clip.pixels if clip.pixels is not None else clip.moments


def pad_to_largest(clips: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Stack (C, T, H, W) tensors, with zeros behind the last frame, row and column of the smaller ones.

    Padded cells are masked from attention and loss. Skiparse counts its sets in the padded grid (as upstream does), so
    only batches of one size, which `--group_data` makes, compute what each clip alone would.

    Returns:
        (B, C, T, H, W), and a mask (B, T, H, W) with 1 where a cell is real; None if all sizes are equal.
    """
    sizes = [clip.shape[1:] for clip in clips]
    if all(size == sizes[0] for size in sizes):
        return torch.stack(list(clips)), None
    largest = [max(size[axis] for size in sizes) for axis in range(3)]
    # F.pad counts axes from the last one, and wants (before, after) for each.
    behind = [[pad for axis in (2, 1, 0) for pad in (0, largest[axis] - size[axis])] for size in sizes]
    padded = [F.pad(clip, pads) for clip, pads in zip(clips, behind, strict=True)]
    masks = [F.pad(clip.new_ones(size), pads) for clip, size, pads in zip(clips, sizes, behind, strict=True)]
    return torch.stack(padded), torch.stack(masks)


def accumulate_gradients(loss: ClipLoss, clips: Sequence[LoadedClip], micro_batch: int, step: int) -> Tensor:
    """Backward of the mean loss of a step's clips, `micro_batch` of them at a time.

    Each clip weighs the same, also in a shorter last micro-batch.

    Returns:
        The loss of each clip, (clips,) float32, detached, on the device.
    """
    losses = []
    for first in range(0, len(clips), micro_batch):
        part = loss(clips[first : first + micro_batch], step)
        (part.sum() / len(clips)).backward()
        losses.append(part.detach())
    return torch.cat(losses)
