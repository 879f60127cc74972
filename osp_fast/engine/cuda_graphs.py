"""Forward and backward of a bucket's micro-batch as one CUDA graph, where that measures faster.

Small micro-batches take a GPU less time than the host needs to launch their thousands of kernels; a graph is launched
at once. It works on fixed memory: a micro-batch is copied to where the graph reads, and gradients are added to tensors
that stay, which costs passes over them that steps without graphs do not need. Large micro-batches gain nothing, and
their memory would be the graph's own for good: so each bucket is timed with and without.

What a graph must not hold, and why it does not: copies from the CPU (micro-batches are on the GPU already), random
numbers (drawn before), waits of the host (a test of the step counts them), first launches (the timing without a graph
comes before). Kernels that read through TMA descriptors are given these by value, as parameters of the launch; they
hold addresses, which are the same in each replay.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from osp_fast.errors import UserError
from osp_fast.models.wfvae_plan import gib

LEAST_GAIN = 0.02  # of a step's time; less is noise, and memory is worth more
ROOM = 0.9  # of what is free: the rest is for fragments
WARM_UPS = 2  # before a capture: libraries make their workspaces for its stream
CHUNKS, CHUNK_S = 3, 0.1  # timed in so many pieces of at least so long

# Tensors of a micro-batch in an order of their own; None where one is not there.
Inputs = Sequence[Tensor | None]
# Adds the gradients of a micro-batch to those of the parameters; returns what is wanted of it, one tensor.
Run = Callable[[Inputs], Tensor]


class Graph(Protocol):
    """A captured call. result: what it returned, overwritten by each replay; size: bytes that it took of the device."""

    result: Tensor
    size: int

    def replay(self) -> None:
        """Do once more what was captured."""


class Machine(Protocol):
    """What runs and measures calls, and captures them in memory that all graphs share."""

    def seconds(self, call: Callable[[], object]) -> float:
        """Of one of many calls, one after the other."""

    def peak_bytes(self, call: Callable[[], object]) -> int:
        """That a call needs at most, beside what is allocated before."""

    def available_bytes(self) -> int:
        """That could still be allocated."""

    def capture(self, call: Callable[[], Tensor]) -> Graph:
        """A call as a graph, after some calls that do what it does. Raises RuntimeError if that cannot be."""


def check_cuda_graphs(wanted: bool | None, device: torch.device, ranks: int) -> bool:
    """Whether graphs come into question (`--cuda_graphs`). Raises `UserError` if they are wanted where they cannot be.

    They are captured in a run of one process on a GPU: collectives of FSDP in a graph have not been tried.
    """
    if wanted and device.type != "cuda":
        raise UserError(f"--cuda_graphs needs an NVIDIA GPU, not the {device.type}: leave the flag out")
    if wanted and ranks > 1:
        raise UserError(f"--cuda_graphs is for a single process, and this run has {ranks}: leave the flag out")
    return wanted is not False and device.type == "cuda" and ranks == 1


@dataclass(frozen=True)
class Choice:
    """What was measured of a bucket.

    eager, graph: seconds without and with; size: bytes of the graph, None as `graph` is where none was captured
    why: what else there is to say, in words
    """

    bucket: str
    eager: float
    graph: float | None
    size: int | None
    kept: bool
    why: str = ""

    def __str__(self) -> str:
        """One line for the log."""
        if self.graph is None:
            return f"CUDA graph of {self.bucket}: not captured, {self.why}"
        gain = f"{1e3 * self.graph:.1f} ms with, {1e3 * self.eager:.1f} ms without, {gib(self.size)}"
        return f"CUDA graph of {self.bucket}: {gain}: {'kept' if self.kept else 'not kept'}{self.why}"


@dataclass
class _Captured:
    """A kept graph, what it reads, and where the weights were."""

    graph: Graph
    inputs: list[Tensor | None]
    addresses: list[int]


class GraphedBuckets:
    """Callable: a micro-batch's tensors -> what `run` returns for them, by a graph where one was kept for such shapes.

    Where any graph is kept, gradients are added to tensors that stay: each step begins with `start_step`.

    run: adds a micro-batch's gradients to those of the parameters; the same work whatever the numbers are
    parameters: that get gradients; their memory must stay where it is once graphs are captured
    """

    def __init__(self, run: Run, parameters: Sequence[nn.Parameter], machine: Machine):
        self._run, self._machine = run, machine
        self._parameters = list(parameters)
        self._gradients: list[Tensor] = []
        self._captured: dict[tuple, _Captured] = {}
        self._always = False

    def choose(
        self, buckets: Sequence[tuple[str, Inputs]], always: bool, report: Callable[[str], None]
    ) -> list[Choice]:
        """Time each bucket with and without a graph and keep the graphs that pay; after the warm-up, before any step.

        Weights are as they were afterwards, and there are no gradients.

        buckets: names and micro-batches with contents of any kind
        always: a graph for every bucket, whatever it measures (`--cuda_graphs`); otherwise those are kept that are
        faster by 2 % and leave room for the buckets without one
        report: takes a line for each bucket

        Raises:
            UserError: with `always`, a graph cannot be captured.
        """
        # The largest first: the graphs that follow work in its memory.
        ordered = sorted(buckets, key=lambda bucket: -sum(x.numel() for x in bucket[1] if x is not None))
        seconds = [self._machine.seconds(partial(self._run_anew, inputs)) for _, inputs in ordered]
        self._drop_gradients()
        self._gradients = [torch.zeros_like(parameter) for parameter in self._parameters]
        self.start_step()
        needs = [self._machine.peak_bytes(partial(self._run, inputs)) for _, inputs in ordered]
        self._always = always
        choices: list[Choice] = []
        for index, (name, inputs) in enumerate(ordered):
            graphed = {place for place, choice in enumerate(choices) if choice.kept} | {index}
            others = max((need for place, need in enumerate(needs) if place not in graphed), default=0)
            choices.append(self._decide(name, inputs, seconds[index], needs[index], others))
            report(str(choices[-1]))
        self._drop_gradients()
        if not self._captured:
            self._gradients = []
        return choices

    @property
    def size(self) -> int:
        """Bytes of the device that graphs hold; PyTorch counts them as reserved, not as allocated."""
        return sum(captured.graph.size for captured in self._captured.values())

    def start_step(self) -> None:
        """Before a step's first micro-batch: where there are graphs, gradients are zero, in the tensors they add to."""
        if self._gradients:
            for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
                parameter.grad = gradient
            torch._foreach_zero_(self._gradients)

    def __call__(self, inputs: Inputs) -> Tensor:
        """What `run` returns for these tensors, a tensor of its own; gradients are added.

        Raises:
            UserError: graphs are wanted for every bucket, and there is none for such shapes.
            RuntimeError: weights or gradients are no longer where they were captured.
        """
        captured = self._captured.get(_shapes(inputs))
        if captured is not None:
            return self._replay(captured, inputs)
        if self._always:
            shapes = ", ".join("x".join(map(str, x.shape)) or "1" for x in inputs if x is not None)
            raise UserError(f"--cuda_graphs: a micro-batch of tensors {shapes} was not captured: leave the flag out")
        return self._run(inputs)

    def _decide(self, name: str, inputs: Inputs, seconds: float, need: int, others: int) -> Choice:
        """Measure a graph of this bucket and keep it, or not.

        seconds, need: of the bucket without a graph, bytes beside gradients; others: that a bucket without one needs
        """
        missing = max(0, need - self.size)
        free = round(ROOM * self._machine.available_bytes())
        if not self._always and missing + others > free:
            why = f"{gib(missing)} for it and {gib(others)} for other buckets are more than the {gib(free)} to be had"
            return Choice(name, seconds, None, None, False, why)
        self.start_step()
        static = [None if x is None else x.clone() for x in inputs]
        try:
            graph = self._machine.capture(lambda: self._run(static).detach())
        except RuntimeError as error:  # the same call has just run without a graph, so it is the capture's
            full = isinstance(error, torch.OutOfMemoryError)
            why = "it does not fit into memory" if full else f"it cannot be captured ({str(error).splitlines()[0]})"
            if self._always:
                raise UserError(f"--cuda_graphs: {name}: {why}: leave the flag out") from error
            return Choice(name, seconds, None, None, False, why)
        captured = _Captured(graph, static, self._addresses())
        graphed = self._machine.seconds(lambda: (self.start_step(), self._replay(captured, inputs)))
        pays, fits = graphed <= (1 - LEAST_GAIN) * seconds, others <= ROOM * self._machine.available_bytes()
        kept = self._always or (pays and fits)
        if kept:
            self._captured[_shapes(inputs)] = captured
        why = f", {gib(others)} for other buckets would no longer fit" if pays and not kept else ""
        return Choice(name, seconds, graphed, graph.size, kept, why)

    def _run_anew(self, inputs: Inputs) -> Tensor:
        self._drop_gradients()
        return self._run(inputs)

    def _replay(self, captured: _Captured, inputs: Inputs) -> Tensor:
        moved = any(
            parameter.grad is not gradient
            for parameter, gradient in zip(self._parameters, self._gradients, strict=True)
        )
        if moved or captured.addresses != self._addresses():
            raise RuntimeError(
                "weights or gradients are not where the CUDA graphs were captured: call start_step first"
            )
        pairs = [(mine, x) for mine, x in zip(captured.inputs, inputs, strict=True) if mine is not None]
        torch._foreach_copy_([mine for mine, _ in pairs], [x for _, x in pairs])
        captured.graph.replay()
        return captured.graph.result.clone()

    def _addresses(self) -> list[int]:
        return [parameter.data_ptr() for parameter in self._parameters]

    def _drop_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None


def _shapes(inputs: Inputs) -> tuple:
    return tuple(None if x is None else (x.shape, x.dtype) for x in inputs)


class CudaMachine:
    """The `Machine` of a GPU: PyTorch's allocator, streams and graphs."""

    def __init__(self, device: torch.device):
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def seconds(self, call: Callable[[], object]) -> float:
        """Median over chunks of calls; within one the host runs ahead of the GPU, as it does in training."""
        times, calls = [], 1
        while len(times) < CHUNKS:
            torch.cuda.synchronize(self._device)
            start = time.perf_counter()
            for _ in range(calls):
                call()
            torch.cuda.synchronize(self._device)
            took = time.perf_counter() - start
            if took < CHUNK_S:
                calls *= 2
            else:
                times.append(took / calls)
        return statistics.median(times)

    def peak_bytes(self, call: Callable[[], object]) -> int:
        """By the allocator's own count."""
        torch.cuda.synchronize(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        call()
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_allocated(self._device) - before

    def available_bytes(self) -> int:
        """What the device has free once the allocator has given back all that it can."""
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self._device)[0]

    def capture(self, call: Callable[[], Tensor]) -> Graph:
        """As PyTorch's notes on CUDA graphs ask: some calls on another stream first, then the capture on one."""
        with torch.cuda.device(self._device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM_UPS):
                    call()
            torch.cuda.current_stream().wait_stream(side)
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            before = torch.cuda.memory_reserved()
            graph = torch.cuda.CUDAGraph()
            # Threads that prepare data may call CUDA meanwhile; only this one's calls must be fit for a capture.
            try:
                with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                    result = call()
            except RuntimeError:
                # Older PyTorch leaves its allocator within a capture that was invalidated, and asserts later.
                with suppress(RuntimeError):
                    torch._C._cuda_endAllocateToPool(self._device.index, self._pool)
                self._pool = torch.cuda.graph_pool_handle()  # the failed one's memory may never come back
                raise
            return _CudaGraph(graph, result, torch.cuda.memory_reserved() - before)


@dataclass
class _CudaGraph:
    graph: "torch.cuda.CUDAGraph"
    result: Tensor
    size: int

    def replay(self) -> None:
        self.graph.replay()
