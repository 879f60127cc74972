"""What the suite `train` compares: one optimizer step of the same DiT, as the engine takes it and as it is usual.

Every implementation starts from the same weights and takes the same micro-batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import noop_context_fn

from bench.results import OURS, REFERENCE, STRONG
from bench.suites.dits import EXACT_TYPES, UPSTREAM, Case, Implementation, make_dit, plain_float32, rates_of
from osp_fast.config import DiffusionConfig, OptimizerConfig
from osp_fast.device import memory_allowance
from osp_fast.diffusion.schedule import DiffusionObjective, diffusion_betas
from osp_fast.engine.activations import ActivationPlan, plan_activations
from osp_fast.engine.cuda_graphs import CudaMachine, GraphedBuckets
from osp_fast.models.dit import DiT, DiTConfig
from osp_fast.parallel.shards import LocalShards
from osp_fast.parallel.world import Ranks, World
from osp_fast.training.optimizer import build_optimizer
from osp_fast.training.step import DenoisingLoss, MicroBatch, Update, accumulate_gradients, add_gradients

SETTINGS = OptimizerConfig()


class Step(Protocol):
    """Takes one optimizer step: a micro-batch -> mean loss and gradient norm, (2,), on the device.

    graph_size: bytes that a CUDA graph of it holds; PyTorch does not count them as allocated
    """

    graph_size: int

    def __call__(self, batch: MicroBatch) -> Tensor:
        """Nothing in it waits for the GPU."""


class PlainStep:
    """The usual lines: autocast, mean squared error, backward, clip, AdamW."""

    graph_size = 0

    def __init__(self, dit: DiT, bf16: bool):
        self.dit, self._bf16 = dit, bf16
        self._alphas = _alphas(dit)
        self._optimizer = _plain_optimizer(list(dit.parameters()))

    def __call__(self, batch: MicroBatch) -> Tensor:
        with torch.autocast(batch.latents.device.type, torch.bfloat16, enabled=self._bf16):
            prediction = self.dit(_noisy(batch, self._alphas), batch.timesteps, batch.text, batch.text_mask)
        loss = F.mse_loss(prediction.float(), batch.noise)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.dit.parameters(), SETTINGS.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return torch.stack((loss.detach(), norm))


class UpstreamStep:
    """As the original code trains: all of the DiT in bfloat16, float32 weights and moments in the optimizer alone."""

    graph_size = 0

    def __init__(self, dit: DiT, bf16: bool):
        self._alphas = _alphas(dit)
        self._masters = [nn.Parameter(parameter.detach().float()) for parameter in dit.parameters()]
        self.dit = dit.to(torch.bfloat16 if bf16 else torch.float32)
        self._parameters = list(self.dit.parameters())
        self._optimizer = _plain_optimizer(self._masters)

    def __call__(self, batch: MicroBatch) -> Tensor:
        dtype = self.dit.proj_out.weight.dtype
        noisy = _noisy(batch, self._alphas).to(dtype)
        prediction = self.dit(noisy, batch.timesteps, batch.text.to(dtype), batch.text_mask)
        loss = F.mse_loss(prediction.float(), batch.noise)
        loss.backward()
        for master, parameter in zip(self._masters, self._parameters, strict=True):
            master.grad, parameter.grad = parameter.grad.float(), None
        norm = nn.utils.clip_grad_norm_(self._masters, SETTINGS.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_copy_(self._parameters, self._masters)
        return torch.stack((loss.detach(), norm))


class EngineStep:
    """The step of `osp_fast.train`, in one process and without an average."""

    graph_size = 0

    def __init__(self, dit: DiT, bf16: bool):
        device = dit.proj_out.weight.device
        self._loss = DenoisingLoss(dit, DiffusionObjective(DiffusionConfig(), device), bf16)
        shards = LocalShards(dit)
        optimizer = build_optimizer(shards.local, SETTINGS)
        self._update = Update(shards, optimizer, None, World(Ranks(), device), SETTINGS.max_grad_norm)
        self._graphs: GraphedBuckets | None = None
        self._steps = 0

    def choose_graph(self, name: str, batch: MicroBatch, report: Callable[[str], None]) -> None:
        """Let a CUDA graph make the gradients of micro-batches like this one, if it measures faster."""
        clips = len(batch.timesteps)
        graphs = GraphedBuckets(
            lambda values: add_gradients(self._loss, MicroBatch(*values), clips),
            self._update.shards.parameters,
            CudaMachine(batch.latents.device),
        )
        graphs.choose([(name, batch.values())], False, report)
        self._graphs, self.graph_size = graphs, graphs.size

    def __call__(self, batch: MicroBatch) -> Tensor:
        self._steps += 1
        return self._update(accumulate_gradients(self._loss, [batch], self._graphs), self._steps)[:2]


@dataclass(frozen=True)
class Trainer(Implementation):
    """One way to train.

    step: how; recomputed: all of every block, nothing, or what does not fit (`plan_activations`)
    """

    step: type = PlainStep
    recomputed: str = "nothing"


ON_GPU = (
    Trainer(OURS, "triton", "triton", True, EngineStep, "planned"),
    Trainer(REFERENCE, UPSTREAM, "reference", False, UpstreamStep, "everything"),
    Trainer(STRONG, "sdpa", "reference", True, PlainStep, "planned"),
)
ON_CPU = (
    Trainer(OURS, "reference", "reference", step=EngineStep),
    Trainer(REFERENCE, UPSTREAM, "reference", False, UpstreamStep, "everything"),
    Trainer(STRONG, "sdpa", "reference"),
    Trainer("plain loop", "reference", "reference"),
)


@dataclass(frozen=True)
class Ready:
    """A step that can be taken. plan: of what blocks recompute; None: nothing was planned."""

    step: Step
    plan: ActivationPlan | None = None


def prepare_step(one: Trainer, dit: DiT, case: Case, bf16: bool, report: Callable[[str], None]) -> Ready:
    """A trainer's step of a fresh DiT; here and later `around` must be its own.

    On a GPU the engine's step is captured in a CUDA graph if that is faster. `report` takes a line of each thing that
    is chosen. Raises `UserError` if memory is too little whatever is recomputed.
    """
    device, plan = dit.proj_out.weight.device, None
    one.prepare(dit, device, torch.bfloat16 if bf16 else torch.float32)
    step = one.step(dit, bf16)
    if one.recomputed == "everything":
        dit.recompute_blocks(noop_context_fn)
    elif one.recomputed == "planned":
        # Gradients are to come, and the optimizer's state where it is not there from the start.
        weights = sum(parameter.numel() * parameter.element_size() for parameter in dit.parameters())
        budget = memory_allowance(device) - (1 if one.step is EngineStep else 3) * weights
        workload = case.workload(one.attention, one.path, one.compiled)
        plan = plan_activations(dit.config, workload, budget, rates_of(device), "what the GPU has left,")
        plan.apply(dit)
        report(str(plan))
    one.compile(dit, buckets=2)  # its own and the one that it is checked at
    if one.step is EngineStep and device.type == "cuda":
        step.choose_graph(str(case), case.make_batch(dit.config, device), report)
    return Ready(step, plan)


def exact_step(config: DiTConfig, case: Case, device: torch.device) -> Tensor:
    """Loss and gradient norm of the first step, of plain operations in `EXACT_TYPES` that recompute every block."""
    dtype = EXACT_TYPES[device.type]
    with plain_float32(device) as one:
        dit = one.prepare(make_dit(config, device).to(dtype)).recompute_blocks(noop_context_fn)
        batch = case.make_batch(config, device)
        noisy = _noisy(batch, _alphas(dit)).to(dtype)
        loss = F.mse_loss(dit(noisy, batch.timesteps, batch.text.to(dtype), batch.text_mask), batch.noise.to(dtype))
        loss.backward()
        return torch.stack((loss.detach(), nn.utils.get_total_norm([x.grad for x in dit.parameters()])))


def _alphas(dit: DiT) -> Tensor:
    return torch.cumprod(1 - diffusion_betas(), 0).to(dit.proj_out.weight.device, torch.float32)


def _noisy(batch: MicroBatch, alphas: Tensor) -> Tensor:
    alpha = alphas[batch.timesteps].view(-1, 1, 1, 1, 1)
    return alpha.sqrt() * batch.latents + (1 - alpha).sqrt() * batch.noise


def _plain_optimizer(parameters: list[nn.Parameter]) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        parameters,
        lr=SETTINGS.learning_rate,
        betas=(SETTINGS.adam_beta1, SETTINGS.adam_beta2),
        eps=SETTINGS.adam_epsilon,
        weight_decay=SETTINGS.adam_weight_decay,
        fused=parameters[0].is_cuda or None,
    )
