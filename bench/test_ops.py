"""`pytest bench --benchmark-only`: what serves each operation on a CPU, on all of its spec's small calls in turn."""

import pytest
import torch
from osp_fast.kernels.spec import DIRECTIONS

from bench.accuracy import gradient_leaves
from bench.ops import load_specs
from bench.suites.kernels import direction_calls
from bench.verify import check_case

CPU = torch.device("cpu")
SPECS = load_specs()


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", SPECS)
def test_operation(name, direction, benchmark):
    spec = SPECS[name]
    bound = []
    for shape in spec.small:
        assert check_case(spec, shape, torch.float32, 0, CPU)["verdict"] == "ok"
        inputs = spec.make_inputs(device=CPU, dtype=torch.float32, seed=0, **shape.sizes)
        leaves = list(gradient_leaves(inputs).values())
        if leaves or direction == "forward":
            bound.append((lambda inputs=inputs: spec.operation(**inputs), leaves))
    calls = direction_calls(bound, direction)
    benchmark(lambda: [call() for call in calls])
