"""`bench verify`: every operation and its gradients on a GPU, each shape and type, against float64 on fresh inputs."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from osp_fast.kernels.spec import OpSpec, Result, Shape, UnsupportedCall
from torch import Tensor

from bench import attention_check
from bench.accuracy import draw_cotangents, exact_float32, in_float64, relative_error, results, with_gradients
from bench.measure import environment, require_cuda
from bench.suites import reason_of
from bench.table import format_table
from osp_fast.seeding import stable_seed

# Operations whose float64 reference can be too large to hold -> (when, comparison of what fits).
SAMPLED = {"skiparse_attention": (attention_check.too_large, attention_check.compare_samples)}


def run_verify(pairs: Sequence[tuple[OpSpec, Shape]], seeds: int, types: Sequence[str] | None = None) -> int:
    """Check every pair in every type of its tolerances, or those named; 1 if a check fails or there is none."""
    device = require_cuda("verify")
    print(environment(device)["device"], flush=True)
    rows = []
    for spec, shape in pairs:
        dtypes = [dtype for dtype in spec.tolerances if not types or name_of(dtype) in types]
        # Variants are unproven: last, so that one that breaks the device takes no other check with it.
        for variant, dtype, place in itertools.product((None, *spec.variants), dtypes, range(seeds)):
            with exact_float32():
                rows.append(check_case(spec, shape, dtype, place, device, variant))
            row = rows[-1]
            print(f"{row['op']} {shape.name} {row['dtype']} seed {place}: {row['verdict']}", flush=True)
    print(verify_table(rows))
    refused = sum(row["verdict"].startswith("refused: ") for row in rows)
    failures = sum(row["verdict"] != "ok" for row in rows) - refused
    print(f"{len(rows)} checks, {failures} failed, {refused} refused by a variant")
    return 1 if failures or not rows else 0


def check_case(
    spec: OpSpec, shape: Shape, dtype: torch.dtype, place: int, device: torch.device, variant: str | None = None
) -> dict[str, Any]:
    """One shape, type and draw of inputs: errors against float64, and whether a second run on them is the same.

    variant: one of the spec's in place of the operation; a call that it refuses is "refused", which is no failure.

    errors: "out" ("out0", "out1", ... of several) and "d" + input name -> ||found - expected|| / ||expected||
    repeat: the largest relative difference between two runs, 0.0 if every bit is the same
    verdict: "ok" or why not. A forward result that changes fails; gradients may change within their tolerance.
    """
    name = spec.name if variant is None else f"{spec.name} {variant}"
    row = {"op": name, "shape": shape.name, "dtype": name_of(dtype), "seed": place}
    seed = stable_seed("bench verify", spec.name, shape.name, row["dtype"], place)
    try:
        row |= _compare(spec, spec.variants[variant] if variant else spec.operation, shape, dtype, seed, device)
    except UnsupportedCall as error:
        return row | {"errors": {}, "repeat": None, "reference": None, "verdict": f"refused: {reason_of(error)}"}
    except Exception as error:  # one operation that breaks must not hide the others
        return row | {"errors": {}, "repeat": None, "reference": None, "verdict": f"error: {reason_of(error)}"}
    return row | {"verdict": _verdict(row, spec.tolerances[dtype])}


def name_of(dtype: torch.dtype) -> str:
    """torch.bfloat16 -> "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def verify_table(rows: Sequence[dict[str, Any]]) -> str:
    """One line per check."""
    lines = []
    for row in rows:
        worst = [_worst(row["errors"], outputs) for outputs in (True, False)]
        repeat = "equal" if row["repeat"] == 0 else _scientific(row["repeat"])
        figures = [worst[0] and worst[0].removesuffix(" out"), worst[1], repeat]
        names = [row["op"], row["shape"], row["dtype"], row["seed"]]
        lines.append([*names, *figures, row["reference"], row["verdict"]])
    headers = ["op", "shape", "type", "seed", "error", "worst gradient", "run twice", "reference", "verdict"]
    return format_table(headers, lines)


def _compare(
    spec: OpSpec, function: Callable[..., Result], shape: Shape, dtype: torch.dtype, seed: int, device: torch.device
) -> dict[str, Any]:
    inputs = spec.make_inputs(device=device, dtype=dtype, seed=seed, **shape.sizes)
    result = function(**inputs)
    cotangents = draw_cotangents(result, torch.Generator(device).manual_seed(stable_seed("cotangent", seed)))
    first = with_gradients(result, inputs, cotangents)
    second = results(function, inputs, cotangents)
    repeats = {name: _difference(second[name], x) for name, x in first.items()}
    too_large, sampled = SAMPLED.get(spec.name, (None, None))
    if too_large is not None and too_large(inputs):
        compared = sampled(inputs, first, cotangents, seed)
        reference = "float64, gradients sampled"
    else:
        expected = results(spec.reference, in_float64(inputs), cotangents)
        compared = {name: (x, expected[name]) for name, x in first.items()}
        reference = "float64"
    errors = {name: relative_error(*pair) for name, pair in compared.items()}
    return {"errors": errors, "repeats": repeats, "repeat": max(repeats.values()), "reference": reference}


def _difference(found: Tensor, expected: Tensor) -> float:
    return 0.0 if torch.equal(found, expected) else relative_error(found, expected)


def _verdict(row: dict[str, Any], tolerances: tuple[float, float]) -> str:
    forward, gradient = tolerances
    wrong = []
    for name, error in row["errors"].items():
        allowed = forward if _is_output(name) else gradient
        if not error <= allowed:  # NaN too
            wrong.append(f"{name} {error:.1e} > {allowed:.0e}")
    for name, difference in row["repeats"].items():
        if not difference <= (0.0 if _is_output(name) else gradient):
            wrong.append(f"{name} of two equal calls differs by {difference:.1e}")
    return "; ".join(wrong) or "ok"


def _is_output(name: str) -> bool:
    return not name.startswith("d")  # as gradients do


def _worst(errors: dict[str, float], outputs: bool) -> str | None:
    """The largest error of the outputs or of the gradients, with its name."""
    pairs = [(error, name) for name, error in errors.items() if _is_output(name) == outputs]
    worst = max(pairs, key=lambda pair: (pair[0] != pair[0], pair[0]), default=None)  # NaN is the worst
    return worst and f"{worst[0]:.1e} {worst[1]}"


def _scientific(value: float | None) -> str | None:
    return None if value is None else f"{value:.1e}"
