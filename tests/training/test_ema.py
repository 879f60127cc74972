"""The average follows its formula, lives where it was told to, and starts when it was told to."""

import pytest
import torch
from torch import nn

from osp_fast.parallel.shards import LocalShards
from osp_fast.seeding import torch_generator
from osp_fast.training.ema import EMA


def layer(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Linear:
    module = nn.Linear(5, 3, dtype=dtype)
    for name, parameter in module.named_parameters():
        drawn = torch.randn(parameter.shape, generator=torch_generator("test", seed, name))
        parameter.data.copy_(drawn)
    return module


@pytest.mark.parametrize("decay", [0.0, 0.15, 0.9999])
@pytest.mark.parametrize("start", [0, 3])
def test_formula(decay, start):
    module = layer()
    ema = EMA(LocalShards(module), decay, start)
    expected, averaged = module.weight.detach().double(), 0
    for step in range(1, 9):
        module.weight.data += 0.1 * step
        ema.update(step)
        d = 0.0
        if step > start:
            d = min(decay, (1 + averaged) / (10 + averaged)) if averaged else 0.0
            averaged += 1
        expected = d * expected + (1 - d) * module.weight.detach().double()
        torch.testing.assert_close(ema.named_average()["weight"].double(), expected, rtol=0, atol=1e-6)
    assert ema.updates == 8 - start


def test_equals_the_weights_until_it_starts_and_shares_no_memory_with_them():
    module = layer()
    ema = EMA(LocalShards(module), 0.5, start_step=2)
    for step in (1, 2, 3):
        module.weight.data += 1.0
        ema.update(step)
        assert torch.equal(ema.named_average()["weight"], module.weight)
    module.weight.data += 1.0
    assert not torch.equal(ema.named_average()["weight"], module.weight)
    ema.update(4)
    assert not torch.equal(ema.named_average()["weight"], module.weight)


def test_float32_average_of_16_bit_weights():
    module = layer(dtype=torch.bfloat16)
    ema = EMA(LocalShards(module), 0.9999, offload=True)
    ema.update(1)
    assert all(average.dtype == torch.float32 and average.device.type == "cpu" for average in ema.average)
    assert torch.equal(ema.named_average()["bias"], module.bias.float())


def test_load_goes_on_from_a_saved_average():
    module, saved = layer(0), layer(1)
    ema = EMA(LocalShards(module), 0.15)
    ema.load(saved.state_dict(), updates=7)
    module.weight.data += 1.0
    ema.update(8)
    expected = 0.15 * saved.weight + 0.85 * module.weight
    torch.testing.assert_close(ema.named_average()["weight"], expected.detach())
    assert ema.updates == 8


def test_a_skipped_step_changes_nothing_and_counts_for_nothing():
    module = layer()
    ema = EMA(LocalShards(module), 0.5)
    ema.update(1)
    module.weight.data += 1.0
    before = {name: average.clone() for name, average in ema.named_average().items()}
    ema.update(2, skipped=torch.tensor(1.0))
    assert ema.updates == 1 and all(torch.equal(ema.named_average()[name], kept) for name, kept in before.items())
    ema.update(3, skipped=torch.tensor(0.0))
    assert ema.updates == 2 and not torch.equal(ema.named_average()["weight"], before["weight"])


def test_the_model_computes_with_the_average_for_a_while():
    module = layer()
    ema = EMA(LocalShards(module), 0.5)
    ema.update(1)
    average = module.weight.detach().clone()
    module.weight.data += 1.0
    weights = module.weight.detach().clone()
    with pytest.raises(KeyError), ema.in_place_of_weights():
        assert torch.equal(module.weight, average)
        raise KeyError
    assert torch.equal(module.weight, weights) and torch.equal(ema.named_average()["weight"], average)
