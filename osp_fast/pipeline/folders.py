"""The pipeline's networks from their folders: what is checked before anything is loaded, and how each is loaded."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from osp_fast.engine.compile import check_compiler, compile_blocks
from osp_fast.errors import UserError
from osp_fast.models.dit import DiT, DiTConfig
from osp_fast.models.lora import merge_lora
from osp_fast.models.lora_files import Lora
from osp_fast.models.prompt_refiner import PromptRefiner, check_refiner
from osp_fast.models.quantize import load_torchao
from osp_fast.models.text_encoder import TextEncoder, read_facts
from osp_fast.models.wfvae import WFVAE
from osp_fast.models.wfvae_plan import gib
from osp_fast.pipeline.networks import Held, NetworkT

SIZES_TO_COMPILE = 8  # that a web page may ask for


@dataclass(frozen=True)
class ModelFolders:
    """Where the networks are, and how they compute.

    dit, vae, text_encoder: None stands for the released one, of which only a plan can be made
    dtype: float32 or bfloat16; max_length: text tokens; attention: one of `ATTENTION_NAMES`
    round_rope_angles: rounds RoPE angles to bfloat16, as upstream trained
    lora, lora_scale: adapters to add to the DiT's weights; compile: the DiT's blocks
    refiner: of a chat model that rewrites prompts, with the length of its answers and their temperature
    text_8bit: weights of the text encoder and the refiner in 8 bits
    """

    dit: Path | None = None
    vae: Path | None = None
    text_encoder: Path | None = None
    dtype: torch.dtype = torch.float32
    max_length: int = 512
    attention: str = "auto"
    round_rope_angles: bool = False
    lora: Lora | None = None
    lora_scale: float = 1.0
    compile: bool = False
    refiner: Path | None = None
    refiner_max_tokens: int = 256
    refiner_temperature: float = 0.0
    text_8bit: bool = False

    def __post_init__(self) -> None:
        for name in ("dit", "vae", "text_encoder", "refiner"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, Path(getattr(self, name)))

    def check(self, device: torch.device) -> DiTConfig:
        """The DiT's configuration, if all fits together. Raises `UserError` before anything is loaded."""
        config, vae = DiT.read_config(self.dit, quiet=True), WFVAE.read_config(self.vae, quiet=True)
        text = read_facts(self.text_encoder)
        if text.width != config.caption_channels:
            raise UserError(
                f"{self.text_encoder} gives states of {text.width} channels, but the DiT of {self.dit} "
                f"takes {config.caption_channels}: name the text encoder that it was trained with"
            )
        if config.out_channels != config.in_channels:
            raise UserError(
                f"{self.dit}/config.json: out_channels is {config.out_channels} and in_channels "
                f"{config.in_channels}, but sampling needs as many out as in: name another model"
            )
        if vae.latent_dim != config.in_channels:
            raise UserError(
                f"{self.vae} has {vae.latent_dim} latent channels, but the DiT of {self.dit} takes "
                f"{config.in_channels}: name the VAE that it was trained with"
            )
        if self.compile:
            check_compiler(device)
        if self.refiner is not None:
            check_refiner(self.refiner)
        if self.text_8bit:
            load_torchao()
        DiT.check_pretrained(self.dit)
        WFVAE.check_pretrained(self.vae)
        return config

    def vae_on_meta(self) -> WFVAE:
        """The VAE without weights, for plans."""
        return WFVAE.on_meta(self.vae, self.dtype)

    def held_dit(
        self, device: torch.device, leaves: bool, report: Callable[[str], None], join: Callable[[DiT], None]
    ) -> Held[DiT]:
        """The DiT, which stays in memory; `join` is called with it, on the CPU."""

        def load() -> DiT:
            dit = DiT.from_pretrained(self.dit, self.dtype).requires_grad_(False).eval()
            dit.use_attention(self.attention, device, self.dtype)
            dit.rope_dtype = torch.bfloat16 if self.round_rope_angles else None
            if self.lora is not None:
                merge_lora(dit, self.lora, self.lora_scale)
            report(f"attention: {dit.attention_summary()}")
            join(dit)
            if self.compile:
                compile_blocks(dit, SIZES_TO_COMPILE)
            return dit

        def blocks(dit: DiT) -> list[torch.nn.Module]:
            return list(dit.transformer_blocks)

        told = _told("DiT", load, report)
        return Held(device, load=told, leaves=leaves, blocks=blocks, methods=("forward", "text_keys"))

    def held_vae(self, device: torch.device, leaves: bool, report: Callable[[str], None]) -> Held[WFVAE]:
        """The VAE, which stays in memory."""

        def load() -> WFVAE:
            return WFVAE.from_pretrained(self.vae, self.dtype).requires_grad_(False).eval()

        return Held(device, load=_told("VAE", load, report), leaves=leaves)

    def held_text_encoder(self, device: torch.device, keep: bool, report: Callable[[str], None]) -> Held[TextEncoder]:
        """The text encoder, which leaves the device after use; keep: it stays in CPU memory."""

        def load() -> TextEncoder:
            return TextEncoder.from_pretrained(
                self.text_encoder, self.dtype, "cpu", self.max_length, eight_bit=self.text_8bit
            )

        return Held(
            device,
            load=_told("text encoder", load, report),
            keep=keep,
            leaves=True,
            blocks=lambda encoder: list(encoder.blocks),
        )

    def held_refiner(
        self, device: torch.device, keep: bool, report: Callable[[str], None]
    ) -> Held[PromptRefiner] | None:
        """The prompt refiner, if there is one; as the text encoder."""
        if self.refiner is None:
            return None

        def load() -> PromptRefiner:
            return PromptRefiner.from_pretrained(
                self.refiner,
                self.dtype,
                "cpu",
                max_new_tokens=self.refiner_max_tokens,
                temperature=self.refiner_temperature,
                eight_bit=self.text_8bit,
            )

        return Held(
            device,
            load=_told("prompt refiner", load, report),
            keep=keep,
            leaves=True,
            blocks=lambda refiner: list(refiner.blocks),
        )


def _told(name: str, load: Callable[[], NetworkT], report: Callable[[str], None]) -> Callable[[], NetworkT]:
    """`load` with a line on what it took."""

    def told() -> NetworkT:
        started = time.monotonic()
        network = load()
        size = sum(x.numel() * x.element_size() for x in (*network.parameters(), *network.buffers()))
        report(f"{name}: {gib(size)} loaded in {time.monotonic() - started:.1f} s")
        return network

    return told
