"""`bench predict`: what two ceilings allow operations and whole steps, and what they are expected to take; no GPU.

A roofline is the longer of two times: FLOPs over the rate of a matrix product, bytes over the rate of a copy.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from osp_fast.kernels.spec import DIRECTIONS, OpSpec, Shape

from bench.results import ENV_KEYS, H100, Ceilings, Result, Row, read_result, write_result
from bench.table import format_table, markdown_table, milliseconds, percent
from osp_fast.errors import UserError

PREDICTED = "predicted"
OP_HEADERS = ("op", "shape", "direction", "TFLOP", "GB", "FLOP/byte", "bound by", "roofline", "expected", "of roofline")


def run_predict(
    what: Sequence[str],
    pairs: Sequence[tuple[OpSpec, Shape]],
    ceilings_file: Path | None = None,
    json_file: Path | None = None,
    as_markdown: bool = False,
) -> int:
    """Print what is asked for, "ops", "steps" (both, if nothing is) or "parallel". Raises `UserError`."""
    if "parallel" in what:
        from bench.predict_parallel import run_predict_parallel

        if len(what) > 1 or ceilings_file is not None:
            raise UserError("bench predict parallel is for an H100 and has a file of its own: name nothing beside it")
        return run_predict_parallel(json_file, as_markdown)
    limits, name = ceilings_of(ceilings_file)
    of_h100 = ceilings_file is None
    table = markdown_table if as_markdown else format_table
    print(
        f"{name}: a matrix product {limits.matmul_flops / 1e12:.0f} TFLOP/s, a copy {limits.copy_bytes / 1e12:.2f} TB/s"
    )
    rows: list[Row] = []
    if not what or "ops" in what:
        rows += op_rows(pairs, limits, of_h100)
        print("\n" + table(OP_HEADERS if of_h100 else OP_HEADERS[:-2], op_lines(rows, limits, of_h100)))
    if not what or "steps" in what:
        if of_h100:
            from bench.predict_steps import CLIPS, predict_steps, step_row, steps_table

            steps = [step for clip in CLIPS for step in predict_steps(clip)]
            print("\n" + steps_table(steps, table))
            rows += [step_row(step) for step in steps]
        else:
            print("\nsteps are predicted for one H100 alone: without --ceilings")
    if json_file is not None:
        write_result(json_file, Result(_environment(name, limits), rows))
        print(f"written to {json_file}")
    return 0


def ceilings_of(file: Path | None) -> tuple[Ceilings, str]:
    """Those of a result file and its device's name; an H100's, as measured, without one. Raises `UserError`."""
    if file is None:
        return H100, "one H100 SXM, as measured"
    result = read_result(file)
    if not isinstance(result, Result):
        raise UserError(f"--ceilings {file}: is of bench static, which measures none: give a file of bench run")
    return result.ceilings, result.env["device"]


def op_rows(pairs: Sequence[tuple[OpSpec, Shape]], limits: Ceilings, of_h100: bool = True) -> list[Row]:
    """A row for each operation, shape and direction: `ms` is the roofline's, `predicted_ms` the spec's, of an H100."""
    rows = []
    for spec, shape in pairs:
        for direction in DIRECTIONS:
            flops, moved = (cost(direction, **shape.sizes) for cost in (spec.flops, spec.bytes))
            case = f"{spec.name} {shape.name} {direction}"
            row = Row("kernels", case, PREDICTED, "variant", "bfloat16", dict(shape.sizes), flops=flops, moved=moved)
            row.ms = 1e3 * limits.seconds(flops, moved)
            if of_h100:
                row.predicted_ms = 1e3 * spec.predicted(direction, **shape.sizes)
            rows.append(row)
    return rows


def op_lines(rows: Sequence[Row], limits: Ceilings, of_h100: bool) -> list[list[str | None]]:
    """Of `op_rows`, by `OP_HEADERS`."""
    lines = []
    for row in rows:
        op, shape = row.case.split(" ", 1)
        shape, direction = shape.rsplit(" ", 1)
        line = [op, shape, direction, f"{row.flops / 1e12:.3f}", f"{row.moved / 1e9:.3f}"]
        line += [f"{row.flops / row.moved:.0f}", limits.bound_by(row.flops, row.moved), milliseconds(row.ms * 1e-3)]
        if of_h100:
            line += [milliseconds(row.predicted_ms * 1e-3), percent(row.ms / row.predicted_ms)]
        lines.append(line)
    return lines


def _environment(name: str, limits: Ceilings) -> dict[str, Any]:
    env = dict.fromkeys(ENV_KEYS)
    return env | {"device": name, "matmul_tflops": limits.matmul_flops / 1e12, "copy_tbps": limits.copy_bytes / 1e12}
