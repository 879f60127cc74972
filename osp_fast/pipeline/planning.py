"""The plan of a run's memory, made before anything is loaded."""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import nn

from osp_fast.device import memory_allowance
from osp_fast.engine.devices import DeviceModel, find_device
from osp_fast.engine.sampling_plan import SamplingFacts, SamplingPlan
from osp_fast.engine.stages import plan_sampling
from osp_fast.kernels.launch import selected_path
from osp_fast.models.attention_backends import resolve_attention
from osp_fast.models.dit import DIT_CONFIGS, DiT, DiTConfig
from osp_fast.models.prompt_refiner import decoder_layers, refiner_on_meta
from osp_fast.models.quantize import quantize_linear_weights
from osp_fast.models.text_encoder import encoder_layers, text_encoder_on_meta
from osp_fast.models.wfvae import WFVAE, WFVAE_CONFIGS
from osp_fast.models.wfvae_plan import Task
from osp_fast.pipeline.decoding import pixel_type
from osp_fast.pipeline.folders import ModelFolders
from osp_fast.pipeline.settings import ClipSettings
from osp_fast.pipeline.team import Team

RELEASED_DIT, RELEASED_VAE = "OpenSoraT2V_v1_3-2B/122", "WFVAEModel_D8_4x8x8"


@dataclass(frozen=True)
class Shapes:
    """Networks without weights, for plans. Each is that of a folder, or the released one where there is no folder."""

    dit: DiTConfig
    vae: WFVAE
    text_encoder: nn.Module
    refiner: nn.Module | None

    @classmethod
    def of(cls, folders: ModelFolders) -> "Shapes":
        """Raises `UserError` for a config.json that is missing or broken."""
        dit = DIT_CONFIGS[RELEASED_DIT] if folders.dit is None else DiT.read_config(folders.dit, quiet=True)
        if folders.vae is None:
            with torch.device("meta"):
                vae = WFVAE(WFVAE_CONFIGS[RELEASED_VAE]).to(folders.dtype)
        else:
            vae = WFVAE.on_meta(folders.vae, folders.dtype)
        encoder = text_encoder_on_meta(folders.text_encoder, folders.dtype)
        refiner = None if folders.refiner is None else refiner_on_meta(folders.refiner, folders.dtype)
        if folders.text_8bit:
            quantize_linear_weights(encoder_layers(encoder))
            if refiner is not None:
                quantize_linear_weights(decoder_layers(refiner))
        return cls(dit, vae, encoder, refiner)


class Budget:
    """What a pipeline from folders may hold on its device.

    memory: bytes, None: what is free on a GPU before the first run; on a CPU nothing is planned then
    team: the ranks that share a clip; rates: of the device, by default of the GPU that is there
    """

    def __init__(
        self,
        folders: ModelFolders,
        device: torch.device,
        memory: int | None,
        save_memory: bool = False,
        team: Team | None = None,
        rates: DeviceModel | None = None,
    ):
        self._folders, self._device, self._team, self._rates = folders, device, team, rates
        self._given, self._save_memory = memory, save_memory
        self.plan = lru_cache(maxsize=16)(self._plan)

    @cached_property
    def _memory(self) -> int:
        return memory_allowance(self._device) if self._given is None else self._given

    @cached_property
    def _shapes(self) -> Shapes:
        return Shapes.of(self._folders)

    def _plan(self, settings: ClipSettings, clips: int, calls: int) -> SamplingPlan | None:
        """Of a run of so many clips, each of so many model calls. Raises `UserError` if nothing fits."""
        if self._given is None and self._device.type == "cpu":
            return None
        folders, shapes, device, team = self._folders, self._shapes, self._device, self._team
        facts = SamplingFacts(
            dit=shapes.dit,
            dtype=folders.dtype,
            latent_size=settings.latent_size(shapes.dit),
            guided=settings.guided,
            text_tokens=folders.max_length,
            calls=calls,
            clips=clips,
            vae=shapes.vae,
            decode=Task(
                "decode",
                settings.num_frames,
                settings.height,
                settings.width,
                collected=False,
                pixels=pixel_type(shapes.vae),
            ),
            text_encoder=shapes.text_encoder,
            refiner=shapes.refiner,
            attention=resolve_attention(folders.attention, device, folders.dtype),
            path=selected_path(device),
            step_cache=settings.step_cache is not None,
            save_memory=self._save_memory,
            ranks=1 if team is None else team.ranks,
            sequence=None if team is None else team.settle(settings, shapes.dit),
            refiner_new_tokens=folders.refiner_max_tokens,
            vae_memory=settings.vae_memory,
            most_latent_frames=settings.most_latent_frames,
        )
        rates = self._rates
        if rates is None and device.type == "cuda":
            rates = find_device(torch.cuda.get_device_name(device))
        source = "what the GPU has free," if self._given is None else "--memory_budget"
        return plan_sampling(facts, self._memory, device, rates, source)
