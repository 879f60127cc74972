"""LoRA adapters on disk, as PEFT has them: adapter_config.json and adapter_model.safetensors, recipe.json beside them.

Reading is strict, and takes safetensors and JSON only. Files of diffusers are read too.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from osp_fast.config import Recipe
from osp_fast.errors import UserError
from osp_fast.files import sync
from osp_fast.models.weights import RECIPE, read_json, read_recipe, write_json

CONFIG_FILE, TENSOR_FILE = "adapter_config.json", "adapter_model.safetensors"
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
PREFIX, LORA_A, LORA_B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
# PEFT's and diffusers' names, with and without the model's and the adapter's own.
NAME = re.compile(r"(?:base_model\.model\.)?(?:transformer\.)?([\w.]+)\.lora_([AB])(?:\.default)?\.weight")
# Whatever else is not off in adapter_config.json changes what the tensors mean.
MUST_BE_OFF = (
    "alora_invocation_tokens",
    "alpha_pattern",
    "arrow_config",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "modules_to_save",
    "monteclora_config",
    "rank_pattern",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "use_rslora",
)
# Initialisations of PEFT that leave the weights of the base as they are.
PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")
MAX_ALPHA = 1e6


class Lora(NamedTuple):
    """Adapters from a file.

    tensors: under PEFT's names for a released checkpoint, `PREFIX` transformer_blocks.0.attn1.to_q `LORA_A`, of shape
    (rank, in), and `LORA_B` (out, rank), in the file's dtype; `alpha / rank` scales their product
    recipe: how they were trained, if the folder tells
    """

    tensors: dict[str, Tensor]
    rank: int
    alpha: float
    file: Path
    recipe: Recipe | None

    def products(self) -> dict[str, tuple[Tensor, Tensor]]:
        """{product, such as transformer_blocks.0.attn1.to_q: (A, B)}."""
        stems = [name.removesuffix(LORA_A) for name in self.tensors if name.endswith(LORA_A)]
        return {stem.removeprefix(PREFIX): (self.tensors[stem + LORA_A], self.tensors[stem + LORA_B]) for stem in stems}


def write_lora(
    folder: Path, tensors: Mapping[str, Tensor], rank: int, alpha: float, recipe: Recipe | None = None
) -> None:
    """Write adapters, under the names of `Lora.tensors`, as a folder that PEFT reads, and bring it to the disk.

    Raises OSError, SafetensorError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # A module's name without its block is what PEFT finds it by.
    targets = {re.sub(r"^transformer_blocks\.\d+\.", "", match[1]) for match in map(NAME.fullmatch, tensors)}
    config = dict(
        peft_type="LORA",
        task_type=None,
        base_model_name_or_path=None,
        inference_mode=True,
        r=rank,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,
        lora_dropout=0.0,
        bias="none",
        target_modules=sorted(targets),
    )
    write_json(folder / CONFIG_FILE, config)
    if recipe is not None:
        write_json(folder / RECIPE, dataclasses.asdict(recipe))
    # Copies: products of a fused one share A, but a file holds each tensor by itself.
    copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    save_file(copies, folder / TENSOR_FILE, metadata={"format": "pt"})
    sync(folder / TENSOR_FILE)
    sync(folder)


def holds_lora(path: Path) -> bool:
    """Whether a path is a file, or a folder with adapters directly inside."""
    return path.is_file() or any((path / name).is_file() for name in (CONFIG_FILE, TENSOR_FILE, DIFFUSERS_FILE))


def load_lora(path: str | Path) -> Lora:
    """Read adapters from a folder, PEFT's or diffusers', or from a .safetensors file.

    Without an adapter_config.json, as in diffusers' files, alpha is what their metadata say, else the rank, as it is
    for diffusers.

    Raises:
        UserError: a file is missing, truncated or not safetensors, or anything in it is not plain LoRA.
    """
    path = Path(path)
    file, config = _find_files(path)
    found, metadata = _read(file)
    tensors: dict[str, Tensor] = {}
    for name, tensor in found.items():
        match = NAME.fullmatch(name)
        if match is None:
            raise UserError(f"{file}: {name!r} is not the name of a LoRA tensor: use adapters of PEFT or diffusers")
        ours = f"{PREFIX}{match[1]}.lora_{match[2]}.weight"
        if ours in tensors:
            raise UserError(f"{file}: {name} stands there twice, under two names: save the adapters again")
        if not tensor.is_floating_point() or tensor.dim() != 2 or 0 in tensor.shape:
            kind = f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
            raise UserError(f"{file}: {name} is {kind}, not a matrix of floating point numbers: use other adapters")
        if not torch.isfinite(tensor.float()).all():
            raise UserError(f"{file}: {name} holds numbers that are not finite: use an earlier checkpoint's adapters")
        tensors[ours] = tensor
    rank = _check_pairs(file, tensors)
    if config is None:
        values = _diffusers_config(file, metadata)
        alpha = float(rank) if values is None else _read_alpha(f"{file}, lora_adapter_metadata", values, rank)
        return Lora(tensors, rank, alpha, file, None)
    return Lora(tensors, rank, _read_alpha(str(config), read_json(config), rank), file, read_recipe(file.parent))


def agreed_recipe(base: Recipe | None, folder: Path, lora: Lora) -> Recipe | None:
    """How a model with adapters was trained: as the adapters say, else as the base says; None if neither does.

    Raises `UserError` if they predict different things: adapters mean nothing on another model.
    """
    if base is None or lora.recipe is None:
        return lora.recipe or base
    fields = ("rectified_flow", "prediction_type", "rescale_betas_zero_snr")
    for name in fields[: 1 if base.rectified_flow else None]:  # a flow has its own prediction and schedule
        ours, theirs = getattr(base, name), getattr(lora.recipe, name)
        if ours != theirs:
            raise UserError(
                f"{lora.file.parent / RECIPE} says {name} {theirs}, but {folder / RECIPE}, of the model, says {ours}:"
                " name the model that the adapters were trained on"
            )
    return lora.recipe


def _find_files(path: Path) -> tuple[Path, Path | None]:
    """The tensors' file and the configuration that belongs to it (None for a file that comes without)."""
    file = path
    if path.is_dir():
        present = [path / name for name in (TENSOR_FILE, DIFFUSERS_FILE) if (path / name).is_file()]
        if not present:
            raise UserError(f"{path / TENSOR_FILE} is missing: name a folder of LoRA adapters, saved as safetensors")
        file = present[0]
    elif not path.is_file():
        raise UserError(f"{path} does not exist: name a folder or a file of LoRA adapters")
    if file.suffix != ".safetensors":
        raise UserError(f"{file} is not a .safetensors file: save the adapters as one, other formats are not read")
    config = file.with_name(CONFIG_FILE)
    if file.name != TENSOR_FILE:
        return file, None
    if not config.is_file():
        raise UserError(f"{config} is missing, which says alpha: copy it there")
    return file, config


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is not a complete safetensors file ({error}): copy it again") from None


def _check_pairs(file: Path, tensors: Mapping[str, Tensor]) -> int:
    """The rank. Raises `UserError` unless each A has a B and all have one rank."""
    if not tensors:
        raise UserError(f"{file} holds no tensors: name a file of LoRA adapters")
    rank = None
    for name, tensor in tensors.items():
        kind, other = (LORA_A, LORA_B) if name.endswith(LORA_A) else (LORA_B, LORA_A)
        if name.removesuffix(kind) + other not in tensors:
            raise UserError(f"{file}: {name} is there without its {other[1:]}: save the adapters again")
        found = tensor.shape[0 if kind == LORA_A else 1]
        rank = rank or found
        if found != rank:
            raise UserError(f"{file}: {name} has rank {found}, others {rank}: only adapters of one rank are supported")
    return rank


def _diffusers_config(file: Path, metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """What diffusers has put of PEFT's configuration into a file's metadata; None if nothing."""
    text = metadata.get("lora_adapter_metadata")
    if text is None:
        return None
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise UserError(f"{file}: its lora_adapter_metadata are not a JSON object: save the adapters again")
    return {"peft_type": "LORA", **{name.removeprefix("transformer."): value for name, value in values.items()}}


def _read_alpha(place: str, values: Mapping[str, Any], rank: int) -> float:
    """lora_alpha of a configuration. Raises `UserError` unless it is one of plain LoRA with this rank."""
    if values.get("peft_type") != "LORA":
        raise UserError(f"{place}: peft_type is {values.get('peft_type')!r}, but only LORA is supported")
    for name in MUST_BE_OFF:
        if values.get(name):
            raise UserError(f"{place}: {name} is {values[name]!r}, but only plain LoRA is read: use other adapters")
    start = values.get("init_lora_weights")
    if start not in PLAIN_STARTS:
        raise UserError(
            f"{place}: init_lora_weights {start!r} goes with weights of the base that PEFT has changed: convert the"
            " adapters to plain LoRA"
        )
    if values.get("bias", "none") != "none":
        raise UserError(f"{place}: bias is {values['bias']!r}, but only 'none' is supported: use other adapters")
    if values.get("r") != rank:
        raise UserError(f"{place}: r is {values.get('r')!r}, but the tensors' rank is {rank}: restore the file")
    alpha = values.get("lora_alpha")
    number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
    if not number or not 0 < alpha <= MAX_ALPHA:
        raise UserError(f"{place}: lora_alpha is {alpha!r}, not a number above 0 and up to {MAX_ALPHA:g}: restore it")
    return float(alpha)
