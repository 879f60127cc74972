"""What a step cache saves in `bench sample`, and how much it changes: whole runs with it beside one without.

Random weights do not change from step to step as trained ones do, so which share of steps is skipped says little of
these; what a skipped step costs does not depend on the weights. What it does to trained ones is in docs/sampling.md.
"""

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bench.accuracy import relative_error
from bench.sample_steps import ON_CPU, ON_GPU, engine_sampler, fresh_dit, let_go, make_noise, prepare
from bench.table import format_table, percent
from bench.train_steps import Case, kernels_path
from osp_fast.diffusion.step_cache import FirstBlockCache
from osp_fast.models.dit import DiT, DiTConfig

GUIDANCE = 7.5  # what sampling takes by default: the larger, the more do differences count
TURNS = {"cuda": 1, "cpu": 3}  # whole runs of each
OFF = "step cache off"


def measure_caches(
    config: DiTConfig,
    case: Case,
    thresholds: Sequence[float],
    device: torch.device,
    dtype: torch.dtype,
    steps: int,
) -> list[dict[str, Any]]:
    """A row without a cache and one for each threshold, of runs in turns: seconds of a step on average, the share of
    steps that were skipped, and how far the last latents are from those without."""
    let_go(device)
    one = (ON_GPU if device.type == "cuda" else ON_CPU)[0]
    seconds: dict[float | None, list[float]] = {threshold: [] for threshold in (None, *thresholds)}
    latents: dict[float | None, Tensor] = {}
    skipped: dict[float | None, float] = {None: 0.0}
    with kernels_path(one.path):
        dit = prepare(one, fresh_dit(config, device, dtype))
        for warm in (None, FirstBlockCache(0.0)):
            engine_sampler(dit, case, steps, step_cache=warm).run(make_noise(config, case, device), range(2))
        for _ in range(TURNS[device.type]):
            for threshold in seconds:
                cache = None if threshold is None else FirstBlockCache(threshold)
                took, latents[threshold] = _run(dit, case, steps, cache)
                seconds[threshold].append(took / steps)
                if cache is not None:
                    skipped[threshold] = cache.skipped / cache.calls
    return [
        {
            "case": str(case),
            "implementation": OFF if threshold is None else f"step cache {threshold:g}",
            "seconds": sorted(times)[len(times) // 2],
            "skipped": skipped[threshold],
            "change": relative_error(latents[threshold], latents[None]),
        }
        for threshold, times in seconds.items()
    ]


def _run(dit: DiT, case: Case, steps: int, cache: FirstBlockCache | None) -> tuple[float, Tensor]:
    """Seconds of a run, with what is computed once in it, and its latents."""
    noise = make_noise(dit.config, case, dit.proj_out.weight.device)
    start = time.perf_counter()
    latents = engine_sampler(dit, case, steps, scale=GUIDANCE, step_cache=cache).run(noise, range(steps))
    if noise.is_cuda:
        torch.cuda.synchronize(noise.device)
    return time.perf_counter() - start, latents


def cache_table(rows: Sequence[dict[str, Any]]) -> str:
    """Each cache, and how much faster than without."""
    off = next(row["seconds"] for row in rows if row["implementation"] == OFF)
    headers = ["case", "implementation", "skipped", "s/step", "times as fast", "change of latents"]
    return format_table(
        headers,
        [
            [
                row["case"],
                row["implementation"],
                percent(row["skipped"]),
                f"{row['seconds']:.4g}",
                f"{off / row['seconds']:.2f}",
                f"{row['change']:.1e}",
            ]
            for row in rows
        ],
    )
