"""`bench report`: a Markdown table of the latest results, with the prediction where nothing has been measured."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from osp_fast.kernels.spec import DIRECTIONS, OpSpec, Shape

from bench.results import BASELINE_HEADERS, RESULTS, best_and_ratio, bound_by, find_row, latest_runs
from bench.run import describe_ceilings
from bench.table import markdown_table, milliseconds, percent
from osp_fast.errors import UserError

NOT_MEASURED = "not yet measured on a GPU"
HEADERS = ["op", "shape", "direction", "bound by", "device", "time", "TFLOP/s", "of matmul", "GB/s", "of copy"]
HEADERS += ["predicted", *(header for layout in BASELINE_HEADERS.values() for header in (layout, "x"))]


def run_report(pairs: Sequence[tuple[OpSpec, Shape]], results: Path | None, output: Path | None) -> int:
    """Print the report of the results under `results`, by default the repository's, or write it to `output`."""
    if results is not None and not results.is_dir():
        raise UserError(f"--results {results}: no such folder: name the one that bench run wrote to")
    text = report_text(pairs, latest_runs(RESULTS if results is None else results))
    if output is None:
        print(text)
    else:
        try:
            output.write_text(text + "\n")
        except OSError as error:
            raise UserError(f"--output {output}: cannot be written ({error.strerror}): name another file") from None
        print(f"written to {output}")
    return 0


def report_text(pairs: Sequence[tuple[OpSpec, Shape]], runs: Mapping[tuple[str, str], dict[str, Any]]) -> str:
    """A row per operation, shape, direction and device it was measured on, or one that says that it was not."""
    rows = []
    for spec, shape in pairs:
        measured = [run for (op, _), run in runs.items() if op == spec.name]
        for direction in DIRECTIONS:
            lines = [line for run in measured if (line := _measured_line(run, shape.name, direction))]
            flops, moved, seconds = (
                cost(direction, **shape.sizes) for cost in (spec.flops, spec.bytes, spec.predicted)
            )
            for line in lines or [[None, NOT_MEASURED, *[None] * 8]]:
                names = [spec.name, shape.name, direction, bound_by(flops, moved)]
                rows.append([*names, *line[:6], milliseconds(seconds), *line[6:]])
    notes = [
        f"{op} on {device}: {describe_ceilings(run['ceilings'])}; "
        + ", ".join(f"{name} {run['environment'][name]}" for name in ("torch", "triton", "cuda", "cudnn"))
        + f"; {run['date']}"
        for (op, device), run in runs.items()
        if op in {spec.name for spec, _ in pairs}
    ]
    legend = "x: the baseline's time over ours. predicted: written down for one H100 SXM before measuring."
    return "\n\n".join([markdown_table(HEADERS, rows), *notes, legend])


def _measured_line(run: dict[str, Any], shape: str, direction: str) -> list[str | None] | None:
    row = find_row(run["rows"], shape, direction)
    if row is None:
        return None
    line = [run["environment"]["device"], milliseconds(row["seconds"]), f"{row['tflops']:.0f}"]
    line += [percent(row["matmul_fraction"]), f"{row['gb_per_second']:.0f}", percent(row["copy_fraction"])]
    for layout in BASELINE_HEADERS:
        name, ratio = best_and_ratio(run["rows"], shape, direction, layout)
        line += [name, None if ratio is None else f"{ratio:.2f}"]
    return line
