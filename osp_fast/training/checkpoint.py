"""Checkpoints: `checkpoint-N/`, complete or absent.

    checkpoint-N/model/               the weights, a model folder that sampling and --pretrained take
    checkpoint-N/model_ema/           the average, if there is one, likewise
    checkpoint-N/lora/, lora_ema/     in their place where LoRA adapters are trained, folders that --lora takes
    checkpoint-N/optimizer/           the optimizer's state: a distributed checkpoint, a safetensors file for each rank
    checkpoint-N/trainer_state.json
    checkpoint-N/SHA256SUMS           what the files must be

A checkpoint is written beside its final place, brought to the disk, and then renamed; only after that are the oldest
ones removed, by a rename first. So a kill, a full disk or a power cut at any moment leaves whole checkpoints only, and
what it left half-written has a name that nothing takes for a checkpoint. No file is a pickle. This module knows what is
on the disk; `saver.py` writes it.
"""

import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from torch.optim import Optimizer

from osp_fast.errors import UserError
from osp_fast.parallel.shards import LocalShards
from osp_fast.parallel.world import World
from osp_fast.training.manifest import verify_manifest
from osp_fast.training.optimizer import state_tensors, step_tensors
from osp_fast.training.state import FILE_NAME as STATE_FILE
from osp_fast.training.state import read_state

OPTIMIZER_FOLDER = "optimizer"
LATEST = "latest"
NAME = r"checkpoint-(\d+)"
WRITING = ".writing-"
REMOVING = ".removing-"


def list_checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    """(step, folder) of each `checkpoint-N` in a folder, oldest first, complete or not."""
    if not output_dir.is_dir():
        return []
    named = ((re.fullmatch(NAME, path.name), path) for path in output_dir.iterdir())
    return sorted((int(match[1]), path) for match, path in named if match and path.is_dir())


def verify(folder: Path) -> None:
    """Raise `UserError` unless a checkpoint is complete and every byte of it is what was written."""
    step, named = read_state(folder / STATE_FILE).step, re.fullmatch(NAME, folder.name)
    if named and int(named[1]) != step:
        raise UserError(f"{folder} holds step {step}: give it its name back")
    listed = verify_manifest(folder)
    for file in (folder / OPTIMIZER_FOLDER).glob("*.safetensors"):
        if str(file.relative_to(folder)) not in listed:
            raise UserError(f"{file} is no part of the checkpoint, but would be read: remove it")


def find_checkpoint(wanted: str, output_dir: Path, notify: Callable[[str], None]) -> Path | None:
    """The folder that `--resume_from_checkpoint` names.

    Args:
        wanted: a folder, absolute, relative, or inside `output_dir`; or "latest": the sound checkpoint with the
            greatest step in `output_dir`, None if there is no checkpoint at all.
        notify: gets one sentence for each checkpoint that "latest" passes over, and for a start from anew.

    Raises:
        UserError: the named folder does not exist or is damaged, or none of the checkpoints that are there is sound.
    """
    if wanted != LATEST:
        for folder in (Path(wanted), output_dir / wanted):
            if folder.is_dir():
                verify(folder)
                return folder
        present = ", ".join(path.name for _, path in list_checkpoints(output_dir)) or "none"
        raise UserError(f"--resume_from_checkpoint {wanted} does not exist; checkpoints in {output_dir}: {present}")
    faults = []
    for _, folder in reversed(list_checkpoints(output_dir)):
        try:
            verify(folder)
        except UserError as error:
            faults.append(str(error))
            notify(f"{folder} is damaged and is passed over: {error}")
        else:
            return folder
    if faults:  # starting anew here would in time replace weights that may be sound
        raise UserError(f"no checkpoint in {output_dir} is sound ({faults[0]}); or choose another --output_dir")
    notify(f"--resume_from_checkpoint latest: no checkpoint in {output_dir}, training starts from the beginning")
    return None


def remove_leftovers(output_dir: Path) -> None:
    """Remove what a killed run left half-written or half-removed in `output_dir`."""
    for prefix in (WRITING, REMOVING):
        for path in output_dir.glob(f"{prefix}checkpoint-*"):
            shutil.rmtree(path)


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint in such a way that it is never half there under its own name. Raises OSError."""
    if folder.exists():
        removing = folder.with_name(REMOVING + folder.name)
        folder.rename(removing)
        shutil.rmtree(removing)


def superfluous(steps: list[int], newest: int, limit: int | None, keep_every: int | None) -> list[int]:
    """Which checkpoints are to go once `newest` is there, oldest first.

    limit: so many of the newest stay (None: all)
    keep_every: those whose step is a multiple stay as well
    """
    if limit is None:
        return []
    older = sorted(step for step in steps if step < newest)
    old = older[: max(0, len(older) - (limit - 1))]
    return [step for step in old if not (keep_every and step % keep_every == 0)]


def load_optimizer(folder: Path, optimizer: Optimizer, shards: LocalShards, world: World) -> None:
    """Fill the optimizer's state from a checkpoint, strictly, whatever number of ranks has written it.

    All ranks must call it.

    Raises:
        UserError: the files are missing, damaged or of another model or optimizer.
    """
    fix = "resume from another checkpoint, or start a new run with --pretrained"
    place = folder / OPTIMIZER_FOLDER
    with world.together():
        if not any(place.glob("*.safetensors")):
            raise UserError(f"{place} holds no optimizer's state: {fix}")
    steps = step_tensors(optimizer)
    tensors = {"step": steps[0], **state_tensors(optimizer, shards)}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that no other ranks are there
            dcp.load(
                tensors,
                storage_reader=dcp.HuggingFaceStorageReader(str(place)),
                process_group=world.files,
                no_dist=world.alone,
            )
    except (CheckpointException, SafetensorError, OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(f"{place} does not fit or cannot be read ({reason}): {fix}") from error
    for step in steps[1:]:
        step.copy_(steps[0])
