"""The baselines that every memory-bound operation has: its reference, eager and compiled; and what binds a call."""

import dataclasses
import functools
import importlib.util

import pytest
import torch
from osp_fast.kernels import channel_norm_spec
from osp_fast.kernels.spec import Shape

from bench import run
from bench.accuracy import named
from bench.baselines import Unavailable, baselines_of, compiled_reference, eager_reference
from bench.results import AS_WRITTEN, bound_by, rate

CPU = torch.device("cpu")
LIMITS = {"copy_bytes_per_second": 3e12, "matmul_flops_per_second": 8e14}


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
    assert leaves == [inputs["a"], inputs["b"]] and baseline.layout == AS_WRITTEN


def test_each_shape_is_compiled_for_itself(toy, eager_backend):
    torch._dynamo.reset()
    baseline = compiled_reference(reference)
    for rows in range(1, 12):  # more than the eight compilations after which torch.compile gives up
        sets = [toy.make_inputs(CPU, torch.float32, seed, rows, 5, 6) for seed in (0, 1)]
        for call, _ in [baseline.bind(inputs) for inputs in sets]:
            call()
    assert [shapes[0] for shapes in eager_backend] == [(rows, 6) for rows in range(1, 12)]


def test_a_reference_is_timed_in_both_directions(toy, eager_backend, monkeypatch):
    others = (eager_reference(reference), compiled_reference(reference))
    monkeypatch.setattr(run, "baselines_of", lambda op: others)
    spec = dataclasses.replace(toy.SPEC, operation=reference, reference=reference)
    shape = Shape("small", {"rows": 3, "columns": 4, "inner": 5})

    def clock(calls):
        for call in [*calls, *calls]:  # the graph of backward is kept
            call()
        return 1e-3, 0.0

    rows = list(run.measure_shape(spec, shape, CPU, LIMITS, clock))
    assert [row["implementation"] for row in rows[2::2]] == ["eager reference", "torch.compile of the reference"]
    assert all(row["seconds"] == 1e-3 for row in rows), rows
    table = run.ratio_table({"rows": rows})
    assert "best baseline as written" in table and "gathered" not in table


def test_a_reference_that_breaks_the_graph_is_not_available(toy, eager_backend, monkeypatch):
    def breaking(a, b):
        torch._dynamo.graph_break()
        return reference(a, b)

    monkeypatch.setattr(run, "baselines_of", lambda op: (compiled_reference(breaking),))
    spec = dataclasses.replace(toy.SPEC, operation=reference, reference=reference)
    rows = list(run.measure_shape(spec, toy.SPEC.shapes[1], CPU, LIMITS, lambda calls: (calls[0](), (1e-3, 0.0))[1]))
    assert rows[0]["seconds"] and "unavailable" in rows[-1]


def test_what_binds_and_at_what_rate():
    assert bound_by(798e12, 2.9e12) == "products" and bound_by(798e12, 3.1e12) == "memory"
    assert bound_by(798e12, 2.9e12, {**LIMITS, "copy_bytes_per_second": 2e12}) == "memory"
    assert rate(1e9, 2.76e9, 1e-3) == "2760 GB/s" and rate(420e12, 1e9, 1.0) == "420 TFLOP/s"


def test_the_baselines_of_the_channel_norm():
    baselines = {baseline.name: baseline for baseline in baselines_of("channel_norm")}
    assert list(baselines) == ["eager reference", "torch.compile of the reference", "Liger-Kernel LayerNorm"]
    sizes = dict(batch=1, frames=2, rows=3, columns=4, channels=8)
    for silu, reason in ((True, "has no SiLU"), (False, "is not installed")):
        inputs = channel_norm_spec.make_inputs(device=CPU, dtype=torch.float32, seed=0, **sizes, silu=silu)
        call, leaves = baselines["eager reference"].bind(inputs)
        assert torch.equal(call(), channel_norm_spec.SPEC.reference(**inputs)) and len(leaves) == 3
        if silu or importlib.util.find_spec("liger_kernel") is None:
            with pytest.raises(Unavailable, match=reason):
                baselines["Liger-Kernel LayerNorm"].bind(inputs)
