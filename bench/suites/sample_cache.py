"""What a step cache saves in the suite `sample`, and how much it changes: whole runs with it beside one without.

Random weights do not change from step to step as trained ones do, so which share of steps is skipped says little of
these; what a skipped step costs does not depend on the weights. What it does to trained ones is in docs/sampling.md.
A run is of 20 steps with what is computed once, as the engine takes them. `figures` of a row: `skipped_share` of the
steps, and `latents_change`, ||with - without|| / ||without|| of the last latents.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from bench.accuracy import relative_error
from bench.measure import Contestant, Effort, Timing
from bench.results import OURS, Row
from bench.suites import Job, Setting
from bench.suites.dits import (
    BUILD_S,
    COMPILE_S,
    DTYPES,
    Case,
    add_note,
    checked_note,
    fault,
    fresh_dit,
    let_go,
    take_timing,
)
from bench.suites.sample_check import (
    CPU_SECONDS,
    STEPS,
    SUITE,
    exact_step_seconds,
    expected_prediction,
    judge,
    predicted_seconds,
)
from bench.suites.sample_steps import ON_CPU, ON_GPU, checked_noise, engine_sampler, make_noise, prepare
from osp_fast.diffusion.step_cache import FirstBlockCache
from osp_fast.engine.devices import H100
from osp_fast.engine.forward_peak import weight_bytes
from osp_fast.models.dit import DiT, DiTConfig

GUIDANCE = 7.5  # what sampling takes by default: the larger, the more do differences count
RUN_STEPS = 20
EFFORT = {
    "cuda": Effort(rounds=2, seconds=0.0, fewest=2, warm_seconds=0.0),
    "cpu": Effort(rounds=3, seconds=0.0, fewest=3, warm_seconds=0.0),
}
WARM_RUNS = 3  # of each, that the timer makes before those that count

Ended = dict[str, tuple[Tensor, float]]  # row -> the last latents of its last run, and the share of skipped steps


def cache_job(config: DiTConfig, case: Case, thresholds: Sequence[float], device_type: str) -> Job:
    """Runs without a cache, which are ours, and with one of each threshold, in turns."""
    thresholds = tuple(thresholds)
    if device_type == "cpu":
        seconds = CPU_SECONDS / 2 * (1 + len(thresholds))
    else:
        runs = (WARM_RUNS + EFFORT["cuda"].fewest) * (1 + len(thresholds))
        running = runs * RUN_STEPS * predicted_seconds(config, case, H100)
        seconds = exact_step_seconds(config, case) + BUILD_S + 2 * COMPILE_S + running
    return Job(SUITE, f"{case} step cache", seconds, functools.partial(measure_caches, config, case, thresholds))


@torch.no_grad()
def measure_caches(config: DiTConfig, case: Case, thresholds: Sequence[float], setting: Setting) -> list[Row]:
    """Ours, without a cache, is held against float32; what caches compute is not right or wrong, but finite."""
    device, dtype = setting.device, DTYPES[setting.device.type]
    checked, expected = expected_prediction(config, case, device)
    let_go(device)
    one = (ON_GPU if device.type == "cuda" else ON_CPU)[0]
    names = {OURS: None, **{f"step cache {threshold:g}": threshold for threshold in thresholds}}
    rows = {
        name: Row(
            SUITE,
            f"{case} step cache",
            name,
            "ours" if name == OURS else "variant",
            str(dtype).removeprefix("torch."),
            case.shape | {"steps": RUN_STEPS},
        )
        for name in names
    }
    with one.around():
        dit = prepare(one, fresh_dit(config, device, dtype))
        judge(rows[OURS], engine_sampler(dit, checked, STEPS), checked_noise(dit, checked), expected)
    add_note(rows[OURS], checked_note(case, checked))
    if not rows[OURS].ok:
        for name in list(rows)[1:]:
            rows[name].note = "not timed: the step without a cache is wrong"
        return list(rows.values())
    ended: Ended = {}
    contestants = [
        Contestant(name, [functools.partial(_run, dit, case, threshold, name, ended)], one.around, weight_bytes(dit))
        for name, threshold in names.items()
    ]
    timings = setting.timer(contestants, device, EFFORT[device.type])
    for name, timing in timings.items():
        _complete(rows[name], timing, ended)
    return list(rows.values())


def _run(dit: DiT, case: Case, threshold: float | None, name: str, ended: Ended) -> None:
    cache = None if threshold is None else FirstBlockCache(threshold)
    noise = make_noise(dit.config, case, dit.proj_out.weight.device)
    sampler = engine_sampler(dit, case, RUN_STEPS, scale=GUIDANCE, step_cache=cache)
    latents = sampler.run(noise, range(RUN_STEPS))
    ended[name] = latents, 0.0 if cache is None else cache.skipped / cache.calls


def _complete(row: Row, timing: Timing | Exception, ended: Ended) -> None:
    if isinstance(timing, Timing) and not ended[row.impl][0].isfinite().all():
        fault(row, "WRONG, not timed: its latents are not finite")
        return
    row.ok = True
    take_timing(row, timing)
    if not row.timed:
        return
    latents, skipped = ended[row.impl]
    row.figures = {"skipped_share": skipped, "steps_per_s": RUN_STEPS * 1e3 / row.ms}
    if row.role == "variant" and OURS in ended:
        row.figures["latents_change"] = change = relative_error(latents, ended[OURS][0])
        add_note(row, f"{skipped:.0%} of the steps skipped, latents changed by {change:.1e}")
