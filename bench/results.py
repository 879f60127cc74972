"""Result files: where they lie, how they are read, and the ratios that they hold."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from osp_fast.errors import UserError

RESULTS = Path(__file__).parent / "results"
OURS = "osp_fast"
AS_WRITTEN, GATHERED = "as written", "gathered"  # the layout of a baseline's inputs
BASELINE_HEADERS = {AS_WRITTEN: "best baseline as written", GATHERED: "best already gathered"}
STATIC_KEYS = {"op", "kernel", "arch", "config", "registers", "spills", "shared"}
RUN_KEYS = {"op", "date", "environment", "ceilings"}
# What one H100 SXM was measured to reach, for predictions: `bench run` measures its own device.
H100 = {"copy_bytes_per_second": 3.0e12, "matmul_flops_per_second": 798e12}
VARIANT = "variant"  # in its place for our own kernels that do not serve: no baseline


def bound_by(flops: float, moved: float, limits: dict[str, float] = H100) -> str:
    """memory or products: which of the two ceilings takes longer for so many operations and bytes."""
    products = flops / limits["matmul_flops_per_second"]
    return "memory" if moved / limits["copy_bytes_per_second"] > products else "products"


def rate(flops: float, moved: float, seconds: float, limits: dict[str, float] = H100) -> str:
    """The rate that counts for such a call: "2760 GB/s" if memory binds, "420 TFLOP/s" if products do."""
    if bound_by(flops, moved, limits) == "memory":
        return f"{moved / seconds / 1e9:.0f} GB/s"
    return f"{flops / seconds / 1e12:.0f} TFLOP/s"


def result_path(folder: Path, device: str, stem: str) -> Path:
    """A new folder/<device>/<stem>-<n>.json, n one more than the highest there."""
    place = folder / re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    numbers = [int(path.stem.rsplit("-", 1)[1]) for path in place.glob(f"{stem}-[0-9]*.json")]
    return place / f"{stem}-{max(numbers, default=0) + 1:03d}.json"


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write `result` as JSON, its folder made if there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def read_result(path: Path) -> Any:
    """A result of run (an object) or of static (a list of rows). Raises UserError if it is neither."""
    try:
        result = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): give a file that bench wrote") from None
    except ValueError:
        raise UserError(f"{path}: is no JSON: give a file that bench run or bench static wrote") from None
    is_static = isinstance(result, list) and all(isinstance(row, dict) and row.keys() >= STATIC_KEYS for row in result)
    kind = result.get("kind") if isinstance(result, dict) else None
    is_measured = kind in ("run", "tune", "vae", "train", "sample") and isinstance(result.get("rows"), list)
    if is_static or is_measured:
        return result
    raise UserError(f"{path}: has no rows of bench run or bench static: give a file that one of them wrote")


def latest_runs(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """(operation, device) -> its newest result of `bench run` under `folder`, with each shape's newest rows.

    Shapes may have been measured in runs of their own. All rows of a shape are of one run, as ratios are.
    """
    runs = []
    for path in sorted(folder.rglob("*.json")):
        result = read_result(path)
        if isinstance(result, dict) and result["kind"] == "run":
            if missing := RUN_KEYS - result.keys():
                raise UserError(f"{path}: lacks {', '.join(sorted(missing))}: keep only files that bench run wrote")
            runs.append(result)
    latest: dict[tuple[str, str], dict[str, Any]] = {}
    for run in sorted(runs, key=lambda run: run["date"]):
        key = (run["op"], run["environment"]["device"])
        measured = {row["shape"] for row in run["rows"]}
        older = latest[key]["rows"] if key in latest else []
        latest[key] = run | {"rows": [row for row in older if row["shape"] not in measured] + run["rows"]}
    return latest


def find_row(rows: Sequence[dict[str, Any]], shape: str, direction: str) -> dict[str, Any] | None:
    """Our own measured row of a shape and direction, if there is one."""
    for row in rows:
        if (row["implementation"], row["shape"], row["direction"]) == (OURS, shape, direction) and row["seconds"]:
            return row
    return None


def best_baseline(rows: Sequence[dict[str, Any]], shape: str, direction: str, layout: str) -> dict[str, Any] | None:
    """The fastest baseline of a shape and direction whose inputs have this layout, if any ran."""
    ran = [
        row
        for row in rows
        if (row["shape"], row["direction"], row["layout"]) == (shape, direction, layout)
        and row["implementation"] != OURS
        and row["seconds"]
    ]
    return min(ran, key=lambda row: row["seconds"], default=None)


def best_and_ratio(
    rows: Sequence[dict[str, Any]], shape: str, direction: str, layout: str
) -> tuple[str | None, float | None]:
    """The best baseline's name and its time over ours: above 1, ours is faster."""
    ours, best = find_row(rows, shape, direction), best_baseline(rows, shape, direction, layout)
    if best is None:
        return None, None
    return best["implementation"], best["seconds"] / ours["seconds"] if ours else None
