"""The update: clipped as PyTorch clips, skipped where a gradient is not finite, and without a wait of the host."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from osp_fast.config import OptimizerConfig
from osp_fast.parallel.shards import LocalShards
from osp_fast.parallel.world import Ranks, World
from osp_fast.training.ema import EMA
from osp_fast.training.optimizer import build_optimizer, state_tensors, step_tensors
from osp_fast.training.records import Records
from osp_fast.training.step import Update, accumulate_gradients

CPU = torch.device("cpu")
ALONE = World(Ranks(), CPU)
# Operations whose result the host needs, so that it waits for a GPU.
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero", "repeat_interleave"}
READING = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")


def update_of(dit, max_norm: float = 1.0) -> Update:
    shards = LocalShards(dit)
    optimizer = build_optimizer(shards.local, OptimizerConfig(learning_rate=0.01))
    return Update(shards, optimizer, EMA(shards, 0.9), ALONE, max_norm)


@pytest.mark.parametrize("max_norm", [0.01, 1e6])
def test_clipped_and_stepped_as_pytorch_does(make_loss, make_clip, max_norm):
    loss = make_loss()
    batches = [loss.make([make_clip(slot, (1, 16, 16))], 0, 2) for slot in range(2)]
    update, other = update_of(loss.dit, max_norm), copy.deepcopy(loss.dit)
    losses = accumulate_gradients(loss.loss, batches)
    for parameter, theirs in zip(loss.dit.parameters(), other.parameters(), strict=True):
        theirs.grad = parameter.grad.clone()
    expected = torch.nn.utils.clip_grad_norm_(other.parameters(), max_norm)
    torch.optim.AdamW(other.parameters(), lr=0.01, betas=(0.9, 0.999), eps=1e-15, weight_decay=0.01, fused=True).step()
    mean, norm, skipped, not_finite, *clips = update(losses, 1).tolist()
    assert norm == pytest.approx(expected.item(), rel=1e-6) and (skipped, not_finite) == (0.0, 0.0)
    assert mean == pytest.approx(losses.mean().item()) and clips == losses.tolist()
    for ours, theirs in zip(loss.dit.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    assert all(parameter.grad is None for parameter in loss.dit.parameters())


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_changes_nothing(make_loss, make_clip, where):
    loss = make_loss()
    update = update_of(loss.dit)
    batch = loss.make([make_clip(0, (1, 16, 16))], 0, 1)

    def everything() -> dict[str, torch.Tensor]:
        tensors = {**loss.dit.state_dict(), **state_tensors(update.optimizer, update.shards)}
        tensors |= {f"average {name}": tensor for name, tensor in update.ema.named_average().items()}
        return {name: tensor.clone() for name, tensor in tensors.items()}

    update(accumulate_gradients(loss.loss, [batch]), 1)
    before = everything()
    losses = accumulate_gradients(loss.loss, [batch])
    if where == "loss":
        losses = losses + float("inf")
    else:
        loss.dit.proj_out.bias.grad[0] = float("nan")
    _, _, skipped, not_finite, *_ = update(losses, 2).tolist()
    assert (skipped, not_finite) == (1.0, float(where == "loss"))
    after = everything()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert update.ema.updates == 1 and {float(step) for step in step_tensors(update.optimizer)} == {1.0}
    assert update(accumulate_gradients(loss.loss, [batch]), 3)[2] == 0
    assert not torch.equal(everything()["proj_out.bias"], before["proj_out.bias"])


class Waits(TorchDispatchMode):
    """Names of what a host would wait for, had the tensors been on a GPU."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.names: list[str] = []
        for name in READING:
            monkeypatch.setattr(torch.Tensor, name, self._watched(name, getattr(torch.Tensor, name)))

    def _watched(self, name, function):
        def read(tensor, *args, **kwargs):
            self.names.append(name)
            return function(tensor, *args, **kwargs)

        return read

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        masked = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in WAITING or masked:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def test_a_step_makes_the_host_wait_for_nothing(make_loss, make_clip, monkeypatch):
    loss = make_loss()
    update = update_of(loss.dit)
    batches = [loss.make([make_clip(slot, (5, 16, 16))], 0, 2) for slot in range(2)]
    with monkeypatch.context() as patched, Waits(patched) as waits:
        numbers = update(accumulate_gradients(loss.loss, batches), 1)
        assert waits.names == []
        numbers[0].item()  # it does see one
        assert "item" in waits.names
    assert numbers.isfinite().all()


def test_records_come_in_order_and_all():
    records = Records(CPU)
    assert [(record.note, record.numbers) for record in records.put("a", torch.tensor([1.0, 2.0]))] == [
        ("a", [1.0, 2.0])
    ]
    assert records.flush() == []
    late = Records(CPU)
    late._lag = 1  # as on a GPU
    taken = [record.note for step in range(3) for record in late.put(step, torch.zeros(1))]
    assert taken == [0, 1] and [record.note for record in late.flush()] == [2]
