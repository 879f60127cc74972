"""What a plan of sampling's memory depends on, and what it says. `stages.py` makes it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from osp_fast.models.dit import DiTConfig
from osp_fast.models.wfvae_plan import Task, gib
from osp_fast.models.wfvae_stream import Plan
from osp_fast.parallel.sequence_plan import SequencePlan


@dataclass(frozen=True)
class SamplingFacts:
    """What a plan depends on.

    latent_size: (T, H, W) in latent cells; calls: of the model in a clip; clips: of the run
    vae, text_encoder, refiner: without weights, on the meta device; decode: a clip's decoding
    attention: a resolved `--attention`; path: triton or reference, what serves all other operations
    step_cache: whether there is one; save_memory: networks leave the device after each use, and nothing runs beside
    ranks: that share each clip (`--sp`); sequence: how those share the tokens that compute the same half of guidance
    refiner_tokens: of a prompt with the instruction; refiner_new_tokens: of its answer
    vae_memory: bytes that decoding may hold, None: what is left; most_latent_frames: decoded at once
    """

    dit: DiTConfig
    dtype: torch.dtype
    latent_size: tuple[int, int, int]
    guided: bool
    text_tokens: int
    calls: int
    clips: int
    vae: nn.Module
    decode: Task
    text_encoder: nn.Module | None = None
    refiner: nn.Module | None = None
    attention: str = "triton"
    path: str = "triton"
    step_cache: bool = False
    save_memory: bool = False
    ranks: int = 1
    sequence: SequencePlan | None = None
    refiner_tokens: int = 512
    refiner_new_tokens: int = 256
    vae_memory: int | None = None
    most_latent_frames: int | None = None

    @property
    def batches(self) -> list[tuple[int, int]]:
        """The ways to compute guidance: (clips in a call of the DiT, calls in a step)."""
        if not self.guided or (self.ranks > 1 and self.ranks % 2 == 0):  # with an even number each half has its ranks
            return [(1, 1)]
        # A step cache decides for both halves at once.
        return [(2, 1)] if self.step_cache else [(2, 1), (1, 2)]


@dataclass(frozen=True)
class StagePlan:
    """One stage. peak: bytes on the device, at most; words: how it is computed, for a reader."""

    name: str
    peak: int
    words: str


@dataclass(frozen=True)
class SamplingPlan:
    """What is on the device when. `plan_sampling` makes it; the defaults are everything on the device.

    guidance_in_turns: the halves of guidance one after the other, else as one batch
    overlap: a clip is decoded while the next one is denoised
    *_streamed: numbers of the blocks, or layers, whose weights are streamed through `slots`
    vae: how decoding is cut; vae_memory: bytes that it may hold, its weights included
    peaks: bytes on the device, at most, by stage
    step_seconds, clip_seconds: predicted, the latter with decoding; None where the device's rates are not known
    """

    guidance_in_turns: bool = False
    overlap: bool = False
    dit_streamed: tuple[int, ...] = ()
    text_streamed: tuple[int, ...] = ()
    refiner_streamed: tuple[int, ...] = ()
    slots: int = 2
    vae: Plan = field(default_factory=Plan)
    vae_memory: int = 0
    peaks: Mapping[str, int] = field(default_factory=dict)
    budget: int | None = None
    step_seconds: float | None = None
    clip_seconds: float | None = None
    stages: tuple[StagePlan, ...] = ()

    @property
    def peak(self) -> int:
        """The most bytes at any time."""
        return max(self.peaks.values(), default=0)

    def lines(self) -> list[str]:
        """The plan for a reader."""
        of_budget = "" if self.budget is None else f" of {gib(self.budget)}"
        found = [f"memory: at most {gib(self.peak)}{of_budget} on the device"]
        found += [f"  {stage.name}: {gib(stage.peak)}: {stage.words}" for stage in self.stages]
        if self.step_seconds is not None:
            found.append(
                f"predicted: {duration(self.step_seconds)} a step, {duration(self.clip_seconds)} a clip with decoding"
            )
        return found


def duration(seconds: float) -> str:
    """Seconds for a reader."""
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"
