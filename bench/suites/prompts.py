"""`bench run prompts`: does the embedded model show what it is asked for, with every way of sampling?

Of each kind that it was not trained on (`assets/shapes.py`), clips are sampled and read by `shape_checker.py`: the
score is the share of clips in which each of colour, shape, motion and background is right, and all of them. What is
right is counted, not timed: it proves data, VAE, training, text, guidance, samplers and decoding together.

| case | what is compared |
|---|---|
| METHOD N steps | `--sample_method`s and numbers of steps, each with the least score that it must reach |
| paths | the same clips by plain calls of the DiT, by the engine, compiled, with a step cache, in bfloat16 |
| other prompts | clips judged by every prompt but their own: as chance would give, or the checker is no use |
"""

import functools
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bench.results import OURS, REFERENCE, Row
from bench.shape_checker import Reading, read_kind
from bench.suites import Job, Options, Setting, reason_of
from bench.suites.data_readers import installed
from bench.suites.dits import kernels_path
from osp_fast.assets.shapes import HELD_OUT, Kind, captions
from osp_fast.config import EMBEDDED_MODEL, SAMPLE_PRESETS
from osp_fast.diffusion.denoise import Text, denoise
from osp_fast.diffusion.schedule import draw_noise
from osp_fast.errors import UserError
from osp_fast.models.weights import read_recipe
from osp_fast.pipeline import ClipSettings, ModelFolders, VideoPipeline
from osp_fast.pipeline.sampler import padded
from osp_fast.seeding import torch_generator

SUITE = "prompts"
ALL = "all"
ATTRIBUTES = Kind._fields
FRAMES, SIDE, GUIDANCE, SEED = 17, 64, 5.0, 0
SAMPLES = 2  # of each prompt where methods are scored
STEP_S = {"cuda": 0.02, "cpu": 0.045}  # predicted, of a step with guidance; a clip's decoding is a few of them
DECODING_STEPS = 5
COMPILE_S = 60.0
CHANCE_MARGIN = 0.03  # that other prompts may score above chance


class Bar(NamedTuple):
    """The least share of clips in which all is right, and in which each attribute is."""

    all: float
    each: float


# (sampler, steps) -> what it must reach; ten steps are few, and are only shown.
METHODS = {
    ("EulerAncestralDiscrete", 20): Bar(0.90, 0.95),
    ("DDIM", 20): Bar(0.85, 0.0),
    ("DPMSolverMultistep", 20): Bar(0.85, 0.0),
    ("EulerDiscrete", 20): Bar(0.85, 0.0),
    ("EulerAncestralDiscrete", 10): Bar(0.0, 0.0),
    ("EulerAncestralDiscrete", 50): Bar(0.85, 0.0),
}
PATHS_METHOD, PATHS_STEPS = "DPMSolverMultistep", 20  # one without new noise in each step, as a step cache wants


@dataclass(frozen=True)
class Way:
    """A way to sample the clips of `paths`: fields of `ModelFolders` and `ClipSettings`; plain: without the engine."""

    role: str
    folders: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    plain: bool = False


WAYS = {
    OURS: Way("ours"),
    REFERENCE: Way("reference", {"attention": "reference"}, plain=True),
    f"{OURS} compiled": Way("ours", {"compile": True}),
    f"{OURS} step cache 0.2": Way("ours", settings={"step_cache": 0.2}),
    f"{OURS} bfloat16": Way("ours", {"dtype": torch.bfloat16}),
}


def jobs(options: Options) -> list[Job]:
    """The cases. Raises `UserError` for sizes: the model knows one."""
    if options.sizes:
        raise UserError(f"--size: the embedded model makes clips of {FRAMES}x{SIDE}x{SIDE}: leave it out")
    step = STEP_S[options.device]

    def seconds(steps: int, clips: int) -> float:
        return clips * (steps + DECODING_STEPS) * step

    found = []
    for method, steps in METHODS:
        measure = functools.partial(score_method, method, steps)
        found.append(Job(SUITE, f"{method} {steps} steps", seconds(steps, SAMPLES * len(HELD_OUT)), measure))
    clips = seconds(PATHS_STEPS, len(HELD_OUT))
    found.append(Job(SUITE, "paths", len(WAYS) * clips + COMPILE_S, score_paths))
    found.append(Job(SUITE, "other prompts", clips, score_other_prompts))
    return found


def score_method(method: str, steps: int, setting: Setting) -> list[Row]:
    """The row of a sampler and its number of steps."""
    bar = METHODS[method, steps]
    began = time.monotonic()
    readings = [read_kind(clip) for clip in sampled(setting, method, steps, samples=SAMPLES)]
    seconds = (time.monotonic() - began) / len(readings)
    row = scored_row(f"{method} {steps} steps", OURS, "ours", readings, repeated(SAMPLES), steps=steps)
    row.figures["seconds_per_clip"] = seconds
    each = min(row.figures[name] for name in ATTRIBUTES)
    judge(row, row.figures[ALL] >= bar.all and each >= bar.each, f"less than {bar.all:.0%}, each {bar.each:.0%}")
    return [row]


def score_paths(setting: Setting) -> Iterator[Row]:
    """A row for each way; all must score as the reference does, up to one clip in thirty."""
    readings: dict[str, list[Reading]] = {}
    for name, way in sorted(WAYS.items(), key=lambda item: not item[1].plain):  # what the others are held against
        try:
            clips = list(sampled(setting, PATHS_METHOD, PATHS_STEPS, way=way, skipped=(skipped := [])))
        except UserError as error:
            if way.plain:
                raise
            yield Row(SUITE, "paths", name, way.role, "", note=f"refused: {reason_of(error)}")
            continue
        readings[name] = [read_kind(clip) for clip in clips]
        dtype = str(way.folders.get("dtype", torch.float32)).removeprefix("torch.")
        row = scored_row("paths", name, way.role, readings[name], HELD_OUT, dtype, PATHS_STEPS)
        expected = score(readings[REFERENCE], HELD_OUT)
        same = np.mean([one == other for one, other in zip(readings[name], readings[REFERENCE], strict=True)])
        row.figures["read_as_reference"] = float(same)
        apart = max(abs(row.figures[part] - expected[part]) for part in expected)
        judge(row, apart <= 1 / len(HELD_OUT) + 1e-9, "another score than the reference's")
        if "step_cache" in way.settings:
            row.figures["steps_skipped"] = float(np.mean(skipped))
            judge(row, row.ok and any(skipped), "no step was skipped")
        yield row


def score_other_prompts(setting: Setting) -> list[Row]:
    """The row of clips judged by every prompt but their own."""
    readings = [read_kind(clip) for clip in sampled(setting, PATHS_METHOD, PATHS_STEPS)]
    row = scored_row("other prompts", OURS, "ours", *crossed(readings), steps=PATHS_STEPS)
    chance = score(*crossed([Reading(*kind) for kind in HELD_OUT]))
    above = max(row.figures[name] - chance[name] for name in chance)
    row.note += "; by chance " + in_words(chance)
    judge(row, above <= CHANCE_MARGIN, f"more than {CHANCE_MARGIN:.0%} above chance")
    return [row]


def crossed(readings: Sequence[Reading]) -> tuple[list[Reading], list[Kind]]:
    """Every reading beside each kind but the one that was asked for."""
    pairs = [(i, j) for i, j in itertools.product(range(len(readings)), repeat=2) if i != j]
    return [readings[i] for i, _ in pairs], [HELD_OUT[j] for _, j in pairs]


def repeated(samples: int) -> list[Kind]:
    """What is asked for, in the order of clips."""
    return [kind for kind in HELD_OUT for _ in range(samples)]


def score(readings: Sequence[Reading], kinds: Sequence[Kind]) -> dict[str, float]:
    """The share of clips in which all is as asked, and each attribute."""
    pairs = zip(readings, kinds, strict=True)
    right = np.array([[found == asked for found, asked in zip(*pair, strict=True)] for pair in pairs])
    return {ALL: float(right.all(1).mean()), **dict(zip(ATTRIBUTES, right.mean(0).tolist(), strict=True))}


def scored_row(
    case: str,
    impl: str,
    role: str,
    readings: Sequence[Reading],
    kinds: Sequence[Kind],
    dtype: str = "float32",
    steps: int = PATHS_STEPS,
) -> Row:
    """A row with the score as its figures, not judged yet."""
    shape = dict(frames=FRAMES, height=SIDE, width=SIDE, steps=steps)
    figures = score(readings, kinds)
    note = f"{in_words(figures)}; {len(readings)} clips"
    return Row(SUITE, case, impl, role, dtype, shape, figures={**figures, "clips": len(readings)}, note=note)


def in_words(figures: Mapping[str, float]) -> str:
    """all 93 %, colour 100 %, ..."""
    return ", ".join(f"{name} {100 * figures[name]:.0f} %" for name in (ALL, *ATTRIBUTES))


def judge(row: Row, ok: bool, otherwise: str) -> None:
    """Note whether it is right."""
    row.ok = bool(ok)
    if not row.ok and not row.note.startswith("WRONG"):
        row.note = f"WRONG, {otherwise}: {row.note}"


def sampled(
    setting: Setting,
    method: str,
    steps: int,
    samples: int = 1,
    way: Way = WAYS[OURS],
    skipped: list[int] | None = None,
) -> Iterator[np.ndarray]:
    """Clips of the held-out kinds, uint8 (T, H, W, 3), all samples of a prompt one after the other.

    skipped: gets for each clip the steps that a step cache skipped
    """
    if not installed("diffusers"):
        raise UserError("bench run prompts: the samplers are diffusers', which is not installed: pip install diffusers")
    length = SAMPLE_PRESETS["tiny"]["max_sequence_length"]
    parts = (EMBEDDED_MODEL / name for name in ("dit", "vae", "text_encoder"))
    folders = ModelFolders(*parts, max_length=length, **way.folders)
    pipeline = VideoPipeline.from_folders(folders, read_recipe(folders.dit), device=setting.device)
    settings = ClipSettings(
        num_frames=FRAMES,
        height=SIDE,
        width=SIDE,
        steps=steps,
        guidance_scale=GUIDANCE,
        negative_prompt=SAMPLE_PRESETS["tiny"]["negative_prompt"],
        method=method,
        **way.settings,
    )
    run = pipeline.prepare(settings, samples * len(HELD_OUT))
    texts, negative = run.encode([captions(kind)[0] for kind in HELD_OUT])
    decode = run.decoder()
    sampler = PlainSampler(pipeline, settings) if way.plain else run.sampler()
    with kernels_path("reference") if way.plain else nullcontext():
        for number, text in enumerate(texts):
            for sample in range(samples):
                yield decode(sampler(text, negative, SEED, number, sample))
                if skipped is not None and settings.step_cache is not None:
                    skipped.append(sampler.step_cache.skipped)


class PlainSampler:
    """The same latents as the engine's sampler makes, by the DiT as it is called without one: nothing is kept."""

    def __init__(self, pipeline: VideoPipeline, settings: ClipSettings) -> None:
        self._held, self._settings = pipeline.networks.dit, settings
        self._scheduler = settings.scheduler(pipeline.recipe)

    def __call__(self, text: Text, negative: Text, *place: int) -> Tensor:
        """Latents (1, C, T, H, W) of a clip; place: seed, number of the prompt, number of the sample."""
        settings, timesteps = self._settings, self._scheduler.set_steps(self._settings.steps)
        halves = [padded(negative), padded(text)]
        with self._held.use() as dit:
            device = next(dit.parameters()).device
            states = torch.cat([half.states for half in halves]).to(device)
            mask = torch.cat([half.mask for half in halves]).to(device)

            def predict(latents: Tensor, call: int) -> Tensor:
                timestep = timesteps[call].to(device).expand(2)
                without, with_prompt = dit(torch.cat([latents, latents]), timestep, states, mask).chunk(2)
                return without + settings.guidance_scale * (with_prompt - without)

            shape = (1, dit.config.in_channels, *settings.latent_size(dit.config))
            noise = draw_noise(shape, torch_generator("sample", *place)).to(device)
            generator = torch_generator("sample steps", *place)
            return denoise(predict, self._scheduler, settings.steps, noise, generator)
