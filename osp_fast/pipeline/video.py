"""Text to video: the one path that sampling, validation and the web page share.

In stages, each network on the device only as long as it is used: all prompts are encoded, then the text encoder makes
room for the DiT and the VAE, and where memory allows a clip is decoded while the next one is denoised.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from osp_fast.config import Recipe
from osp_fast.models.dit import DiT
from osp_fast.models.text_encoder import TextEncoder
from osp_fast.models.wfvae import WFVAE, Tiles
from osp_fast.pipeline.decoding import Decoder
from osp_fast.pipeline.folders import ModelFolders
from osp_fast.pipeline.networks import Held
from osp_fast.pipeline.planning import Budget
from osp_fast.pipeline.run import Networks, Report, Run, silent
from osp_fast.pipeline.settings import ClipSettings
from osp_fast.pipeline.team import Team

# prompt_index, sample_index, model calls done, of how many
OnStep = Callable[[int, int, int, int], None]
# prompt_index, sample_index, frames uint8 (t, H, W, 3)
OnFrames = Callable[[int, int, np.ndarray], None]


@dataclass(frozen=True)
class GeneratedClip:
    """One sample: `frames` is uint8 (T, H, W, 3); the indices count from 0; `seed` is the run's."""

    prompt_index: int
    sample_index: int
    prompt: str
    frames: np.ndarray
    seed: int


class VideoPipeline:
    """Text to video with one DiT, one VAE and one text encoder: `generate`, or the stages of what `prepare` returns.

    The networks are given, on `device` (default: the DiT's), or loaded from folders when they are needed
    (`from_folders`). With `save_memory` each is on the device only while it is in use and on the CPU otherwise.
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
        place = torch.device(device) if device is not None else next(dit.parameters()).device
        self.recipe = recipe
        self.networks = Networks(
            place,
            dit.config,
            vae,
            *(Held(place, network, leaves=save_memory) for network in (dit, vae, text_encoder)),
        )
        self._team: Team | None = None
        self._budget: Budget | None = None
        self._cuda_graphs: bool | None = False

    @classmethod
    def from_folders(
        cls,
        folders: ModelFolders,
        recipe: Recipe | None = None,
        *,
        device: torch.device | str = "cpu",
        memory_budget: int | None = None,
        save_memory: bool = False,
        cuda_graphs: bool | None = None,
        keep: bool = False,
        team: Team | None = None,
        report: Report = silent,
    ) -> "VideoPipeline":
        """Networks that are loaded for inference when they are first needed. Raises `UserError`, also later.

        memory_budget: bytes on the device for all of it, None: what is free
        cuda_graphs: the DiT as a graph, None: where it measures faster
        keep: the text encoder stays in CPU memory, for more than one call of `generate`
        team: the ranks that share each clip, None: there is one
        report: gets lines for the user
        """
        self = cls.__new__(cls)
        place = torch.device(device)
        config = folders.check(place)

        def joined(dit: DiT) -> None:
            self.networks.teamwork = None if team is None else team.join(dit)

        self.recipe = recipe
        self.networks = Networks(
            place,
            config,
            folders.vae_on_meta(),
            folders.held_dit(place, save_memory, report, joined),
            folders.held_vae(place, save_memory, report),
            folders.held_text_encoder(place, keep, report),
            folders.held_refiner(place, keep, report),
        )
        self._team = team
        self._budget = Budget(folders, place, memory_budget, save_memory, team)
        self._cuda_graphs = cuda_graphs
        return self

    def prepare(self, settings: ClipSettings, clips: int = 1, report: Report = silent) -> Run:
        """Check the settings and plan the memory of a run of so many clips. `report` gets the plan, line by line.

        Raises `UserError` if the settings do not fit together, or into the memory.
        """
        run = Run(self.networks, settings, self.recipe, None, self._cuda_graphs, report)
        if self._team is not None:
            self._team.settle(settings, self.networks.config)
        if self._budget is not None:
            run.plan = self._budget.plan(settings, clips, run.calls)
            for line in [] if run.plan is None else run.plan.lines():
                report(line)
        return run

    def generate(
        self,
        prompts: Sequence[str],
        *,
        seed: int,
        samples_per_prompt: int = 1,
        tiles: Tiles | None = None,
        on_step: OnStep | None = None,
        on_frames: OnFrames | None = None,
        report: Report | None = None,
        **settings: object,
    ) -> Iterator[GeneratedClip]:
        """Clips of one size, all samples of the first prompt first.

        `settings` are the fields of `ClipSettings`. Prompts go into `PROMPT_TEMPLATE`. A sample's noise depends on
        `seed`, its prompt's and its own number only. Decoding takes `tiles`, or else plans for the memory there is, of
        which `report` gets a line.

        `on_step(prompt_index, sample_index, done, calls)` is called after each of a clip's `calls` model calls, and
        `on_frames(prompt_index, sample_index, frames)` with each piece of a clip as soon as it is decoded, maybe in
        another thread; what they raise ends the run. Raises `UserError`, before anything is computed, if the settings
        do not fit together.
        """
        run = self.prepare(ClipSettings(**settings), len(prompts) * samples_per_prompt, report or silent)
        decode = run.decoder(tiles)

        def clips() -> Iterator[GeneratedClip]:
            with run.beside() as beside:
                waiting = None
                for prompt, sample, latents in self._latents(run, prompts, seed, samples_per_prompt, on_step):
                    on_piece = partial(on_frames, prompt, sample) if on_frames else None
                    decoding = beside.submit(partial(decode, on_piece=on_piece), latents)
                    if waiting is not None:
                        yield clip(*waiting)
                    waiting = (prompt, sample, decoding)
                    if not beside.overlap:
                        yield clip(*waiting)
                        waiting = None
                if waiting is not None:
                    yield clip(*waiting)

        def clip(prompt: int, sample: int, decoding) -> GeneratedClip:
            return GeneratedClip(prompt, sample, prompts[prompt], decoding.result(), seed)

        return clips()

    def latents(
        self,
        prompts: Sequence[str],
        *,
        seed: int,
        samples_per_prompt: int = 1,
        on_step: OnStep | None = None,
        **settings: object,
    ) -> Iterator[tuple[int, int, Tensor]]:
        """`generate` without its VAE: (prompt_index, sample_index, latents (1, C, T, H, W) as the DiT has them)."""
        return self._latents(self.prepare(ClipSettings(**settings)), prompts, seed, samples_per_prompt, on_step)

    def decoder(self, settings: ClipSettings) -> Decoder:
        """What decodes clips of this size."""
        return Run(self.networks, settings, self.recipe).decoder()

    def _latents(
        self, run: Run, prompts: Sequence[str], seed: int, samples_per_prompt: int, on_step: OnStep | None
    ) -> Iterator[tuple[int, int, Tensor]]:
        texts, negative = run.encode(list(prompts))
        sampler = run.sampler()
        for prompt, text in enumerate(texts):
            for sample in range(samples_per_prompt):
                tell = partial(on_step, prompt, sample) if on_step else None
                yield prompt, sample, sampler(text, negative, seed, prompt, sample, tell)
