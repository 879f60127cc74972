"""AdamW against its formula, schedules against diffusers, state as named tensors."""

import dataclasses

import pytest
import torch
from torch import nn

from osp_fast.config import LR_SCHEDULERS, OptimizerConfig
from osp_fast.errors import UserError
from osp_fast.seeding import torch_generator
from osp_fast.training.optimizer import build_optimizer, learning_rate_rule, set_learning_rate, state_tensors


def network() -> nn.Sequential:
    module = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2))
    for name, parameter in module.named_parameters():
        drawn = torch.randn(parameter.shape, generator=torch_generator("test", name))
        parameter.data.copy_(drawn)
    return module


def train(module: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x = torch.randn(8, 6, generator=torch_generator("x", step))
        module(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_adamw_follows_its_formula():
    config = OptimizerConfig(learning_rate=0.1, adam_beta1=0.8, adam_beta2=0.9, adam_weight_decay=0.05)
    module = nn.Linear(3, 1, bias=False)
    optimizer = build_optimizer(module, config)
    weight = module.weight.detach().double().clone()
    first = second = torch.zeros_like(weight)
    for step in range(1, 5):
        gradient = torch.randn(1, 3, generator=torch_generator("gradient", step))
        module.weight.grad = gradient.clone()
        optimizer.step()
        first = 0.8 * first + 0.2 * gradient.double()
        second = 0.9 * second + 0.1 * gradient.double() ** 2
        weight = weight * (1 - 0.1 * 0.05)
        weight = weight - 0.1 * (first / (1 - 0.8**step)) / ((second / (1 - 0.9**step)).sqrt() + 1e-15)
        torch.testing.assert_close(module.weight.detach().double(), weight, rtol=0, atol=1e-6)


def test_building_allocates_state_and_changes_nothing():
    module, untouched = network(), network()
    optimizer = build_optimizer(module, OptimizerConfig(learning_rate=0.3))
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), untouched.parameters(), strict=True))
    tensors = state_tensors(optimizer, module)
    assert set(tensors) == {
        f"{layer}.{kind}.{key}"
        for layer in "01"
        for kind in ("weight", "bias")
        for key in ("exp_avg", "exp_avg_sq", "step")
    }
    assert all(not tensor.any() for tensor in tensors.values())
    assert [group["lr"] for group in optimizer.param_groups] == [0.3]
    assert all(parameter.grad is None for parameter in module.parameters())


def test_copying_the_state_continues_bit_for_bit():
    config = OptimizerConfig(learning_rate=0.05)
    straight, resumed = network(), network()
    first = build_optimizer(straight, config)
    train(straight, first, range(3))
    saved = {name: tensor.clone() for name, tensor in state_tensors(first, straight).items()}
    resumed.load_state_dict(straight.state_dict())
    second = build_optimizer(resumed, config)
    for name, tensor in state_tensors(second, resumed).items():
        tensor.copy_(saved[name])
    train(straight, first, range(3, 6))
    train(resumed, second, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))


class Coded:
    """What a quantised moment looks like from outside."""

    def __init__(self):
        self.codes, self.scale = torch.zeros(4, dtype=torch.uint8), torch.ones(1)

    def __tensor_flatten__(self):
        return ["codes", "scale"], []


def test_state_of_a_quantised_moment_is_its_parts():
    module = nn.Linear(2, 2, bias=False)
    optimizer = build_optimizer(module, OptimizerConfig())
    coded = optimizer.state[module.weight]["exp_avg"] = Coded()
    tensors = state_tensors(optimizer, module)
    assert tensors["weight.exp_avg.codes"] is coded.codes and tensors["weight.exp_avg.scale"] is coded.scale
    assert "weight.exp_avg" not in tensors and "weight.exp_avg_sq" in tensors


@pytest.mark.parametrize("name", LR_SCHEDULERS)
def test_learning_rate_is_that_of_diffusers_stepped_through(name):
    from diffusers.optimization import get_scheduler

    config = OptimizerConfig(learning_rate=3e-3, lr_scheduler=name, lr_warmup_steps=5)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=3e-3)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=5, num_training_steps=20)
    rule = learning_rate_rule(config, 20)
    for step in range(20):
        assert rule(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12, abs=1e-18)
        optimizer.step()
        scheduler.step()


def test_a_tensor_learning_rate_stays_a_tensor():
    optimizer = build_optimizer(nn.Linear(1, 1), OptimizerConfig())
    rate = optimizer.param_groups[0]["lr"] = torch.tensor(1.0)
    set_learning_rate(optimizer, [0.25])
    assert optimizer.param_groups[0]["lr"] is rate and rate.item() == 0.25


def test_8_bit_adam_on_the_cpu_is_refused():
    config = dataclasses.replace(OptimizerConfig(), use_8bit_adam=True)
    with pytest.raises(UserError, match="--use_8bit_adam needs an NVIDIA GPU"):
        build_optimizer(nn.Linear(1, 1), config)
