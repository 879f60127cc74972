"""The choice and the replay of CUDA graphs, with a machine in a GPU's place whose times and memory are given."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

from osp_fast.engine.cuda_graphs import GraphedBuckets, check_cuda_graphs
from osp_fast.errors import UserError

WIDTH = 3


@dataclass
class RecordedCall:
    """What a CUDA graph is to its caller: it works on the memory of its capture alone, and into its own result."""

    machine: "FakeMachine"
    call: Callable[[], Tensor]
    result: Tensor
    size: int

    def replay(self) -> None:
        self.machine.replays += 1
        self.result.copy_(self.call())


@dataclass
class FakeMachine:
    """eager, graph: seconds by the number of clips; needs: bytes that a call takes beside gradients.

    fault: raised by each capture; waste: bytes that one takes beside what its call needs
    """

    eager: dict[int, float]
    graph: dict[int, float]
    needs: dict[int, int]
    free: int = 1000
    fault: Exception | None = None
    waste: int = 0
    pool: int = 0
    captures: list[int] = field(default_factory=list)
    replays: int = 0
    clips: int = 0  # of the last call

    def seconds(self, call):
        replays = self.replays
        call()
        return (self.graph if self.replays > replays else self.eager)[self.clips]

    def peak_bytes(self, call):
        call()
        return self.needs[self.clips]

    def available_bytes(self):
        return self.free - self.pool

    def capture(self, call):
        if self.fault is not None:
            raise self.fault
        result = call()
        self.captures.append(self.clips)
        size = max(0, self.needs[self.clips] + self.waste - self.pool)
        self.pool += size
        return RecordedCall(self, call, result.clone(), size)


def make(machine: FakeMachine) -> tuple[nn.Linear, GraphedBuckets]:
    layer = nn.Linear(WIDTH, WIDTH)

    def run(inputs):
        x, mask, clips = inputs
        machine.clips = len(x)
        losses = layer(x).square().mean(1)
        if mask is not None:
            losses = losses * mask
        (losses.sum() / clips).backward()
        return losses

    return layer, GraphedBuckets(run, list(layer.parameters()), machine)


def micro_batch(clips: int, seed: int = 0, masked: bool = False) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(clips, generator=generator) if masked else None
    return [torch.randn(clips, WIDTH, generator=generator), mask, torch.tensor(float(clips))]


def buckets(*clips: int) -> list[tuple[str, list[Tensor | None]]]:
    return [(f"1x8x8, {count} clips", micro_batch(count)) for count in clips]


SMALL_GAINS = dict(eager={1: 1.0, 8: 4.0, 64: 9.0}, graph={1: 0.5, 8: 3.91, 64: 8.9}, needs={1: 10, 8: 80, 64: 640})


def test_a_graph_is_kept_where_it_is_faster_and_a_line_says_why():
    machine, lines = FakeMachine(**SMALL_GAINS, free=10_000), []
    layer, graphs = make(machine)
    weights = [parameter.clone() for parameter in layer.parameters()]
    choices = graphs.choose(buckets(1, 8, 64), False, lines.append)
    assert machine.captures == [64, 8, 1]  # the largest first
    assert [choice.kept for choice in choices] == [False, True, True]  # by 1.1, 2.25 and 50 %
    assert lines[0] == "CUDA graph of 1x8x8, 64 clips: 8900.0 ms with, 9000.0 ms without, 0.0 MiB: not kept"
    assert lines[2].endswith("500.0 ms with, 1000.0 ms without, 0.0 MiB: kept")
    assert all(map(torch.equal, layer.parameters(), weights))
    assert all(parameter.grad is None for parameter in layer.parameters())


def test_gradients_of_several_micro_batches_are_those_without_graphs():
    machine = FakeMachine(**SMALL_GAINS, free=10_000)
    layer, graphs = make(machine)
    graphs.choose([*buckets(1, 64), ("masked", micro_batch(1, masked=True))], False, print)
    steps = [
        [micro_batch(1, 1), micro_batch(1, 2)],  # two replays
        [micro_batch(64, 3), micro_batch(1, 4)],  # the larger one has no graph
        [micro_batch(1, 5, masked=True)],
        [micro_batch(5, 6)],  # never seen before
    ]
    for step in steps:
        expected, losses = [], []
        for x, mask, clips in step:
            part = layer(x).square().mean(1) * (1 if mask is None else mask)
            (part.sum() / clips).backward()
            losses.append(part.detach())
        for parameter in layer.parameters():
            expected.append(parameter.grad)
            parameter.grad = None
        graphs.start_step()
        found = [graphs(inputs) for inputs in step]
        assert all(map(torch.equal, found, losses))  # each a tensor of its own, not the graph's
        assert all(
            torch.equal(parameter.grad, want) for parameter, want in zip(layer.parameters(), expected, strict=True)
        )
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.sub_(parameter.grad)  # the graph sees new weights
                parameter.grad = None


def test_without_a_graph_gradients_are_free_to_go():
    machine = FakeMachine(eager={8: 1.0}, graph={8: 0.99}, needs={8: 80})
    layer, graphs = make(machine)
    assert not graphs.choose(buckets(8), False, print)[0].kept
    graphs.start_step()
    assert layer.weight.grad is None
    graphs(micro_batch(8))
    assert machine.replays == 1 and layer.weight.grad is not None


def test_graphs_leave_room_for_buckets_without_one():
    gains = {clips: seconds / 2 for clips, seconds in SMALL_GAINS["eager"].items()}
    times = dict(SMALL_GAINS, graph=gains)
    # All fit one beside the other: the largest graph's memory serves the others.
    machine = FakeMachine(**times, free=1000)
    assert [choice.kept for choice in make(machine)[1].choose(buckets(1, 8, 64), False, print)] == [True] * 3
    assert machine.pool == 640
    # The largest does not fit beside what the others need without a graph; they fit beside it.
    lines = []
    machine = FakeMachine(**times, free=790)
    choices = make(machine)[1].choose(buckets(1, 8, 64), False, lines.append)
    assert [choice.kept for choice in choices] == [False, False, True] and machine.captures == [1]
    assert ": not captured, 0.0 MiB for it and 0.0 MiB for other buckets are more than the " in lines[0]
    # A graph takes more than its bucket did without.
    machine = FakeMachine(**times, free=850, waste=150)
    assert not make(machine)[1].choose(buckets(8, 64), False, lines.append)[0].kept
    assert lines[3].endswith("not kept, 0.0 MiB for other buckets would no longer fit")


@pytest.mark.parametrize(
    "fault, words",
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "it does not fit into memory"),
        (
            RuntimeError("operation not permitted\nwhen stream is capturing"),
            "it cannot be captured (operation not permitted)",
        ),
    ],
)
def test_what_cannot_be_captured_is_told_or_refused(fault, words):
    lines = []
    _, graphs = make(FakeMachine(**SMALL_GAINS, fault=fault))
    assert not graphs.choose(buckets(8), False, lines.append)[0].kept
    assert lines == [f"CUDA graph of 1x8x8, 8 clips: not captured, {words}"]
    with pytest.raises(UserError) as refused:
        graphs.choose(buckets(8), True, lines.append)
    assert str(refused.value) == f"--cuda_graphs: 1x8x8, 8 clips: {words}: leave the flag out"


def test_wanted_graphs_are_kept_whatever_they_measure_and_nothing_runs_without():
    machine = FakeMachine(**SMALL_GAINS, free=100)
    _, graphs = make(machine)
    assert all(choice.kept for choice in graphs.choose(buckets(8, 64), True, print))
    graphs.start_step()
    graphs(micro_batch(64))
    with pytest.raises(UserError, match="--cuda_graphs: a micro-batch of tensors 1x3, 1 was not captured"):
        graphs(micro_batch(1))


@pytest.mark.parametrize("moved", ["gradients", "weights"])
def test_a_graph_never_works_on_memory_that_was_left(moved):
    layer, graphs = make(FakeMachine(**SMALL_GAINS))
    graphs.choose(buckets(8), True, print)
    graphs.start_step()
    if moved == "gradients":
        layer.weight.grad = None
    else:
        layer.weight.data = layer.weight.data.clone()
    with pytest.raises(RuntimeError, match="not where the CUDA graphs were captured"):
        graphs(micro_batch(8))


def test_where_graphs_come_into_question():
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert check_cuda_graphs(None, gpu, 1) and check_cuda_graphs(True, gpu, 1)
    assert not any(check_cuda_graphs(*given) for given in ((False, gpu, 1), (None, cpu, 1), (None, gpu, 8)))
    with pytest.raises(UserError, match="--cuda_graphs needs an NVIDIA GPU, not the cpu"):
        check_cuda_graphs(True, cpu, 1)
    with pytest.raises(UserError, match="is for a single process, and this run has 8"):
        check_cuda_graphs(True, gpu, 8)
