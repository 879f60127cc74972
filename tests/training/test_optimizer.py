"""AdamW against its formula, schedules against diffusers, state as named tensors."""

import dataclasses

import pytest
import torch
from torch import nn

from osp_fast.config import LR_SCHEDULERS, OptimizerConfig
from osp_fast.errors import UserError
from osp_fast.parallel.shards import LocalShards
from osp_fast.seeding import torch_generator
from osp_fast.training.optimizer import (
    build_optimizer,
    learning_rate_rule,
    set_learning_rate,
    state_tensors,
    step_tensors,
    take_step,
)


def network() -> nn.Sequential:
    module = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2))
    for name, parameter in module.named_parameters():
        drawn = torch.randn(parameter.shape, generator=torch_generator("test", name))
        parameter.data.copy_(drawn)
    return module


def train(module: nn.Module, shards: LocalShards, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x = torch.randn(8, 6, generator=torch_generator("x", step))
        module(x).square().mean().backward()
        shards.collect_gradients()
        take_step(optimizer)
        shards.drop_gradients()


def test_adamw_follows_its_formula():
    config = OptimizerConfig(learning_rate=0.1, adam_beta1=0.8, adam_beta2=0.9, adam_weight_decay=0.05)
    module = nn.Linear(3, 1, bias=False)
    optimizer = build_optimizer(list(module.parameters()), config)
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
    shards = LocalShards(module)
    optimizer = build_optimizer(shards.local, OptimizerConfig(learning_rate=0.3))
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), untouched.parameters(), strict=True))
    tensors = state_tensors(optimizer, shards)
    assert set(tensors) == {
        f"{layer}.{kind}.{key}" for layer in "01" for kind in ("weight", "bias") for key in ("exp_avg", "exp_avg_sq")
    }
    assert all(not tensor.any() for tensor in (*tensors.values(), *step_tensors(optimizer)))
    assert [group["lr"] for group in optimizer.param_groups] == [0.3]
    assert all(parameter.grad is None for parameter in module.parameters())


def test_copying_the_state_continues_bit_for_bit():
    config = OptimizerConfig(learning_rate=0.05)
    straight, resumed = network(), network()
    shards = [LocalShards(straight), LocalShards(resumed)]
    first = build_optimizer(shards[0].local, config)
    train(straight, shards[0], first, range(3))
    saved = {name: tensor.clone() for name, tensor in state_tensors(first, shards[0]).items()}
    resumed.load_state_dict(straight.state_dict())
    second = build_optimizer(shards[1].local, config)
    for name, tensor in state_tensors(second, shards[1]).items():
        tensor.copy_(saved[name])
    for step in step_tensors(second):
        step.fill_(3)
    train(straight, shards[0], first, range(3, 6))
    train(resumed, shards[1], second, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))


class Coded:
    """What a quantised moment looks like from outside."""

    def __init__(self):
        self.codes, self.scale = torch.zeros(4, dtype=torch.uint8), torch.ones(1)

    def __tensor_flatten__(self):
        return ["codes", "scale"], []


def test_state_of_a_quantised_moment_is_its_parts():
    shards = LocalShards(nn.Linear(2, 2, bias=False))
    optimizer = build_optimizer(shards.local, OptimizerConfig())
    coded = optimizer.state[shards.local[0]]["exp_avg"] = Coded()
    tensors = state_tensors(optimizer, shards)
    assert tensors["weight.exp_avg.codes.0-of-1"] is coded.codes
    assert tensors["weight.exp_avg.scale.0-of-1"] is coded.scale
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
    optimizer = build_optimizer(list(nn.Linear(1, 1).parameters()), OptimizerConfig())
    rate = optimizer.param_groups[0]["lr"] = torch.tensor(1.0)
    set_learning_rate(optimizer, [0.25])
    assert optimizer.param_groups[0]["lr"] is rate and rate.item() == 0.25


@pytest.mark.parametrize(
    "flags, words",
    [
        (["use_8bit_adam"], "--use_8bit_adam needs an NVIDIA GPU"),
        (["offload_optimizer"], "--offload_optimizer needs an NVIDIA GPU"),
        (["use_8bit_adam", "offload_optimizer"], "exclude each other"),
    ],
)
def test_what_needs_a_gpu_or_contradicts_is_refused(flags, words):
    config = dataclasses.replace(OptimizerConfig(), **dict.fromkeys(flags, True))
    with pytest.raises(UserError, match=words):
        build_optimizer(list(nn.Linear(1, 1).parameters()), config)


class Offloading:
    """What torchao's offloading optimizer does with gradients: it takes them where autograd has accumulated them."""

    def __init__(self, parameters: list[nn.Parameter], seen: list[torch.Tensor]):
        self.param_d2h_map = {parameter: parameter.detach().clone() for parameter in parameters}
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))

    def step(self) -> None:
        pass


def test_an_offloading_optimizer_gets_the_gradients_as_they_are_after_clipping():
    seen: list[torch.Tensor] = []
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.ones(3))]
    offloading = Offloading(parameters, seen)
    for number, parameter in enumerate(parameters):
        parameter.grad = torch.full_like(parameter, number + 0.5)
    take_step(offloading)
    assert [gradient.tolist() for gradient in seen] == [[0.5] * 2, [1.5] * 3]
