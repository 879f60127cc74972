"""Checkpoints: `checkpoint-N/`, complete or absent.

    checkpoint-N/model/               the weights, a model folder that sampling and --pretrained take
    checkpoint-N/model_ema/           the average, if there is one, likewise
    checkpoint-N/optimizer.safetensors
    checkpoint-N/trainer_state.json

A checkpoint is written beside its final place, brought to the disk, and then renamed; only after that are the oldest
ones removed, by a rename first. So a kill, a full disk or a power cut at any moment leaves whole checkpoints only, and
what it left half-written has a name that nothing takes for a checkpoint. No file is a pickle.
"""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from torch.optim import Optimizer

from osp_fast.config import Recipe
from osp_fast.errors import UserError
from osp_fast.files import sync
from osp_fast.models.weights import PretrainedModel
from osp_fast.training.ema import EMA
from osp_fast.training.optimizer import state_tensors
from osp_fast.training.state import FILE_NAME as STATE_FILE
from osp_fast.training.state import TrainerState, read_state, write_state
from osp_fast.training.tensorfile import read_tensors_into, write_tensors

OPTIMIZER_FILE = "optimizer.safetensors"
LATEST = "latest"
WRITING = ".writing-"
REMOVING = ".removing-"


def list_checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    """(step, folder) of each `checkpoint-N` in a folder, oldest first, complete or not."""
    if not output_dir.is_dir():
        return []
    named = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in output_dir.iterdir())
    return sorted((int(match[1]), path) for match, path in named if match and path.is_dir())


def find_checkpoint(wanted: str, output_dir: Path, notify: Callable[[str], None]) -> Path | None:
    """The folder that `--resume_from_checkpoint` names.

    Args:
        wanted: a folder, absolute, relative, or inside `output_dir`; or "latest": the complete checkpoint with the
            greatest step in `output_dir`, None if there is no checkpoint at all.
        notify: gets one sentence for each incomplete checkpoint that "latest" passes over, and for a start from anew.

    Raises:
        UserError: the named folder does not exist, or none of the checkpoints that are there can be read.
    """
    if wanted != LATEST:
        for folder in (Path(wanted), output_dir / wanted):
            if folder.is_dir():
                return folder
        present = ", ".join(path.name for _, path in list_checkpoints(output_dir)) or "none"
        raise UserError(f"--resume_from_checkpoint {wanted} does not exist; checkpoints in {output_dir}: {present}")
    faults = []
    for _, folder in reversed(list_checkpoints(output_dir)):
        try:
            read_state(folder / STATE_FILE)
        except UserError as error:
            faults.append(str(error))
            notify(f"{folder} is not complete and is passed over: {error}")
        else:
            return folder
    if faults:  # starting anew here would in time replace weights that may be sound
        raise UserError(f"no checkpoint in {output_dir} can be read ({faults[0]}); or choose another --output_dir")
    notify(f"--resume_from_checkpoint latest: no checkpoint in {output_dir}, training starts from the beginning")
    return None


def remove_leftovers(output_dir: Path) -> None:
    """Remove what a killed run left half-written or half-removed in `output_dir`."""
    for prefix in (WRITING, REMOVING):
        for path in output_dir.glob(f"{prefix}checkpoint-*"):
            shutil.rmtree(path)


def save_checkpoint(
    output_dir: Path,
    state: TrainerState,
    dit: PretrainedModel,
    ema: EMA | None,
    optimizer: Optimizer,
    recipe: Recipe,
    limit: int | None,
) -> Path:
    """Write `output_dir/checkpoint-{state.step}`, then remove the oldest beyond `limit` (None: keep all).

    Until the new checkpoint is whole and on the disk, all older ones stay, so there must be room for `limit` + 1.

    Raises:
        UserError: it could not be written; the older checkpoints are as they were.
    """
    final = output_dir / f"checkpoint-{state.step}"
    writing = output_dir / (WRITING + final.name)
    try:
        writing.mkdir()
        dit.save_pretrained(writing / "model", recipe=recipe)
        if ema is not None:
            state_dict = {**dit.state_dict(), **ema.named_average()}
            dit.save_pretrained(writing / "model_ema", recipe=recipe, state=state_dict)
        write_tensors(writing / OPTIMIZER_FILE, state_tensors(optimizer, dit))
        write_state(writing / STATE_FILE, state)
        _sync_tree(writing)
        _remove(final)  # only an incomplete folder can have this name: `prepare_output` refuses later checkpoints
        writing.rename(final)
        sync(output_dir)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{final} could not be written ({error}): make room or choose another --output_dir; the older checkpoints"
            " are intact, resume with --resume_from_checkpoint latest"
        ) from error
    finally:
        shutil.rmtree(writing, ignore_errors=True)
    if limit is not None:
        _remove_oldest(output_dir, state.step, limit)
    return final


def load_training_state(folder: Path, dit: PretrainedModel, optimizer: Optimizer) -> None:
    """Fill the optimizer's state from a checkpoint, strictly.

    Raises:
        UserError: the file is missing, truncated or of another model.
    """
    fix = "resume from another checkpoint, or start a new run with --pretrained"
    read_tensors_into(folder / OPTIMIZER_FILE, state_tensors(optimizer, dit), fix)


def _remove_oldest(output_dir: Path, newest: int, limit: int) -> None:
    older = [path for step, path in list_checkpoints(output_dir) if step < newest]
    for path in older[: max(0, len(older) - (limit - 1))]:
        try:
            _remove(path)
        except OSError as error:
            raise UserError(
                f"{path} could not be removed ({error}): remove it by hand or raise --checkpoints_total_limit"
            ) from error


def _remove(folder: Path) -> None:
    """Remove a checkpoint in such a way that it is never half there under its own name."""
    if folder.exists():
        removing = folder.with_name(REMOVING + folder.name)
        folder.rename(removing)
        shutil.rmtree(removing)


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)
