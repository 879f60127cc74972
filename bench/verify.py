"""`bench verify`: operations, their gradients and whole model paths against higher precision, on fresh inputs.

On a GPU each operation is checked at its spec's production shapes in every type of its tolerances; on a CPU Triton's
interpreter runs the same kernels at the spec's small shapes in float32. Models are in `verify_models.py`. A check is a
`Job`, as the cases of `bench run` are, and its verdict a `Row` without times.
"""

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from osp_fast.kernels.launch import forced_path, interpreting
from osp_fast.kernels.spec import OpSpec, Result, Shape, UnsupportedCall
from torch import Tensor

from bench import attention_check, results
from bench.accuracy import draw_cotangents, exact_float32, in_float64, relative_error, with_gradients
from bench.accuracy import results as results_of
from bench.measure import poisoned, require_cuda
from bench.ops import load_specs
from bench.results import OURS, Row, result_path, write_result
from bench.run import describe_ceilings
from bench.suites import Job, Options, Setting, reason_of
from bench.worker import Failed, InProcess, Measurer, Worker
from osp_fast.errors import UserError
from osp_fast.seeding import stable_seed

SUITE = "verify"
OK, REFUSED, NOT_MADE = "ok", "refused: ", "not made: "
TYPES = ("float32", "float16", "bfloat16")
DRAWS = {"cuda": 2, "cpu": 1}  # of inputs
# Operations whose float64 reference can be too large to hold -> (when, comparison of what fits).
SAMPLED = {"skiparse_attention": (attention_check.too_large, attention_check.compare_samples)}
# Of a job's seconds: what every check costs and compiling for the first of a kind; on a GPU the reference in float64,
# for each FLOP of forward and for each byte, which it moves in many passes; in the interpreter all of a small call.
CHECK_S, COMPILE_S, FLOAT64_S_PER_FLOP, FLOAT64_S_PER_BYTE, INTERPRETED_S = 0.3, 2.0, 7 / 30e12, 100 / 2.5e12, 0.7
Pairs = Sequence[tuple[OpSpec, Shape]]


def jobs(
    options: Options, pairs: Pairs, models: bool = True, types: Sequence[str] = ("bfloat16",), seeds: int = 1
) -> list[Job]:
    """A job for each shape, type and draw of an operation, for each path of a model, and for each variant.

    pairs: on a GPU of specs and their `shapes`, on a CPU of their `small`, which are checked in float32 alone
    types: by name; a type that an operation has no tolerance for is not checked of it
    """
    types = [name for name in types if options.device == "cuda" or name == "float32"]
    wanted = [
        (spec, shape, dtype, place)
        for spec, shape in pairs
        for dtype, place in itertools.product(spec.tolerances, range(seeds))
        if name_of(dtype) in types
    ]
    compiled: set = set()
    found = [_op_job(*one, None, options, compiled) for one in wanted]
    if models:
        from bench.verify_models import model_jobs  # which needs safetensors

        found += model_jobs(options.device, types)
    # Variants are unproven: last, so that one that breaks the device takes no other check with it.
    return found + [_op_job(*one, variant, options, compiled) for one in wanted for variant in one[0].variants]


def run_verify(
    pairs: Pairs,
    models: bool,
    device_type: str,
    seeds: int | None = None,
    types: Sequence[str] | None = None,
    json_folder: Path | None = None,
) -> int:
    """Make the checks of `jobs`, a line for each; 1 if one fails or none is right. Raises UserError.

    seeds: draws of inputs, None: `DRAWS`; types: by name, None: all of an operation's tolerances
    json_folder: where a result file is written, if anywhere, after each check
    """
    if device_type == "cpu" and not interpreting():
        raise UserError(
            "bench verify --device cpu runs the kernels in Triton's interpreter, which must be chosen before they are "
            "imported: set TRITON_INTERPRET=1"
        )
    options = Options(device_type)
    asked = {"models": models, "types": tuple(types or TYPES), "seeds": seeds or DRAWS[device_type]}
    checks = jobs(options, pairs, **asked)
    if not checks:
        raise UserError(f"bench verify: there is nothing to check in {', '.join(asked['types'])}: see --dtype and --op")
    if device_type == "cpu":
        measurer: Measurer = InProcess(torch.device("cpu"))
    else:
        require_cuda("verify")
        names = tuple((spec.name, shape.name) for spec, shape in pairs)
        measurer = Worker((SUITE,), options, functools.partial(_jobs_by_name, names=names, **asked))
    with contextlib.closing(measurer):
        rows = _checked(checks, measurer, json_folder)
    failures = [row for row in rows if is_failure(row)]
    refused, left = (sum(row.note.startswith(prefix) for row in rows) for prefix in (REFUSED, NOT_MADE))
    for row in failures:
        print(f"FAILED {row.case}: {row.note}")
    print(f"{len(rows)} checks, {len(failures)} failed, {refused} refused by a variant, {left} not made")
    return 1 if failures or not any(row.ok for row in rows) else 0


def _checked(checks: Sequence[Job], measurer: Measurer, json_folder: Path | None) -> list[Row]:
    """The rows of all checks, each printed, and in a result file, as soon as it is there."""
    env, rows = measurer.env, []
    path = json_folder and result_path(json_folder, env["device"], SUITE)
    print(f"{env['device']}: {describe_ceilings(env)}")
    width = max((len(check.case) for check in checks), default=0)
    print(f"{'':<{width}}  {'error':>8}  {'gradient':>8}  {'run twice':>9}  verdict", flush=True)
    for check in checks:
        rows += _rows(check, measurer)
        figures = rows[-1].figures
        twice = figures.get("second_run_rel_diff")
        error, gradient, last = map(_scientific, (*map(figures.get, ("output_rel_err", "gradient_rel_err")), twice))
        last = "equal" if twice == 0 else last
        print(f"{check.case:<{width}}  {error:>8}  {gradient:>8}  {last:>9}  {rows[-1].note}", flush=True)
        if path is not None:
            write_result(path, results.Result(env, rows))
    if path is not None:
        print(f"written to {path}")
    return rows


def _jobs_by_name(
    suites: Sequence[str], options: Options, *, names: Sequence[tuple[str, str]], **asked: Any
) -> list[Job]:
    """The same jobs in another process, of specs and shapes with these names."""
    specs = load_specs()
    shapes = {(spec.name, shape.name): (spec, shape) for spec in specs.values() for shape in spec.shapes}
    return jobs(options, [shapes[name] for name in names], **asked)


def _rows(check: Job, measurer: Measurer) -> list[Row]:
    """Of a check, or one that says why it has none."""
    rows: list[Row] = []
    note = ""
    try:
        rows.extend(measurer.rows(check))
    except UserError as error:
        note = f"{NOT_MADE}{error}"
    except Failed as error:
        note = f"error: {error}"
    return rows or [Row(SUITE, check.case, OURS, "ours", "", note=note or "error: it gave no verdict")]


def is_failure(row: Row) -> bool:
    """Whether a check was made and is not "ok"; a call that a variant refuses is no failure."""
    return not row.ok and not row.note.startswith((REFUSED, NOT_MADE))


def check_row(
    case: str,
    errors: Mapping[str, float],
    tolerances: tuple[float, float],
    dtype: str,
    repeats: Mapping[str, float] | None = None,
    remark: str = "",
    **fields: Any,
) -> Row:
    """A check's row: `verdict_of` the errors; the worst ones as figures. remark: said behind an "ok"."""
    verdict = verdict_of(errors, tolerances, repeats or {})
    figures = {"output_rel_err": worst(errors, outputs=True), "gradient_rel_err": worst(errors, outputs=False)}
    figures["second_run_rel_diff"] = max(repeats.values()) if repeats else None
    figures = {name: value for name, value in figures.items() if value is not None and math.isfinite(value)}
    row = Row(SUITE, case, **{"impl": OURS, "role": "ours", **fields}, dtype=dtype, figures=figures)
    row.ok, row.rel_err = verdict == OK, worst(errors)
    row.note = f"{verdict}, {remark}" if row.ok and remark else verdict
    return row


def name_of(dtype: torch.dtype) -> str:
    """torch.bfloat16 -> "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def _op_job(
    spec: OpSpec, shape: Shape, dtype: torch.dtype, place: int, variant: str | None, options: Options, compiled: set
) -> Job:
    case = f"{spec.name} {shape.name} {name_of(dtype)}{f', draw {place + 1}' if place else ''}"
    case += f", {variant}" if variant else ""
    if options.device == "cpu":
        seconds = INTERPRETED_S
    else:
        kind = (spec.name, dtype, variant)
        seconds = CHECK_S if kind in compiled else CHECK_S + COMPILE_S
        compiled.add(kind)
        seconds += FLOAT64_S_PER_FLOP * spec.flops("forward", **shape.sizes)
        seconds += FLOAT64_S_PER_BYTE * sum(spec.bytes(way, **shape.sizes) for way in ("forward", "backward"))
    return Job(SUITE, case, seconds, functools.partial(_measure_op, case, spec, shape, dtype, place, variant))


def _measure_op(
    case: str, spec: OpSpec, shape: Shape, dtype: torch.dtype, place: int, variant: str | None, setting: Setting
) -> Iterable[Row]:
    interpreted = setting.device.type == "cpu"
    # What the interpreter runs, it runs one after the other: a second call would show nothing.
    with exact_float32(), forced_path("triton") if interpreted else contextlib.nullcontext():
        found = check_case(spec, shape, dtype, place, setting.device, variant, twice=not interpreted)
    fields = {"impl": f"{OURS} {variant}", "role": "variant"} if variant else {}
    fields["shape"] = dict(shape.sizes)
    if not found["errors"]:
        base = {"impl": OURS, "role": "ours", **fields}
        return [Row(SUITE, case, **base, dtype=name_of(dtype), note=found["verdict"])]
    return [
        check_row(
            case, found["errors"], spec.tolerances[dtype], name_of(dtype), found["repeats"], found["remark"], **fields
        )
    ]


def check_case(
    spec: OpSpec,
    shape: Shape,
    dtype: torch.dtype,
    place: int,
    device: torch.device,
    variant: str | None = None,
    twice: bool = True,
) -> dict[str, Any]:
    """One shape, type and draw of inputs: errors against float64, and whether a second run on them is the same.

    It runs where fresh memory is full of NaN, so that what an operation forgets to write is wrong.

    variant: one of the spec's in place of the operation; a call that it refuses is "refused", which is no failure
    twice: whether there is a second run

    errors: "out" ("out0", "out1", ... of several) and "d" + input name -> ||found - expected|| / ||expected||
    repeats: the same names -> relative difference between two runs, 0.0 if every bit is the same
    verdict: "ok" or why not. A forward result that changes fails; gradients may change within their tolerance.
    remark: what was not compared in full
    """
    seed = stable_seed("bench verify", spec.name, shape.name, name_of(dtype), place)
    nothing = {"errors": {}, "repeats": {}, "remark": ""}
    try:
        function = spec.variants[variant] if variant else spec.operation
        found = _compare(spec, function, shape, dtype, seed, device, twice)
    except UnsupportedCall as error:
        return nothing | {"verdict": f"{REFUSED}{reason_of(error)}"}
    except torch.OutOfMemoryError:
        return nothing | {"verdict": f"{NOT_MADE}out of memory"}
    except Exception as error:  # one operation that breaks must not hide the others
        return nothing | {"verdict": f"error: {reason_of(error)}"}
    return found | {"verdict": verdict_of(found["errors"], spec.tolerances[dtype], found["repeats"])}


def _compare(
    spec: OpSpec,
    function: Callable[..., Result],
    shape: Shape,
    dtype: torch.dtype,
    seed: int,
    device: torch.device,
    twice: bool,
) -> dict[str, Any]:
    inputs = spec.make_inputs(device=device, dtype=dtype, seed=seed, **shape.sizes)
    with poisoned():
        result = function(**inputs)
    cotangents = draw_cotangents(result, torch.Generator(device).manual_seed(stable_seed("cotangent", seed)))
    with poisoned():
        first = with_gradients(result, inputs, cotangents)
        second = results_of(function, inputs, cotangents) if twice else {}
    repeats = {name: _difference(x, first[name]) for name, x in second.items()}
    too_large, sampled = SAMPLED.get(spec.name, (None, None))
    remark = ""
    if too_large is not None and too_large(inputs):
        compared = sampled(inputs, first, cotangents, seed)
        remark = "gradients of sampled tokens"
    else:
        expected = results_of(spec.reference, in_float64(inputs), cotangents)
        compared = {name: (x, expected[name]) for name, x in first.items()}
    errors = {name: relative_error(*pair) for name, pair in compared.items()}
    return {"errors": errors, "repeats": repeats, "remark": remark}


def _difference(found: Tensor, expected: Tensor) -> float:
    return 0.0 if torch.equal(found, expected) else relative_error(found, expected)


def verdict_of(errors: Mapping[str, float], tolerances: tuple[float, float], repeats: Mapping[str, float]) -> str:
    """ "ok", or all that is wrong. tolerances: of outputs and of gradients, whose names begin with d."""
    forward, gradient = tolerances
    wrong = []
    for name, error in errors.items():
        allowed = forward if _is_output(name) else gradient
        if not error <= allowed:  # NaN too
            wrong.append(f"{name} {error:.1e} > {allowed:.0e}")
    for name, difference in repeats.items():
        if not difference <= (0.0 if _is_output(name) else gradient):
            wrong.append(f"{name} of two equal calls differs by {difference:.1e}")
    return "; ".join(wrong) or OK


def worst(errors: Mapping[str, float], outputs: bool | None = None) -> float | None:
    """The largest error of all, of the outputs, or of the gradients; NaN is the largest. None if there are none."""
    chosen = [error for name, error in errors.items() if outputs is None or _is_output(name) == outputs]
    return max(chosen, key=lambda error: (error != error, error), default=None)


def _is_output(name: str) -> bool:
    return not name.startswith("d")  # as gradients do


def _scientific(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"
