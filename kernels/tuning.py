"""Block sizes, warps and pipeline stages of the Triton kernels: one table, read by launchers, bench and static report.

The first row of each list was chosen so that nothing that `python -m bench static` builds spills on sm_80 and sm_90;
times on a GPU may change it (`python -m bench run --tune`). `forced` overrides the table for one kernel, in tests and
in the bench, in the thread that launches: a backward pass on a GPU runs in another, the backward operation does not.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

AnyConfig = TypeVar("AnyConfig")


@dataclass(frozen=True)
class Config:
    """One way to run an attention kernel.

    block_m: rows of a block of queries; block_n: of a block of keys; tail: rows at a time of what is left of a set
    """

    block_m: int
    block_n: int
    tail: int
    num_warps: int
    num_stages: int

    def __str__(self) -> str:
        return f"{self.block_m}x{self.block_n}/{self.tail} {self.num_warps} warps {self.num_stages} stages"


@dataclass(frozen=True)
class RowConfig:
    """One way to run a kernel that streams rows through registers.

    rows: rows (or pixels) of a block; programs: per multiprocessor, for kernels that walk over blocks
    """

    rows: int
    num_warps: int
    num_stages: int = 1
    programs: int = 1

    def __str__(self) -> str:
        return f"{self.rows} rows {self.num_warps} warps {self.num_stages} stages {self.programs} programs"


@dataclass(frozen=True)
class Call:
    """What the choice depends on. arch: compute capability as a number, 0 in the interpreter."""

    arch: int
    dtype: torch.dtype
    head_dim: int
    mode: str
    masked: bool
    descriptors: bool


@dataclass
class Forced:
    """A configuration that overrides the table, and whether any launch has asked for it."""

    config: Any
    used: bool = False


KERNELS = ("forward", "keys", "queries")
_forced: ContextVar[dict[str, Forced] | None] = ContextVar("forced", default=None)


def pick(kernel: str, rows: Sequence[AnyConfig]) -> AnyConfig:
    """The configuration of a kernel: the first of its candidates, unless one is forced. Names are unique over all."""
    override = (_forced.get() or {}).get(kernel)
    if override is None:
        return rows[0]
    override.used = True
    return override.config


def choose(kernel: str, call: Call) -> Config:
    """The configuration of one of `KERNELS` of skiparse attention."""
    return pick(kernel, candidates(kernel, call))


@contextmanager
def forced(kernel: str, config: Any) -> Iterator[Forced]:
    """Within it `pick` gives `config` for `kernel`."""
    override = Forced(config)
    token = _forced.set({**(_forced.get() or {}), kernel: override})
    try:
        yield override
    finally:
        _forced.reset(token)


def candidates(kernel: str, call: Call) -> list[Config]:
    """The configurations worth timing, the chosen one first."""
    if call.arch == 0:
        return [_INTERPRETED[kernel]]
    if call.dtype == torch.float32:
        if call.head_dim > 96:
            return [Config(32, 16, 16, 8, 1) if kernel == "forward" else Config(16, 32, 16, 8, 1)]
        return [Config(32, 32, 16, 8, 1) if kernel == "keys" and call.arch < 90 else _FLOAT32[kernel]]
    if call.arch >= 100 and call.descriptors:
        return _BLACKWELL[kernel]
    if kernel != "forward" and call.head_dim <= 48 and not call.descriptors:
        if kernel == "queries":
            return [Config(64, 32, 16, 4, 2)]
        return [Config(32, 32, 16, 8, 2) if call.masked else Config(32, 64, 16, 4, 2)]
    if kernel == "queries" and call.head_dim == 64 and not call.descriptors:
        return [Config(128, 64, 16, 8, 3)]
    table = _HOPPER if call.descriptors else _POINTERS
    return table[kernel, call.head_dim > 96, call.masked]


# Small blocks that differ, so that short clips have several blocks and a rest.
_INTERPRETED = {
    "forward": Config(32, 16, 16, 4, 1),
    "keys": Config(16, 32, 16, 4, 1),
    "queries": Config(32, 16, 16, 4, 1),
}
_FLOAT32 = {
    "forward": Config(32, 32, 16, 8, 1),
    "keys": Config(32, 32, 16, 4, 1),
    "queries": Config(32, 32, 16, 4, 1),
}
# Compiled, never timed: larger blocks want more than the 512 columns of tensor memory.
_BLACKWELL = {
    "forward": [Config(128, 64, 16, 8, 3), Config(128, 64, 16, 8, 2)],
    "keys": [Config(64, 64, 16, 8, 2), Config(64, 64, 16, 4, 2)],
    "queries": [Config(128, 64, 16, 8, 2), Config(64, 64, 16, 4, 2)],
}
# (kernel, head dimension above 96, masked): with descriptors, on sm_90
_HOPPER = {
    ("forward", False, False): [Config(128, 128, 32, 8, 3), Config(128, 128, 16, 8, 2), Config(128, 64, 32, 8, 4)],
    ("forward", False, True): [Config(128, 64, 16, 8, 3), Config(128, 64, 16, 8, 4)],
    ("forward", True, False): [Config(128, 64, 16, 8, 3), Config(128, 128, 16, 8, 2), Config(128, 64, 16, 8, 2)],
    ("forward", True, True): [Config(64, 64, 16, 4, 2), Config(128, 64, 16, 8, 2)],
    ("keys", False, False): [Config(64, 128, 16, 8, 3), Config(64, 128, 16, 8, 2), Config(64, 64, 16, 8, 3)],
    ("keys", False, True): [Config(64, 64, 16, 8, 2), Config(64, 128, 16, 8, 2)],
    ("keys", True, False): [Config(64, 64, 16, 8, 2), Config(64, 128, 16, 8, 2), Config(64, 64, 16, 8, 3)],
    ("keys", True, True): [Config(64, 64, 16, 8, 2), Config(64, 128, 16, 8, 2)],
    ("queries", False, False): [Config(128, 128, 16, 8, 3), Config(128, 128, 16, 8, 2), Config(128, 64, 16, 8, 3)],
    ("queries", False, True): [Config(128, 64, 16, 8, 2), Config(128, 128, 16, 8, 2)],
    ("queries", True, False): [Config(128, 64, 16, 8, 2), Config(128, 64, 16, 8, 3)],
    ("queries", True, True): [Config(128, 64, 16, 8, 2), Config(128, 64, 16, 8, 3)],
}
# with pointers, on sm_80 and newer
_POINTERS = {
    ("forward", False, False): [Config(128, 64, 16, 8, 3), Config(64, 64, 16, 4, 2), Config(128, 32, 16, 8, 3)],
    ("forward", False, True): [Config(128, 32, 16, 8, 3), Config(64, 32, 16, 4, 2)],
    ("forward", True, False): [Config(128, 32, 16, 8, 3), Config(64, 32, 16, 8, 2), Config(64, 64, 16, 8, 2)],
    ("forward", True, True): [Config(64, 32, 16, 4, 3), Config(64, 32, 16, 4, 2)],
    ("keys", False, False): [Config(32, 64, 16, 8, 2), Config(64, 64, 16, 8, 2), Config(64, 128, 16, 8, 2)],
    ("keys", False, True): [Config(32, 32, 16, 8, 2), Config(32, 64, 16, 8, 2)],
    ("keys", True, False): [Config(64, 64, 16, 8, 2), Config(64, 128, 16, 8, 2)],
    ("keys", True, True): [Config(64, 64, 16, 8, 2), Config(32, 64, 16, 8, 2)],
    ("queries", False, False): [Config(128, 64, 16, 8, 2), Config(128, 32, 16, 8, 2), Config(64, 64, 16, 4, 2)],
    ("queries", False, True): [Config(128, 32, 16, 8, 2), Config(128, 64, 16, 8, 2)],
    ("queries", True, False): [Config(128, 32, 16, 8, 2), Config(64, 32, 16, 4, 2)],
    ("queries", True, True): [Config(128, 32, 16, 8, 2), Config(64, 32, 16, 4, 2)],
}
