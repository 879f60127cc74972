"""`bench run`: each operation, shape and direction timed on a GPU, beside the device's ceilings and its baselines."""

import datetime
import functools
import gc
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from osp_fast.kernels.spec import DIRECTIONS, OpSpec, Result, Shape
from torch import Tensor

from bench.accuracy import (
    draw_cotangents,
    gradient_leaves,
    largest_error,
    named,
    relative_error,
    with_gradients,
)
from bench.baselines import Baseline, Unavailable, baselines_of, function_baseline
from bench.measure import (
    Timer,
    ceilings,
    direction_calls,
    environment,
    input_set_count,
    median_seconds,
    require_cuda,
)
from bench.results import (
    AS_WRITTEN,
    BASELINE_HEADERS,
    OURS,
    VARIANT,
    best_and_ratio,
    bound_by,
    find_row,
    rate,
    result_path,
    write_result,
)
from bench.table import format_table, milliseconds, percent
from osp_fast.seeding import stable_seed

NOT_PREDICTED = {"predicted": None, "predicted_rate": None}
DTYPE = torch.bfloat16  # specs count bytes for it
BASELINE_TOLERANCE = 0.05  # of a baseline's results and gradients against ours; bench verify is the check of ours
REASON_LENGTH = 200


def run_bench(pairs: Sequence[tuple[OpSpec, Shape]], folder: Path) -> int:
    """Measure `pairs`, print tables, write a result file per operation; 1 if an operation of ours did not run."""
    device = require_cuda("run")
    limits = ceilings(device)
    print(f"{environment(device)['device']}: {describe_ceilings(limits)}", flush=True)
    failed = False
    for spec, group in itertools.groupby(pairs, key=lambda pair: pair[0]):
        path = result_path(folder, environment(device)["device"], spec.name)
        keep = functools.partial(write_result, path)
        result = measure_op(spec, [shape for _, shape in group], device, limits, median_seconds, keep)
        print(result_table(result))
        print(ratio_table(result))
        print(f"written to {path}")
        failed |= any(row["implementation"] == OURS and row["seconds"] is None for row in result["rows"])
    return 1 if failed else 0


def measure_op(
    spec: OpSpec,
    shapes: Sequence[Shape],
    device: torch.device,
    limits: dict[str, float],
    timer: Timer,
    keep: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """What a result file of `bench run` holds; see bench/README.md. `keep` gets it after each shape as it has grown."""
    rows: list[dict[str, Any]] = []
    result = {
        "kind": "run",
        "op": spec.name,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "environment": environment(device),
        "ceilings": limits,
        "rows": rows,
    }
    for shape in shapes:
        for row in measure_shape(spec, shape, device, limits, timer):
            rows.append(row)
            took = milliseconds(row["seconds"]) or f"not available: {row['unavailable']}"
            print(f"{spec.name} {shape.name} {row['direction']} {row['implementation']}: {took}", flush=True)
        keep(result)
    return result


def measure_shape(
    spec: OpSpec, shape: Shape, device: torch.device, limits: dict[str, float], timer: Timer
) -> Iterator[dict[str, Any]]:
    """Yield a row per implementation and direction, ours first. What cannot run has a reason instead of figures.

    An operation none of whose inputs takes a gradient has no backward. Before an implementation is timed, its results
    for the first set of inputs are held against ours, and its gradients of those leaves that are inputs of ours.
    """
    sets = make_input_sets(spec, shape, device)
    directions = DIRECTIONS if gradient_leaves(sets[0]) else ("forward",)
    expected = cotangents = gradients = None
    ours = function_baseline(OURS, spec.operation)
    variants = (function_baseline(f"{OURS} {name}", function, VARIANT) for name, function in spec.variants.items())
    # Variants are unproven: last, so that one that breaks the device takes no baseline with it.
    for implementation in (ours, *baselines_of(spec.name), *variants):
        reason = None
        for direction in directions:
            seconds = spread = None
            try:
                if reason is None:
                    bound = [implementation.bind(inputs) for inputs in sets]
                    if direction == "forward":
                        result = _checked_result(implementation, bound[0][0], sets[0], expected)
                        expected = result if implementation.name == OURS else expected
                    elif implementation.name == OURS:
                        cotangents, gradients = _gradients_of_ours(spec, shape, sets[0], device)
                    elif gradients is not None:
                        _check_gradients(implementation, *bound[0], sets[0], cotangents, gradients)
                    seconds, spread = timer(direction_calls(bound, direction))
            except Exception as error:  # whatever a library raises is the reason why it was not measured
                reason = reason_of(error)
            bound = result = None  # frees their memory for the next
            row = {"shape": shape.name, "direction": direction, "implementation": implementation.name}
            row |= {"layout": implementation.layout, "seconds": seconds, "spread": spread}
            row |= _rates(spec, shape, direction, seconds, limits)
            row |= _predicted(spec, shape, direction, limits) if implementation is ours else NOT_PREDICTED
            yield row if seconds is not None else row | {"unavailable": reason}
    sets.clear()
    expected = cotangents = gradients = None
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def reason_of(error: Exception) -> str:
    """One line that says what an exception says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:REASON_LENGTH]


def make_input_sets(spec: OpSpec, shape: Shape, device: torch.device) -> list[dict[str, Any]]:
    """Random inputs of one shape, as many sets as it takes to leave the L2 cache behind."""

    def make(place: int) -> dict[str, Any]:
        seed = stable_seed("bench run", spec.name, shape.name, place)
        return spec.make_inputs(device=device, dtype=DTYPE, seed=seed, **shape.sizes)

    first = make(0)
    return [first, *(make(place) for place in range(1, input_set_count(first, device)))]


def describe_ceilings(limits: dict[str, float]) -> str:
    """The two ceilings in words."""
    return (
        f"copy {limits['copy_bytes_per_second'] / 1e9:.0f} GB/s, "
        f"bf16 matrix product {limits['matmul_flops_per_second'] / 1e12:.0f} TFLOP/s"
    )


def result_table(result: dict[str, Any]) -> str:
    """Every row of a result, one line each; what is not available says why."""
    headers = ["shape", "direction", "implementation", "time", "spread", "bound by"]
    headers += ["TFLOP/s", "of matmul", "GB/s", "of copy", "predicted", "rate at that", ""]
    lines = []
    for row in result["rows"]:
        figures = [percent(row["spread"]), row["bound_by"], _rounded(row["tflops"]), percent(row["matmul_fraction"])]
        figures += [_rounded(row["gb_per_second"]), percent(row["copy_fraction"])]
        figures += [milliseconds(row["predicted"]), row["predicted_rate"]]
        note = f"not available: {row['unavailable']}" if row["seconds"] is None else ""
        names = [row["shape"], row["direction"], row["implementation"]]
        lines.append([*names, milliseconds(row["seconds"]), *figures, note])
    return format_table(headers, lines)


def ratio_table(result: dict[str, Any]) -> str:
    """Ours against the best baseline of each layout: the baseline's time over ours."""
    rows = result["rows"]
    layouts = [
        layout for layout in BASELINE_HEADERS if layout == AS_WRITTEN or layout in {row["layout"] for row in rows}
    ]
    headers = ["shape", "direction", "ours"]
    headers += [header for layout in layouts for header in (BASELINE_HEADERS[layout], "ratio")]
    lines = []
    for shape, direction in dict.fromkeys((row["shape"], row["direction"]) for row in rows):
        mine = find_row(rows, shape, direction)
        line = [shape, direction, milliseconds(mine["seconds"] if mine else None)]
        for layout in layouts:
            name, ratio = best_and_ratio(rows, shape, direction, layout)
            line += [name, None if ratio is None else f"{ratio:.2f}"]
        lines.append(line)
    return format_table(headers, lines)


def _checked_result(
    implementation: Baseline, call: Callable[[], Result], inputs: dict[str, Any], expected: Result | None
) -> Result:
    """The result of one call in the operation's layout. Raises Unavailable if any of it is not what was expected."""
    with torch.no_grad():
        result = implementation.restore(call(), inputs)
    if expected is not None:
        found, wanted = named(result), named(expected)
        shapes, wanted_shapes = ([tuple(x.shape) for x in results.values()] for results in (found, wanted))
        if shapes != wanted_shapes:
            raise Unavailable(f"its results have shapes {shapes}, ours have {wanted_shapes}")
        types, wanted_types = ([str(x.dtype) for x in results.values()] for results in (found, wanted))
        if types != wanted_types:
            raise Unavailable(f"its results have types {types}, ours have {wanted_types}")
        error = largest_error(found, wanted)
        if not error <= BASELINE_TOLERANCE:
            raise Unavailable(f"its result differs from ours by {error:.1e}")
    return result


def _gradients_of_ours(
    spec: OpSpec, shape: Shape, inputs: dict[str, Any], device: torch.device
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(random gradients of the results, the gradients of the inputs that follow): what baselines are held against."""
    result = spec.operation(**inputs)
    seed = stable_seed("bench run cotangent", spec.name, shape.name)
    cotangents = draw_cotangents(result, torch.Generator(device).manual_seed(seed))
    found = with_gradients(result, inputs, cotangents)
    return cotangents, {name: found[f"d{name}"] for name in gradient_leaves(inputs)}


def _check_gradients(
    implementation: Baseline,
    call: Callable[[], Result],
    leaves: Sequence[Tensor],
    inputs: dict[str, Any],
    cotangents: dict[str, Tensor],
    expected: dict[str, Tensor],
) -> None:
    """Raises Unavailable if a gradient of a leaf that is an input of ours is not what was expected.

    Other leaves, gathered beforehand or made of several inputs, have gradients that ours do not have.
    """
    shared = {name: x for name, x in gradient_leaves(inputs).items() if any(x is leaf for leaf in leaves)}
    if not shared:
        return
    found = with_gradients(implementation.restore(call(), inputs), shared, cotangents)
    for name in shared:
        error = relative_error(found[f"d{name}"], expected[name])
        if not error <= BASELINE_TOLERANCE:
            raise Unavailable(f"its gradient of {name} differs from ours by {error:.1e}")


def _rates(
    spec: OpSpec, shape: Shape, direction: str, seconds: float | None, limits: dict[str, float]
) -> dict[str, Any]:
    flops, moved = spec.flops(direction, **shape.sizes), spec.bytes(direction, **shape.sizes)
    row = {"bound_by": bound_by(flops, moved, limits)}
    if seconds is None:
        return row | dict.fromkeys(("tflops", "matmul_fraction", "gb_per_second", "copy_fraction"))
    return row | {
        "tflops": flops / seconds / 1e12,
        "matmul_fraction": flops / seconds / limits["matmul_flops_per_second"],
        "gb_per_second": moved / seconds / 1e9,
        "copy_fraction": moved / seconds / limits["copy_bytes_per_second"],
    }


def _predicted(spec: OpSpec, shape: Shape, direction: str, limits: dict[str, float]) -> dict[str, Any]:
    flops, moved, seconds = (cost(direction, **shape.sizes) for cost in (spec.flops, spec.bytes, spec.predicted))
    return {"predicted": seconds, "predicted_rate": rate(flops, moved, seconds, limits)}


def _rounded(value: float | None) -> str | None:
    return None if value is None else f"{value:.1f}"
