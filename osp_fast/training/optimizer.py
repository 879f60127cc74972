"""AdamW, its learning-rate schedule and its state as named tensors."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from osp_fast.config import OptimizerConfig
from osp_fast.errors import UserError
from osp_fast.parallel.shards import LocalShards

MOMENTS = ("exp_avg", "exp_avg_sq")


def build_optimizer(parameters: Sequence[nn.Parameter], config: OptimizerConfig) -> Optimizer:
    """AdamW over these parameters, all on one device and none part of a graph, its state already allocated.

    One fused kernel updates all of them. `use_8bit_adam` takes torchao's AdamW instead, which keeps both moments in
    blocks of 8-bit codes (Dettmers et al. 2021, "8-bit Optimizers via Block-wise Quantization"); `offload_optimizer`
    torchao's that keeps them in CPU memory and updates there, while other gradients are still on their way.

    Raises:
        UserError: one of the two without a GPU or without torchao, or both.
    """
    if config.use_8bit_adam and config.offload_optimizer:
        raise UserError("--use_8bit_adam and --offload_optimizer exclude each other: leave one of them out")
    # A rank of many may hold no part of a small parameter.
    parameters = [parameter for parameter in parameters if parameter.numel()]
    settings = dict(
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.adam_weight_decay,
    )
    if config.use_8bit_adam:
        optimizer = _torchao("--use_8bit_adam", parameters).AdamW8bit(parameters, **settings)
    elif config.offload_optimizer:
        offloading = _torchao("--offload_optimizer", parameters).CPUOffloadOptimizer
        optimizer = offloading(parameters, torch.optim.AdamW, minimal_size=0, fused=True, **settings)
    else:
        optimizer = torch.optim.AdamW(parameters, **settings, fused=True)
    _allocate_state(optimizer)
    return optimizer


def _torchao(flag: str, parameters: Sequence[nn.Parameter]) -> Any:
    """torchao's optimizers, for a flag that needs them."""
    if parameters[0].device.type != "cuda":
        raise UserError(f"{flag} needs an NVIDIA GPU: leave it out to train on the CPU")
    try:
        import torchao.optim
    except ImportError as error:
        raise UserError(
            f"{flag} needs the package torchao: install it (pip install torchao), or leave the flag out"
        ) from error
    return torchao.optim


def steps_by_flag(optimizer: Optimizer) -> bool:
    """Whether a step changes nothing when the tensor `found_inf` is 1, as PyTorch's fused AdamW does."""
    return isinstance(optimizer, torch.optim.AdamW)


def take_step(optimizer: Optimizer) -> None:
    """One step with the gradients that the parameters have."""
    if hasattr(optimizer, "param_d2h_map"):
        # torchao's offloading fetches a gradient when autograd has accumulated it. These parameters are in no graph,
        # so that gradients can be clipped first: each is accumulated here.
        for parameter in optimizer.param_d2h_map:
            gradient, parameter.grad = parameter.grad, None
            parameter.backward(gradient)
    optimizer.step()


def _allocate_state(optimizer: Optimizer) -> None:
    """Create the optimizer's tensors now, through its public interface: a step with zero gradients at rate zero.

    So a run that does not fit into memory fails before its first clip, and a resumed run can fill the very tensors
    that a new run would have, whatever their layout. The weights and moments are left exactly as they were.
    """
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    set_learning_rate(optimizer, [0.0] * len(rates))
    for parameter in trained(optimizer):
        parameter.grad = torch.zeros_like(parameter)
    with torch.enable_grad():
        take_step(optimizer)
    optimizer.zero_grad(set_to_none=True)
    for state in states(optimizer).values():
        state["step"].zero_()
    set_learning_rate(optimizer, rates)


def trained(optimizer: Optimizer) -> list[nn.Parameter]:
    """The parameters that an optimizer updates, on their own device."""
    if hasattr(optimizer, "param_d2h_map"):
        return list(optimizer.param_d2h_map)
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def states(optimizer: Optimizer) -> dict[nn.Parameter, dict[str, Tensor]]:
    """What an optimizer knows of each of its parameters."""
    if hasattr(optimizer, "param_d2h_map"):
        return {
            parameter: optimizer.optim_dict[parameter].state[on_cpu]
            for parameter, on_cpu in optimizer.param_d2h_map.items()
        }
    return {parameter: optimizer.state[parameter] for parameter in trained(optimizer)}


def set_learning_rate(optimizer: Optimizer, rates: list[float]) -> None:
    """Set the learning rate of each parameter group; an optimizer that holds it as a tensor keeps its tensor."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def state_tensors(optimizer: Optimizer, shards: LocalShards) -> dict[str, Tensor]:
    """The optimizer's state by name: `PARAMETER.exp_avg`, `PARAMETER.exp_avg_sq`, and `step`, equal for all.

    They are the tensors themselves, so copying into them restores a state. A moment is part of a whole as its parameter
    is (`LocalShards.like`). A quantised one, whose blocks end where this rank's part ends, is given by its own parts,
    named for the rank's place (`PARAMETER.exp_avg.codes.3-of-8`, `.scale`, `.qmap`), so that it comes back bit for bit.
    """
    known = states(optimizer)
    tensors: dict[str, Tensor] = {}
    for index, (name, local) in enumerate(zip(shards.names, shards.local, strict=True)):
        state = known.get(local)
        if state is None:  # this rank has no part of it
            continue
        for key in MOMENTS:
            if hasattr(state[key], "__tensor_flatten__"):
                parts, _ = state[key].__tensor_flatten__()
                tensors |= {f"{name}.{key}.{part}.{shards.place}": getattr(state[key], part) for part in parts}
            else:
                tensors[f"{name}.{key}"] = shards.like(index, state[key])
    return tensors


def step_tensors(optimizer: Optimizer) -> list[Tensor]:
    """How many steps each parameter was updated in: tensors of one number, all equal."""
    return [state["step"] for state in states(optimizer).values()]


def learning_rate_rule(config: OptimizerConfig, total_steps: int) -> Callable[[int], float]:
    """The learning rate of each optimizer step (the first is 0) as a pure function, so a resumed run just calls it.

    The shapes are those of `diffusers.optimization.get_scheduler`, with one cycle and power 1.

    Args:
        total_steps: optimizer steps of the whole run, where the decaying schedules end.

    Raises:
        UserError: the schedule and the learning rate do not go together.
    """
    from diffusers.optimization import get_scheduler

    try:
        scheduler = get_scheduler(
            config.lr_scheduler,
            # The schedule is asked for its factors only; it needs an optimizer to be built on.
            torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=config.learning_rate),
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=total_steps,
        )
    except ValueError as error:
        raise UserError(
            f"--lr_scheduler {config.lr_scheduler} does not go with --learning_rate {config.learning_rate:g} ({error}):"
            " raise the rate or choose another schedule"
        ) from error
    factor = scheduler.lr_lambdas[0]
    return lambda step: config.learning_rate * factor(step)
