"""The folders that a sampling run names: models, adapters, and where its files go."""

import os
from collections.abc import Sequence
from pathlib import Path

from osp_fast.config import SampleConfig
from osp_fast.errors import UserError
from osp_fast.models.lora_files import holds_lora
from osp_fast.models.text_encoder import find_folder
from osp_fast.progress import say
from osp_fast.training.checkpoint import list_checkpoints


def find_dit(config: SampleConfig) -> Path:
    """The model folder that `--model_path` names: itself, a checkpoint's, or that of a run's newest checkpoint.

    Of a checkpoint the average is taken if there is one. Raises `UserError` if there is no model.
    """
    named = Path(config.model_path)
    if not list_checkpoints(named) and (named / "config.json").is_file():
        return named
    found = in_newest_checkpoint(named, ("model_ema", "model"))
    if found is not None:
        return found
    adapters = in_newest_checkpoint(named, ("lora_ema", "lora"))
    if adapters is not None:
        raise UserError(
            f"--model_path {named} holds LoRA adapters only: give --lora {adapters}, and in --model_path the model that"
            " they were trained on"
        )
    return find_folder(config.model_path, config.cache_dir)


def find_lora(name: str) -> Path:
    """The adapters that `--lora` names: a folder or file, those of a checkpoint, or of a run's newest checkpoint.

    Of a checkpoint the average is taken if there is one.
    """
    named = Path(name)
    return named if holds_lora(named) else in_newest_checkpoint(named, ("lora_ema", "lora")) or named


def in_newest_checkpoint(named: Path, parts: Sequence[str]) -> Path | None:
    """The first of these folders that a checkpoint has, or a run's newest checkpoint; None if it has none."""
    checkpoints = list_checkpoints(named)
    checkpoint = checkpoints[-1][1] if checkpoints else named
    found = next((checkpoint / part for part in parts if (checkpoint / part).is_dir()), None)
    if found is not None and checkpoints:
        say(f"{named}: the newest checkpoint is {found}")
    return found


def writable_folder(name: str) -> Path:
    """The output folder, made if need be. Raises `UserError` if it cannot be written to."""
    folder = Path(name)
    probe = folder / f".write_probe-{os.getpid()}"  # others may probe, too
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"--save_img_path {folder} cannot be written to ({error.strerror}): name another") from None
    return folder
