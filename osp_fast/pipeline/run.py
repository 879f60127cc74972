"""The stages of one run, planned: refine and encode all texts, then denoise and decode clip after clip."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from osp_fast.config import Recipe
from osp_fast.diffusion.denoise import Text
from osp_fast.engine.cuda_graphs import CudaMachine
from osp_fast.engine.forward_graph import GraphedForward
from osp_fast.engine.sampling_plan import SamplingPlan
from osp_fast.engine.stages import DECODING
from osp_fast.models.dit import DiT, DiTConfig
from osp_fast.models.prompt_refiner import PromptRefiner
from osp_fast.models.text_encoder import TextEncoder
from osp_fast.models.wfvae import WFVAE, Tiles
from osp_fast.pipeline.decoding import Beside, Decoder
from osp_fast.pipeline.networks import Held
from osp_fast.pipeline.sampler import ClipSampler, Teamwork, trimmed
from osp_fast.pipeline.settings import ClipSettings

Report = Callable[[str], None]


def silent(line: str) -> None:
    """A `Report` where nobody listens."""


@dataclass
class Networks:
    """What a pipeline works with.

    config: the DiT's; shape_of_vae: the VAE, or one like it without weights
    teamwork: how ranks share a clip, as soon as the DiT is there
    """

    device: torch.device
    config: DiTConfig
    shape_of_vae: WFVAE
    dit: Held[DiT]
    vae: Held[WFVAE]
    text_encoder: Held[TextEncoder]
    refiner: Held[PromptRefiner] | None = None
    teamwork: Teamwork | None = None


class Run:
    """Clips of one size, made of a pipeline's networks. `VideoPipeline.prepare` makes it.

    plan: what is on the device when; None: everything, as it is given
    cuda_graphs: the DiT as a graph, None: where it measures faster
    report: gets lines for the user
    """

    def __init__(
        self,
        networks: Networks,
        settings: ClipSettings,
        recipe: Recipe | None,
        plan: SamplingPlan | None = None,
        cuda_graphs: bool | None = None,
        report: Report = silent,
    ):
        self.settings, self.plan = settings, plan
        self._networks, self._cuda_graphs, self._report = networks, cuda_graphs, report
        self._scheduler = settings.scheduler(recipe)
        self.calls = len(self._scheduler.set_steps(settings.steps))
        settings.latent_size(networks.config)

    @contextmanager
    def refiner(self) -> Iterator[Callable[[str, int], str]]:
        """What rewrites a prompt: (prompt, seed) -> prompt, or nothing if it had no answer."""
        self._make_room()
        held = self._networks.refiner
        if self.plan is not None:
            held.stream(self.plan.refiner_streamed, self.plan.slots)
        with held.use() as refiner:
            yield refiner.refine

    @contextmanager
    def text_encoder(self) -> Iterator[Callable[[str], Text]]:
        """What encodes a text; one by one, so that what else is encoded changes no bit."""
        self._make_room()
        held = self._networks.text_encoder
        if self.plan is not None:
            held.stream(self.plan.text_streamed, self.plan.slots)
        with held.use() as encoder:
            yield lambda text: trimmed(*encoder([text]))

    def encode(self, prompts: list[str]) -> tuple[list[Text], Text | None]:
        """The prompts in their template, and the negative prompt, None without guidance."""
        with self.text_encoder() as encode:
            texts = [encode(text) for text in self.settings.texts(prompts)]
        return texts, texts.pop() if self.settings.guided else None

    def load(self) -> None:
        """Bring the DiT and the VAE to their places now, so that the first clip's time is its own."""
        self._stream_dit()
        for held in (self._networks.dit, self._networks.vae):
            if not held.leaves:
                with held.use():
                    pass

    def sampler(self) -> ClipSampler:
        """What denoises clips."""
        networks, plan = self._networks, self.plan
        self._stream_dit()
        return ClipSampler(
            networks.dit,
            networks.config,
            self.settings,
            self._scheduler,
            networks.device,
            replace_forward=self._graphed,
            in_turns=plan is not None and plan.guidance_in_turns,
            team=lambda: networks.teamwork or Teamwork(),
        )

    def decoder(self, tiles: Tiles | None = None) -> Decoder:
        """What decodes clips; tiles: in place of the plan."""
        networks = self._networks
        plan = tiles if self.plan is None or tiles is not None else self.plan.vae
        return Decoder(networks.vae, networks.shape_of_vae, self.settings, networks.device, plan, self._report)

    def beside(self) -> Beside:
        """What decodes a clip while the next one is denoised, if there is memory for both."""
        return Beside(self._networks.device, self.plan is not None and self.plan.overlap)

    def _stream_dit(self) -> None:
        if self.plan is not None:
            self._networks.dit.stream(self.plan.dit_streamed, self.plan.slots)

    def _make_room(self) -> None:
        self._networks.dit.leave()
        self._networks.vae.leave()

    def _graphed(self, dit: DiT) -> Callable[..., Tensor] | None:
        """The DiT as a CUDA graph, where that can be: what changes from step to step cannot be in one."""
        networks = self._networks
        changes = self.settings.step_cache is not None or networks.teamwork is not None or networks.dit.leaves
        streams = self.plan is not None and self.plan.dit_streamed
        if networks.device.type != "cuda" or self._cuda_graphs is False or changes or streams:
            return None
        return GraphedForward(dit, CudaMachine(networks.device), bool(self._cuda_graphs), self._report, self._spare())

    def _spare(self) -> int:
        """Bytes of the GPU that a graph must leave: to decoding, and to whoever has what is beyond the budget."""
        if self.plan is None:
            return 0
        held = torch.cuda.memory_allocated(self._networks.device)
        spare = max(0, self.plan.peaks.get(DECODING, 0) - held)
        if self.plan.budget is not None:
            spare += max(0, torch.cuda.mem_get_info(self._networks.device)[0] - (self.plan.budget - held))
        return spare
