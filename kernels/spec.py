"""What the tests and the bench know of an operation: its `OpSpec`, the last object of a kernel file.

An operation without a spec is not done. Tolerances live here and nowhere else.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

DIRECTIONS = ("forward", "backward")
TRITON_TYPE = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.uint8: "u8"}
# Of one H100 SXM, for predictions: bytes/s of a device copy, what a launch costs, and the part of the copy rate that an
# operation bound by memory is to reach.
COPY_RATE = 3.0e12
LAUNCH_SECONDS = 5e-6
REACHED = {"forward": 0.92, "backward": 0.85}


class UnsupportedCall(ValueError):
    """What a variant raises for a call that is not its own to serve."""


@dataclass(frozen=True)
class Shape:
    """One call that users make. `sizes` are the keyword arguments of the spec's functions, and of nothing else."""

    name: str
    sizes: dict[str, Any]


@dataclass(frozen=True)
class KernelBuild:
    """One kernel, compiled ahead of time for one architecture.

    kernel: the `@triton.jit` function, uncompiled
    arch: compute capability as a number, 80, 90, 100
    config: a label of what was chosen for it, "64x128 D96 bf16 descriptor"
    signature: argument name -> Triton's type string ("*bf16", "i32", "tensordesc<bf16[1, 64, 1, 64]>")
    constants: argument name -> value, for the constexpr arguments
    aligned: names of pointers and integers that may be taken as multiples of 16, as they are when launched
    expects: instructions that the binary must hold, ("HGMMA", "UTMALDG"); the static report fails without them
    may_spill: spills are reported but no fault, as on an architecture that is compiled for and not yet tuned for
    programs: how many a multiprocessor is to hold at once, where the launcher starts no more than fit; None: as many as
        there are blocks
    narrow: how many instructions of the binary may touch global memory with less than 16 bytes a thread, those for
        scalars and short vectors; None: not counted
    """

    kernel: Any
    arch: int
    config: str
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...]
    num_warps: int
    num_stages: int
    expects: tuple[str, ...] = ()
    maxnreg: int | None = None
    may_spill: bool = False
    narrow: int | None = None
    programs: int | None = None


Result = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Tunable:
    """How an operation is tuned.

    candidates: (inputs, architecture) -> every (kernel, configuration) to time; a kernel is named as it is in
        `tuning.pick`, the first candidate of each is the one chosen
    bind: (inputs, kernel) -> a call that launches this kernel in the thread that makes it
    """

    candidates: Callable[[dict[str, Any], int], Iterator[tuple[str, Any]]]
    bind: Callable[[dict[str, Any], str], Callable[[], Any]]


@dataclass(frozen=True)
class OpSpec:
    """An operation, its reference and what its calls cost.

    operation, reference: take what `make_inputs` gives as keyword arguments, return a tensor or a tuple of them
    make_inputs: (device=, dtype=, seed=, **sizes) -> keyword arguments; tensors that need gradients say so
    shapes: the calls that are timed and checked on a GPU
    small: calls of every kind that Triton's interpreter makes, forward and backward, in a second or two, to be checked
        without a GPU: each mode, mask and option, and lengths that end inside a block
    tolerances: dtype -> relative error ||out - ref|| / ||ref|| allowed against float64, (forward, gradients)
    flops, bytes: (direction, **sizes) -> operations that the mathematics needs, bytes that must move (bf16)
        (backward: from the gradients of the results to those of the inputs, with what it reads again)
    predicted: (direction, **sizes) -> seconds expected on one H100 SXM, written down before it was measured
    builds: architecture number -> what to compile ahead of time
    variants: name -> another kernel of ours for the same calls, which is verified and timed but does not serve yet
    tunable: what `bench run --tune` needs, None for an operation without a choice
    """

    name: str
    operation: Callable[..., Result]
    reference: Callable[..., Result]
    make_inputs: Callable[..., dict[str, Any]]
    shapes: tuple[Shape, ...]
    small: tuple[Shape, ...]
    tolerances: dict[torch.dtype, tuple[float, float]]
    flops: Callable[..., float]
    bytes: Callable[..., float]
    predicted: Callable[..., float]
    builds: Callable[[int], list[KernelBuild]] = field(repr=False)
    variants: dict[str, Callable[..., Result]] = field(default_factory=dict)
    tunable: Tunable | None = None
