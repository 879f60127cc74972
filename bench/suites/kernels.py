"""Suite `kernels`: each operation on each of its spec's shapes, forward and backward, beside its baselines.

Forward runs without a graph, as sampling does; backward is the gradients of all inputs from a graph that is kept. Ours
are held against float64 on poisoned memory first (`bench.verify`), the others against ours: what is wrong is not timed.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from osp_fast.kernels.spec import DIRECTIONS, OpSpec, Result, Shape
from torch import Tensor

from bench.accuracy import (
    differentiable,
    draw_cotangents,
    exact_float32,
    gradient_leaves,
    largest_error,
    named,
    with_gradients,
)
from bench.baselines import Baseline, Unavailable, baselines_of, function_baseline
from bench.measure import Contestant, Timing, input_set_count, poisoned
from bench.ops import load_specs
from bench.results import OURS, Row
from bench.suites import Job, Options, Setting, reason_of
from bench.verify import check_case
from osp_fast.errors import UserError
from osp_fast.seeding import stable_seed

SUITE = "kernels"
DTYPE = torch.bfloat16  # specs count bytes for it
BASELINE_TOLERANCE = 0.05  # of a baseline's results and gradients against ours, which are held against float64
# Of a job's seconds: inputs and the check; compiling a baseline for both directions; the turns of an implementation and
# direction; float64 for each FLOP of the forward, which the check has seven of
CHECK_S, COMPILE_S, TURNS_S, FLOAT64_S_PER_FLOP = 0.5, 6.0, 0.5, 7 / 30e12

Bound = list[tuple[Callable[[], Result], Sequence[Tensor]]]  # (call, leaves) of each set of inputs


def jobs(options: Options, specs: Sequence[OpSpec] | None = None) -> list[Job]:
    """A job for each operation and shape. Raises UserError on a CPU, where the references serve them."""
    if options.device != "cuda":
        raise UserError("bench run kernels --device cpu: the kernels need a GPU: bench verify --device cpu checks them")
    if options.sizes:
        raise UserError("bench run kernels: operations have shapes of their own: use --case instead of --size")
    specs = list(load_specs().values()) if specs is None else specs
    return [op_job(spec, shape) for spec in specs for shape in spec.shapes]


def op_job(spec: OpSpec, shape: Shape) -> Job:
    """One operation on one shape, in both directions."""
    others = baselines_of(spec.name)
    # A call of tens of milliseconds runs longer than its turns; baselines are taken to need half as long again.
    running = sum(max(TURNS_S, 1.5 * 12 * spec.predicted(direction, **shape.sizes)) for direction in DIRECTIONS)
    check = CHECK_S + FLOAT64_S_PER_FLOP * spec.flops("forward", **shape.sizes)
    seconds = (
        check + COMPILE_S * sum(one.compiled for one in others) + running * (1 + 2 * len(spec.variants) + len(others))
    )
    measure = functools.partial(measure_op, spec, shape)
    return Job(SUITE, f"{spec.name} {shape.name}", seconds, measure, parts=DIRECTIONS)


def measure_op(spec: OpSpec, shape: Shape, setting: Setting) -> Iterator[Row]:
    """Rows of both directions, ours first; of forward alone where no input takes a gradient.

    Variants are unproven: they come last, so that one that breaks the device takes nothing with it.
    """
    with exact_float32():
        verdict = check_case(spec, shape, DTYPE, 0, setting.device)
    setting.say(f"{spec.name} {shape.name}: {verdict['verdict']}")
    ours = function_baseline(OURS, spec.operation, "ours")
    variants = [function_baseline(f"{OURS} {name}", made, "variant") for name, made in spec.variants.items()]
    yield from _measure_group(spec, shape, [ours, *baselines_of(spec.name)], verdict, setting)
    if variants:
        for row in _measure_group(spec, shape, [ours, *variants], verdict, setting):
            if row.role == "variant":
                yield row


def _measure_group(
    spec: OpSpec, shape: Shape, every: Sequence[Baseline], verdict: dict[str, Any], setting: Setting
) -> Iterator[Row]:
    """Rows of implementations that take turns, ours the first."""
    sets = make_input_sets(spec, shape, setting.device)
    bound: dict[str, Bound] = {}
    failed: dict[str, str] = {}
    if verdict["verdict"] != "ok":
        failed = {one.name: f"not timed: {OURS}, which it is held against, is wrong" for one in every}
        failed[OURS] = f"WRONG, not timed: {verdict['verdict']}"
    for one in every:
        try:
            if one.name not in failed:
                bound[one.name] = [one.bind(inputs) for inputs in sets]
        except Exception as error:  # whatever a library raises is the reason why it is not measured
            failed[one.name] = reason_of(error)
    for direction in DIRECTIONS if gradient_leaves(sets[0]) else ("forward",):
        seed = stable_seed("bench run", spec.name, shape.name)
        errors = _errors(every, bound, failed, sets[0], direction, seed)
        errors[OURS] = _error_of_ours(verdict["errors"], direction)
        timings = _time(bound, failed, sets[0], direction, setting)
        for one in every:
            yield _row(spec, shape, direction, one, errors.get(one.name), timings, failed)


def make_input_sets(spec: OpSpec, shape: Shape, device: torch.device) -> list[dict[str, Any]]:
    """Random inputs of one shape, as many sets as it takes to leave the L2 cache behind."""

    def make(place: int) -> dict[str, Any]:
        seed = stable_seed("bench run", spec.name, shape.name, place)
        return spec.make_inputs(device=device, dtype=DTYPE, seed=seed, **shape.sizes)

    first = make(0)
    return [first, *(make(place) for place in range(1, input_set_count(first, device)))]


def direction_calls(bound: Bound, direction: str) -> list[Callable[[], Any]]:
    """What is timed, for each set of inputs: (call, leaves) -> the call without graph, or the gradients of the leaves.

    backward keeps the graph of one forward call, which is not timed, and takes the gradients of it again and again,
    from a random gradient of each result that has one.
    """
    return [(_forward_call if direction == "forward" else _backward_call)(*pair) for pair in bound]


def _forward_call(call: Callable[[], Result], leaves: Sequence[Tensor]) -> Callable[[], Any]:
    return torch.no_grad()(call)


def _backward_call(call: Callable[[], Result], leaves: Sequence[Tensor]) -> Callable[[], Any]:
    with torch.enable_grad():
        outs = list(differentiable(call()).values())
    if not outs:
        raise Unavailable("it has no backward")
    cotangents = [torch.randn_like(out) for out in outs]
    return lambda: torch.autograd.grad(outs, leaves, cotangents, retain_graph=True)


def _errors(
    every: Sequence[Baseline],
    bound: dict[str, Bound],
    failed: dict[str, str],
    inputs: dict[str, Any],
    direction: str,
    seed: int,
) -> dict[str, float | None]:
    """Implementation -> its error against ours, the first, for one set of inputs; what is wrong joins `failed`.

    A gradient is compared where both have it: leaves gathered beforehand, or made of several inputs, have gradients
    that ours do not have. None: nothing could be compared.
    """
    found: dict[str, float | None] = {}
    expected = cotangents = None
    for one in every:
        if one.name in failed:
            continue
        call, leaves = bound[one.name][0]
        try:
            with poisoned() if one.role in ("ours", "variant") else contextlib.nullcontext():
                if direction == "forward":
                    with torch.no_grad():
                        results = named(one.restore(call(), inputs))
                else:
                    result = one.restore(call(), inputs)
                    cotangents = cotangents or draw_cotangents(
                        result, torch.Generator(_device(result)).manual_seed(seed)
                    )
                    results = _gradients(result, leaves, inputs, cotangents)
            expected = expected or results
            found[one.name] = _compare(results, expected, direction)
            if found[one.name] is not None and not found[one.name] <= BASELINE_TOLERANCE:
                failed[one.name] = f"WRONG, not timed: off by {found[one.name]:.1e} from ours"
        except Exception as error:  # whatever a library raises is the reason why it is not measured
            failed[one.name] = reason_of(error)
            if one.name == OURS:  # nothing to hold the others against
                raise
    return found


def _compare(found: dict[str, Tensor], expected: dict[str, Tensor], direction: str) -> float | None:
    """The worst error. Raises Unavailable if results have other shapes or types, or some are missing."""
    if direction == "backward":
        expected = {name: x for name, x in expected.items() if name in found}
    for what, of in (("shapes", lambda x: tuple(x.shape)), ("types", lambda x: str(x.dtype))):
        values, wanted = ([of(x) for x in results.values()] for results in (found, expected))
        if values != wanted:
            raise Unavailable(f"its results have {what} {values}, ours have {wanted}")
    return largest_error(found, expected) if found else None


def _gradients(
    result: Result, leaves: Sequence[Tensor], inputs: dict[str, Any], cotangents: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Of those leaves that are inputs of the operation, by "d" and its name. Raises Unavailable without a graph."""
    if not differentiable(result):
        raise Unavailable("it has no backward")
    shared = {name: x for name, x in gradient_leaves(inputs).items() if any(x is leaf for leaf in leaves)}
    return {name: x for name, x in with_gradients(result, shared, cotangents).items() if name.startswith("d")}


def _device(result: Result) -> torch.device:
    return next(iter(named(result).values())).device


def _error_of_ours(errors: dict[str, float], direction: str) -> float | None:
    """The worst of the outputs, or of the gradients, against float64; NaN is the worst."""
    of_it = [error for name, error in errors.items() if name.startswith("d") == (direction == "backward")]
    return max(of_it, key=lambda error: (error != error, error), default=None)


def _time(
    bound: dict[str, Bound], failed: dict[str, str], inputs: dict[str, Any], direction: str, setting: Setting
) -> dict[str, Timing]:
    """Times of what did not fail; what fails now joins `failed`."""
    held = sum(x.numel() * x.element_size() for x in inputs.values() if isinstance(x, Tensor))
    contestants = []
    for name, pairs in bound.items():
        if name in failed:
            continue
        try:
            contestants.append(Contestant(name, direction_calls(pairs, direction), holds=held))
        except Exception as error:  # a backward that does not fit into memory, or is not there
            failed[name] = reason_of(error)
    found = setting.timer(contestants, setting.device)
    failed |= {name: reason_of(timing) for name, timing in found.items() if isinstance(timing, Exception)}
    return {name: timing for name, timing in found.items() if isinstance(timing, Timing)}


def _row(
    spec: OpSpec,
    shape: Shape,
    direction: str,
    one: Baseline,
    error: float | None,
    timings: dict[str, Timing],
    failed: dict[str, str],
) -> Row:
    row = Row(SUITE, f"{spec.name} {shape.name} {direction}", one.name, one.role, "bfloat16", dict(shape.sizes))
    row.flops, row.moved = (cost(direction, **shape.sizes) for cost in (spec.flops, spec.bytes))
    row.rel_err = error
    if one.role == "ours":
        row.predicted_ms = 1e3 * spec.predicted(direction, **shape.sizes)
    if one.name in failed:
        row.note = failed[one.name]
        return row
    row.ok = True
    for name, value in timings[one.name].fields().items():
        setattr(row, name, value)
    return row
