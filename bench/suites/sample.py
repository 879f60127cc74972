"""`bench run sample`: one denoising step of the whole DiT with guidance, beside how it is usually written.

On a GPU it is the released 2.7 B model in bfloat16:

| | blocks | attention | computed once |
|---|---|---|---|
| osp_fast | compiled, Triton operations | our kernel | text keys for a prompt, time vectors for all steps |
| reference | as the original's: `upstream_blocks.py` | memory-efficient SDPA with a mask | nothing |
| strong | compiled, plain PyTorch | PyTorch's fused kernels | nothing |
| plain loop | compiled, Triton operations | our kernel | nothing |

All have the same weights in the same memory, and take turns. First each is held against float32 of plain operations at
the same size (where that takes too much memory, of a shorter clip, and the note says so): what is wrong is not timed. A
clip is 100 such steps and its decoding by our VAE, which is timed when all else is let go. On a CPU it is the tiny
preset's step in float32, nothing compiled, and there are either of the two things computed once, so that each one's
share is seen: `of_plain_loop` is the median of the ratios of turns, and lies with 95 % confidence between its low and
high.

`--step_cache` adds whole runs with a step cache, `--memory_budget` steps within so much memory: cases of their own.
"""

import functools
import math
import statistics
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from bench.measure import LONG_CALLS, Contestant, Effort, Timing
from bench.results import OURS, Row
from bench.suites import Job, Options, Setting
from bench.suites.dits import (
    BUILD_S,
    COMPILE_S,
    DTYPES,
    MODELS,
    TIMES_OURS,
    Case,
    add_note,
    allocated,
    checked_note,
    fault,
    fresh_dit,
    let_go,
    rates_of,
    same_dit,
    sizes_of,
    take_timing,
    tiny_sampling,
)
from bench.suites.sample_cache import cache_job
from bench.suites.sample_check import (
    CPU_SECONDS,
    STEPS,
    SUITE,
    exact_step_seconds,
    expected_prediction,
    judge,
    predicted_seconds,
    step_row,
)
from bench.suites.sample_memory import BUDGETED, BUDGETS, budget_job
from bench.suites.sample_steps import (
    ON_CPU,
    ON_GPU,
    PLAIN,
    Sampler,
    Way,
    checked_noise,
    make_noise,
    make_sampler,
    prepare,
)
from osp_fast.device import memory_allowance
from osp_fast.engine.devices import H100
from osp_fast.engine.forward_peak import weight_bytes
from osp_fast.errors import UserError
from osp_fast.models.dit import DIT_CONFIGS, DiT, DiTConfig

SIZES = ("93x640x640", "93x480x640", "93x352x640", "29x352x640", "93x720x1280")
TIMED_STEP = 50
EFFORT = {"cuda": LONG_CALLS, "cpu": Effort(rounds=100, seconds=0.0, fewest=100, warm_seconds=0.1)}
LEAST_TURNS = 6  # of which the median's confidence of 95 % can be told
WARM_RUNS, GRAPH_RUNS = 4, 11  # predicted, beside those that count: check and timer; ours, to choose a graph or not
DECODING_S = 8.0  # predicted: of building the VAE, beside its runs
DECODED_TOKENS_PER_S, DECODING_RUNS = 20_000.0, 6
# Seconds of a clip on one H100: what is to be reached, and what upstream tells of itself.
TARGETS = {"93x640x640": 115.0, "93x352x640": 50.0}
UPSTREAM_CLIPS = {"93x480x640": 150.0}


def jobs(options: Options) -> list[Job]:
    """For each size its steps, then what was asked for besides.

    Raises `UserError` for sizes that the DiT does not take, and for a budget of memory on a CPU.
    """
    if options.device == "cpu" and options.memory_budget:
        raise UserError("--memory_budget is measured on a GPU: leave it out with --device cpu")
    config = DIT_CONFIGS[MODELS[options.device]]
    own = tiny_sampling()
    if options.device == "cpu":
        cases = [Case(size, 1, own.text_tokens) for size in sizes_of(options, [str(own.size)])]
    else:
        cases = [Case(size) for size in sizes_of(options, SIZES)]
    found = [step_job(config, case, options.device) for case in cases]
    for case in cases:
        budgets = options.memory_budget or (BUDGETS if str(case) == BUDGETED and not options.sizes else ())
        if budgets:
            found.append(budget_job(config, case, budgets))
        if options.step_cache:
            found.append(cache_job(config, case, options.step_cache, options.device))
    return found


def step_job(config: DiTConfig, case: Case, device_type: str) -> Job:
    """A step of every implementation, in turns."""
    if device_type == "cpu":
        own = tiny_sampling()
        seconds = max(CPU_SECONDS / 2, CPU_SECONDS * case.video_tokens(config) / own.video_tokens(config))
    else:
        seconds = _job_seconds(config, case)
    return Job(SUITE, str(case), seconds, functools.partial(measure_case, config, case))


def measure_case(config: DiTConfig, case: Case, setting: Setting) -> list[Row]:
    """A row for each implementation; see the module's docstring."""
    device = setting.device
    rows = _measure_steps(config, case, setting)
    decoding = None
    if device.type == "cuda":
        let_go(device)
        decoding, why = decode_seconds(case, setting)
        add_note(rows[0], why)
    for row in rows:
        complete(row, case, decoding)
    return rows


@torch.no_grad()
def _measure_steps(config: DiTConfig, case: Case, setting: Setting) -> list[Row]:
    """Timed rows; models and graphs are let go with this function."""
    device, dtype = setting.device, DTYPES[setting.device.type]
    checked, expected = expected_prediction(config, case, device)
    let_go(device)
    base = fresh_dit(config, device, dtype)
    latents = make_noise(config, case, device)
    rows, contestants = {}, []
    for one in ON_GPU if device.type == "cuda" else ON_CPU:
        row = rows[one.name] = step_row(config, case, one, dtype)
        before = allocated(device)
        try:
            with one.around():
                sampler = _start(one, base, case, row, (checked, expected), setting)
                if row.ok:
                    call = functools.partial(sampler.run, latents, range(TIMED_STEP, TIMED_STEP + 1))
                    holds = weight_bytes(base) + allocated(device) - before + sampler.graph_bytes
                    contestants.append(Contestant(one.name, [call], one.around, holds))
        except Exception as error:  # whatever a library raises is the reason why it is not measured
            fault(row, error)
    timings = setting.timer(contestants, device, EFFORT[device.type])
    for name, timing in timings.items():
        take_timing(rows[name], timing)
    _share(rows, timings)
    if device.type == "cuda" and rows[OURS].ok:
        rows[OURS].predicted_ms = 1e3 * predicted_seconds(config, case, rates_of(device))
    return list(rows.values())


def _start(one: Way, base: DiT, case: Case, row: Row, checked: tuple[Case, Tensor], setting: Setting) -> Sampler:
    """An implementation, compiled, and its error in its row."""

    def say(line: str) -> None:
        add_note(row, line)
        setting.say(f"{case}, {one.name}: {line}")

    at, expected = checked
    dit = prepare(one, same_dit(base))
    sampler = make_sampler(one, dit, case, STEPS, say)
    trial = sampler if at == case else make_sampler(one, dit, at, STEPS, lambda line: None)
    judge(row, trial, checked_noise(base, at), expected)
    add_note(row, checked_note(case, at))
    return sampler


def complete(row: Row, case: Case, decoding: float | None) -> None:
    """Fill in rates and the whole clip. decoding: seconds; None: not measured, and then there is no whole clip."""
    if row.role == "ours":
        known = {"target_clip_seconds": TARGETS.get(str(case)), "upstream_clip_seconds": UPSTREAM_CLIPS.get(str(case))}
        row.figures |= {name: seconds for name, seconds in known.items() if seconds is not None}
    if row.timed:
        row.figures["steps_per_s"] = 1e3 / row.ms
        if decoding is not None:
            row.figures["decode_seconds"] = decoding
            row.figures["clip_seconds"] = STEPS * row.ms * 1e-3 + decoding


def _share(rows: dict[str, Row], timings: dict[str, Timing | Exception]) -> None:
    """Fill in what part of a plain loop's step each one takes, where there are turns enough to tell."""
    plain = timings.get(PLAIN)
    for name, timing in timings.items():
        both = isinstance(timing, Timing) and isinstance(plain, Timing)
        if both and name != PLAIN and len(plain.turns) >= LEAST_TURNS:
            median, low, high = median_of_ratios(timing.turns, plain.turns)
            rows[name].figures |= {
                "of_plain_loop": median,
                "of_plain_loop_low": low,
                "of_plain_loop_high": high,
            }
            add_note(rows[name], f"{median:.3f} ({low:.3f} to {high:.3f}) of a plain loop's step")


def median_of_ratios(turns: Sequence[Iterable[float]], others: Sequence[Iterable[float]]) -> tuple[float, float, float]:
    """(median, low, high) of the ratios of times of the same turns: what slows a whole turn down is in both.

    low, high: between them the median lies with 95 % confidence, by the order statistics of its sign test
    """
    ratios = sorted(
        statistics.median(mine) / statistics.median(other) for mine, other in zip(turns, others, strict=True)
    )
    half = 0.98 * len(ratios) ** 0.5
    first = max(0, math.floor(len(ratios) / 2 - half))
    return statistics.median(ratios), ratios[first], ratios[len(ratios) - 1 - first]


def decode_seconds(case: Case, setting: Setting) -> tuple[float | None, str]:
    """Of our VAE for such a clip, with all of the GPU to itself, and how; None and why, if it does not fit."""
    from bench.suites.vae import Case as VaeCase
    from bench.suites.vae import implementations, make_vae, time_and_peak

    device, lines = setting.device, []
    vae = make_vae("WFVAEModel_D8_4x8x8", device, torch.bfloat16)
    decode = VaeCase("decode", case.size)
    _, make = next(implementations(vae, decode, memory_allowance(device), lines.append))
    try:
        with torch.no_grad():
            seconds, _ = time_and_peak(make(), decode.make_input(next(vae.parameters())), device)
    except torch.OutOfMemoryError:
        return None, "decoding: out of memory"
    except UserError as error:  # the plan's: not even piece by piece
        return None, f"decoding: {error}"
    return seconds, "; ".join(lines)


def _job_seconds(config: DiTConfig, case: Case) -> float:
    """On an H100: float32, building, compiling, everyone's steps, and decoding."""
    step = predicted_seconds(config, case, H100)
    runs = WARM_RUNS + max(LONG_CALLS.fewest, math.ceil(LONG_CALLS.seconds / step))
    compiling = COMPILE_S * sum(one.compiled for one in ON_GPU)
    running = step * (runs * sum(TIMES_OURS.get(one.name, 1.0) for one in ON_GPU) + GRAPH_RUNS)
    decoding = DECODING_S + DECODING_RUNS * case.video_tokens(config) / DECODED_TOKENS_PER_S
    return exact_step_seconds(config, case) + BUILD_S + compiling + running + decoding
