"""`bench run --tune`: every candidate configuration of every kernel timed on an operation's shapes, the best printed.

Candidates and calls are those of the spec's `Tunable`. One kernel at a time is changed, all others keep what their
tables give them; a kernel is judged by the time of the call that launches it. The backward operation is called by
itself: PyTorch runs a backward pass on a GPU in a thread that `osp_fast.kernels.tuning.forced` does not reach.
"""

import datetime
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from osp_fast.kernels import tuning
from osp_fast.kernels.launch import architecture
from osp_fast.kernels.spec import OpSpec, Shape

from bench.measure import Timer, environment, median_seconds, require_cuda
from bench.results import result_path, write_result
from bench.run import make_input_sets, reason_of
from bench.table import format_table, milliseconds
from osp_fast.errors import UserError


def run_tune(pairs: Sequence[tuple[OpSpec, Shape]], folder: Path) -> int:
    """Time all candidates, print the best ones, write <op>-tune-<n>.json; 1 if a shape has no candidate that ran."""
    device = require_cuda("run --tune")
    check_tunable(pairs)
    rows = []
    for spec, shape in pairs:
        for row in tune_shape(spec, shape, device, median_seconds):
            rows.append(row)
            took = milliseconds(row["seconds"]) or f"not available: {row['unavailable']}"
            print(f"{spec.name} {shape.name} {row['kernel']} {row['config']}: {took}", flush=True)
    print(tune_table(rows))
    for op in dict.fromkeys(spec.name for spec, _ in pairs):
        result = {
            "kind": "tune",
            "op": op,
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "environment": environment(device),
            "rows": [row for row in rows if row["op"] == op],
        }
        path = result_path(folder, result["environment"]["device"], f"{op}-tune")
        write_result(path, result)
        print(f"written to {path}")
    return 1 if any(best is None for best in best_rows(rows).values()) else 0


def check_tunable(pairs: Sequence[tuple[OpSpec, Shape]]) -> None:
    """Raises UserError for an operation without candidates."""
    for spec, _ in pairs:
        if spec.tunable is None:
            raise UserError(f"--tune: {spec.name} has no candidates to time: choose other operations by --op")


def tune_shape(spec: OpSpec, shape: Shape, device: torch.device, timer: Timer) -> Iterator[dict[str, Any]]:
    """Yield a row per kernel and candidate. Raises RuntimeError if a call does not launch the kernel it is to time."""
    sets = make_input_sets(spec, shape, device)
    for kernel, config in spec.tunable.candidates(sets[0], architecture(device)):
        row = {"op": spec.name, "shape": shape.name, "kernel": kernel, "config": str(config)}
        row |= {"seconds": None, "spread": None}
        try:
            calls = [spec.tunable.bind(inputs, kernel) for inputs in sets]
            with tuning.forced(kernel, config) as override:
                row["seconds"], row["spread"] = timer(calls)
        except Exception as error:  # that a candidate does not fit this device is a result
            row["unavailable"] = reason_of(error)
        if row["seconds"] is not None and not override.used:
            raise RuntimeError(f"{spec.name} {shape.name}: the call that was timed does not launch {kernel!r}")
        yield row


def best_rows(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str, str], dict[str, Any] | None]:
    """(op, shape, kernel) -> its fastest row, None if no candidate ran."""
    best: dict[tuple[str, str, str], dict[str, Any] | None] = {}
    for row in rows:
        key = (row["op"], row["shape"], row["kernel"])
        held = best.setdefault(key, None)
        if row["seconds"] is not None and (held is None or row["seconds"] < held["seconds"]):
            best[key] = row
    return best


def tune_table(rows: Sequence[dict[str, Any]]) -> str:
    """The best candidate of each shape and kernel; the time is that of the call that launches it."""
    lines = []
    for key, row in best_rows(rows).items():
        lines.append([*key, milliseconds(row["seconds"]), row["config"]] if row else [*key, None, "no candidate ran"])
    return format_table(["op", "shape", "kernel", "time", "best configuration"], lines)
