"""What `bench run` can measure, by suite: each is a module whose `jobs(options)` gives its cases.

Making jobs costs nothing and needs no GPU: models are built, and data drawn, when a job is measured.
"""

import importlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch

from bench.measure import Timer, time_in_turns
from bench.results import Ceilings, Row
from osp_fast.data.buckets import Bucket
from osp_fast.errors import UserError

SUITES = ("kernels", "model", "vae", "train", "sample", "parallel", "data")
ON_CPU = SUITES[1:]  # those with cases for a CPU
REASON_LENGTH = 200
ASKED_FOR = ("tune", "prompts")  # measured only where it is named


@dataclass(frozen=True)
class Options:
    """What the command line asks for.

    device: "cuda", or "cpu" for cases that a CPU does in seconds
    sizes: clips in place of a suite's own
    step_cache: thresholds to sample with, too; memory_budget: bytes to sample within, too
    vae_memory: bytes that our VAE may hold; None: what is free
    """

    device: str
    sizes: tuple[Bucket, ...] = ()
    step_cache: tuple[float, ...] = ()
    memory_budget: tuple[int, ...] = ()
    vae_memory: int | None = None


@dataclass(frozen=True)
class Setting:
    """What a job measures with.

    timer: `measure.time_in_turns`, or a test's; say: takes a line of progress or of what was chosen
    """

    device: torch.device
    ceilings: Ceilings
    say: Callable[[str], None] = field(default=print)
    timer: Timer = time_in_turns


@dataclass(frozen=True)
class Job:
    """One case: its implementations are measured in turns.

    case: unique in its suite
    parts: what its rows' cases have behind `case`, as forward and backward; empty: the case is theirs
    seconds: how long it should take on one H100, or on two cores of a CPU: building, compiling, checking, measuring
    measure: gives its rows, one by one where what comes later could break the device; `results.complete_case` is left
        to the caller. Raises `UserError` where the case cannot be measured here at all
    """

    suite: str
    case: str
    seconds: float
    measure: Callable[[Setting], Iterable[Row]]
    parts: tuple[str, ...] = ()

    @property
    def cases(self) -> tuple[str, ...]:
        """The cases of its rows."""
        return tuple(f"{self.case} {part}" for part in self.parts) or (self.case,)


def jobs_of(suites: Sequence[str], options: Options) -> list[Job]:
    """The jobs of these suites, in their order. Raises UserError for an unknown suite."""
    found: list[Job] = []
    for suite in suites:
        if suite not in (*SUITES, *ASKED_FOR):
            known = ", ".join((*SUITES, *ASKED_FOR))
            raise UserError(f"bench run: {suite!r} is not a suite: choose from {known}, or gpu-day alone")
        found += importlib.import_module(f"bench.suites.{suite}").jobs(options)
    return found


def reason_of(error: BaseException) -> str:
    """One line that says what an exception says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:REASON_LENGTH]
