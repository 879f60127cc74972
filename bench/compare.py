"""`bench compare`: what changed between two results of `bench run`, or two of `bench static`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.results import read_result
from bench.table import format_table, milliseconds
from osp_fast.errors import UserError

RUN_KEY = ("shape", "direction", "implementation")
TUNE_KEY = ("shape", "kernel", "config")
MODEL_KEY = ("case", "implementation")
STATIC_KEY = ("op", "kernel", "arch", "config")


def run_compare(before: Path, after: Path, threshold: float) -> int:
    """Print a table of ratios; 1 if a row is worse by more than `threshold` (0.05: five percent), else 0."""
    old, new = read_result(before), read_result(after)
    if _kind(old) != _kind(new):
        raise UserError(f"{after}: is of bench {_kind(new)}, {before} of bench {_kind(old)}: give two of one kind")
    if isinstance(old, list):
        table, worse = compare_static(old, new, threshold)
    else:
        for name, value in old["environment"].items():
            if new["environment"].get(name) != value:
                print(f"{name} differs: {value} -> {new['environment'].get(name)}")
        keys = {"run": RUN_KEY, "tune": TUNE_KEY, "vae": MODEL_KEY, "train": MODEL_KEY, "sample": MODEL_KEY}
        table, worse = compare_times(old["rows"], new["rows"], keys[_kind(old)], threshold)
    print(table)
    for sentence in worse:
        print(f"WORSE {sentence}")
    return 1 if worse else 0


def compare_times(
    old: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]], key: tuple[str, ...], threshold: float
) -> tuple[str, list[str]]:
    """(table, what is worse): slower by more than `threshold`, or measured before and no more."""
    lines, worse = [], []
    for name, first, second in _paired(old, new, key):
        before, after = (row["seconds"] if row else None for row in (first, second))
        ratio = after / before if before and after else None
        lines.append([*name, milliseconds(before), milliseconds(after), None if ratio is None else f"{ratio:.3f}"])
        if before and not after:
            worse.append(f"{' '.join(name)}: measured before, not any more")
        elif ratio is not None and ratio > 1 + threshold:
            worse.append(f"{' '.join(name)}: {100 * (ratio - 1):.1f} % slower")
    return format_table([*key, "before", "after", "after/before"], lines), worse


def compare_static(
    old: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]], threshold: float
) -> tuple[str, list[str]]:
    """(table, what is worse): any more spills, registers up by more than `threshold`, compiled before and no more."""
    lines, worse = [], []
    for name, first, second in _paired(old, new, STATIC_KEY):
        cells = [_change(first, second, figure) for figure in ("registers", "spills", "shared")]
        lines.append([*name, *cells])
        label = " ".join(name)
        if first is None or "error" in first:
            continue
        if second is None or "error" in second:
            worse.append(f"{label}: compiled before, {second['error'] if second else 'not in the second file'}")
            continue
        if second["spills"] > first["spills"]:
            worse.append(f"{label}: {first['spills']} -> {second['spills']} spills")
        if second["registers"] > first["registers"] * (1 + threshold):
            worse.append(f"{label}: {first['registers']} -> {second['registers']} registers")
    return format_table([*STATIC_KEY, "registers", "spills", "shared"], lines), worse


def _paired(
    old: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]], key: tuple[str, ...]
) -> list[tuple[tuple[str, ...], dict[str, Any] | None, dict[str, Any] | None]]:
    """(name, row of the first file, row of the second); None where a file does not have it."""
    first, second = ({tuple(str(row[part]) for part in key): row for row in rows} for rows in (old, new))
    return [(name, first.get(name), second.get(name)) for name in dict.fromkeys([*first, *second])]


def _change(first: dict[str, Any] | None, second: dict[str, Any] | None, figure: str) -> str:
    before, after = (row[figure] if row and "error" not in row else None for row in (first, second))
    if before == after:
        return "-" if before is None else str(before)
    return " -> ".join("-" if value is None else str(value) for value in (before, after))


def _kind(result: Any) -> str:
    return "static" if isinstance(result, list) else result["kind"]
