"""The networks of a training run, on its device and in its precision."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from osp_fast.config import ModelConfig, TrainConfig
from osp_fast.device import memory_allowance
from osp_fast.errors import UserError
from osp_fast.models.dit import DIT_CONFIGS, DiT, DiTConfig
from osp_fast.models.lora import add_lora, restore_lora
from osp_fast.models.text_encoder import TextEncoder, TextEncoderFacts, find_folder, read_facts
from osp_fast.models.wfvae import WFVAE
from osp_fast.models.wfvae_plan import Planner

TILING_FRAMES = 8  # latent frames encoded at once, at most, with --enable_tiling
# With these, cuBLAS adds up in the same order each time, also where several streams share its workspace.
DETERMINISTIC_WORKSPACES = (":4096:8", ":16:8")
# Flags that replace values of a DiT folder's config.json.
OVERRIDES = ("interpolation_scale_t", "interpolation_scale_h", "interpolation_scale_w", "sparse1d", "sparse_n")
# Values that the tensors do not depend on: here a folder may differ from what `--model` names.
FREE_FIELDS = frozenset((*OVERRIDES, "sample_size_t", "sample_size_h", "sample_size_w", "cross_attention_dim"))


def set_precision(model: ModelConfig) -> None:
    """Let float32 products and convolutions on NVIDIA GPUs use TF32, or not (`--allow_tf32`); for the whole process."""
    torch.backends.cuda.matmul.allow_tf32 = model.allow_tf32
    torch.backends.cudnn.allow_tf32 = model.allow_tf32


def set_determinism(deterministic: bool, device: torch.device) -> None:
    """Let PyTorch and the kernels use deterministic algorithms only, or any (`--deterministic`); for the whole process.

    To be called before the first product on a GPU. Raises `UserError` if the environment contradicts the flag.
    """
    torch.use_deterministic_algorithms(deterministic)
    if deterministic and device.type == "cuda":
        workspace = os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", DETERMINISTIC_WORKSPACES[0])
        if workspace not in DETERMINISTIC_WORKSPACES:
            raise UserError(
                f"--deterministic does not go with CUBLAS_WORKSPACE_CONFIG={workspace}: unset it, or set it to"
                f" {' or '.join(DETERMINISTIC_WORKSPACES)}"
            )


def compute_dtype(model: ModelConfig) -> torch.dtype:
    """What `--mixed_precision` lets products and attention run in; also the dtype of the frozen networks."""
    return torch.bfloat16 if model.mixed_precision == "bf16" else torch.float32


def check_folders(model: ModelConfig) -> None:
    """Raise `UserError` for a frozen network whose folder is not named or not there, before anything large is built."""
    for flag, name, owner in (
        ("--ae_path", model.ae_path, "the VAE's folder"),
        ("--text_encoder_name_1", model.text_encoder_name_1, "the text encoder's folder"),
    ):
        if not name:
            raise UserError(f"{flag} is missing: name {owner}, or use --preset tiny")
        with naming(flag):
            find_folder(name, model.cache_dir)


def build_dit(config: TrainConfig, checkpoint: Path | None, device: torch.device) -> DiT:
    """The DiT to train, float32: from a checkpoint's `model`, else from `--pretrained`, else fresh by `--seed`.

    With `--lora_rank` its weights are those of `--pretrained` and stay, and adapters train, from a checkpoint's `lora`
    or fresh.

    Raises:
        UserError: the folder does not hold the architecture that `--model` names, or does not load strictly; or
            `--attention` cannot serve it.
    """
    model = config.model
    overrides = {name: getattr(model, name) for name in OVERRIDES if getattr(model, name) is not None}
    adapts = model.lora_rank is not None
    folder = checkpoint / "model" if checkpoint is not None and not adapts else model.pretrained
    if folder is None:
        dit = DiT.create(replace(DIT_CONFIGS[model.model], **overrides), config.run.seed, device)
    else:
        _check_architecture(Path(folder), model)
        dit = load_trainable(Path(folder), device, **overrides)
    if adapts:
        add_lora(dit, model.lora_rank, lora_alpha(model), config.run.seed)
        if checkpoint is not None:
            restore_lora(dit, checkpoint / "lora")
    return dit.use_attention(model.attention, device, compute_dtype(model)).train()


def lora_alpha(model: ModelConfig) -> float:
    """LoRA's alpha: `--lora_alpha`, or the rank, which makes the scale 1."""
    return float(model.lora_rank if model.lora_alpha is None else model.lora_alpha)


def load_trainable(folder: Path, device: torch.device | str = "cpu", **overrides: Any) -> DiT:
    """A float32 DiT from a model folder, in memory of its own. Raises `UserError`.

    Tensors fresh from a safetensors file lie in the mapped file at any address. Vectorised sums over them start at
    another place than over aligned memory and round differently, so a resumed run would drift from one that never
    stopped; and a training run should not hang on the file.
    """
    dit = DiT.from_pretrained(folder, torch.float32, device, **overrides)
    for parameter in dit.parameters():
        parameter.data = parameter.data.clone()
    return dit


def _check_architecture(folder: Path, model: ModelConfig) -> None:
    named, found = DIT_CONFIGS[model.model], DiT.read_config(folder)
    for field in fields(DiTConfig):
        wanted, given = getattr(named, field.name), getattr(found, field.name)
        if field.name not in FREE_FIELDS and wanted != given:
            raise UserError(
                f"{folder}/config.json: {field.name} is {given}, but --model {model.model} has {wanted}: name the"
                " folder of such a model, or change --model"
            )


def vae_dtype(model: ModelConfig) -> torch.dtype:
    """bf16 with `--mixed_precision bf16` unless `--vae_fp32`."""
    return torch.float32 if model.vae_fp32 else compute_dtype(model)


def load_vae(model: ModelConfig, device: torch.device) -> WFVAE:
    """The VAE, frozen. Raises `UserError`."""
    with naming("--ae_path"):
        vae = WFVAE.from_pretrained(find_folder(model.ae_path, model.cache_dir), vae_dtype(model), device)
    return vae.requires_grad_(False).eval()


def vae_planner(
    vae: WFVAE, model: ModelConfig, device: torch.device, report: Callable[[str], None] | None = None
) -> Planner:
    """Plans of the VAE's work within `--vae_memory`."""
    memory = model.vae_memory
    allowance = (lambda held: memory_allowance(device, held)) if memory is None else (lambda held: memory)
    return Planner(vae, device, allowance, TILING_FRAMES if model.enable_tiling else None, report)


def build_vae(model: ModelConfig, dit: DiT, device: torch.device, weights: bool = True) -> WFVAE:
    """The VAE, frozen, if it fits the DiT; weights: whether it is to encode, or only to know its scale and shift.

    Raises `UserError`.
    """
    if weights:
        vae = load_vae(model, device)
    else:
        with naming("--ae_path"), torch.device("meta"):
            vae = WFVAE(WFVAE.read_config(find_folder(model.ae_path, model.cache_dir))).requires_grad_(False)
    if vae.config.latent_dim != dit.config.in_channels:
        raise UserError(
            f"--ae_path {model.ae_path}: latent_dim is {vae.config.latent_dim}, but --model {model.model} takes"
            f" {dit.config.in_channels} channels: name the VAE that belongs to it"
        )
    return vae


def load_text_encoder(model: ModelConfig, device: torch.device) -> TextEncoder:
    """The text encoder, frozen, in bf16 with `--mixed_precision bf16`. Raises `UserError`."""
    name, dtype = model.text_encoder_name_1, compute_dtype(model)
    with naming("--text_encoder_name_1"):
        return TextEncoder.from_pretrained(name, dtype, device, model.model_max_length, model.cache_dir)


def check_text_encoder(model: ModelConfig, dit: DiT) -> TextEncoderFacts:
    """What the text encoder's folder says of it. Raises `UserError` unless it fits the DiT."""
    name = model.text_encoder_name_1
    with naming("--text_encoder_name_1"):
        facts = read_facts(find_folder(name, model.cache_dir))
    if facts.width != dit.config.caption_channels:
        raise UserError(
            f"--text_encoder_name_1 {name}: its states are {facts.width} wide, but --model {model.model} takes"
            f" {dit.config.caption_channels}: name the encoder that belongs to it"
        )
    return facts


@contextmanager
def naming(flag: str) -> Iterator[None]:
    """Let a `UserError` from within say which flag brought it about."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{flag}: {error}") from error
