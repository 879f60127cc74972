"""What a checkpoint knows beside tensors: the place of the run, its settings and its recipe."""

import dataclasses
import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from osp_fast import __version__
from osp_fast.config import DataConfig, Recipe, TrainConfig
from osp_fast.errors import UserError

FILE_NAME = "trainer_state.json"


@dataclass
class TrainerState:
    """The place of a run. All draws are named by it (see the package's docstring), so no random state is needed.

    The learning rate is a function of the step and the settings (`optimizer.learning_rate_rule`), so it has no state.
    """

    step: int  # optimizer steps done, those without an update included
    epoch: int  # of the next batch
    batch: int  # the next batch's place in its epoch
    samples_seen: int  # clips trained on
    skipped: int  # steps without an update, because the gradient was not finite
    skipped_in_a_row: int
    ema_updates: int  # steps that the average has taken in
    batch_sizes: dict[str, int]  # clips of one step on all ranks, for each bucket
    data_fingerprint: str  # of the plan: its clips, their buckets and order
    config: dict[str, Any]  # the resolved settings
    recipe: dict[str, Any]
    versions: dict[str, str]


def write_state(file: Path, state: TrainerState) -> None:
    """Write a state as JSON. Raises OSError."""
    file.write_text(json.dumps(dataclasses.asdict(state), indent=2) + "\n", encoding="utf-8")


def read_state(file: Path) -> TrainerState:
    """Read a state, strictly.

    Raises:
        UserError: the file is missing or damaged, or a field is missing or of the wrong type.
    """
    fix = "resume from another checkpoint"
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}): {fix}") from error
    if not isinstance(record, dict):
        raise UserError(f"{file} is not a JSON object: {fix}")
    values = {}
    for field in dataclasses.fields(TrainerState):
        kind = getattr(field.type, "__origin__", field.type)
        value = record.get(field.name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise UserError(f"{file}: the field {field.name} is missing or not of type {kind.__name__}: {fix}")
        values[field.name] = value
    return TrainerState(**values)


def versions() -> dict[str, str]:
    """What computed a checkpoint: for reading, nothing depends on it."""
    return dict(osp_fast=__version__, torch=torch.__version__, python=platform.python_version())


def recipe_of(config: TrainConfig) -> Recipe:
    """What sampling must know of a training run."""
    data, diffusion = config.data, config.diffusion
    return Recipe(
        prediction_type=diffusion.prediction_type,
        rescale_betas_zero_snr=diffusion.rescale_betas_zero_snr,
        rectified_flow=diffusion.rf_scheduler,
        train_fps=data.train_fps,
        num_frames=data.num_frames,
        size=_size_in_words(data),
        hw_stride=data.hw_stride,
    )


def _size_in_words(data: DataConfig) -> str:
    if data.force_resolution:
        return f"{data.max_height}x{data.max_width}"
    if data.max_hxw is not None:
        least = f"{data.min_hxw} <= " if data.min_hxw is not None else ""
        return f"{least}area <= {data.max_hxw}"
    least = f", at least {data.min_height}x{data.min_width}" if data.min_height is not None else ""
    return f"within {data.max_height}x{data.max_width}{least}"
