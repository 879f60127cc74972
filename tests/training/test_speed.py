"""What is settled before the first step: what is compiled, what the VAE may hold; rehearsing changes nothing."""

from types import SimpleNamespace

import pytest
import torch

from osp_fast.config import TrainConfig
from osp_fast.data.buckets import Bucket, Plan
from osp_fast.errors import UserError
from osp_fast.parallel.world import Ranks, World
from osp_fast.training.place import BatchSizes
from osp_fast.training.speed import Rehearsal, bound_vae, capture, compiles, set_up
from osp_fast.training.step import accumulate_gradients

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BUCKETS = {Bucket(5, 16, 16): [0, 1], Bucket(1, 32, 16): [2]}


def config_of(**flags) -> TrainConfig:
    config = TrainConfig()
    config.model.model = "tiny"
    config.model.model_max_length = 4  # as the tests' text encoder has it
    for name, value in flags.items():
        setattr(config.data if name == "group_data" else config.model, name, value)
    return config


@pytest.mark.parametrize(
    "flag, group_data, device, expected",
    [
        (None, True, CPU, False),
        (None, True, CUDA, True),
        (None, False, CUDA, False),
        (False, True, CUDA, False),
        (True, True, CPU, True),
    ],
)
def test_blocks_are_compiled_by_default_on_a_gpu_where_batches_have_few_sizes(flag, group_data, device, expected):
    config, plan = config_of(compile=flag, group_data=group_data), Plan(buckets=BUCKETS)
    assert compiles(config, plan, device) is expected


def test_compiling_for_batches_of_any_size_is_refused(monkeypatch):
    with pytest.raises(UserError, match="--compile .* add --group_data"):
        compiles(config_of(compile=True), Plan(buckets=BUCKETS), CPU)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match="--compile needs a C"):
        compiles(config_of(compile=True, group_data=True), Plan(buckets=BUCKETS), CPU)


def test_the_vae_beside_training_gets_a_share_of_the_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 << 30))
    config = config_of()
    bound_vae(config.model, CPU)
    assert config.model.vae_memory is None
    bound_vae(config.model, CUDA)
    assert config.model.vae_memory == 10 << 30
    config.model.vae_memory = 5
    bound_vae(config.model, CUDA)
    assert config.model.vae_memory == 5


@pytest.mark.parametrize("flags", [{}, dict(gradient_checkpointing=True), dict(activation_memory=64 << 20)])
def test_rehearsing_every_bucket_changes_nothing_and_afterwards_nothing_is_compiled(make_loss, make_clip, flags):
    torch._dynamo.reset()  # graphs are kept by code, and other tests have made some
    config = config_of(group_data=True, **flags)
    loss = make_loss(config)
    before = {name: tensor.clone() for name, tensor in loss.dit.state_dict().items()}
    state = torch.random.get_rng_state()
    lines: list[str] = []
    sizes = BatchSizes(dict.fromkeys(BUCKETS, 2), 1, 1)
    trainer = SimpleNamespace(world=World(Ranks(), CPU), loss=loss.loss)
    # What is compiled is run as it is: this is about when, not what.
    from osp_fast.engine import compile as engine

    honest = engine.compile_blocks
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("osp_fast.training.speed.compile_blocks", lambda dit, n: honest(dit, n, backend="eager"))
        plan = Plan(buckets=BUCKETS)
        counter, graphs = set_up(config, trainer, loss.maker, plan, sizes, True, None, lines.append)
    assert [line.split(":")[0] for line in lines if line.startswith("compiling")] == [
        "compiling bucket 1/2",
        "compiling bucket 2/2",
    ]
    assert any(line.startswith("activations: ") for line in lines) is ("activation_memory" in flags)
    assert all(torch.equal(loss.dit.state_dict()[name], tensor) for name, tensor in before.items())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert graphs is None and all(parameter.grad is None for parameter in loss.dit.parameters())
    for size in ((5, 16, 16), (1, 32, 16)):
        loss([make_clip(slot, size) for slot in range(2)], 0, 2).sum().backward()
    assert counter.count == 0
    loss([make_clip(0, (1, 32, 16))], 0, 2).sum().backward()  # another number of clips
    assert counter.count > 0


class Replayed:
    """A machine that captures a call by remembering it, and on which graphs take half the time."""

    def __init__(self, device):
        self.calls = 0

    def seconds(self, call):
        self.calls += 1
        call()
        return 1.0 if self.calls <= len(BUCKETS) else 0.5

    def peak_bytes(self, call):
        call()
        return 0

    def available_bytes(self):
        return 1 << 40

    def capture(self, call):
        graph = SimpleNamespace(result=call().clone(), size=0)
        graph.replay = lambda: graph.result.copy_(call())
        return graph


def test_steps_by_graphs_are_the_steps_without(make_loss, make_clip, monkeypatch):
    monkeypatch.setattr("osp_fast.training.speed.CudaMachine", Replayed)
    loss, lines = make_loss(config_of()), []
    rehearsal = Rehearsal(loss.maker, loss.loss, BatchSizes(dict.fromkeys(BUCKETS, 2), 2, 1), 8, torch.float32)
    graphs = capture(loss.dit, rehearsal, False, lines.append)
    assert len(lines) == 2 and all(line.endswith(": kept") for line in lines)
    for size in ((5, 16, 16), (1, 32, 16)):
        batches = [loss.make([make_clip(slot, size), make_clip(slot + 1, size)], 0, 4) for slot in (0, 2)]
        expected = accumulate_gradients(loss.loss, batches)
        gradients = [parameter.grad.clone() for parameter in loss.dit.parameters()]
        loss.dit.zero_grad(set_to_none=True)
        found = accumulate_gradients(loss.loss, batches, graphs)
        assert torch.equal(found, expected)
        for parameter, gradient in zip(loss.dit.parameters(), gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)
        loss.dit.zero_grad(set_to_none=True)
