"""Operations that return several tensors: differentiable or not, integers, views of an input."""

import torch
from osp_fast.kernels import haar_spec

from bench.accuracy import (
    differentiable,
    draw_cotangents,
    in_float64,
    largest_error,
    named,
    relative_error,
    results,
)

CPU = torch.device("cpu")


def many(a, b):
    """A product, a view of an input, an integer result and one that no gradient passes through."""
    product = a @ b
    return product, a[:, 1:], (product > 0).to(torch.uint8), product.detach().square()


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


def test_the_error_of_zero_is_zero_and_of_nan_is_nan():
    zero, one = torch.zeros(2), torch.ones(2)
    assert relative_error(zero, zero) == 0 and relative_error(one, zero) == float("inf")
    for found in (one * float("nan"), torch.tensor([1.0, float("nan")])):
        assert relative_error(found, one) != relative_error(found, one)
        assert relative_error(found, zero) != relative_error(found, zero)
