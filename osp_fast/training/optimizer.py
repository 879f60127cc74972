"""AdamW, its learning-rate schedule and its state as named tensors."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from osp_fast.config import OptimizerConfig
from osp_fast.errors import UserError


def build_optimizer(module: nn.Module, config: OptimizerConfig) -> Optimizer:
    """AdamW over the parameters of `module` that need gradients, its state already allocated.

    One fused kernel updates all tensors of a device. `use_8bit_adam` takes torchao's AdamW instead, which keeps both
    moments in blocks of 8-bit codes (Dettmers et al. 2021, "8-bit Optimizers via Block-wise Quantization").

    Raises:
        UserError: `use_8bit_adam` without a GPU or without torchao.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    settings = dict(
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.adam_weight_decay,
    )
    if config.use_8bit_adam:
        optimizer = _adamw_8bit(parameters, settings)
    else:
        optimizer = torch.optim.AdamW(parameters, **settings, fused=True)
    _allocate_state(optimizer)
    return optimizer


def _adamw_8bit(parameters: list[nn.Parameter], settings: dict) -> Optimizer:
    if parameters[0].device.type != "cuda":
        raise UserError("--use_8bit_adam needs an NVIDIA GPU: leave it out to train on the CPU")
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise UserError(
            "--use_8bit_adam needs the package torchao: install it (pip install torchao), or leave the flag out"
        ) from error
    return AdamW8bit(parameters, **settings)


def _allocate_state(optimizer: Optimizer) -> None:
    """Create the optimizer's tensors now, through its public interface: a step with zero gradients at rate zero.

    So a run that does not fit into memory fails before its first clip, and a resumed run can fill the very tensors
    that a new run would have, whatever their layout. The weights and moments are left exactly as they were.
    """
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    set_learning_rate(optimizer, [0.0] * len(rates))
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for state in optimizer.state.values():
        state["step"].zero_()
    set_learning_rate(optimizer, rates)


def set_learning_rate(optimizer: Optimizer, rates: list[float]) -> None:
    """Set the learning rate of each parameter group; an optimizer that holds it as a tensor keeps its tensor."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def state_tensors(optimizer: Optimizer, module: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state as plain tensors, named `PARAMETER.exp_avg`, `PARAMETER.exp_avg_sq`, `PARAMETER.step`.

    They are the tensors themselves, so copying into them restores a state. A quantised moment is given by its parts
    (`PARAMETER.exp_avg.codes`, `.scale`, `.qmap`), so that a saved state comes back bit for bit.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if hasattr(value, "__tensor_flatten__"):
                parts, _ = value.__tensor_flatten__()
                tensors.update({f"{name}.{key}.{part}": getattr(value, part) for part in parts})
            else:
                tensors[f"{name}.{key}"] = value
    return tensors


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
