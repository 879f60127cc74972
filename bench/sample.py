"""`bench sample`: one denoising step of the whole DiT with guidance, beside how it is usually written.

On a GPU it is the released 2.7 B model with random weights in bf16, four implementations in one run, in turns:

| row | blocks | attention | computed once |
|---|---|---|---|
| osp_fast | compiled, Triton operations | our kernel | text keys for a prompt, time vectors for all steps |
| plain loop | the same | the same | nothing |
| torch.compile, best SDPA | compiled, plain PyTorch | PyTorch's fused kernels | nothing |
| reference path | plain PyTorch | memory-efficient SDPA with a mask | nothing |

First each is held against float32 at the same size: what is wrong is not timed. A clip is 100 such steps and its
decoding by our VAE. With `--tiny`, on a CPU, the tiny preset's step takes turns with a plain loop, and with either of
the two things computed once, so that each one's share is seen.
"""

import datetime
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.accuracy import exact_float32, relative_error
from bench.measure import ceilings, environment, require_cuda
from bench.results import OURS, result_path, write_result
from bench.sample_cache import cache_table, measure_caches
from bench.sample_memory import measure_budget
from bench.sample_report import complete, sample_table, shares
from bench.sample_steps import (
    EXACT,
    ON_CPU,
    ON_GPU,
    WITHIN,
    Implementation,
    Sampler,
    fresh_dit,
    let_go,
    make_noise,
    make_sampler,
    prepare,
    same_dit,
)
from bench.train import MODEL, parse_case
from bench.train_steps import Case, kernels_path
from osp_fast.config import SAMPLE_PRESETS, TRAIN_PRESETS
from osp_fast.data.buckets import Bucket
from osp_fast.device import memory_allowance
from osp_fast.errors import UserError
from osp_fast.models.dit import DIT_CONFIGS, DiT, DiTConfig

STEPS = 100  # of a clip
CHECKED_STEP = 37  # neither the first one, which a CUDA graph is captured of, nor the last
TOLERANCE = {True: 0.05, False: 1e-4}  # of the guided prediction against float32, bf16 or not
WARM_STEPS = 3  # the first one compiles
TURNS = {"cuda": 5, "cpu": 200}  # of each implementation
PIECE_S = {"cuda": 2.0, "cpu": 0.0}  # what a turn takes at least, if it is more than a step
# Bytes, and the case that is measured within them where nothing else is asked for: all weights fit into the first.
BUDGETS, BUDGETED = (10 << 30, 6 << 30), "93x480x640"


@dataclass
class Running:
    """An implementation while it takes turns.

    own: bytes that it holds between steps; peak: the most in a step; full: whether it ran out of memory
    """

    implementation: Implementation
    sampler: Sampler
    own: int
    steps: int = 1
    seconds: list[float] = field(default_factory=list)
    peak: int = 0
    full: bool = False


def tiny_case() -> Case:
    """The tiny preset's clip."""
    preset = TRAIN_PRESETS["tiny"]
    size = Bucket(preset["num_frames"], preset["max_height"], preset["max_width"])
    return Case(size, 1, SAMPLE_PRESETS["tiny"]["max_sequence_length"])


@torch.no_grad()
def exact_prediction(config: DiTConfig, case: Case, device: torch.device) -> Tensor:
    """The guided prediction of plain operations in float32. Raises `UserError` if it does not fit."""
    let_go(device)
    try:
        with kernels_path(EXACT.path), exact_float32():
            dit = prepare(EXACT, fresh_dit(config, device, torch.float32))
            return make_sampler(EXACT, dit, case, STEPS).predict(make_noise(config, case, device, 1), CHECKED_STEP)
    except torch.OutOfMemoryError:
        raise UserError(
            f"--case {case}: in float32, which all are held against, it does not fit into the memory of {device}: "
            "give a smaller one"
        ) from None


@torch.no_grad()
def prediction_error(sampler: Sampler, config: DiTConfig, case: Case, expected: Tensor) -> float:
    """Of the guided prediction against float32."""
    return relative_error(sampler.predict(make_noise(config, case, expected.device, 1), CHECKED_STEP), expected)


def measure_case(
    config: DiTConfig,
    case: Case,
    implementations: Sequence[Implementation],
    device: torch.device,
    dtype: torch.dtype,
    expected: Tensor,
) -> list[dict[str, Any]]:
    """A row for each implementation: seconds of a step, its spread, error and memory, or why it has none.

    All have the same weights in the same memory. expected: `exact_prediction`. `of_last`: `median_of_ratios` to the
    last implementation's times.
    """
    let_go(device)
    base = fresh_dit(config, device, dtype)
    rows, running = [], []
    for one in implementations:
        row = {"case": str(case), "implementation": one.name, "seconds": None, "spread": None, "peak_bytes": None}
        row |= {"of_last": None, "rel_err": None, "ok": False, "chosen": [], "note": ""}
        rows.append(row)
        try:
            ready = _start(one, base, case, row, expected)
        except torch.OutOfMemoryError:
            row["note"] = "out of memory"
        else:
            running += [] if ready is None else [(row, ready)]
    _take_turns([ready for _, ready in running], make_noise(config, case, device))
    own = sum(ready.own for _, ready in running)
    for row, ready in running:
        if ready.full:
            row |= {"ok": False, "note": "out of memory beside the others"}
            continue
        low, median, high = torch.tensor(ready.seconds).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
        row |= {"seconds": median, "spread": (high - low) / median}
        if running[-1][0] is rows[-1] and not running[-1][1].full:
            row |= {"of_last": median_of_ratios(ready.seconds, running[-1][1].seconds)}
        if device.type == "cuda":  # less what the others held meanwhile
            row["peak_bytes"] = ready.peak - (own - ready.own) + ready.sampler.graph_bytes
    return rows


def _start(one: Implementation, base: DiT, case: Case, row: dict[str, Any], expected: Tensor) -> Running | None:
    """Compile and warm up an implementation and fill its error in; None if it is wrong."""
    device = expected.device
    before = _allocated(device)
    with kernels_path(one.path):
        sampler = make_sampler(one, prepare(one, same_dit(base)), case, STEPS, row["chosen"].append)
        sampler.run(make_noise(base.config, case, device), range(WARM_STEPS))
        row["rel_err"] = prediction_error(sampler, base.config, case, expected)
    row["ok"] = row["rel_err"] <= TOLERANCE[base.proj_out.weight.dtype == torch.bfloat16]  # not if it is NaN
    for line in row["chosen"]:
        print(f"{case}, {one.name}: {line}", flush=True)
    if not row["ok"]:
        row["note"] = f"WRONG by {row['rel_err']:.1e}, not timed"
        return None
    return Running(one, sampler, _allocated(device) - before)


def _take_turns(running: Sequence[Running], latents: Tensor) -> None:
    """Time pieces of all in turn, in both orders, so that what the device does meanwhile meets all of them."""
    device = latents.device
    for turn in range(-1, TURNS[device.type]):  # the first tells how many steps a piece is to have
        for one in running if turn % 2 else reversed(running):
            if one.full:
                continue
            try:
                seconds = _piece(one, latents)
            except torch.OutOfMemoryError:
                one.full = True
                continue
            if turn < 0:
                one.steps = min(STEPS, max(1, round(PIECE_S[device.type] / seconds)))
            else:
                one.seconds.append(seconds)


def _piece(one: Running, latents: Tensor) -> float:
    """Seconds of one of an implementation's next steps; its peak of memory is noted."""
    with kernels_path(one.implementation.path):
        if not latents.is_cuda:
            return seconds_of(one.sampler, latents, one.steps)
        torch.cuda.reset_peak_memory_stats(latents.device)
        seconds = seconds_of(one.sampler, latents, one.steps)
        one.peak = max(one.peak, torch.cuda.max_memory_allocated(latents.device))
        return seconds


def median_of_ratios(seconds: Sequence[float], others: Sequence[float]) -> list[float]:
    """[median, low, high] of the ratios of times taken in the same turns: what slows a whole turn down is in both.

    low, high: between them the median lies with 95 % confidence, by the order statistics of its sign test
    """
    ratios = sorted(mine / other for mine, other in zip(seconds, others, strict=True))
    half = 0.98 * len(ratios) ** 0.5
    first = max(0, math.floor(len(ratios) / 2 - half))
    return [statistics.median(ratios), ratios[first], ratios[len(ratios) - 1 - first]]


def seconds_of(sampler: Sampler, latents: Tensor, steps: int) -> float:
    """Of one of several steps, without a wait between them, as in sampling."""
    start = time.perf_counter()
    sampler.run(latents, range(steps))
    if latents.is_cuda:
        torch.cuda.synchronize(latents.device)
    return (time.perf_counter() - start) / steps


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def decode_seconds(case: Case, device: torch.device) -> float | None:
    """Of our VAE for such a clip, with all of the GPU to itself; None if it does not fit."""
    from bench.vae import Case as VaeCase
    from bench.vae import implementations, make_vae, time_and_peak

    let_go(device)
    vae = make_vae("WFVAEModel_D8_4x8x8", device, torch.bfloat16)
    decode = VaeCase("decode", case.size)
    _, make = next(implementations(vae, decode, memory_allowance(device)))
    try:
        with torch.no_grad():
            return time_and_peak(make(), decode.make_input(next(vae.parameters())), device)[0]
    except (torch.OutOfMemoryError, UserError):  # the latter is the plan's: not even piece by piece
        return None


class Results:
    """Prints rows and writes all of them after each case, so that a run that is cut off has left what it measured."""

    def __init__(self, folder: Path, model: str, device: torch.device):
        self._env = environment(device)
        if device.type == "cpu":
            self._env["threads"] = torch.get_num_threads()
        self._model = model
        self.path = result_path(folder, self._env["device"], "sample")
        self.limits = ceilings(device) if device.type == "cuda" else None
        self.rows: list[dict[str, Any]] = []
        print(self._env["device"], flush=True)

    def add(self, rows: list[dict[str, Any]], table: str) -> None:
        """Rows of a case."""
        self.rows += rows
        print(table, flush=True)
        date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        result = {"kind": "sample", "date": date, "environment": self._env, "model": self._model}
        write_result(self.path, {**result, "ceilings": self.limits, "rows": self.rows})


def run_sample(
    texts: Sequence[str], tiny: bool, folder: Path, thresholds: Sequence[float] = (), budgets: Sequence[int] = ()
) -> int:
    """Measure the cases and write them; 1 if ours did not run, or computed something else. Raises `UserError`.

    thresholds: of step caches to measure
    budgets: bytes to measure each case within; none: `BUDGETS`, of the case `BUDGETED` alone
    """
    cases = [tiny_case()] if tiny else [parse_case(text) for text in texts]
    device = torch.device("cpu") if tiny else require_cuda("sample (without --tiny)")
    config, dtype = DIT_CONFIGS["tiny" if tiny else MODEL], torch.float32 if tiny else torch.bfloat16
    results = Results(folder, "tiny" if tiny else MODEL, device)
    for case in cases:
        expected = exact_prediction(config, case, device)
        rows = measure_case(config, case, ON_CPU if tiny else ON_GPU, device, dtype, expected)
        if not tiny:
            checked = (CHECKED_STEP, TOLERANCE[True])
            for budget in budgets or (BUDGETS if str(case) == BUDGETED else ()):
                rows.append(measure_budget(config, case, budget, device, dtype, STEPS, expected, checked))
        decoding = None if tiny else decode_seconds(case, device)
        complete(rows, config, case, device, results.limits, STEPS, decoding)
        results.add(rows, sample_table(rows, STEPS))
        if tiny:
            print(shares(rows))
        if thresholds:
            caches = measure_caches(config, case, thresholds, device, dtype, STEPS)
            results.add(caches, cache_table(caches))
    print(f"written to {results.path}")
    ours = [row for row in results.rows if row["implementation"] == OURS or row["implementation"].startswith(WITHIN)]
    return 0 if all(row["ok"] and row["seconds"] for row in ours) else 1
