"""Suite `tune`: every candidate configuration of every kernel in turns; ours is the one that is chosen now.

Candidates and calls are those of the spec's `Tunable`. One kernel at a time is changed, all others keep what their
tables give them; a kernel is judged by the time of the call that launches it. The backward operation is called by
itself: PyTorch runs a backward pass on a GPU in a thread that `osp_fast.kernels.tuning.forced` does not reach.
"""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from osp_fast.kernels import tuning
from osp_fast.kernels.launch import architecture
from osp_fast.kernels.spec import OpSpec, Shape
from torch import Tensor
from torch.utils._pytree import tree_leaves

from bench.accuracy import relative_error
from bench.measure import Contestant, Effort
from bench.ops import load_specs
from bench.results import Row
from bench.suites import Job, Options, Setting, reason_of
from bench.suites.kernels import make_input_sets
from osp_fast.errors import UserError

SUITE = "tune"
EFFORT = Effort(rounds=3, seconds=0.1, fewest=6, warm_seconds=0.02)
TOLERANCE = 0.05  # of a candidate's results against those of the chosen one
# Of a job's seconds, for each candidate: compiling and its turns. Candidates are not counted without a GPU.
CANDIDATES, CANDIDATE_S = 24, 1.5


def jobs(options: Options, specs: Sequence[OpSpec] | None = None) -> list[Job]:
    """A job for each operation and shape that has candidates. Raises UserError on a CPU."""
    if options.device != "cuda":
        raise UserError("bench run tune --device cpu: configurations are chosen on the GPU that they are for")
    specs = list(load_specs().values()) if specs is None else specs
    return [
        Job(SUITE, f"{spec.name} {shape.name}", CANDIDATES * CANDIDATE_S, functools.partial(tune_shape, spec, shape))
        for spec in specs
        if spec.tunable is not None
        for shape in spec.shapes
    ]


def tune_shape(spec: OpSpec, shape: Shape, setting: Setting) -> Iterator[Row]:
    """Rows of each kernel's candidates, the chosen first. Raises RuntimeError if a call does not launch its kernel."""
    sets = make_input_sets(spec, shape, setting.device)
    every = spec.tunable.candidates(sets[0], architecture(setting.device))
    for kernel, group in itertools.groupby(every, key=lambda pair: pair[0]):
        configs = [config for _, config in group]
        calls = [spec.tunable.bind(inputs, kernel) for inputs in sets]
        case = f"{spec.name} {shape.name}: {kernel}"
        compared = {x.shape for x in sets[0].values() if isinstance(x, Tensor)}
        yield from _tune_kernel(case, dict(shape.sizes), kernel, configs, calls, compared, setting)


def _tune_kernel(
    case: str,
    sizes: dict[str, Any],
    kernel: str,
    configs: Sequence[Any],
    calls: Sequence[Callable[[], Any]],
    compared: set[torch.Size],
    setting: Setting,
) -> Iterator[Row]:
    """compared: shapes of results that are held against the chosen one's; others, as attention's log-sum-exp, have
    places that nothing reads."""
    rows = {
        str(config): Row(SUITE, case, str(config), "variant" if place else "ours", "bfloat16", sizes)
        for place, config in enumerate(configs)
    }
    contestants = []
    expected: list[Tensor] | None = None
    for config in configs:
        row = rows[str(config)]
        try:  # that a candidate does not fit this device is a result
            with tuning.forced(kernel, config) as override:
                found = [x for x in tree_leaves(calls[0]()) if isinstance(x, Tensor) and x.shape in compared]
        except Exception as error:
            row.note = reason_of(error)
            continue
        if not override.used:
            raise RuntimeError(f"{case}: the call that is timed does not launch {kernel!r}")
        expected = expected or found
        errors = [relative_error(x, y) for x, y in zip(found, expected, strict=True)]
        row.rel_err = max(errors, key=lambda error: (error != error, error), default=None)
        row.ok = row.rel_err is None or row.rel_err <= TOLERANCE
        if row.ok:
            around = functools.partial(_forced, kernel, config)
            contestants.append(Contestant(str(config), calls, around))
        else:
            row.note = f"WRONG, not timed: off by {row.rel_err:.1e} from the first"
    for name, timing in setting.timer(contestants, setting.device, EFFORT).items():
        if isinstance(timing, Exception):
            rows[name].ok, rows[name].note = False, reason_of(timing)
            continue
        for field, value in timing.fields().items():
            setattr(rows[name], field, value)
    yield from rows.values()


@contextlib.contextmanager
def _forced(kernel: str, config: Any) -> Iterator[None]:
    with tuning.forced(kernel, config), torch.no_grad():
        yield
