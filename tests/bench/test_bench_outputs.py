"""Operations that return several tensors: differentiable or not, integers, views of an input."""

import dataclasses

import pytest
import torch
from osp_fast.kernels import haar_spec

from bench import run, verify
from bench.accuracy import differentiable, draw_cotangents, in_float64, largest_error, named, results
from bench.baselines import Baseline, eager_reference
from bench.measure import direction_calls
from bench.results import AS_WRITTEN

CPU = torch.device("cpu")
LIMITS = {"copy_bytes_per_second": 3e12, "matmul_flops_per_second": 8e14}


def many(a, b):
    """A product, a view of an input, an integer result and one that no gradient passes through."""
    product = a @ b
    return product, a[:, 1:], (product > 0).to(torch.uint8), product.detach().square()


@pytest.fixture
def spec(toy):
    return dataclasses.replace(toy.SPEC, operation=many, reference=many)


def clock(calls):
    for call in calls:
        call()
    return 1e-3, 0.02


def test_results_have_names():
    x = torch.ones(2)
    assert list(named(x)) == ["out"] and list(named((x,))) == ["out0"] and list(named((x, x))) == ["out0", "out1"]


def test_gradients_of_several_results_are_those_of_their_sum():
    a, b = (torch.randn(3, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    inputs = {"a": a, "b": b}
    outs = many(a, b)
    cotangents = draw_cotangents(outs, torch.Generator().manual_seed(1))
    assert list(cotangents) == list(differentiable(outs)) == ["out0", "out1"]
    assert all(x.dtype == torch.float64 for x in cotangents.values())
    found = results(many, inputs, cotangents)
    assert list(found) == ["out0", "out1", "out2", "out3", "da", "db"]
    expected = cotangents["out0"] @ b.detach().T
    expected[:, 1:] += cotangents["out1"]
    assert torch.allclose(found["da"], expected) and torch.allclose(found["db"], a.detach().T @ cotangents["out0"])


def test_without_cotangents_there_are_no_gradients():
    inputs = {"a": torch.ones(3, 3, requires_grad=True)}
    assert list(results(lambda a: (a > 0, a.detach()), inputs, {})) == ["out0", "out1"]


def test_float64_leaves_integers_alone():
    found = in_float64({"pixels": torch.ones(2, dtype=torch.uint8), "x": torch.ones(2).half(), "silu": True})
    assert found["pixels"].dtype == torch.uint8 and found["x"].dtype == torch.float64 and found["silu"] is True


def test_float64_reaches_the_dtypes_asked_for():
    """A reference that is to return bfloat16 would round; one that is to return integers is compared as it is."""
    found = in_float64({"dtype": torch.bfloat16, "pixels": torch.uint8})
    assert found == {"dtype": torch.float64, "pixels": torch.uint8}
    sizes = dict(transform="haar3d", batch=1, frames=3, height=4, width=8, pixels="same", low=True)
    inputs = haar_spec.make_inputs(device=CPU, dtype=torch.bfloat16, seed=0, **sizes)
    assert all(x.dtype == torch.float64 for x in haar_spec.call_ref(**in_float64(inputs)))


def test_the_largest_error_is_that_of_any_result():
    one = torch.ones(2)
    expected = {"out0": one, "out1": one, "out2": one}
    assert largest_error({"out0": one, "out1": one * 1.5, "out2": one}, expected) == 0.5
    assert largest_error({"out0": one * float("nan"), "out1": one, "out2": one}, expected) != 0


def test_several_results_verify(spec):
    row = verify.check_case(spec, spec.shapes[1], torch.float32, 0, CPU)
    assert row["verdict"] == "ok" and set(row["errors"]) == {"out0", "out1", "out2", "out3", "da", "db"}
    assert "ok" in verify.verify_table([row])


@pytest.mark.parametrize(
    "spoil, verdict",
    [
        (lambda outs: (*outs[:1], outs[1] * 1.001, *outs[2:]), "out1 1.0e-03 > 1e-05"),
        (lambda outs: (*outs[:2], 1 - outs[2], outs[3]), "out2"),
        (lambda outs: (*outs[:3], outs[3] * float("nan")), "out3 nan"),
        (lambda outs: (outs[0] + 0.001 * (outs[0] - outs[0].detach()), *outs[1:]), "db 1.0e-03"),
    ],
)
def test_one_wrong_result_of_several_fails(spec, spoil, verdict):
    row = verify.check_case(
        dataclasses.replace(spec, operation=lambda a, b: spoil(many(a, b))), spec.shapes[1], torch.float32, 0, CPU
    )
    assert verdict in row["verdict"]
    if verdict.startswith("out"):
        assert verdict.split()[0] in verify.verify_table([row])


def baseline(name, spoil):
    def bind(inputs):
        return lambda: spoil(many(**inputs)), [inputs["a"], inputs["b"]]

    return Baseline(name, AS_WRITTEN, bind, lambda out, inputs: out)


def test_all_results_of_a_baseline_are_held_against_ours(spec, monkeypatch):
    others = (
        baseline("same", lambda outs: outs),
        baseline("differs", lambda outs: (*outs[:3], outs[3] * 1.1)),
        baseline("lacks one", lambda outs: outs[:3]),
        baseline("is wider", lambda outs: (*outs[:3], outs[3].float())),
    )
    monkeypatch.setattr(run, "baselines_of", lambda op: others)
    rows = list(run.measure_shape(spec, spec.shapes[0], CPU, LIMITS, clock))
    found = {row["implementation"]: row.get("unavailable") for row in rows}
    assert found["osp_fast"] is found["same"] is None
    assert found["differs"].startswith("its result differs from ours by 1.0e-01")
    assert found["lacks one"].startswith("its results have shapes")
    assert found["is wider"].startswith("its results have types ['torch.bfloat16'")


def test_gradients_of_a_baseline_are_held_against_ours(toy, monkeypatch):
    def zero_gradients(inputs):
        a, b = inputs["a"], inputs["b"]
        return lambda: (a @ b).detach() + 0 * (a @ b), [a, b]

    def own_leaves(inputs):
        a, b = (inputs[name].detach().clone().requires_grad_() for name in "ab")
        return lambda: (a @ b).detach() + 0 * (a @ b), [a, b]

    others = [
        Baseline(bind.__name__, AS_WRITTEN, bind, lambda out, inputs: out) for bind in (zero_gradients, own_leaves)
    ]
    monkeypatch.setattr(run, "baselines_of", lambda op: (*others, eager_reference(toy.SPEC.reference)))
    rows = list(run.measure_shape(toy.SPEC, toy.SPEC.shapes[0], CPU, LIMITS, clock))
    assert [row["seconds"] is not None for row in rows] == [True, True, True, False, True, True, True, True]
    assert rows[3]["unavailable"] == "its gradient of a differs from ours by 1.0e+00"


def test_backward_of_several_results_is_what_is_timed():
    a, b = (torch.randn(3, 3, requires_grad=True) for _ in range(2))
    (backward,) = direction_calls([(lambda: many(a, b), [a, b])], "backward")
    assert [gradient.shape for gradient in backward()] == [a.shape, b.shape]


def test_an_operation_without_leaves_is_timed_forward_alone(spec, toy, monkeypatch):
    def make_inputs(**sizes):
        return {name: x.detach() for name, x in toy.make_inputs(**sizes).items()}

    monkeypatch.setattr(run, "baselines_of", lambda op: ())
    spec = dataclasses.replace(spec, make_inputs=make_inputs)
    (row,) = run.measure_shape(spec, spec.shapes[0], CPU, LIMITS, clock)
    assert row["direction"] == "forward" and row["seconds"] == 1e-3
    assert verify.check_case(spec, spec.shapes[1], torch.float32, 0, CPU)["verdict"] == "ok"
