"""What others offer for the same mathematics, timed in the same run: one file per operation, with `baselines()`."""

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from osp_fast.kernels.spec import Result
from torch import Tensor


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


def baselines_of(op: str) -> tuple[Baseline, ...]:
    """The baselines of an operation, none if there is no file for it."""
    name = f"bench.baselines.{op}"
    return importlib.import_module(name).baselines() if importlib.util.find_spec(name) else ()
