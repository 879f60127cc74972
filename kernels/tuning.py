"""Block sizes, warps and pipeline stages of the Triton kernels: one table, read by launchers, bench and static report.

A row was chosen so that nothing spills on its architecture (`python -m bench static`); times on a GPU may change it
(`python -m bench run --tune`). `forced` overrides the table for one kernel, in tests and in the bench.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch


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
class Call:
    """What the choice depends on. arch: compute capability as a number, 0 in the interpreter."""

    arch: int
    dtype: torch.dtype
    head_dim: int
    mode: str
    masked: bool
    descriptors: bool


KERNELS = ("forward", "keys", "queries")
_forced: ContextVar[dict[str, Config] | None] = ContextVar("forced", default=None)


def choose(kernel: str, call: Call) -> Config:
    """The configuration of one of `KERNELS` of skiparse attention."""
    return (_forced.get() or {}).get(kernel) or candidates(kernel, call)[0]


@contextmanager
def forced(kernel: str, config: Config) -> Iterator[None]:
    """Within it `choose` gives `config` for `kernel`."""
    token = _forced.set({**(_forced.get() or {}), kernel: config})
    try:
        yield
    finally:
        _forced.reset(token)


def candidates(kernel: str, call: Call) -> list[Config]:
    """The configurations worth timing, the chosen one first."""
    if call.arch == 0:
        return [_INTERPRETED[kernel]]
    if call.dtype == torch.float32:
        return [Config(32, 32, 16, 8, 1) if kernel == "keys" and call.arch < 90 else _FLOAT32[kernel]]
    if call.arch >= 100 and call.descriptors:
        return _BLACKWELL[kernel]
    if kernel == "keys" and call.head_dim <= 48 and not call.descriptors:
        return [Config(32, 32, 16, 8, 2) if call.masked else Config(32, 64, 16, 4, 2)]
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
    ("forward", False, False): [Config(128, 128, 16, 8, 2), Config(128, 64, 16, 8, 3), Config(128, 64, 16, 8, 4)],
    ("forward", False, True): [Config(128, 64, 16, 8, 3), Config(128, 64, 16, 8, 2)],
    ("forward", True, False): [Config(128, 64, 16, 8, 3), Config(128, 128, 16, 8, 2), Config(128, 64, 16, 8, 2)],
    ("forward", True, True): [Config(64, 64, 16, 4, 2), Config(128, 64, 16, 8, 2)],
    ("keys", False, False): [Config(64, 128, 16, 8, 2), Config(64, 64, 16, 8, 2), Config(64, 64, 16, 4, 2)],
    ("keys", False, True): [Config(64, 64, 16, 8, 2), Config(64, 128, 16, 8, 2)],
    ("keys", True, False): [Config(64, 64, 16, 8, 2), Config(64, 128, 16, 8, 2), Config(64, 64, 16, 8, 3)],
    ("keys", True, True): [Config(64, 64, 16, 8, 2), Config(64, 128, 16, 8, 2)],
    ("queries", False, False): [Config(128, 128, 16, 8, 2), Config(128, 64, 16, 8, 2), Config(128, 64, 16, 8, 3)],
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
