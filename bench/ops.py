"""The operations that the bench knows: the `SPEC` that each has in `kernels/`."""

import difflib
import importlib
from collections.abc import Iterable, Mapping, Sequence

from osp_fast.kernels.spec import OpSpec, Shape

from osp_fast.errors import UserError

MODULES = (
    "osp_fast.kernels.skiparse_attention_spec",
    "osp_fast.kernels.adaln_spec",
    "osp_fast.kernels.rope3d_spec",
    "osp_fast.kernels.sequence_pack_spec",
    "osp_fast.kernels.piece_projection_spec",
    "osp_fast.kernels.haar_spec",
    "osp_fast.kernels.channel_norm_spec",
    "osp_fast.kernels.causal_conv3d_spec",
)


def load_specs(modules: Iterable[str] = MODULES) -> dict[str, OpSpec]:
    """Operation name -> its spec, in the order of `modules`. Imports torch and Triton and nothing else of weight."""
    specs = [importlib.import_module(module).SPEC for module in modules]
    return {spec.name: spec for spec in specs}


def choose_ops(specs: Mapping[str, OpSpec], names: Sequence[str] | None) -> list[OpSpec]:
    """The specs with these names, or all. Raises UserError on a name that no operation has."""
    if not names:
        return list(specs.values())
    return [specs[_known(name, specs, "operation")] for name in names]


def choose_shapes(specs: Sequence[OpSpec], names: Sequence[str] | None) -> list[tuple[OpSpec, Shape]]:
    """Every (spec, shape) of `specs`, or those whose shape has one of these names. Raises UserError on an unknown."""
    pairs = [(spec, shape) for spec in specs for shape in spec.shapes]
    if not names:
        return pairs
    wanted = {_known(name, [shape.name for _, shape in pairs], "shape") for name in names}
    return [(spec, shape) for spec, shape in pairs if shape.name in wanted]


def _known(name: str, known: Iterable[str], what: str) -> str:
    known = list(known)
    if name in known:
        return name
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else "see python -m bench list"
    raise UserError(f"--{'op' if what == 'operation' else what} {name!r} is not a known {what}: {hint}")
