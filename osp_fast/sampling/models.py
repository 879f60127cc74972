"""From the flags of sampling to a pipeline, and to all that is told about it beside each clip."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from osp_fast.checks import with_recipe
from osp_fast.config import Recipe, SampleConfig, as_dict
from osp_fast.data.captions import clean_caption
from osp_fast.device import resolve_dtype
from osp_fast.engine.cuda_graphs import check_cuda_graphs
from osp_fast.models.attention_backends import resolve_attention
from osp_fast.models.lora_files import agreed_recipe, load_lora
from osp_fast.models.text_encoder import find_folder, read_facts
from osp_fast.models.weights import read_recipe
from osp_fast.pipeline import ClipSettings, ModelFolders, Parametrization, VideoPipeline, resolve_parametrization
from osp_fast.pipeline.team import Team
from osp_fast.sampling.folders import find_dit, find_lora
from osp_fast.sampling.texts import fingerprint

TILING_FRAMES = 4  # latent frames decoded at once, at most, with --enable_tiling


@dataclass(frozen=True)
class Models:
    """What the flags name, found and checked.

    config: with the sizes and the frame rate that follow from the checkpoint's recipe
    chinese: whether captions keep their Chinese, as the text encoder's do
    """

    config: SampleConfig
    folders: ModelFolders
    recipe: Recipe | None
    parametrization: Parametrization
    device: torch.device
    chinese: bool

    @classmethod
    def of(cls, config: SampleConfig, device: torch.device) -> "Models":
        """Raises `UserError` for what the flags, folders and small files say."""
        check_cuda_graphs(config.cuda_graphs, device, 1)
        dtype = resolve_dtype(config.dtype, device)
        attention = resolve_attention(config.attention, device, dtype)
        dit = find_dit(config)
        vae = find_folder(config.ae_path, config.cache_dir)
        text_encoder = find_folder(config.text_encoder_name_1, config.cache_dir)
        refiner = find_folder(config.caption_refiner, config.cache_dir) if config.caption_refiner else None
        recipe = read_recipe(dit)
        lora = load_lora(find_lora(config.lora)) if config.lora else None
        if lora is not None:
            recipe = agreed_recipe(recipe, dit, lora)
        config = with_recipe(config, recipe)
        parametrization = resolve_parametrization(
            recipe, config.sample_method, config.prediction_type, config.rescale_betas_zero_snr
        )
        folders = ModelFolders(
            dit,
            vae,
            text_encoder,
            dtype=dtype,
            max_length=config.max_sequence_length,
            attention=attention,
            round_rope_angles=config.round_rope_angles,
            lora=lora,
            lora_scale=config.lora_scale,
            compile=config.compile,
            refiner=refiner,
            refiner_max_tokens=config.refiner_max_tokens,
            refiner_temperature=config.refiner_temperature,
            text_8bit=config.text_8bit,
        )
        return cls(config, folders, recipe, parametrization, device, read_facts(text_encoder).is_multilingual)

    def pipeline(
        self,
        report: Callable[[str], None],
        keep: bool = False,
        team: Team | None = None,
    ) -> VideoPipeline:
        """See `VideoPipeline.from_folders`. Raises `UserError`."""
        return VideoPipeline.from_folders(
            self.folders,
            self.recipe,
            device=self.device,
            memory_budget=self.config.memory_budget,
            save_memory=self.config.save_memory,
            cuda_graphs=self.config.cuda_graphs,
            keep=keep,
            team=team,
            report=report,
        )

    def clean(self, text: str) -> str:
        """A prompt in the form of the training captions."""
        return clean_caption(text, chinese=self.chinese)

    def clip_settings(self) -> ClipSettings:
        """Of the clips that the flags ask for."""
        return clip_settings(self.config, self.clean)

    def settings(self) -> dict[str, Any]:
        """All that the flags resolve to."""
        folders, lora = self.folders, self.folders.lora
        settings = {
            **as_dict(self.config),
            **self.parametrization._asdict(),
            "model_path": str(folders.dit),
            "ae_path": str(folders.vae),
            "text_encoder_name_1": str(folders.text_encoder),
            "device": str(self.device),
            "attention": folders.attention,
            "dtype": str(folders.dtype).removeprefix("torch."),
        }
        if folders.refiner is not None:
            settings["caption_refiner"] = str(folders.refiner)
        if lora is not None:
            settings |= {"lora": str(lora.file), "lora_rank": lora.rank, "lora_alpha": lora.alpha}
        return settings

    def fingerprints(self) -> dict[str, str]:
        """Of each folder that a clip depends on: another one after any change of its files."""
        named: dict[str, Path | None] = {
            "dit": self.folders.dit,
            "vae": self.folders.vae,
            "text_encoder": self.folders.text_encoder,
            "refiner": self.folders.refiner,
        }
        found = {name: fingerprint(folder) for name, folder in named.items() if folder is not None}
        if self.folders.lora is not None:
            found["lora"] = fingerprint(Path(self.folders.lora.file).parent)
        return found


def clip_settings(config: SampleConfig, clean: Callable[[str], str] = str) -> ClipSettings:
    """Of the clips that flags ask for, with their sizes filled in; clean: of captions."""
    negative = config.negative_prompt
    return ClipSettings(
        num_frames=config.num_frames,
        height=config.height,
        width=config.width,
        steps=config.num_sampling_steps,
        guidance_scale=config.guidance_scale,
        method=config.sample_method,
        negative_prompt=None if negative is None else clean(negative),
        prediction_type=config.prediction_type,
        rescale_betas_zero_snr=config.rescale_betas_zero_snr,
        step_cache=config.step_cache,
        vae_memory=config.vae_memory,
        most_latent_frames=TILING_FRAMES if config.enable_tiling else None,
    )
