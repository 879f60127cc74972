"""What the suite `sample` compares: a denoising step with guidance, as the engine takes it and as it is usual.

A step predicts for the negative prompt and the prompt in one batch of two, mixes the predictions, and moves the latents
along. Every implementation has the same weights and is given the same numbers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.results import OURS, REFERENCE, STRONG
from bench.suites.dits import EXACT_TYPES, UPSTREAM, Case, Implementation, plain_float32
from osp_fast.diffusion.denoise import GuidedModel, Halves, Text, prepare_text
from osp_fast.diffusion.samplers import LEAST_SIGNAL
from osp_fast.diffusion.schedule import TRAIN_STEPS, diffusion_betas
from osp_fast.engine.cost import step_flops
from osp_fast.engine.cuda_graphs import CudaMachine
from osp_fast.engine.forward_graph import GraphedForward
from osp_fast.models.dit import DiT, DiTConfig

# Of guidance in timed steps, which take as long with any other. A larger one would magnify rounding in the check: the
# prediction is scale x one half - (scale - 1) x the other.
SCALE = 2.0
Predict = Callable[[Tensor, int], Tensor]  # latents (1, C, T, H, W), number of the step -> guided prediction, float32


@dataclass(frozen=True)
class Way(Implementation):
    """One way to sample.

    keys_once: text keys and values computed before the first step; times_once: time vectors of all steps likewise
    """

    keys_once: bool = False
    times_once: bool = False

    @property
    def role(self) -> str:
        """One of `results.ROLES`: with one of the two computed once it is a part of ours."""
        return "variant" if self.keys_once != self.times_once else super().role

    @property
    def engine(self) -> bool:
        """Whether this is the engine's own step."""
        return self.keys_once and self.times_once


PLAIN = "plain loop"
ON_GPU = (
    Way(OURS, "triton", "triton", compiled=True, keys_once=True, times_once=True),
    Way(REFERENCE, UPSTREAM, "reference"),
    Way(STRONG, "sdpa", "reference", compiled=True),
    Way(PLAIN, "triton", "triton", compiled=True),
)
ON_CPU = (
    Way(OURS, "reference", "reference", keys_once=True, times_once=True),
    Way(REFERENCE, UPSTREAM, "reference"),
    Way(STRONG, "sdpa", "reference"),
    Way("text keys once", "reference", "reference", keys_once=True),
    Way("time vectors once", "reference", "reference", times_once=True),
    Way(PLAIN, "reference", "reference"),
)


class Ddim:
    """DDIM without noise (Song et al. 2021, arXiv:2010.02502) for a DiT that predicts velocity, from zero signal on.

    As `--sample_method DDIM` computes it, without diffusers, and with numbers that the host knows: no step waits.
    """

    def __init__(self, steps: int):
        stride = TRAIN_STEPS / steps
        self.timesteps = (TRAIN_STEPS - stride * torch.arange(steps)).round() - 1
        signal = torch.cumprod(1 - diffusion_betas(True, LEAST_SIGNAL), 0)
        before = (self.timesteps.long() - TRAIN_STEPS // steps).tolist()
        self._now = [signal[int(t)].item() for t in self.timesteps]
        self._next = [signal[t].item() if t >= 0 else 1.0 for t in before]

    def step(self, latents: Tensor, velocity: Tensor, number: int) -> Tensor:
        """The latents of the next timestep."""
        now, after = self._now[number], self._next[number]
        clean = now**0.5 * latents - (1 - now) ** 0.5 * velocity
        noise = now**0.5 * velocity + (1 - now) ** 0.5 * latents
        return after**0.5 * clean + (1 - after) ** 0.5 * noise


@dataclass
class Sampler:
    """An implementation at work on a clip; `around` must be its own. graph: of the forward, where one may be."""

    predict: Predict
    ddim: Ddim
    graph: GraphedForward | None = None

    @torch.no_grad()
    def run(self, latents: Tensor, numbers: range) -> Tensor:
        """The latents after these steps."""
        for number in numbers:
            latents = self.ddim.step(latents, self.predict(latents, number), number)
        return latents

    @property
    def graph_bytes(self) -> int:
        """That a CUDA graph holds; PyTorch does not count them as allocated."""
        return 0 if self.graph is None else self.graph.size


def guided_flops(config: DiTConfig, case: Case) -> int:
    """Of a step: two forwards."""
    return 2 * step_flops(config, case.workload()).model // 3


def make_texts(config: DiTConfig, case: Case, device: torch.device) -> tuple[Text, Text]:
    """Random states of a prompt and of a negative prompt, as long as a quarter and an eighth of the tokens."""
    generator = torch.Generator(device).manual_seed(1)
    places = torch.arange(case.text_tokens, device=device)[None]
    shape = (1, case.text_tokens, config.caption_channels)
    return tuple(
        Text(torch.randn(shape, generator=generator, device=device), (places < case.text_tokens // part).long())
        for part in (4, 8)
    )


def make_noise(config: DiTConfig, case: Case, device: torch.device, seed: int = 0) -> Tensor:
    """Latents to begin with."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(1, config.in_channels, *case.latent_size, generator=generator, device=device)


def prepare(one: Way, dit: DiT, device: torch.device | None = None) -> DiT:
    """Give a DiT an implementation's attention, and compile it, where it is. Returns the model.

    device: where it will compute, None: where it is
    """
    return one.compile(one.prepare(dit, device), buckets=2)


def make_sampler(one: Way, dit: DiT, case: Case, steps: int, report: Callable[[str], None] = print) -> Sampler:
    """Of a prepared DiT. On a GPU the engine's is a CUDA graph if that is faster, of which `report` takes a line."""
    device = dit.proj_out.weight.device
    if not one.engine:
        ddim = Ddim(steps)
        return Sampler(_plain(one, dit, make_texts(dit.config, case, device), ddim.timesteps), ddim)
    graph = GraphedForward(dit, CudaMachine(device), False, report) if device.type == "cuda" else None
    return engine_sampler(dit, case, steps, forward=graph)


def engine_sampler(
    dit: DiT,
    case: Case,
    steps: int,
    *,
    scale: float = SCALE,
    halves: Halves = Halves.TOGETHER,
    forward: GraphedForward | None = None,
    step_cache: Any = None,
) -> Sampler:
    """The engine's own, with these settings of `GuidedModel`."""
    ddim = Ddim(steps)
    texts = prepare_text(dit, *make_texts(dit.config, case, dit.proj_out.weight.device), halves)
    model = GuidedModel(dit, texts, ddim.timesteps, scale, halves, forward=forward, step_cache=step_cache)
    return Sampler(model, ddim, forward)


def _plain(one: Way, dit: DiT, texts: tuple[Text, Text], timesteps: Tensor) -> Predict:
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


def checked_noise(dit: DiT, case: Case) -> Tensor:
    """Latents that predictions are compared for."""
    return make_noise(dit.config, case, dit.proj_out.weight.device, 1)


@torch.no_grad()
def exact_prediction(dit: DiT, case: Case, steps: int, number: int) -> Tensor:
    """The guided prediction in step `number` of `checked_noise`, by plain operations in `EXACT_TYPES`.

    dit: its weights become of that type
    """
    device = dit.proj_out.weight.device
    with plain_float32(device) as exact:
        plain = Way(exact.name, exact.attention, exact.path)
        sampler = make_sampler(plain, prepare(plain, dit.to(EXACT_TYPES[device.type])), case, steps)
        return sampler.predict(checked_noise(dit, case), number)
