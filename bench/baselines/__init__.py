"""What others offer for the same mathematics, timed in the same run: one file per operation, with `baselines()`.

`reference` is the operation as the original code has it, plain PyTorch kernels one after another; `strong` is what
torch.compile makes of the same, with PyTorch's best attention. Peers are other people's kernels.
"""

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from osp_fast.kernels.spec import Result
from torch import Tensor
from torch._functorch import config as functorch_config

from bench.accuracy import gradient_leaves
from bench.results import REFERENCE, STRONG

PEER = "peer"
# Packages that baselines come from where they are installed.
PACKAGES = ("flash-attn", "flash-attn-3", "flash-attn-4", "liger-kernel", "quack-kernels")


class Unavailable(Exception):
    """A baseline that cannot compute a call; the message says why."""


@dataclass(frozen=True)
class Baseline:
    """One way to compute an operation.

    role: one of `results.ROLES`
    bind: the operation's inputs -> (call, leaves): what is timed, and the tensors whose gradients backward takes.
        Raises `Unavailable` if it cannot serve them. What it brings into a layout of its own before the call is outside
        of the clock: its name says so.
    restore: (what call returned, the operation's inputs) -> the result as the operation returns it
    compiled: whether torch.compile makes it, which takes a while for each direction
    """

    name: str
    role: str
    bind: Callable[[dict[str, Any]], tuple[Callable[[], Result], Sequence[Tensor]]]
    restore: Callable[[Result, dict[str, Any]], Result] = lambda result, inputs: result
    compiled: bool = False


def function_baseline(name: str, function: Callable[..., Result], role: str = PEER) -> Baseline:
    """A function that takes the operation's own arguments and returns its results."""

    def bind(inputs: dict[str, Any]) -> tuple[Callable[[], Result], list[Tensor]]:
        return lambda: function(**inputs), list(gradient_leaves(inputs).values())

    return Baseline(name, role, bind)


def eager_reference(reference: Callable[..., Result]) -> Baseline:
    """The reference as PyTorch runs it, one kernel after another."""
    return function_baseline(REFERENCE, reference, REFERENCE)


def compiled_reference(reference: Callable[..., Result]) -> Baseline:
    """torch.compile of the reference in one graph: what Inductor fuses by itself, each shape compiled for itself."""
    call = compiled(reference)
    plain = function_baseline(STRONG, call, STRONG)

    def bind(inputs: dict[str, Any]) -> tuple[Callable[[], Result], Sequence[Tensor]]:
        forget_compiled()
        return plain.bind(inputs)

    return Baseline(plain.name, plain.role, bind, compiled=True)


def compiled(function: Callable[..., Result]) -> Callable[..., Result]:
    """torch.compile of a function, whole and for one shape, whose graph backward may run through many times."""
    graph = torch.compile(function, dynamic=False, fullgraph=True)

    # Buffers donated to backward would not survive its first run.
    @functorch_config.patch(donated_buffer=False)
    def call(*arguments: Any, **options: Any) -> Result:
        return graph(*arguments, **options)

    return call


def forget_compiled() -> None:
    """Before a new shape: after eight torch.compile would give up without a word; sets of one shape share a graph."""
    torch._dynamo.reset()


def baselines_of(op: str) -> tuple[Baseline, ...]:
    """The baselines of an operation, none if there is no file for it."""
    name = f"bench.baselines.{op}"
    return importlib.import_module(name).baselines() if importlib.util.find_spec(name) else ()


def installed_packages() -> dict[str, str | None]:
    """The packages of peers -> their versions; None: not installed, and not measured."""
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found
