"""torch.compile of the DiT's blocks: one graph for all blocks alike, every bucket's before the first step.

Only a block's own forward is compiled. What is hung on the module from outside, as FSDP's hooks are, stays outside of
the graph; what its forward calls, checkpointing above all, is inside. PyTorch treats a block's parameters as inputs of
the graph, so blocks of one kind share it: 32 blocks with three kinds of attention are compiled three or four times for
each size, not 32 times.
"""

import functools
import logging
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import noop_context_fn

from osp_fast.engine.levels import Level
from osp_fast.errors import UserError
from osp_fast.models.dit import DiT

GRAPHS_TO_SPARE = 8
MODES_OF_GRAD = 2  # a graph of its own with gradients and without


def check_compiler(device: torch.device) -> None:
    """Raise `UserError` if what `--compile` needs on `device` is not installed.

    On a CPU Inductor writes C++; on a GPU Triton needs a C compiler for the functions that launch its kernels.
    """
    if device.type == "cpu":
        names = [name for name in (os.environ.get("CXX"), "g++", "clang++") if name]
        if not any(shutil.which(name) for name in names):
            raise UserError("--compile needs a C++ compiler on a CPU: install g++, or leave the flag out")
        return
    named = os.environ.get("CC")
    if not any(shutil.which(name) for name in ([named] if named else ["gcc", "clang"])):
        where = f"CC={named} is not there" if named else "there is none"
        raise UserError(f"--compile needs a C compiler on a GPU, and {where}: install gcc, or add --no-compile")


def compile_blocks(dit: DiT, buckets: int, backend: str | Callable = "inductor") -> DiT:
    """Compile every block's forward, at its first use for each size. Returns the model.

    To be called after `recompute_blocks` and `use_attention`; FSDP may have wrapped the blocks by then, or do so later.
    A copy of the model by `copy.deepcopy` would run this one's blocks: it is to be built anew instead.

    buckets: how many sizes of micro-batches, or of clips to sample, there will be; a block that meets many more raises
    `UserError` rather than being run uncompiled. `backend` is torch.compile's.
    """
    for block in dit.transformer_blocks:
        if block.recompute is noop_context_fn:  # in a graph it would keep everything
            block.recompute = Level.NOTHING.recompute()
    graphs = MODES_OF_GRAD * count_kinds(dit) * buckets + GRAPHS_TO_SPARE
    _logger.addFilter(_says_something_new)
    for block in dit.transformer_blocks:
        block.forward = _compiled(block.forward, graphs, backend)
    return dit


def count_kinds(dit: DiT) -> int:
    """How many graphs a size needs at most: blocks that differ in attention, in what they keep,
    in what they get, or in whether tokens move behind them."""
    kinds, before = set(), "first"
    for block in dit.transformer_blocks:
        moves = block.mover is not None
        kinds.add((block.self_attention.mode, id(block.recompute), before, moves))
        before = "added" if moves or block.recompute is not None else "pending"
    return len(kinds)


def _compiled(forward: Callable[..., Any], graphs: int, backend: str | Callable) -> Callable[..., Any]:
    """`forward` compiled, with room for so many graphs of its code, which all blocks share."""
    from torch._dynamo import config
    from torch._dynamo.exc import FailOnRecompileLimitHit

    compiled = torch.compile(forward, fullgraph=True, dynamic=False, backend=backend)
    # For these calls alone. Beyond the limit PyTorch would go on uncompiled; with `fullgraph` it raises.
    room = config.patch(
        recompile_limit=graphs,
        accumulated_recompile_limit=config.accumulated_recompile_limit + graphs,
        fail_on_recompile_limit_hit=True,
    )

    @functools.wraps(forward)
    def call(*arguments: Any) -> Any:
        try:
            with room:
                return compiled(*arguments)
        except FailOnRecompileLimitHit as error:
            raise UserError(
                f"--compile: the DiT's blocks met clips of many more sizes than were to come, and {graphs} graphs were"
                " compiled for them: add --no-compile, or in training --group_data so that clips are not padded to one"
                " another's size (TORCH_LOGS=recompiles says what differs)"
            ) from error

    return call


_logger = logging.getLogger("torch._higher_order_ops.wrap")


def _says_something_new(record: logging.LogRecord) -> bool:
    """Drop PyTorch's warning of in-place operations in recomputed blocks: ours is provided for (`levels.py`)."""
    return "context_fn is passed to torch.utils.checkpoint" not in record.getMessage()


class RecompileCounter:
    """How many graphs this process has compiled since the counter was made or reset.

    After the warm-up it must stay at zero: each graph more is a step that took minutes.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Count from here."""
        self._before = _graphs_of_process()

    @property
    def count(self) -> int:
        """Graphs since then."""
        return _graphs_of_process() - self._before


def _graphs_of_process() -> int:
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


@dataclass(frozen=True)
class WarmUpBucket:
    """A size of micro-batches. size: its name; clips: of a micro-batch on one rank; tokens: of one clip."""

    size: str
    clips: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.size}, {self.clips} clip{'s' * (self.clips > 1)}"


def warm_up(
    dit: DiT, buckets: Sequence[WarmUpBucket], run: Callable[[WarmUpBucket], Any], report: Callable[[str], None]
) -> int:
    """Run forward and backward of every bucket, the largest first. Returns how many graphs were compiled.

    So all is compiled, chosen and loaded before the first step, and a bucket that does not fit into memory is found at
    once. Nothing else changes: gradients, of which there must be none yet, are dropped and random states restored. With
    several ranks all must call it with the same buckets; they take them in the same order, as collectives need.

    run: makes a micro-batch of a bucket, with contents of any kind, and its gradients
    report: takes a line for each bucket, before it is compiled, and one at the end

    Raises:
        UserError: a bucket does not fit into the GPU's memory.
    """
    ordered = sorted(buckets, key=lambda bucket: (-bucket.clips * bucket.tokens, bucket.size, bucket.clips))
    device = next(dit.parameters()).device
    counter, started, before, left = RecompileCounter(), time.monotonic(), time.monotonic(), ""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for number, bucket in enumerate(ordered, 1):
            report(f"compiling bucket {number}/{len(ordered)}: {bucket}{left}")
            try:
                run(bucket)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
            except torch.OutOfMemoryError as error:
                raise UserError(
                    f"bucket {bucket} does not fit into the memory of {device}: use --activation_memory,"
                    " --gradient_checkpointing, --mixed_precision bf16, or fewer clips (--tokens_per_batch,"
                    " --train_batch_size)"
                ) from error
            finally:
                for parameter in dit.parameters():
                    parameter.grad = None
            now = time.monotonic()
            rest = (now - started) / number * (len(ordered) - number)
            left = f" (the last one took {now - before:.1f} s, about {rest:.0f} s left)"
            before = now
    report(f"compiled {counter.count} graphs for {len(ordered)} buckets in {time.monotonic() - started:.1f} s")
    return counter.count
