"""`bench list`: what there is to run, and what each call should cost."""

from collections.abc import Sequence

from osp_fast.kernels.spec import DIRECTIONS, OpSpec, Shape

from bench.results import H100
from bench.table import format_table, milliseconds


def run_list(pairs: Sequence[tuple[OpSpec, Shape]]) -> int:
    """Print a line per operation, shape and direction. What binds and the predicted times are for one H100 SXM."""
    headers = ["op", "shape", "direction", "TFLOP", "GB", "FLOP/byte", "bound by", "predicted", "rate at that", "sizes"]
    rows = []
    for spec, shape in pairs:
        sizes = " ".join(f"{name}={value}" for name, value in shape.sizes.items())
        for direction in DIRECTIONS:
            flops, moved, seconds = (
                cost(direction, **shape.sizes) for cost in (spec.flops, spec.bytes, spec.predicted)
            )
            figures = [f"{flops / 1e12:.3f}", f"{moved / 1e9:.3f}", f"{flops / moved:.0f}", H100.bound_by(flops, moved)]
            figures += [milliseconds(seconds), H100.rate(flops, moved, seconds)]
            rows.append([spec.name, shape.name, direction, *figures, sizes])
    print(format_table(headers, rows))
    return 0
