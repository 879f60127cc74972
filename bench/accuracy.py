"""How far a result is from its float64 reference."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


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


def with_gradients(out: Tensor, inputs: dict[str, Any], cotangent: Tensor) -> dict[str, Tensor]:
    """ "out" and, for each leaf, "d" + its name: the gradient of sum(out * cotangent)."""
    leaves = gradient_leaves(inputs)
    found = {"out": out.detach()}
    if leaves:
        gradients = torch.autograd.grad(out, list(leaves.values()), cotangent.to(out.dtype))
        found |= {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return found


def results(function: Callable[..., Tensor], inputs: dict[str, Any], cotangent: Tensor) -> dict[str, Tensor]:
    """`with_gradients` of a call."""
    return with_gradients(function(**inputs), inputs, cotangent)


def in_float64(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same values, floating-point tensors as float64 leaves of their own."""
    return {
        name: x.detach().double().requires_grad_(x.requires_grad)
        if isinstance(x, Tensor) and x.is_floating_point()
        else x
        for name, x in inputs.items()
    }
