"""`bench sample`: one denoising step of the whole DiT with guidance, beside how it is usually written.

On a GPU it is the released 2.7 B model with random weights in bf16, four implementations in one run:

| row | blocks | attention | computed once |
|---|---|---|---|
| osp_fast | compiled, Triton operations | our kernel | text keys for a prompt, time vectors for all steps |
| plain loop | the same | the same | nothing |
| torch.compile, best SDPA | compiled, plain PyTorch | PyTorch's fused kernels | nothing |
| reference path | plain PyTorch | memory-efficient SDPA with a mask | nothing |

First every implementation is held against float32 on a small clip: what is wrong is not timed. Then a clip of 100
steps is what they take and the time of our VAE's decoding. With `--tiny`, on a CPU, the tiny preset's step takes turns
with a plain loop, and with either of the two things computed once, so that each one's share is seen.
"""

import datetime
import gc
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.accuracy import exact_float32, relative_error
from bench.measure import ceilings, environment, require_cuda
from bench.results import OURS, result_path, write_result
from bench.sample_steps import ON_CPU, ON_GPU, Implementation, Step, guided_flops, make_noise, prepare_step
from bench.table import format_table, percent
from bench.train import MODEL, parse_case
from bench.train_steps import Case, kernels_path, make_dit
from osp_fast.config import SAMPLE_PRESETS, TRAIN_PRESETS
from osp_fast.data.buckets import Bucket
from osp_fast.engine.cost import Workload, forward_seconds
from osp_fast.engine.devices import H100, find_device
from osp_fast.models.dit import DIT_CONFIGS, DiT, DiTConfig
from osp_fast.models.wfvae_plan import gib

STEPS = 100  # of a clip
CHECKED = Bucket(9, 64, 96)  # the clip of the check
CHECKED_STEPS = 3
TOLERANCE = {True: 0.05, False: 1e-4}  # of the latents after these steps against float32, bf16 or not
WARM_STEPS = 2  # beside the first, which compiles
PIECES, PIECE_S = 5, 2.0  # the median of so many times of as many steps as take so long, or of one
TURNS = 60  # of each implementation on the CPU
TARGETS = {"93x640x640": 115.0, "93x352x640": 50.0}  # seconds of 100 steps, decoding not counted, on an H100
HEADERS = [
    "case",
    "implementation",
    "s/step",
    "times ours",
    "100 steps",
    "with decoding",
    "TFLOP/s",
    "of matmul",
    "peak",
]
HEADERS += ["predicted s/step", "error", ""]


def tiny_case() -> Case:
    """The tiny preset's clip."""
    preset = TRAIN_PRESETS["tiny"]
    size = Bucket(preset["num_frames"], preset["max_height"], preset["max_width"])
    return Case(size, 1, SAMPLE_PRESETS["tiny"]["max_sequence_length"])


def fresh_dit(config: DiTConfig, device: torch.device, dtype: torch.dtype) -> DiT:
    """Random weights, the same for every type."""
    return make_dit(config, device).to(dtype).requires_grad_(False).eval()


def result_of(step: Step, config: DiTConfig, case: Case, device: torch.device) -> torch.Tensor:
    """The latents after some steps."""
    latents = make_noise(config, case, device)
    for number in range(CHECKED_STEPS):
        latents = step(latents, number)
    return latents


def errors(
    implementations: Sequence[Implementation], config: DiTConfig, device: torch.device, dtype: torch.dtype
) -> dict[str, float]:
    """Implementation -> relative error of a small clip's latents against plain operations in float32."""
    case = Case(CHECKED, 1, 32)
    plain = Implementation("float32", "reference", "reference")
    with kernels_path("reference"), exact_float32():
        step = prepare_step(plain, fresh_dit(config, device, torch.float32), case, CHECKED_STEPS)
        expected = result_of(step, config, case, device)
    del step
    found = {}
    for one in implementations:
        _let_go(device)
        with kernels_path(one.path):
            step = prepare_step(one, fresh_dit(config, device, dtype), case, CHECKED_STEPS, lambda line: None)
            found[one.name] = relative_error(result_of(step, config, case, device), expected)
        del step
    return found


def measure_row(
    one: Implementation, config: DiTConfig, case: Case, device: torch.device, error: float, dtype: torch.dtype
) -> dict[str, Any]:
    """Median seconds and memory of an implementation, or why it has none. What came before is let go."""
    _let_go(device)
    row = {"case": str(case), "implementation": one.name, "seconds": None, "peak_bytes": None, "rel_err": error}
    row |= {"ok": error <= TOLERANCE[dtype == torch.bfloat16], "chosen": [], "note": ""}
    if not row["ok"]:
        return row | {"note": f"off by {error:.1e}, not timed"}
    try:
        with kernels_path(one.path):
            step = prepare_step(one, fresh_dit(config, device, dtype), case, STEPS, row["chosen"].append)
            latents = make_noise(config, case, device)
            seconds_of(step, latents, 1 + WARM_STEPS, device)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            steps = max(1, round(PIECE_S / seconds_of(step, latents, 1, device)))
            row["seconds"] = statistics.median(seconds_of(step, latents, steps, device) for _ in range(PIECES))
            if device.type == "cuda":
                row["peak_bytes"] = torch.cuda.max_memory_allocated(device)
    except torch.OutOfMemoryError:
        row["note"] = "out of memory"
    return row


def seconds_of(step: Step, latents: torch.Tensor, steps: int, device: torch.device) -> float:
    """Of one of several steps, without a wait between them, as in sampling."""
    start = time.perf_counter()
    for number in range(steps):
        latents = step(latents, number)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / steps


def measure_in_turns(config: DiTConfig, case: Case, implementations: Sequence[Implementation] = ON_CPU) -> list[dict]:
    """A row for each implementation on the CPU, in float32; all take a step in turn, in both orders."""
    device = torch.device("cpu")
    wrong = errors(implementations, config, device, torch.float32)
    seconds: list[list[float]] = [[] for _ in implementations]
    with kernels_path("reference"):
        steps = [prepare_step(one, fresh_dit(config, device, torch.float32), case, STEPS) for one in implementations]
        latents = make_noise(config, case, device)
        for turn in range(-WARM_STEPS, TURNS):
            for index in range(len(steps)) if turn % 2 else reversed(range(len(steps))):
                took = seconds_of(steps[index], latents, 1, device)
                if turn >= 0:
                    seconds[index].append(took)
    return [
        {
            "case": str(case),
            "implementation": one.name,
            "seconds": statistics.median(times),
            "peak_bytes": None,
            "rel_err": wrong[one.name],
            "ok": wrong[one.name] <= TOLERANCE[False],
            "chosen": [],
            "note": "",
        }
        for one, times in zip(implementations, seconds, strict=True)
    ]


def decode_seconds(case: Case, device: torch.device) -> float | None:
    """Of our VAE for such a clip, with all of the GPU to itself; None if it does not fit."""
    from bench.vae import Case as VaeCase
    from bench.vae import implementations, make_vae, time_and_peak
    from osp_fast.device import memory_allowance

    _let_go(device)
    vae = make_vae("WFVAEModel_D8_4x8x8", device, torch.bfloat16)
    decode = VaeCase("decode", case.size)
    _, make = next(implementations(vae, decode, memory_allowance(device)))
    try:
        return time_and_peak(make(), decode.make_input(next(vae.parameters())), device)[0]
    except torch.OutOfMemoryError:
        return None


def complete(
    rows: list[dict[str, Any]],
    config: DiTConfig,
    case: Case,
    device: torch.device,
    limits: dict[str, float] | None,
    decoding: float | None,
) -> None:
    """Fill in rates, whole clips, predictions, the target, and what ours won over the others."""
    flops = guided_flops(config, case)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    rates = (find_device(name) or H100) if name else None
    for row in rows:
        seconds = row["seconds"]
        row["flops_per_second"] = None if seconds is None else flops / seconds
        row["of_matmul"] = (
            row["flops_per_second"] / limits["matmul_flops_per_second"] if seconds is not None and limits else None
        )
        row["hundred_steps_seconds"] = None if seconds is None else STEPS * seconds
        row["decode_seconds"] = decoding
        row["predicted_seconds"] = None
        if rates is not None and row["implementation"] == OURS:
            row["predicted_seconds"] = forward_seconds(config, _workload(case), rates)
            row["target_seconds"] = TARGETS.get(str(case))


def _workload(case: Case) -> Workload:
    """Both halves of guidance in one batch."""
    return Workload(2, case.latent_size, case.text_tokens, weight_dtype=torch.bfloat16)


def sample_table(rows: Sequence[dict[str, Any]]) -> str:
    """Each case with its implementations, and their times over ours."""
    lines = []
    for row in rows:
        ours = next(one for one in rows if one["case"] == row["case"] and one["implementation"] == OURS)
        seconds, decoding = row["seconds"], row["decode_seconds"]
        ratio = seconds / ours["seconds"] if seconds and ours["seconds"] else None
        lines.append(
            [
                row["case"],
                row["implementation"],
                f"{seconds:.4g}" if seconds else None,
                f"{ratio:.2f}" if ratio else None,
                f"{STEPS * seconds:.1f}" if seconds else None,
                f"{STEPS * seconds + decoding:.1f}" if seconds and decoding else None,
                f"{row['flops_per_second'] / 1e12:.4g}" if seconds else None,
                percent(row["of_matmul"]),
                gib(row["peak_bytes"]) if row["peak_bytes"] else None,
                f"{row['predicted_seconds']:.4g}" if row["predicted_seconds"] else None,
                f"{row['rel_err']:.1e}",
                row["note"],
            ]
        )
    return format_table(HEADERS, lines)


def shares(rows: Sequence[dict[str, Any]]) -> str:
    """In words: how much of a step text keys and time vectors that are computed once save, of the rows of one run."""
    seconds = {row["implementation"]: row["seconds"] for row in rows}
    plain = seconds["plain loop"]
    saved = {name: 1 - seconds[name] / plain for name in (OURS, "text keys once", "time vectors once")}
    return (
        f"of a plain loop's step, text keys once save {saved['text keys once']:.1%}, time vectors once "
        f"{saved['time vectors once']:.1%}, both {saved[OURS]:.1%}"
    )


def run_sample(texts: Sequence[str], tiny: bool, folder: Path) -> int:
    """Measure the cases and write them; 1 if ours did not run, or computed something else. Raises `UserError`."""
    cases = [parse_case(text) for text in texts]
    device = torch.device("cpu") if tiny else require_cuda("sample (without --tiny)")
    env = environment(device)
    limits = None
    if tiny:
        env["threads"] = torch.get_num_threads()
    else:
        limits = ceilings(device)
    print(env["device"], flush=True)
    path = result_path(folder, env["device"], "sample")
    rows: list[dict[str, Any]] = []
    for found in _measured(cases, tiny, device, limits):
        rows += found
        print(sample_table(found), flush=True)
        date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        result = {"kind": "sample", "date": date, "environment": env, "model": "tiny" if tiny else MODEL}
        write_result(path, {**result, "ceilings": limits, "rows": rows})
    if tiny:
        print(shares(rows))
    print(f"written to {path}")
    return 1 if any(row["implementation"] == OURS and not (row["ok"] and row["seconds"]) for row in rows) else 0


def _measured(
    cases: Sequence[Case], tiny: bool, device: torch.device, limits: dict[str, float] | None
) -> Iterator[list[dict[str, Any]]]:
    """The rows of each case."""
    if tiny:
        config, case = DIT_CONFIGS["tiny"], tiny_case()
        rows = measure_in_turns(config, case)
        complete(rows, config, case, device, None, None)
        yield rows
        return
    config = DIT_CONFIGS[MODEL]
    wrong = errors(ON_GPU, config, device, torch.bfloat16)
    for case in cases:
        rows = [measure_row(one, config, case, device, wrong[one.name], torch.bfloat16) for one in ON_GPU]
        complete(rows, config, case, device, limits, decode_seconds(case, device))
        yield rows


def _let_go(device: torch.device) -> None:
    torch._dynamo.reset()  # compiled graphs do not know which path they were made for
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
