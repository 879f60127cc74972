"""What `bench sample` compares: one denoising step with guidance, as the engine takes it and as it is usually written.

A step predicts for the negative prompt and the prompt in one batch of two, mixes the predictions, and moves the latents
along. Every implementation has the same weights and is given the same numbers, so its results must agree with the
others'.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.results import OURS
from bench.train_steps import Case, masked_attention
from osp_fast.diffusion.denoise import GuidedModel, Text, prepare_text
from osp_fast.engine.compile import compile_blocks
from osp_fast.engine.cost import step_flops
from osp_fast.engine.cuda_graphs import CudaMachine
from osp_fast.engine.forward_graph import GraphedForward
from osp_fast.models.attention_backends import AttentionBackend
from osp_fast.models.dit import DiT, DiTConfig

SCALE = 7.5
STRIDE = 0.01  # how far a step moves the latents; any number would do
Step = Callable[[Tensor, int], Tensor]  # latents (1, C, T, H, W), number of the step -> the next ones


@dataclass(frozen=True)
class Implementation:
    """One way to sample.

    attention: triton, sdpa, reference, or masked: memory-efficient SDPA with a mask, as upstream calls it
    path: triton or reference, what serves all other operations; compiled: whether blocks are
    keys_once: text keys and values computed before the first step; times_once: time vectors of all steps likewise
    """

    name: str
    attention: str
    path: str
    compiled: bool = False
    keys_once: bool = False
    times_once: bool = False

    @property
    def engine(self) -> bool:
        """Whether this is the engine's own step."""
        return self.keys_once and self.times_once


ON_GPU = (
    Implementation(OURS, "triton", "triton", compiled=True, keys_once=True, times_once=True),
    Implementation("plain loop", "triton", "triton", compiled=True),
    Implementation("torch.compile, best SDPA", "sdpa", "reference", compiled=True),
    Implementation("reference path", "masked", "reference"),
)
ON_CPU = (
    Implementation(OURS, "reference", "reference", keys_once=True, times_once=True),
    Implementation("text keys once", "reference", "reference", keys_once=True),
    Implementation("time vectors once", "reference", "reference", times_once=True),
    Implementation("plain loop", "reference", "reference"),
)


def guided_flops(config: DiTConfig, case: Case) -> int:
    """Of a step: two forwards."""
    return 2 * step_flops(config, case.workload("triton", "triton", True)).model // 3


def make_texts(config: DiTConfig, case: Case, device: torch.device) -> tuple[Text, Text]:
    """Random states of a prompt and of a negative prompt, as long as a quarter and an eighth of the tokens."""
    generator = torch.Generator(device).manual_seed(1)
    places = torch.arange(case.text_tokens, device=device)[None]
    shape = (1, case.text_tokens, config.caption_channels)
    return tuple(
        Text(torch.randn(shape, generator=generator, device=device), (places < case.text_tokens // part).long())
        for part in (4, 8)
    )


def make_noise(config: DiTConfig, case: Case, device: torch.device) -> Tensor:
    """Latents to begin with."""
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(1, config.in_channels, *case.latent_size, generator=generator, device=device)


def prepare_step(one: Implementation, dit: DiT, case: Case, steps: int, report: Callable[[str], None] = print) -> Step:
    """An implementation's step with this DiT, which it changes; `kernels_path` must be its own.

    steps: of a run, whose timesteps go from 999 to 0; report: takes a line on a CUDA graph
    """
    device, dtype = dit.proj_out.weight.device, dit.proj_out.weight.dtype
    if one.attention == "masked":
        backend = AttentionBackend("masked", masked_attention, lambda mode, sparse_n: "memory-efficient, masked")
        for block in dit.transformer_blocks:
            block.self_attention.backend = block.cross_attention.backend = backend
    else:
        dit.use_attention(one.attention, device, dtype)
    if one.compiled:
        compile_blocks(dit, buckets=2)
    texts = make_texts(dit.config, case, device)
    timesteps = torch.linspace(999, 0, steps)
    predict = _engine(dit, texts, timesteps, report) if one.engine else _plain(one, dit, texts, timesteps)

    @torch.no_grad()
    def step(latents: Tensor, number: int) -> Tensor:
        return latents - STRIDE * predict(latents, number % steps)

    return step


def _engine(dit: DiT, texts: tuple[Text, Text], timesteps: Tensor, report: Callable[[str], None]) -> Step:
    """The engine's model call; on a GPU a CUDA graph, if that is faster."""
    device = dit.proj_out.weight.device
    forward = GraphedForward(dit, CudaMachine(device), False, report) if device.type == "cuda" else None
    return GuidedModel(dit, prepare_text(dit, *texts), timesteps, SCALE, forward=forward)


def _plain(one: Implementation, dit: DiT, texts: tuple[Text, Text], timesteps: Tensor) -> Step:
    """The usual lines, with what is computed once left out of the loop, or not."""
    device, dtype = dit.proj_out.weight.device, dit.proj_out.weight.dtype
    states = torch.cat([texts[1].states, texts[0].states]).to(dtype)
    masks = torch.cat([texts[1].mask, texts[0].mask])
    timesteps = timesteps.to(device)
    with torch.no_grad():
        text = (dit.text_context(states, masks),) if one.keys_once else (states, masks)
        times = dit.time_context(timesteps) if one.times_once else None

    def predict(latents: Tensor, number: int) -> Tensor:
        time = timesteps[number].expand(2) if times is None else times.at(number, 2)
        without, with_prompt = dit(torch.cat([latents] * 2).to(dtype), time, *text).float().chunk(2)
        return without + SCALE * (with_prompt - without)

    return predict
