"""What `bench train` compares: one optimizer step of the same DiT, as the engine takes it and as it is usually written.

Every implementation starts from the same weights and takes the same micro-batch: its first loss and gradient norm must
agree with the others'.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import noop_context_fn

from bench.results import OURS
from osp_fast.config import DiffusionConfig, OptimizerConfig
from osp_fast.data.buckets import Bucket
from osp_fast.device import memory_allowance
from osp_fast.diffusion.schedule import TRAIN_STEPS, DiffusionObjective, diffusion_betas
from osp_fast.engine.activations import plan_activations
from osp_fast.engine.compile import compile_blocks
from osp_fast.engine.cost import Workload, step_flops, tokens_of
from osp_fast.engine.cuda_graphs import CudaMachine, GraphedBuckets
from osp_fast.engine.devices import H100, find_device
from osp_fast.models.attention_backends import AttentionBackend
from osp_fast.models.dit import DiT, DiTConfig
from osp_fast.models.gather import merge_sets, split_sets, visible_keys, with_all_where_none
from osp_fast.parallel.shards import LocalShards
from osp_fast.parallel.world import Ranks, World
from osp_fast.training.optimizer import build_optimizer
from osp_fast.training.step import DenoisingLoss, MicroBatch, Update, accumulate_gradients, add_gradients

SETTINGS = OptimizerConfig()


@dataclass(frozen=True)
class Case:
    """A micro-batch: its clips, their size in pixels, and the tokens of their texts."""

    size: Bucket
    clips: int = 1
    text_tokens: int = 512

    def __str__(self) -> str:
        return str(self.size)

    @property
    def latent_size(self) -> tuple[int, int, int]:
        """(T, H, W) of the latents."""
        return (self.size.frames - 1) // 4 + 1, self.size.height // 8, self.size.width // 8

    def video_tokens(self, config: DiTConfig) -> int:
        """Of all clips."""
        return self.clips * tokens_of(config, self.latent_size)

    def workload(self, attention: str, path: str, compiled: bool) -> Workload:
        """As the engine plans and counts it: bfloat16 by autocast, float32 weights."""
        chosen = dict(attention=attention, path=path, compiled=compiled)
        return Workload(self.clips, self.latent_size, self.text_tokens, **chosen)

    def model_flops(self, config: DiTConfig) -> int:
        """Of forward and backward, by the mathematics: 3 x forward."""
        return step_flops(config, self.workload("triton", "triton", True)).model

    def make_batch(self, config: DiTConfig, device: torch.device) -> MicroBatch:
        """Random latents and text states, a quarter of the text padding."""
        generator = torch.Generator(device).manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        shape = (self.clips, config.in_channels, *self.latent_size)
        timesteps = torch.arange(self.clips, device=device) * (TRAIN_STEPS // self.clips) + TRAIN_STEPS // 3
        mask = (torch.arange(self.text_tokens, device=device) < self.text_tokens * 3 // 4).long()
        text = draw(self.clips, self.text_tokens, config.caption_channels)
        return MicroBatch(draw(*shape), draw(*shape), timesteps % TRAIN_STEPS, text, mask.expand(self.clips, -1))


class Step(Protocol):
    """Takes one optimizer step: a micro-batch -> mean loss and gradient norm, (2,), on the device.

    graph_size: bytes that a CUDA graph of it holds; PyTorch does not count them as allocated
    """

    graph_size: int

    def __call__(self, batch: MicroBatch) -> Tensor:
        """Nothing in it waits for the GPU."""


@dataclass(frozen=True)
class Implementation:
    """One way to train.

    attention: triton, sdpa, reference, or masked: memory-efficient SDPA with a mask, as upstream calls it
    path: triton or reference, what serves all other operations
    compiled: whether blocks are; recomputed: all of every block, or what does not fit (`plan_activations`)
    engine: the engine's step, or the usual lines
    """

    name: str
    attention: str
    path: str
    compiled: bool = False
    recomputed: str = "nothing"
    engine: bool = False


ON_GPU = (
    Implementation(OURS, "triton", "triton", compiled=True, recomputed="planned", engine=True),
    Implementation("torch.compile, best SDPA", "sdpa", "reference", compiled=True, recomputed="planned"),
    Implementation("reference path", "masked", "reference", recomputed="everything"),
)
ON_CPU = (
    Implementation(OURS, "reference", "reference", engine=True),
    Implementation("plain loop", "reference", "reference"),
)


@contextmanager
def kernels_path(path: str) -> Iterator[None]:
    """Within it `path` serves all operations, also in the threads of backward, which know no context variables."""
    before = os.environ.get("OSP_FAST_KERNELS")
    os.environ["OSP_FAST_KERNELS"] = path
    try:
        yield
    finally:
        if before is None:
            del os.environ["OSP_FAST_KERNELS"]
        else:
            os.environ["OSP_FAST_KERNELS"] = before


def make_dit(config: DiTConfig, device: torch.device) -> DiT:
    """Random float32 weights, the same each time, drawn on the device."""
    with torch.device("meta"):
        dit = DiT(config)
    dit.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in dit.parameters():
            parameter.normal_(std=0.02, generator=generator)
    return dit.train()


def prepare_step(one: Implementation, dit: DiT, case: Case, bf16: bool, report: Callable[[str], None]) -> Step:
    """An implementation's step of a fresh DiT; here and later `kernels_path` must be its own.

    On a GPU the engine's step is captured in a CUDA graph if that is faster. `report` takes a line of each thing that
    is chosen. Raises `UserError` if memory is too little whatever is recomputed.
    """
    device = dit.proj_out.weight.device
    if one.attention == "masked":
        backend = AttentionBackend("masked", masked_attention, lambda mode, sparse_n: "memory-efficient, masked")
        for block in dit.transformer_blocks:
            block.self_attention.backend = block.cross_attention.backend = backend
    else:
        dit.use_attention(one.attention, device, torch.bfloat16 if bf16 else torch.float32)
    step = (EngineStep if one.engine else PlainStep)(dit, bf16)
    if one.recomputed == "everything":
        dit.recompute_blocks(noop_context_fn)
    elif one.recomputed == "planned":
        # Gradients are to come, and the optimizer's state where it is not there from the start.
        weights = sum(parameter.numel() * parameter.element_size() for parameter in dit.parameters())
        budget = memory_allowance(device) - (1 if one.engine else 3) * weights
        rates = (find_device(torch.cuda.get_device_name(device)) if device.type == "cuda" else None) or H100
        workload = case.workload(one.attention, one.path, one.compiled)
        plan = plan_activations(dit.config, workload, budget, rates, "what the GPU has left,")
        plan.apply(dit)
        report(str(plan))
    if one.compiled:
        compile_blocks(dit, buckets=1)
    if one.engine and device.type == "cuda":
        step.choose_graph(str(case), case.make_batch(dit.config, device), report)
    return step


class PlainStep:
    """The usual lines: autocast, mean squared error, backward, clip, AdamW."""

    graph_size = 0

    def __init__(self, dit: DiT, bf16: bool):
        self.dit, self._bf16 = dit, bf16
        weight = dit.proj_out.weight
        self._alphas = torch.cumprod(1 - diffusion_betas(), 0).to(weight.device, torch.float32)
        self._optimizer = torch.optim.AdamW(
            dit.parameters(),
            lr=SETTINGS.learning_rate,
            betas=(SETTINGS.adam_beta1, SETTINGS.adam_beta2),
            eps=SETTINGS.adam_epsilon,
            weight_decay=SETTINGS.adam_weight_decay,
            fused=weight.device.type == "cuda" or None,
        )

    def __call__(self, batch: MicroBatch) -> Tensor:
        alpha = self._alphas[batch.timesteps].view(-1, 1, 1, 1, 1)
        noisy = alpha.sqrt() * batch.latents + (1 - alpha).sqrt() * batch.noise
        with torch.autocast(noisy.device.type, torch.bfloat16, enabled=self._bf16):
            prediction = self.dit(noisy, batch.timesteps, batch.text, batch.text_mask)
        loss = F.mse_loss(prediction.float(), batch.noise)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.dit.parameters(), SETTINGS.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
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


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mode: str = "full",
    sparse_n: int = 4,
    key_mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
) -> Tensor:
    """Sets gathered, PyTorch's memory-efficient kernel with a mask, which is there even where all is visible."""
    visible = visible_keys(k, key_mask, key_lengths)
    if visible is None:
        visible = torch.ones(k.shape[:2], dtype=torch.bool, device=k.device)
    outs = []
    for q_blshd, k_bmshd, v_bmshd, seen_bms in zip(
        *(split_sets(x, mode, sparse_n) for x in (q, k, v, visible)), strict=True
    ):
        heads = q_blshd.shape[2:4]
        q_bhld, k_bhmd, v_bhmd = (x.flatten(2, 3).transpose(1, 2) for x in (q_blshd, k_bmshd, v_bmshd))
        seen_bms, _ = with_all_where_none(seen_bms)
        mask = seen_bms.transpose(1, 2)[:, :, None].expand(-1, -1, heads[1], -1).flatten(1, 2)[:, :, None]
        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION if q.is_cuda else SDPBackend.MATH):
            out = F.scaled_dot_product_attention(q_bhld, k_bhmd, v_bhmd, attn_mask=mask)
        outs.append(out.transpose(1, 2).unflatten(2, heads))
    return merge_sets(outs, mode, sparse_n, q.shape[1])
