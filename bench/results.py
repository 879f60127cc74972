"""Result files: one environment, a row for each implementation of each case, and how times compare within a case.

`{"env": {...}, "rows": [{...}, ...]}`; bench/README.md has the meaning of every field. A ratio is only made of rows of
one case, which were measured in turns in one run, and never of a row that is wrong.
"""

import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from osp_fast.errors import UserError

RESULTS = Path(__file__).parent / "results"
OURS, REFERENCE, STRONG = "osp_fast", "reference", "strong"
# What an implementation is to a case: a variant is a kernel of ours that does not serve, a peer somebody else's.
ROLES = ("ours", "reference", "strong", "peer", "variant")
ENV_KEYS = ("device", "torch", "triton", "cuda", "cudnn", "driver", "git", "date", "matmul_tflops", "copy_tbps")
# What two results must have in common to be compared.
SAME = ("device", "capability", "torch", "triton", "cuda", "cudnn", "driver", "cpu", "threads")
STATIC_KEYS = {"op", "kernel", "arch", "config", "registers", "spills", "shared", "instructions"}
MIB = 1 << 20


@dataclass
class Row:
    """One implementation of one case, as measured.

    suite, case: their names; the implementations of a case are measured in turns and compared
    impl: osp_fast, reference, strong, or the name of what it is; role: one of `ROLES`
    dtype: of what is computed ("bfloat16"); shape: sizes by name
    ok: its results are right; rel_err: ||out - expected|| / ||expected|| against higher precision, the worst of all
        results; None where only the shape of a result could be compared
    ms, ms_p20, ms_p80: median and percentiles of a call; None if it was not timed, and `note` says why
    flops, moved: operations that the mathematics needs and bytes that must move, the same for all of a case
    tflops, tbps: their rates; of_peak: the part that a roofline of the run's ceilings allows
    peak_mib: memory allocated at most
    vs: implementation -> its time over this one's: above 1, this one is faster. Rows of ours and variants have it
    predicted_ms: written down before it was measured, for one H100 SXM
    figures: further numbers by name, with their unit in the name
    note: why it was not timed, or what was chosen
    """

    suite: str
    case: str
    impl: str
    role: str
    dtype: str
    shape: dict[str, Any] = field(default_factory=dict)
    ok: bool = False
    rel_err: float | None = None
    ms: float | None = None
    ms_p20: float | None = None
    ms_p80: float | None = None
    flops: float | None = None
    moved: float | None = None
    tflops: float | None = None
    tbps: float | None = None
    of_peak: float | None = None
    peak_mib: float | None = None
    vs: dict[str, float] = field(default_factory=dict)
    predicted_ms: float | None = None
    sm_mhz: float | None = None
    watts: float | None = None
    figures: dict[str, float] = field(default_factory=dict)
    note: str = ""

    @property
    def timed(self) -> bool:
        """Whether it is right and has a time."""
        return self.ok and self.ms is not None


@dataclass(frozen=True)
class Ceilings:
    """What a device was measured to reach: FLOP/s of a matrix product, bytes/s of a copy, read plus written."""

    matmul_flops: float
    copy_bytes: float

    def seconds(self, flops: float, moved: float) -> float:
        """The roofline: no call that needs so many operations and bytes is faster."""
        return max(flops / self.matmul_flops, moved / self.copy_bytes)

    def bound_by(self, flops: float, moved: float) -> str:
        """memory or products: whichever of the two takes longer."""
        return "memory" if moved / self.copy_bytes > flops / self.matmul_flops else "products"

    def rate(self, flops: float, moved: float, seconds: float) -> str:
        """The rate that counts: "2760 GB/s" if memory binds, "420 TFLOP/s" if products do."""
        if self.bound_by(flops, moved) == "memory":
            return f"{moved / seconds / 1e9:.0f} GB/s"
        return f"{flops / seconds / 1e12:.0f} TFLOP/s"


# One H100 SXM, for predictions: `bench run` measures its own device.
H100 = Ceilings(798e12, 3.0e12)


@dataclass
class Result:
    """A result file: `env` as `measure.environment` makes it."""

    env: dict[str, Any]
    rows: list[Row]

    @property
    def ceilings(self) -> Ceilings:
        """Of the run that measured the rows."""
        return Ceilings(self.env["matmul_tflops"] * 1e12, self.env["copy_tbps"] * 1e12)


def complete_case(rows: Sequence[Row], ceilings: Ceilings) -> None:
    """Fill in the rates and ratios of the rows of one case. What is wrong or has no time gets none."""
    for row in rows:
        row.tflops = row.tbps = row.of_peak = None
        row.vs = {}
        if not row.timed:
            continue
        seconds = row.ms * 1e-3
        row.tflops = None if row.flops is None else row.flops / seconds / 1e12
        row.tbps = None if row.moved is None else row.moved / seconds / 1e12
        if row.flops is not None or row.moved is not None:
            row.of_peak = ceilings.seconds(row.flops or 0, row.moved or 0) / seconds
        if row.role in ("ours", "variant"):
            row.vs = {other.impl: other.ms / row.ms for other in rows if other.timed and other is not row}


def best_of(rows: Iterable[Row], roles: Sequence[str] = ("reference", "strong", "peer")) -> Row | None:
    """The fastest right row with one of these roles."""
    return min((row for row in rows if row.timed and row.role in roles), key=lambda row: row.ms, default=None)


def cases_of(rows: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    """(suite, case) -> its rows, in their order."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row.suite, row.case), []).append(row)
    return found


def folder_name(device: str) -> str:
    """ "NVIDIA H100 80GB HBM3" -> "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def result_path(folder: Path, device: str, stem: str) -> Path:
    """A new folder/<device>/<stem>-<n>.json, n one more than the highest there."""
    place = folder / folder_name(device)
    numbers = [int(path.stem.rsplit("-", 1)[1]) for path in place.glob(f"{stem}-[0-9]*.json")]
    return place / f"{stem}-{max(numbers, default=0) + 1:03d}.json"


def write_json(path: Path, value: Any) -> None:
    """Write JSON in place of what is there, whole or not at all. Raises `UserError`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(value, indent=1) + "\n")
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}): name another place") from None


def write_result(path: Path, result: Result) -> None:
    """Write a result file. NaN and infinities, which JSON has not, are written as null."""
    rows = [{name: _finite(value) for name, value in asdict(row).items()} for row in result.rows]
    write_json(path, {"env": result.env, "rows": rows})


def read_result(path: Path) -> Result | list[dict[str, Any]]:
    """A result, or the rows of `bench static`. Raises `UserError` if the file is neither."""
    value = _read_json(path)
    if isinstance(value, list) and all(isinstance(row, dict) and row.keys() >= STATIC_KEYS for row in value):
        return value
    if not isinstance(value, dict) or not isinstance(value.get("env"), dict) or not isinstance(value.get("rows"), list):
        raise UserError(f"{path}: has no env and rows: give a file that bench run or bench static wrote")
    if missing := [key for key in ENV_KEYS if key not in value["env"]]:
        raise UserError(f"{path}: its env lacks {', '.join(missing)}: give a file that bench run wrote")
    return Result(value["env"], [_read_row(path, row) for row in value["rows"]])


def read_results(folder: Path) -> list[Result]:
    """All results of `bench run` in a folder and those below it, the oldest first; its other JSON files must be
    `bench static`'s."""
    found = [result for path in sorted(folder.rglob("*.json")) if isinstance(result := read_result(path), Result)]
    return sorted(found, key=lambda result: result.env["date"])


def newest_cases(results: Sequence[Result]) -> dict[str, dict[tuple[str, str], tuple[Result, list[Row]]]]:
    """Device -> (suite, case) -> its newest result that has it, and its rows there. `results`: the oldest first."""
    found: dict[str, dict[tuple[str, str], tuple[Result, list[Row]]]] = {}
    for result in results:
        cases = {key: (result, rows) for key, rows in cases_of(result.rows).items()}
        found.setdefault(result.env["device"], {}).update(cases)
    return found


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): give a file that bench wrote") from None
    except ValueError:
        raise UserError(f"{path}: is no JSON: give a file that bench run or bench static wrote") from None


def _read_row(path: Path, row: Any) -> Row:
    known = {one.name for one in fields(Row)}
    if not isinstance(row, dict) or not {"suite", "case", "impl", "role", "dtype"} <= row.keys() <= known:
        raise UserError(f"{path}: a row has not the fields of bench run's: give a file that this version wrote")
    return Row(**row)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
