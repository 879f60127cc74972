"""The baselines that every memory-bound operation has: its reference, eager and compiled; and what binds a call."""

import dataclasses
import functools
import importlib.util

import pytest
import torch
from osp_fast.kernels import channel_norm_spec, rope3d_spec
from osp_fast.kernels.spec import Shape

from bench.accuracy import named
from bench.baselines import Unavailable, baselines_of, compiled_reference, eager_reference, rope3d
from bench.measure import Effort, time_in_turns
from bench.results import H100, Ceilings
from bench.suites import Setting, kernels

CPU = torch.device("cpu")


def reference(a, b, scale=1):
    return (a * scale) @ b, (a > 0).to(torch.uint8)


@pytest.fixture
def eager_backend(monkeypatch):
    """torch.compile without Inductor, for machines without a C++ compiler; the list of the shapes it compiled."""
    compiled = []

    def backend(graph, examples):
        compiled.append([tuple(x.shape) for x in examples if isinstance(x, torch.Tensor)])
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    return compiled


def test_the_eager_reference_is_the_reference(toy):
    baseline = eager_reference(reference)
    inputs = toy.make_inputs(CPU, torch.float32, 0, 4, 5, 6) | {"scale": 2}
    call, leaves = baseline.bind(inputs)
    found = named(baseline.restore(call(), inputs))
    assert all(torch.equal(x, expected) for x, expected in zip(found.values(), reference(**inputs), strict=True))
    assert leaves == [inputs["a"], inputs["b"]] and baseline.role == "reference"


def test_each_shape_is_compiled_for_itself(toy, eager_backend):
    torch._dynamo.reset()
    baseline = compiled_reference(reference)
    for rows in range(1, 12):  # more than the eight compilations after which torch.compile gives up
        sets = [toy.make_inputs(CPU, torch.float32, seed, rows, 5, 6) for seed in (0, 1)]
        for call, _ in [baseline.bind(inputs) for inputs in sets]:
            call()
    assert [shapes[0] for shapes in eager_backend] == [(rows, 6) for rows in range(1, 12)]


def rows_of(spec, monkeypatch, *others):
    monkeypatch.setattr(kernels, "baselines_of", lambda op: others)
    brief = functools.partial(time_in_turns, effort=Effort(rounds=2, seconds=0, fewest=2, warm_seconds=0))
    setting = Setting(CPU, Ceilings(8e14, 3e12), lambda line: None, brief)
    return list(kernels.measure_op(spec, Shape("small", {"rows": 3, "columns": 4, "inner": 5}), setting))


def test_a_reference_is_timed_in_both_directions(toy, eager_backend, monkeypatch):
    spec = dataclasses.replace(toy.SPEC, operation=reference, reference=reference)
    rows = rows_of(spec, monkeypatch, eager_reference(reference), compiled_reference(reference))
    assert [(row.impl, row.role) for row in rows[1:3]] == [("reference", "reference"), ("strong", "strong")]
    assert len(rows) == 6 and all(row.timed for row in rows), rows


def test_a_reference_that_breaks_the_graph_is_not_available(toy, eager_backend, monkeypatch):
    def breaking(a, b):
        torch._dynamo.graph_break()
        return reference(a, b)

    spec = dataclasses.replace(toy.SPEC, operation=reference, reference=reference)
    rows = rows_of(spec, monkeypatch, compiled_reference(breaking))
    assert rows[0].timed and rows[1].impl == "strong" and not rows[1].ok and rows[1].note


def test_what_binds_and_at_what_rate():
    assert H100.bound_by(798e12, 2.9e12) == "products" and H100.bound_by(798e12, 3.1e12) == "memory"
    assert Ceilings(798e12, 2e12).bound_by(798e12, 2.9e12) == "memory"
    assert H100.rate(1e9, 2.76e9, 1e-3) == "2760 GB/s" and H100.rate(420e12, 1e9, 1.0) == "420 TFLOP/s"


def test_the_baselines_of_the_channel_norm():
    baselines = {baseline.name: baseline for baseline in baselines_of("channel_norm")}
    assert list(baselines) == ["reference", "strong", "Liger-Kernel"]
    sizes = dict(batch=1, frames=2, rows=3, columns=4, channels=8)
    for silu, reason in ((True, "has no SiLU"), (False, "is not installed")):
        inputs = channel_norm_spec.make_inputs(device=CPU, dtype=torch.float32, seed=0, **sizes, silu=silu)
        call, leaves = baselines["reference"].bind(inputs)
        assert torch.equal(call(), channel_norm_spec.SPEC.reference(**inputs)) and len(leaves) == 3
        if silu or importlib.util.find_spec("liger_kernel") is None:
            with pytest.raises(Unavailable, match=reason):
                baselines["Liger-Kernel"].bind(inputs)


def test_the_original_rotation_is_ours():
    for shape in rope3d_spec.SPEC.small:
        inputs = rope3d_spec.SPEC.make_inputs(device=CPU, dtype=torch.float32, seed=0, **shape.sizes)
        expected, found = rope3d_spec.SPEC.reference(**inputs), rope3d.original(**inputs)
        assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(found, expected, strict=True)), shape.name
