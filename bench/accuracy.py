"""How far a result is from its float64 reference.

The results of a call have names: "out" of one tensor, "out0", "out1", ... of a tuple.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from osp_fast.kernels.spec import Result
from torch import Tensor


@contextmanager
def exact_float32() -> Iterator[None]:
    """Within it cuDNN's convolutions, and the kernels that follow its setting, multiply float32 without rounding it."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def relative_error(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected|| in float64; 0 if both are zero, NaN or infinite if `found` is not finite."""
    expected = expected.detach().double()
    difference = float((found.detach().double() - expected).norm())
    norm = float(expected.norm())
    if norm == 0:
        return 0.0 if difference == 0 else float("inf") if difference > 0 else difference
    return difference / norm


def gradient_leaves(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The inputs that take gradients, by name."""
    return {name: x for name, x in inputs.items() if isinstance(x, Tensor) and x.requires_grad}


def named(result: Result) -> dict[str, Tensor]:
    """Results by name."""
    return {"out": result} if isinstance(result, Tensor) else {f"out{i}": x for i, x in enumerate(result)}


def differentiable(result: Result) -> dict[str, Tensor]:
    """The results that have a gradient, by name."""
    return {name: x for name, x in named(result).items() if x.requires_grad}


def draw_cotangents(result: Result, generator: torch.Generator) -> dict[str, Tensor]:
    """Random gradients for the results that have one: their type and shape, drawn in float32."""
    return {
        name: torch.randn(x.shape, generator=generator, device=x.device, dtype=torch.float32).to(x.dtype)
        for name, x in differentiable(result).items()
    }


def with_gradients(result: Result, inputs: dict[str, Any], cotangents: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The results by name and, for each leaf, "d" + its name: the gradient of the sum of result * cotangent.

    Results without a cotangent take no part in the gradients.
    """
    leaves, results = gradient_leaves(inputs), named(result)
    found = {name: x.detach() for name, x in results.items()}
    if leaves and cotangents:
        sources = [results[name] for name in cotangents]
        weights = [cotangent.to(x.dtype) for x, cotangent in zip(sources, cotangents.values(), strict=True)]
        gradients = torch.autograd.grad(sources, list(leaves.values()), weights)
        found |= {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return found


def results(
    function: Callable[..., Result], inputs: dict[str, Any], cotangents: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """`with_gradients` of a call."""
    return with_gradients(function(**inputs), inputs, cotangents)


def largest_error(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The worst `relative_error` of results with the same names; NaN is the worst."""
    errors = [relative_error(x, expected[name]) for name, x in found.items()]
    return max(errors, key=lambda error: (error != error, error))


def in_float64(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same values, floating-point tensors as float64 leaves of their own; integers stay as they are.

    So do dtypes among them, which say what the results are to be: floating ones become float64, or a reference would
    round its results to them; integers stay, as a result in integers is compared as it is.
    """
    return {name: _in_float64(x) for name, x in inputs.items()}


def _in_float64(x: Any) -> Any:
    if isinstance(x, Tensor) and x.is_floating_point():
        return x.detach().double().requires_grad_(x.requires_grad)
    return torch.float64 if isinstance(x, torch.dtype) and x.is_floating_point else x
