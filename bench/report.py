"""`bench report`: Markdown tables and plots of the newest results, beside them; of predictions where there are none.

Of each case the newest result of a device counts; all rows of a case are of one run, as ratios are. What lost to a
baseline, or is wrong, comes first.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from osp_fast.kernels.spec import OpSpec, Shape

from bench import plots
from bench.predict import OP_HEADERS, PREDICTED, op_lines, op_rows
from bench.predict_steps import CLIPS, Step, predict_steps, steps_table
from bench.results import H100, OURS, Result, Row, best_of, folder_name, newest_cases, read_results
from bench.run import describe_ceilings
from bench.table import markdown_table, milliseconds, percent
from osp_fast.errors import UserError

REPORT = "report.md"
HEADERS = ("case", "implementation", "times ours", "time", "spread", "TFLOP/s", "GB/s", "of peak", "error")
HEADERS += ("peak memory", "SM clock", "power", "")
CPU_HEADERS = ("case", "implementation", "times ours", "spread", "error", "")
Cases = Mapping[tuple[str, str], tuple[Result, list[Row]]]


def run_report(
    pairs: Sequence[tuple[OpSpec, Shape]], folder: Path, device: str | None = None, readme: Path | None = None
) -> int:
    """Write reports of all devices with results in `folder`, or of the one whose folder has this name.

    Of predictions, into folder/predicted, if no GPU has results. readme: a README whose table is written anew, too.
    Raises `UserError`.
    """
    if not folder.is_dir():
        raise UserError(f"--results {folder}: no such folder: name the one that bench run wrote to")
    devices = {folder_name(name): cases for name, cases in newest_cases(read_results(folder)).items()}
    if device is not None and device not in (*devices, PREDICTED):
        known = ", ".join((*devices, PREDICTED))
        raise UserError(f"--device {device!r} has no results in {folder}: choose from {known}")
    on_gpus = [name for name in devices if name != "cpu"]
    for name, cases in devices.items():
        if device in (None, name):
            write_report(folder / name, cases)
    if device == PREDICTED or (device is None and not on_gpus):
        write_predictions(folder / PREDICTED, pairs)
    if readme is not None:
        from bench.readme_table import write_readme

        write_readme(readme, folder)
    return 0


def write_report(place: Path, cases: Cases) -> None:
    """A device's report.md and plots, in its folder."""
    name = next(iter(cases.values()))[0].env["device"]
    rows = [row for _, of_case in cases.values() for row in of_case]
    drawn = []
    if name != "cpu":
        ceilings = max((result for result, _ in cases.values()), key=lambda result: result.env["date"]).ceilings
        points, lines = plots.roofline_points(rows), plots.attention_lines(rows)
        if points:
            drawn.append(("roofline.png", plots.roofline(points, ceilings, f"Operations on {name}")))
        if lines:
            drawn.append(("attention.png", plots.attention(lines, ceilings, f"Skiparse attention on {name}")))
        measured = {(row.suite, row.case.split()[0]): row.ms / 1e3 for row in rows if row.impl == OURS and row.timed}
        title = f"Steps: expected on one H100 SXM, measured on {name}"
        drawn.append(("steps.png", plots.steps(_steps(), measured, title)))
    _write(place, report_text(name, cases, [file for file, _ in drawn]), drawn)


def report_text(name: str, cases: Cases, images: Sequence[str] = ()) -> str:
    """Markdown of a device's cases, those first in which ours is not the fastest."""
    parts = [f"# Measured on {name}"]
    if name == "cpu":
        parts.append(
            "A CPU's times depend on what else it does: only ratios of one run are shown, of small cases, and no plots."
        )
    parts.append("## Not the fastest, wrong, or not measured\n\n" + ("\n".join(losses(cases)) or "None."))
    parts += [f"![{Path(image).stem}]({image})" for image in images]
    for suite in dict.fromkeys(suite for suite, _ in cases):
        chosen = {key: value for key, value in cases.items() if key[0] == suite}
        parts.append(f"## {suite}\n\n" + _suite_table(chosen, name != "cpu"))
        parts.append("\n".join(dict.fromkeys(_where(result) for result, _ in chosen.values())))
    parts.append("times ours: the implementation's time over ours, above 1 ours is faster. Meanings: bench/README.md.")
    return "\n\n".join(parts) + "\n"


def losses(cases: Cases) -> list[str]:
    """A line for each case in which ours is slower than something, wrong, or has no time."""
    lines = []
    for (suite, case), (_, rows) in cases.items():
        ours, best = next((row for row in rows if row.role == "ours"), rows[0]), best_of(rows)
        if not ours.ok and not ours.note.startswith("refused"):
            lines.append(f"- {suite} {case}: {ours.note or 'not measured'}")
        elif ours.ms is not None and best is not None and best.ms < ours.ms:
            lines.append(f"- {suite} {case}: {best.impl} needs {best.ms / ours.ms:.2f} of our time")
    return lines


def write_predictions(place: Path, pairs: Sequence[tuple[OpSpec, Shape]]) -> None:
    """The same of what is expected of one H100, where nothing has been measured."""
    rows, steps = op_rows(pairs, H100), _steps()
    expected = [_as_expected(row) for row in op_rows(pairs, H100)]
    title = "predicted for one H100 SXM, not measured"
    points, lines = plots.roofline_points(expected, PREDICTED), plots.attention_lines(expected, PREDICTED)
    drawn = [("roofline.png", plots.roofline(points, H100, f"Operations: {title}"))]
    if lines:
        drawn.append(("attention.png", plots.attention(lines, H100, f"Skiparse attention: {title}", PREDICTED)))
    drawn.append(("steps.png", plots.steps(steps, {}, f"Steps: {title}")))
    parts = ["# Predicted, not yet measured on a GPU"]
    parts.append("What one H100 SXM should reach, written down before measuring; `python -m bench predict` prints it.")
    parts += [f"![{Path(file).stem}]({file})" for file, _ in drawn]
    parts.append("## Steps\n\n" + steps_table(steps, markdown_table))
    parts.append("## Operations\n\n" + markdown_table(OP_HEADERS, op_lines(rows, H100, True)))
    _write(place, "\n\n".join(parts) + "\n", drawn)


def _as_expected(row: Row) -> Row:
    """A prediction in the place of a measurement."""
    row.ok, row.ms = True, row.predicted_ms
    return row


def _steps() -> list[Step]:
    return [step for clip in CLIPS for step in predict_steps(clip)]


def _suite_table(cases: Cases, absolute: bool) -> str:
    lines = []
    for (_, case), (_, rows) in cases.items():
        ours = next((row for row in rows if row.role == "ours"), None)
        for row in rows:
            ratio = ours.vs.get(row.impl) if ours is not None else None
            spread = percent((row.ms_p80 - row.ms_p20) / row.ms) if row.ms else None
            error = None if row.rel_err is None else f"{row.rel_err:.1e}"
            line = [case, row.impl, f"{ratio:.2f}" if ratio else None]
            lines.append([*line, *_figures(row, spread, error)] if absolute else [*line, spread, error, row.note])
    return markdown_table(HEADERS if absolute else CPU_HEADERS, lines)


def _figures(row: Row, spread: str | None, error: str | None) -> list[str | None]:
    figures = [milliseconds(row.ms / 1e3) if row.ms else None, spread]
    figures += [None if rate is None else f"{rate:.0f}" for rate in (row.tflops, row.tbps and row.tbps * 1e3)]
    figures += [percent(row.of_peak), error, None if row.peak_mib is None else f"{row.peak_mib / 1024:.2f} GiB"]
    figures += [
        None if row.sm_mhz is None else f"{row.sm_mhz:.0f} MHz",
        None if row.watts is None else f"{row.watts:.0f} W",
    ]
    more = [f"{name} {value:.4g}" for name, value in row.figures.items()]
    return [*figures, "; ".join(filter(None, [*more, row.note]))]


def _where(result: Result) -> str:
    """Device, versions, commit and date of a run."""
    env = result.env
    versions = ", ".join(f"{key} {env[key]}" for key in ("torch", "triton", "cuda", "cudnn", "driver") if env[key])
    return f"{env['date'][:10]}, commit {env['git']}: {describe_ceilings(env)}; {versions}."


def _write(place: Path, text: str, drawn: Sequence[tuple[str, Any]]) -> None:
    try:
        place.mkdir(parents=True, exist_ok=True)
        (place / REPORT).write_text(text)
    except OSError as error:
        raise UserError(f"{place / REPORT}: cannot be written ({error.strerror}): name another folder") from None
    for file, figure in drawn:
        plots.save(figure, place / file)
    print(f"written to {place}: {', '.join([REPORT, *(file for file, _ in drawn)])}")
