"""From an encoded prompt to latents: the DiT in place, and all that the clips of a run share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from osp_fast.diffusion.denoise import GuidedModel, Halves, Text, denoise, prepare_text
from osp_fast.diffusion.samplers import Scheduler
from osp_fast.diffusion.schedule import draw_noise
from osp_fast.diffusion.step_cache import Agree, FirstBlockCache
from osp_fast.models.dit import DiT, DiTConfig
from osp_fast.pipeline.networks import Held
from osp_fast.pipeline.settings import ClipSettings
from osp_fast.seeding import torch_generator


@dataclass(frozen=True)
class Teamwork:
    """How the ranks of `--sp` share a clip's denoising.

    half: of guidance that this rank computes, None: both; exchange: see `GuidedModel`; agree: see `FirstBlockCache`
    """

    half: int | None = None
    exchange: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
    agree: Agree = lambda sums: sums


class ClipSampler:
    """Denoises the clips of a run: `sampler(text, negative, seed, prompt_index, sample_index)`.

    replace_forward: what to call in place of the DiT's forward, made of the DiT when it is in place
    in_turns: the halves of guidance one after the other
    team: how ranks share a clip, asked when the DiT is in place
    """

    def __init__(
        self,
        held: Held[DiT],
        config: DiTConfig,
        settings: ClipSettings,
        scheduler: Scheduler,
        device: torch.device,
        *,
        replace_forward: Callable[[DiT], Callable[..., Tensor] | None] = lambda dit: None,
        in_turns: bool = False,
        team: Callable[[], Teamwork] = Teamwork,
    ):
        self._held, self._settings, self._scheduler, self._device = held, settings, scheduler, device
        self._replace_forward, self._in_turns, self._team_of = replace_forward, in_turns, team
        self._shape = (1, config.in_channels, *settings.latent_size(config))
        self._dit: DiT | None = None
        self._text: Text | None = None
        self._prepared: tuple[Any, ...] = ()
        self.step_cache: FirstBlockCache | None = None  # of the last clip

    def __call__(
        self,
        text: Text,
        negative: Text | None,
        seed: int,
        prompt_index: int,
        sample_index: int,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Latents (1, C, T, H, W), float32. The noise depends on `seed` and the two numbers only."""
        with self._held.use() as dit:
            if dit is not self._dit:
                self._dit, self._forward, self._team = dit, self._replace_forward(dit), self._team_of()
            latents = self._denoise(dit, text, negative, (seed, prompt_index, sample_index), on_step)
        if self._held.leaves:
            self._text, self._prepared = None, ()
        return latents

    def _denoise(
        self,
        dit: DiT,
        text: Text,
        negative: Text | None,
        place: tuple[int, int, int],
        on_step: Callable[[int, int], None] | None,
    ) -> Tensor:
        settings, team = self._settings, self._team
        halves = Halves.IN_TURNS if self._in_turns else Halves.TOGETHER
        if settings.guided and team.half is not None:
            halves = Halves.APART
        if self._text is not text:  # samples of one prompt come one after the other
            self._prepared = ()  # before the next ones are made
            whole = None if negative is None else padded(negative)
            self._prepared = prepare_text(dit, padded(text), whole, halves, team.half or 0)
            self._text = text
        if settings.step_cache is not None:
            self.step_cache = FirstBlockCache(settings.step_cache, team.agree)
        model = GuidedModel(
            dit,
            self._prepared,
            self._scheduler.set_steps(settings.steps),
            settings.guidance_scale,
            halves,
            forward=self._forward,
            step_cache=self.step_cache,
            exchange=team.exchange if halves is Halves.APART else None,
        )
        noise = draw_noise(self._shape, torch_generator("sample", *place)).to(self._device)
        generator = torch_generator("sample steps", *place)
        try:
            return denoise(model, self._scheduler, settings.steps, noise, generator, on_step)
        finally:
            if self.step_cache is not None:
                self.step_cache.release()


def trimmed(states: Tensor, mask: Tensor) -> Text:
    """An encoded text (1, L, C), to be kept on the CPU: without the states behind its last real token."""
    real = int(mask[0].nonzero().max()) + 1 if mask.any() else 0
    return Text(states[:, :real].cpu().clone(), mask.cpu())


def padded(text: Text) -> Text:
    """The text at its full length again; what is not real is zeros, and nothing sees it."""
    return Text(F.pad(text.states, (0, 0, 0, text.mask.shape[1] - text.states.shape[1])), text.mask)
