"""`bench compare`: two result files of `bench run`, or two of `bench static`; what got worse ends with exit code 1."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.results import SAME, Result, Row, read_result
from bench.run import describe_ceilings
from bench.table import format_table, milliseconds
from osp_fast.errors import UserError

STATIC_KEY = ("op", "kernel", "arch", "config")


def run_compare(before: Path, after: Path, threshold: float) -> int:
    """Print a table of ratios; 1 if a row is worse by more than `threshold` (0.05: five percent), else 0.

    Raises UserError if the two are of different commands, devices or versions.
    """
    old, new = read_result(before), read_result(after)
    if isinstance(old, Result) != isinstance(new, Result):
        kinds = ["run" if isinstance(one, Result) else "static" for one in (old, new)]
        raise UserError(f"{after}: is of bench {kinds[1]}, {before} of bench {kinds[0]}: give two of one kind")
    if isinstance(old, Result):
        refuse_other_environment(before, old, after, new)
        for path, result in ((before, old), (after, new)):
            print(f"{path}: {result.env['git']}, {result.env['date']}, {describe_ceilings(result.env)}")
        table, worse = compare_times(old.rows, new.rows, threshold, old.env["device"] != "cpu")
    else:
        table, worse = compare_static(old, new, threshold)
    print(table)
    for sentence in worse:
        print(f"WORSE {sentence}")
    return 1 if worse else 0


def refuse_other_environment(before: Path, old: Result, after: Path, new: Result) -> None:
    """Raises UserError, with all that differs, if times of the two do not compare."""
    differs = [
        f"{key} ({old.env.get(key)} and {new.env.get(key)})" for key in SAME if old.env.get(key) != new.env.get(key)
    ]
    if differs:
        raise UserError(
            f"{before} and {after} were measured in different environments, {', '.join(differs)}: "
            "measure both commits in one, as their times do not compare"
        )


def compare_times(
    old: Sequence[Row], new: Sequence[Row], threshold: float, absolute: bool = True
) -> tuple[str, list[str]]:
    """(table, what is worse): slower by more than `threshold` and both spreads, wrong, or measured no more.

    absolute: whether the table has times. Where the percentiles of both overlap there is no difference.
    """
    first, second = ({(row.suite, row.case, row.impl): row for row in rows} for rows in (old, new))
    lines, worse = [], []
    for name in dict.fromkeys([*first, *second]):
        before, after = first.get(name), second.get(name)
        times = [row.ms if row is not None and row.timed else None for row in (before, after)]
        ratio = times[1] / times[0] if all(times) else None
        within = ratio is not None and _overlap(before, after)
        cells = [milliseconds(value * 1e-3) if value else None for value in times] if absolute else []
        lines.append([*name, *cells, None if ratio is None else f"{ratio:.3f}", "within spread" if within else None])
        label = " ".join(name)
        if times[0] and not times[1]:
            reason = after.note if after is not None else "not in the second file"
            worse.append(f"{label}: measured before, {reason or 'not any more'}")
        elif ratio is not None and ratio > 1 + threshold and not within:
            worse.append(f"{label}: {100 * (ratio - 1):.1f} % slower")
    headers = ["suite", "case", "implementation", *(["before", "after"] if absolute else []), "after/before", ""]
    return format_table(headers, lines), worse


def _overlap(before: Row, after: Row) -> bool:
    """Whether the 20th to 80th percentiles of both have a time in common."""
    return before.ms_p20 <= after.ms_p80 and after.ms_p20 <= before.ms_p80


def compare_static(
    old: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]], threshold: float
) -> tuple[str, list[str]]:
    """(table, what is worse): any more spills, registers up by more than `threshold`, compiled before and no more."""
    lines, worse = [], []
    files = [{tuple(str(row[part]) for part in STATIC_KEY): row for row in rows} for rows in (old, new)]
    for name in dict.fromkeys([*files[0], *files[1]]):
        first, second = (rows.get(name) for rows in files)
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


def _change(first: dict[str, Any] | None, second: dict[str, Any] | None, figure: str) -> str:
    before, after = (row[figure] if row and "error" not in row else None for row in (first, second))
    if before == after:
        return "-" if before is None else str(before)
    return " -> ".join("-" if value is None else str(value) for value in (before, after))
