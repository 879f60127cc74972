"""Prompt -> text states -> latents -> frames: the one path that sampling, validation and the web page share."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from osp_fast.config import Recipe
from osp_fast.device import memory_allowance
from osp_fast.diffusion.denoise import FLOW_METHOD, Scheduler, denoise, make_scheduler
from osp_fast.diffusion.schedule import draw_noise
from osp_fast.errors import UserError
from osp_fast.models.dit import DiT
from osp_fast.models.text_encoder import TextEncoder
from osp_fast.models.wfvae import WFVAE, Tiles, as_plan
from osp_fast.models.wfvae_plan import Planner, Task
from osp_fast.models.wfvae_stream import SPACE_STRIDE, TIME_STRIDE, Plan
from osp_fast.seeding import torch_generator

PROMPT_TEMPLATE = "high quality, high aesthetic, {}"
NEGATIVE_PROMPT = (
    "low quality, low resolution, low aesthetic, blurry, out of focus, grainy, noisy, overexposed, washed out colors, "
    "flicker, jittery motion, frozen frame, compression artifacts, distorted, deformed body, extra limbs, "
    "malformed hands, disfigured face, cropped, watermark, subtitles, logo, text"
)

OnStep = Callable[[int, int, int, int], None]
OnFrames = Callable[[int, int, np.ndarray], None]
OnPiece = Callable[[np.ndarray], None]


class Parametrization(NamedTuple):
    """What a DiT predicts ("velocity" with rectified flow) and on which noise schedule."""

    prediction_type: str
    rescale_betas_zero_snr: bool
    rectified_flow: bool

    def scheduler(self, method: str) -> Scheduler:
        """The sampler that `--sample_method` names, for such a DiT. Raises `UserError` if it cannot sample one."""
        return make_scheduler(method, *self)


@dataclass(frozen=True)
class GeneratedClip:
    """One sample: `frames` is uint8 (T, H, W, 3); the indices count from 0; `seed` is the run's."""

    prompt_index: int
    sample_index: int
    prompt: str
    frames: np.ndarray
    seed: int


def resolve_parametrization(
    recipe: Recipe | None,
    method: str,
    prediction_type: str | None = None,
    rescale_betas_zero_snr: bool | None = None,
) -> Parametrization:
    """How the DiT was trained: by its recipe; without one by the flags, whose defaults are epsilon and off.

    Rectified flow (by the recipe, else by `method`) has its own prediction, so the flags play no part in it. Raises
    `UserError` if a flag contradicts the recipe.
    """
    if recipe.rectified_flow if recipe else method == FLOW_METHOD:
        return Parametrization("velocity", False, True)
    if recipe is None:
        return Parametrization(prediction_type or "epsilon", bool(rescale_betas_zero_snr), False)
    for flag, given, trained in (
        ("--prediction_type", prediction_type, recipe.prediction_type),
        ("--rescale_betas_zero_snr", rescale_betas_zero_snr, recipe.rescale_betas_zero_snr),
    ):
        if given is not None and given != trained:
            raise UserError(
                f"{flag} {given} contradicts the checkpoint's recipe.json, which says {trained}: leave the flag out"
            )
    return Parametrization(recipe.prediction_type, recipe.rescale_betas_zero_snr, False)


class VideoPipeline:
    """Text to video with one DiT, one VAE and one text encoder.

    The networks keep their own types. With `save_memory` each is on `device` only while it is in use and on the CPU
    otherwise; without it the caller has put all three on `device` (default: the DiT's).
    """

    def __init__(
        self,
        dit: DiT,
        vae: WFVAE,
        text_encoder: TextEncoder,
        recipe: Recipe | None = None,
        device: torch.device | str | None = None,
        save_memory: bool = False,
    ):
        self.dit, self.vae, self.text_encoder, self.recipe = dit, vae, text_encoder, recipe
        self.device = torch.device(device) if device is not None else next(dit.parameters()).device
        self.save_memory = save_memory

    @classmethod
    def from_folders(
        cls,
        dit_folder: str | Path,
        vae_folder: str | Path,
        text_encoder_folder: str | Path,
        recipe: Recipe | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        max_length: int = 512,
        attention: str = "auto",
        round_rope_angles: bool = False,
        save_memory: bool = False,
    ) -> "VideoPipeline":
        """Load the three networks in `dtype` (float32 or bfloat16) for inference. Raises `UserError`.

        `max_length` is in text tokens; `attention` is one of `ATTENTION_NAMES`; `round_rope_angles` rounds RoPE angles
        to bfloat16, as upstream trained.
        """
        place = "cpu" if save_memory else device
        dit = DiT.from_pretrained(dit_folder, dtype, place).requires_grad_(False).eval()
        dit.use_attention(attention, torch.device(device), dtype)
        dit.rope_dtype = torch.bfloat16 if round_rope_angles else None
        vae = WFVAE.from_pretrained(vae_folder, dtype, place).requires_grad_(False).eval()
        text_encoder = TextEncoder.from_pretrained(text_encoder_folder, dtype, place, max_length)
        if text_encoder.width != dit.config.caption_channels:
            raise UserError(
                f"{text_encoder_folder} gives states of {text_encoder.width} channels, but the DiT of {dit_folder} "
                f"takes {dit.config.caption_channels}: name the text encoder that it was trained with"
            )
        if dit.config.out_channels != dit.config.in_channels:
            raise UserError(
                f"{dit_folder}/config.json: out_channels is {dit.config.out_channels} and in_channels "
                f"{dit.config.in_channels}, but sampling needs as many out as in: name another model"
            )
        if vae.config.latent_dim != dit.config.in_channels:
            raise UserError(
                f"{vae_folder} has {vae.config.latent_dim} latent channels, but the DiT of {dit_folder} takes "
                f"{dit.config.in_channels}: name the VAE that it was trained with"
            )
        return cls(dit, vae, text_encoder, recipe, device, save_memory)

    def compile_blocks(self) -> None:
        """torch.compile each block of the DiT, at its first use for each size."""
        for block in self.dit.transformer_blocks:
            block.compile()

    def generate(
        self,
        prompts: Sequence[str],
        *,
        negative_prompt: str | None = None,
        num_frames: int,
        height: int,
        width: int,
        steps: int,
        guidance_scale: float,
        method: str,
        seed: int,
        samples_per_prompt: int = 1,
        prediction_type: str | None = None,
        rescale_betas_zero_snr: bool | None = None,
        tiles: Tiles | None = None,
        vae_memory: int | None = None,
        most_latent_frames: int | None = None,
        on_step: OnStep | None = None,
        on_frames: OnFrames | None = None,
        report: Callable[[str], None] | None = None,
    ) -> Iterator[GeneratedClip]:
        """Clips of `num_frames` x `height` x `width` pixels, all samples of the first prompt first.

        Prompts go into `PROMPT_TEMPLATE`; `negative_prompt` replaces `NEGATIVE_PROMPT`. A sample's noise depends on
        `seed`, its prompt's and its own number only. The last two of the training's settings may be given where the
        checkpoint has no recipe. Decoding keeps to `vae_memory` bytes (default: what is free on the device by then), of
        which `report` gets a line, and to `most_latent_frames` at once; or it takes these `tiles`.

        `on_step(prompt_index, sample_index, done, calls)` is called after each of a clip's `calls` model calls, and
        `on_frames(prompt_index, sample_index, frames)` with each piece of a clip as soon as it is decoded, before the
        whole clip is given. Raises `UserError`, before anything is computed, if the settings do not fit together.
        """
        sampled = self.latents(
            prompts,
            negative_prompt=negative_prompt,
            num_frames=num_frames,
            height=height,
            width=width,
            steps=steps,
            guidance_scale=guidance_scale,
            method=method,
            seed=seed,
            samples_per_prompt=samples_per_prompt,
            prediction_type=prediction_type,
            rescale_betas_zero_snr=rescale_betas_zero_snr,
            on_step=on_step,
        )
        decode = self.decoder(num_frames, height, width, tiles, vae_memory, most_latent_frames, report)

        def clips() -> Iterator[GeneratedClip]:
            for prompt, sample, latents in sampled:
                frames = decode(latents, partial(on_frames, prompt, sample) if on_frames else None)
                yield GeneratedClip(prompt, sample, prompts[prompt], frames, seed)

        return clips()

    def latents(
        self,
        prompts: Sequence[str],
        *,
        negative_prompt: str | None = None,
        num_frames: int,
        height: int,
        width: int,
        steps: int,
        guidance_scale: float,
        method: str,
        seed: int,
        samples_per_prompt: int = 1,
        prediction_type: str | None = None,
        rescale_betas_zero_snr: bool | None = None,
        on_step: OnStep | None = None,
    ) -> Iterator[tuple[int, int, Tensor]]:
        """`generate` without its VAE: (prompt_index, sample_index, latents (1, C, T, H, W) as the DiT has them).

        Raises `UserError`, before anything is computed, if the settings do not fit together.
        """
        shape = self._latent_shape(num_frames, height, width)
        parametrization = resolve_parametrization(self.recipe, method, prediction_type, rescale_betas_zero_snr)
        scheduler = parametrization.scheduler(method)
        scheduler.set_steps(steps)

        def clips() -> Iterator[tuple[int, int, Tensor]]:
            texts = [PROMPT_TEMPLATE.format(prompt) for prompt in prompts]
            if guidance_scale != 1:
                texts.append(NEGATIVE_PROMPT if negative_prompt is None else negative_prompt)
            encoded = self._encode(texts)
            negative = encoded.pop() if guidance_scale != 1 else (None, None)
            for prompt_index, text in enumerate(encoded):
                for sample_index in range(samples_per_prompt):
                    place = (seed, prompt_index, sample_index)

                    def report(done: int, calls: int, place: tuple[int, int, int] = place) -> None:
                        if on_step:
                            on_step(place[1], place[2], done, calls)

                    noise = draw_noise(shape, torch_generator("sample", *place)).to(self.device)
                    generator = torch_generator("sample steps", *place)
                    with self._in_use(self.dit):
                        latents = denoise(
                            self.dit, scheduler, steps, noise, *text, *negative, guidance_scale, generator, report
                        )
                    yield prompt_index, sample_index, latents

        return clips()

    def decoder(
        self,
        num_frames: int,
        height: int,
        width: int,
        tiles: Tiles | None = None,
        vae_memory: int | None = None,
        most_latent_frames: int | None = None,
        report: Callable[[str], None] | None = None,
    ) -> Callable[[Tensor, OnPiece | None], np.ndarray]:
        """What decodes clips of this size, with the last settings as `generate` has them.

        Returns a function: latents (1, C, T, H, W) as the DiT has them, and what gets each piece (t, height, width, 3)
        as soon as it is decoded -> the frames, uint8 (num_frames, height, width, 3). Raises `UserError`, also here, if
        `vae_memory` is not enough.
        """
        allowance = (
            (lambda held: memory_allowance(self.device, held)) if vae_memory is None else lambda held: vae_memory
        )
        planner = Planner(self.vae, self.device, allowance, most_latent_frames, report)

        def plan() -> Plan:
            task = Task("decode", num_frames, height, width, collected=False, pixels=pixel_type(self.vae))
            return planner(task) if tiles is None else as_plan(tiles)

        if vae_memory is not None:
            plan()

        def decode(latents: Tensor, on_piece: OnPiece | None = None) -> np.ndarray:
            frames = np.empty((num_frames, height, width, 3), np.uint8)
            start = 0
            for piece in self._decode(latents, plan):
                frames[start : start + len(piece)] = piece
                start += len(piece)
                if on_piece:
                    on_piece(piece)
            return frames

        return decode

    def _latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, ...]:
        """(1, C, T, H, W) of the latents. Raises `UserError` for sizes that the networks cannot give."""
        token = SPACE_STRIDE * self.dit.config.patch_size
        if num_frames < 1 or (num_frames - 1) % TIME_STRIDE:
            raise UserError(f"--num_frames {num_frames} is not of the form {TIME_STRIDE}n+1: use 1, 5, 9, ...")
        for flag, size in (("--height", height), ("--width", width)):
            if size < 1 or size % token:
                raise UserError(f"{flag} {size} is not a multiple of {token} pixels, the size of a token: change it")
        latent_frames = (num_frames - 1) // TIME_STRIDE + 1
        return 1, self.dit.config.in_channels, latent_frames, height // SPACE_STRIDE, width // SPACE_STRIDE

    def _encode(self, texts: list[str]) -> list[tuple[Tensor, Tensor]]:
        """States (1, L, C) and mask (1, L) of each text; one by one, as large encoders need much memory."""
        with self._in_use(self.text_encoder):
            return [self.text_encoder([text]) for text in texts]

    @torch.no_grad()
    def _decode(self, latents: Tensor, plan: Callable[[], Plan]) -> Iterator[np.ndarray]:
        """The DiT's latents (1, C, T, H, W) -> pieces of the clip as they are decoded, uint8 (t, H, W, 3)."""
        with self._in_use(self.vae):
            raw = self.vae.denormalize(latents).to(next(self.vae.parameters()).dtype)
            for video in self.vae.decode_stream((raw,), plan(), pixel_type(self.vae)):
                if not torch.isfinite(video).all():
                    raise UserError("the VAE's frames are not finite numbers: check --ae_path, or use --dtype fp32")
                yield to_frames(video)

    @contextmanager
    def _in_use(self, network: nn.Module) -> Iterator[None]:
        """With `save_memory`: hold a network on the device for the time of the block."""
        if not self.save_memory:
            yield
            return
        network.to(self.device)
        try:
            yield
        finally:
            network.to("cpu")
            if self.device.type == "cuda":
                torch.cuda.empty_cache()


def pixel_type(vae: WFVAE) -> torch.dtype:
    """What frames are decoded to: finer than bytes, as bfloat16 is not, and no wider than it need be."""
    return torch.float32 if next(vae.parameters()).dtype == torch.float32 else torch.float16


def to_frames(video: Tensor) -> np.ndarray:
    """One video (1, 3, T, H, W) in [-1, 1] -> frames, uint8 (T, H, W, 3)."""
    pixels = ((video[0].float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return pixels.permute(1, 2, 3, 0).cpu().numpy()
