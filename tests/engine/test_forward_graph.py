"""The DiT as a CUDA graph in sampling, with a machine in a GPU's place whose times and memory are given."""

import weakref
from dataclasses import dataclass

import pytest
import torch

from osp_fast.engine.forward_graph import GraphedForward
from osp_fast.errors import UserError
from osp_fast.models.dit import DiT, DiTConfig

CONFIG = DiTConfig(
    num_layers=3, num_attention_heads=2, attention_head_dim=24, caption_channels=16, cross_attention_dim=48
)


@dataclass
class Recorded:
    """What a CUDA graph is to its caller: it works on the memory of its capture alone, and into its own result."""

    machine: "FakeMachine"
    call: object
    result: torch.Tensor
    size: int = 1 << 20

    def replay(self):
        self.machine.replays += 1
        self.result.copy_(self.call())


class FakeMachine:
    """eager, graph: seconds; needs: bytes of a call; fault: raised by each capture."""

    def __init__(self, eager=1.0, graph=0.5, needs=100, free=1000, fault=None):
        self.eager, self.graph, self.needs, self.free, self.fault = eager, graph, needs, free, fault
        self.replays = self.captures = 0

    def seconds(self, call):
        replays = self.replays
        call()
        return self.graph if self.replays > replays else self.eager

    def peak_bytes(self, call):
        call()
        return self.needs

    def available_bytes(self):
        return self.free

    def capture(self, call):
        if self.fault is not None:
            raise self.fault
        self.captures += 1
        return Recorded(self, call, call().clone())


@pytest.fixture(scope="module")
def dit():
    model = DiT.create(CONFIG, seed=0).requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.05)
    return model


def inputs(dit, seed, batch=2, rows=4):
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch, 8, 2, rows, 4, generator=generator)
    mask = (torch.rand(batch, 5, generator=generator) < 0.7).long()
    mask[:, 0] = 1
    text = dit.text_context(torch.randn(batch, 5, 16, generator=generator), mask)
    return latents, dit.time_context(torch.tensor([900.0, 10.0])).at(seed % 2, batch), text


def test_replays_give_what_the_model_gives(dit):
    machine, said = FakeMachine(), []
    forward = GraphedForward(dit, machine, False, said.append)
    first = inputs(dit, 0)
    for latents, time, text in (first, inputs(dit, 1), (*inputs(dit, 2)[:2], first[2]), first):
        assert torch.equal(forward(latents, time, text), dit(latents, time, text))
    assert machine.captures == 1 and machine.replays == 1 + 4
    assert said == ["CUDA graph of 2x4x4 latents, batch of 2: 500.0 ms with, 1000.0 ms without, 1.0 MiB: kept"]
    one, other = forward(*first), forward(*inputs(dit, 1))
    assert not torch.equal(one, other)  # each result is a tensor of its own
    assert forward.size == 1 << 20


def test_a_text_is_its_callers_to_let_go(dit):
    forward = GraphedForward(dit, FakeMachine(), False, lambda line: None)
    latents, time, text = inputs(dit, 0)
    forward(latents, time, text)
    keys = weakref.ref(text.keys[0].keys)
    del text
    assert keys() is None
    for seed in (1, 2):  # a new text may lie where an old one lay
        arguments = inputs(dit, seed)
        assert torch.equal(forward(*arguments), dit(*arguments))
        del arguments


def test_what_others_need_is_left_to_them(dit):
    for spare, captures in ((800, 1), (801, 0)):
        machine = FakeMachine(needs=100, free=1000)
        GraphedForward(dit, machine, False, lambda line: None, spare)(*inputs(dit, 0))
        assert machine.captures == captures


def test_other_sizes_are_measured_for_themselves(dit):
    machine, said = FakeMachine(), []
    forward = GraphedForward(dit, machine, False, said.append)
    for arguments in (inputs(dit, 0), inputs(dit, 0, batch=1), inputs(dit, 0, rows=6), inputs(dit, 3)):
        assert torch.equal(forward(*arguments), dit(*arguments))
    assert machine.captures == 3 and len(said) == 3 and "2x6x4 latents" in said[2]


@pytest.mark.parametrize(
    "machine, words",
    [
        (FakeMachine(graph=0.99), "990.0 ms with, 1000.0 ms without, 1.0 MiB: not kept"),
        (FakeMachine(needs=901), "not captured, its 0.0 MiB are more than"),
        (
            FakeMachine(fault=RuntimeError("operation not permitted\nwhen capturing")),
            "captured (operation not permitted)",
        ),
        (FakeMachine(fault=torch.OutOfMemoryError("no")), "it does not fit into memory"),
    ],
)
def test_where_a_graph_does_not_pay_or_cannot_be_the_model_runs(dit, machine, words):
    said = []
    forward, arguments = GraphedForward(dit, machine, False, said.append), inputs(dit, 0)
    expected = dit(*arguments)
    assert torch.equal(forward(*arguments), expected) and torch.equal(forward(*arguments), expected)
    assert len(said) == 1 and words in said[0]
    assert machine.replays <= 1


def test_always_means_always(dit):
    machine = FakeMachine(graph=2.0, needs=901)
    forward = GraphedForward(dit, machine, True, lambda line: None)
    assert torch.equal(forward(*inputs(dit, 0)), dit(*inputs(dit, 0))) and machine.replays == 2
    broken = GraphedForward(dit, FakeMachine(fault=RuntimeError("not permitted")), True, lambda line: None)
    with pytest.raises(UserError, match=r"--cuda_graphs: 2x4x4 .*not permitted.*: leave the flag out"):
        broken(*inputs(dit, 0))
