"""`bench train`: one optimizer step of the whole DiT beside how it is usually trained, in time, memory and numbers.

A step is forward, backward, clipping and AdamW on random latents and text states: no data, VAE or text encoder. On a
GPU it is the released 2.7 B model with random weights in bf16, three implementations in one run:

| row | blocks | attention | recomputed |
|---|---|---|---|
| osp_fast | compiled, Triton operations | our kernel | what does not fit |
| torch.compile, best SDPA | compiled, plain PyTorch | PyTorch's fused kernels | what does not fit |
| reference path | plain PyTorch | memory-efficient SDPA with a mask | everything |

With `--tiny`, on a CPU, it is the tiny preset's step beside a plain loop; the two take turns.
"""

import datetime
import gc
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.measure import environment, require_cuda
from bench.results import OURS, result_path, write_result
from bench.table import format_table, percent
from bench.train_steps import ON_CPU, ON_GPU, Case, Implementation, Step, kernels_path, make_dit, prepare_step
from osp_fast.config import TRAIN_PRESETS
from osp_fast.data.buckets import Bucket
from osp_fast.engine.devices import peak_flops
from osp_fast.errors import UserError
from osp_fast.models.dit import DIT_CONFIGS, DiTConfig
from osp_fast.models.wfvae_plan import gib
from osp_fast.training.step import MicroBatch

MODEL = "OpenSoraT2V_v1_3-2B/122"
WARM_STEPS = 2  # beside the first, which compiles
PIECES, PIECE_S = 5, 2.0  # the median of so many times of as many steps as take so long, or of one
TURNS = 30  # of each implementation on the CPU
TOLERANCE = {True: 0.03, False: 1e-4}  # of the first loss and norm against the last row's, bf16 or not
HEADERS = ["case", "implementation", "s/step", "times ours", "tokens/s", "MFU", "peak memory", "error", ""]


def parse_case(text: str) -> Case:
    """ "93x640x640" -> a case of one clip. Raises `UserError`."""
    try:
        size = Bucket.parse(text)
    except ValueError as error:
        raise UserError(f"--case {text!r}: {error}") from None
    if (size.frames - 1) % 4 or size.height % 16 or size.width % 16:
        raise UserError(f"--case {text!r} must be TxHxW with T = 4n+1, H and W multiples of 16")
    return Case(size)


def tiny_case() -> Case:
    """The tiny preset's micro-batch."""
    preset = TRAIN_PRESETS["tiny"]
    size = Bucket(preset["num_frames"], preset["max_height"], preset["max_width"])
    return Case(size, preset["train_batch_size"], preset["model_max_length"])


def measure_row(
    one: Implementation, config: DiTConfig, case: Case, device: torch.device, bf16: bool = True
) -> dict[str, Any]:
    """Median seconds, memory and first step of an implementation, or why it has none. What came before is let go."""
    torch._dynamo.reset()  # compiled graphs do not know which path they were made for
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    try:
        with kernels_path(one.path):
            return _measure(one, config, case, device, bf16)
    except torch.OutOfMemoryError:
        note = "out of memory"
    except UserError as error:  # the plan's: too little memory, whatever is recomputed
        note = str(error)
    return _row(one, config, case, device, note=note)


def _measure(one: Implementation, config: DiTConfig, case: Case, device: torch.device, bf16: bool) -> dict[str, Any]:
    chosen: list[str] = []
    step = prepare_step(one, make_dit(config, device), case, bf16, chosen.append)
    for line in chosen:
        print(f"{case}, {one.name}: {line}", flush=True)
    batch = case.make_batch(config, device)
    first = step(batch).tolist()
    _seconds_of(step, batch, WARM_STEPS, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    steps = max(1, round(PIECE_S / _seconds_of(step, batch, 1, device)))
    seconds = statistics.median(_seconds_of(step, batch, steps, device) for _ in range(PIECES))
    peak = torch.cuda.max_memory_allocated(device) + step.graph_size if device.type == "cuda" else None
    return _row(one, config, case, device, first, seconds, peak, chosen)


def _seconds_of(step: Step, batch: MicroBatch, steps: int, device: torch.device) -> float:
    """Of one of several steps, without a wait between them, as in training."""
    start = time.perf_counter()
    for _ in range(steps):
        step(batch)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / max(steps, 1)


def measure_in_turns(config: DiTConfig, case: Case, implementations: Sequence[Implementation] = ON_CPU) -> list[dict]:
    """A row for each implementation on the CPU, in float32; all take a step in turn."""
    device = torch.device("cpu")
    batch = case.make_batch(config, device)
    seconds: list[list[float]] = [[] for _ in implementations]
    with kernels_path("reference"):
        steps = [prepare_step(one, make_dit(config, device), case, False, print) for one in implementations]
        first = [step(batch).tolist() for step in steps]
        for turn in range(TURNS):
            for index in range(len(steps)) if turn % 2 else reversed(range(len(steps))):
                seconds[index].append(_seconds_of(steps[index], batch, 1, device))
    return [
        _row(one, config, case, device, begun, statistics.median(times))
        for one, begun, times in zip(implementations, first, seconds, strict=True)
    ]


def _row(
    one: Implementation,
    config: DiTConfig,
    case: Case,
    device: torch.device,
    first: list[float] | None = None,
    seconds: float | None = None,
    peak: int | None = None,
    chosen: Sequence[str] = (),
    note: str = "",
) -> dict[str, Any]:
    """What was measured, or why nothing was (`note`).

    first: loss and gradient norm of the first step; peak: bytes; chosen: what was, in words
    """
    per_second = None if seconds is None else case.model_flops(config) / seconds
    most = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return {
        "case": str(case),
        "implementation": one.name,
        "clips": case.clips,
        "seconds": seconds,
        "tokens_per_second": None if seconds is None else case.video_tokens(config) / seconds,
        "model_flops_per_second": per_second,
        "mfu": None if per_second is None or most is None else per_second / most,
        "peak_bytes": peak,
        "loss": first[0] if first else None,
        "grad_norm": first[1] if first else None,
        "rel_err": None,
        "ok": False,
        "chosen": list(chosen),
        "note": note,
    }


def compare_first_steps(rows: Sequence[dict[str, Any]], tolerance: float) -> None:
    """Fill in `rel_err` and `ok`: first loss and norm against those of the last row that ran, the plainest."""
    ran = [row for row in rows if row["seconds"] is not None]
    for row in ran:
        reference = ran[-1]
        errors = [abs(row[name] - reference[name]) / abs(reference[name]) for name in ("loss", "grad_norm")]
        row["rel_err"] = max(errors)
        row["ok"] = row["rel_err"] <= tolerance  # not if it is NaN
        if not row["ok"]:
            row["note"] = f"WRONG: first loss {row['loss']:.4g}, gradient norm {row['grad_norm']:.4g}"


def train_table(rows: Sequence[dict[str, Any]]) -> str:
    """Each case with its implementations, and their times over ours."""
    lines = []
    for row in rows:
        ours = next(one for one in rows if one["case"] == row["case"] and one["implementation"] == OURS)
        ratio = row["seconds"] / ours["seconds"] if row["seconds"] and ours["seconds"] else None
        lines.append(
            [
                row["case"],
                row["implementation"],
                f"{row['seconds']:.4g}" if row["seconds"] else None,
                f"{ratio:.2f}" if ratio else None,
                f"{row['tokens_per_second']:.0f}" if row["seconds"] else None,
                percent(row["mfu"]),
                gib(row["peak_bytes"]) if row["peak_bytes"] else None,
                f"{row['rel_err']:.1e}" if row["rel_err"] is not None else None,
                row["note"],
            ]
        )
    return format_table(HEADERS, lines)


def run_train(texts: Sequence[str], tiny: bool, folder: Path) -> int:
    """Measure the cases and write them; 1 if ours did not run, or computed something else. Raises `UserError`."""
    cases = [parse_case(text) for text in texts]
    if tiny:
        device, env = torch.device("cpu"), environment(torch.device("cpu"))
        env["threads"] = torch.get_num_threads()
        measured: Iterator[list[dict]] = iter([measure_in_turns(DIT_CONFIGS["tiny"], tiny_case())])
    else:
        device = require_cuda("train (without --tiny)")
        env = environment(device)
        measured = ([measure_row(one, DIT_CONFIGS[MODEL], case, device) for one in ON_GPU] for case in cases)
    print(env["device"], flush=True)
    path = result_path(folder, env["device"], "train")
    rows: list[dict[str, Any]] = []
    for found in measured:
        compare_first_steps(found, TOLERANCE[not tiny])
        rows += found
        print(train_table(found), flush=True)
        date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        model = "tiny" if tiny else MODEL
        write_result(path, {"kind": "train", "date": date, "environment": env, "model": model, "rows": rows})
    print(f"written to {path}")
    return 1 if any(row["implementation"] == OURS and not row["ok"] for row in rows) else 0
