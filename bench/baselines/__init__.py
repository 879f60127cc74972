"""What others offer for the same mathematics, timed in the same run: one file per operation, with `baselines()`."""

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from osp_fast.kernels.spec import Result
from torch import Tensor
from torch._functorch import config as functorch_config

from bench.accuracy import gradient_leaves
from bench.results import AS_WRITTEN


class Unavailable(Exception):
    """A baseline that cannot compute a call; the message says why."""


@dataclass(frozen=True)
class Baseline:
    """One way to compute an operation.

    layout: `results.AS_WRITTEN` if it takes the operation's inputs as they are, `results.GATHERED` if they were
        brought into its own layout before the clock starts
    bind: the operation's inputs -> (call, leaves): what is timed, and the tensors whose gradients backward takes.
        Raises `Unavailable` if it cannot serve them.
    restore: (what call returned, the operation's inputs) -> the result as the operation returns it
    """

    name: str
    layout: str
    bind: Callable[[dict[str, Any]], tuple[Callable[[], Result], Sequence[Tensor]]]
    restore: Callable[[Result, dict[str, Any]], Result]


def function_baseline(name: str, function: Callable[..., Result], layout: str = AS_WRITTEN) -> Baseline:
    """A function that takes the operation's own arguments and returns its results."""

    def bind(inputs: dict[str, Any]) -> tuple[Callable[[], Result], list[Tensor]]:
        return lambda: function(**inputs), list(gradient_leaves(inputs).values())

    return Baseline(name, layout, bind, lambda result, inputs: result)


def eager_reference(reference: Callable[..., Result]) -> Baseline:
    """The reference as PyTorch runs it, one kernel after another."""
    return function_baseline("eager reference", reference)


def compiled_reference(reference: Callable[..., Result]) -> Baseline:
    """torch.compile of the reference in one graph: what Inductor fuses by itself, each shape compiled for itself."""
    compiled = torch.compile(reference, dynamic=False, fullgraph=True)

    # Backward runs many times over one graph, which buffers donated to it would not survive.
    @functorch_config.patch(donated_buffer=False)
    def call(**inputs: Any) -> Result:
        return compiled(**inputs)

    plain = function_baseline("torch.compile of the reference", call)

    def bind(inputs: dict[str, Any]) -> tuple[Callable[[], Result], Sequence[Tensor]]:
        torch._dynamo.reset()  # after eight shapes it would give up without a word; sets of one shape share a graph
        return plain.bind(inputs)

    return Baseline(plain.name, plain.layout, bind, plain.restore)


def baselines_of(op: str) -> tuple[Baseline, ...]:
    """The baselines of an operation, none if there is no file for it."""
    name = f"bench.baselines.{op}"
    return importlib.import_module(name).baselines() if importlib.util.find_spec(name) else ()
