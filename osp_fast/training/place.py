"""The place of a run in its steps and in its data: where it starts, and how many steps there are."""

import hashlib
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from osp_fast.config import TrainConfig, as_dict
from osp_fast.data.buckets import Plan, by_count
from osp_fast.training.resume import check_resume
from osp_fast.training.state import FILE_NAME as STATE_FILE
from osp_fast.training.state import TrainerState, read_state, recipe_of, versions


def starting_point(
    config: TrainConfig, plan: Plan, checkpoint: Path | None, notify: Callable[[str], None]
) -> TrainerState:
    """The place that the run starts from: its beginning, or the checkpoint's. Raises `UserError` if that does not fit.

    The checkpoint keeps its counters; its settings become those of this run.
    """
    fingerprint = plan_fingerprint(plan)
    settings = dict(
        data_fingerprint=fingerprint,
        config=as_dict(config),
        recipe=asdict(recipe_of(config)),
        versions=versions(),
    )
    if checkpoint is None:
        return TrainerState(
            step=0, epoch=0, batch=0, samples_seen=0, skipped=0, skipped_in_a_row=0, ema_updates=0, **settings
        )
    state = read_state(checkpoint / STATE_FILE)
    notify(f"going on from {checkpoint}: step {state.step}, epoch {state.epoch}, batch {state.batch}")
    if config.model.pretrained is not None:
        notify(f"--pretrained {config.model.pretrained} is not used: --resume_from_checkpoint overrides it")
    for notice in check_resume(state, config, fingerprint, str(checkpoint)):
        notify(f"note: {notice}")
    return replace(state, **settings)


def plan_summary(plan: Plan) -> str:
    """What is trained on, in three lines for the log; `python -m osp_fast.inspect` tells more."""
    dropped = ", ".join(f"{count} {reason}" for reason, count in by_count(plan.dropped)) or "none"
    buckets = ", ".join(f"{bucket}: {len(plan.buckets[bucket])}" for bucket in sorted(plan.buckets))
    return f"clips: {len(plan.clips)}\ndropped: {dropped}\nbuckets (frames x height x width): {buckets}"


def plan_fingerprint(plan: Plan) -> str:
    """A hash of the clips, their order, buckets, timing and crops: what the place in the data refers to."""
    digest = hashlib.blake2b(digest_size=16)
    for clip in plan.clips:
        entry = clip.entry
        timing = f"{entry.num_frames}\x1f{entry.fps}\x1f{entry.cut}\x1f{entry.crop}"
        digest.update(f"{entry.path}\x1f{clip.bucket}\x1f{timing}\x1e".encode())
    return digest.hexdigest()


def clips_per_step(config: TrainConfig) -> int:
    """Clips of one optimizer step."""
    return config.optimizer.train_batch_size * config.optimizer.gradient_accumulation_steps


def steps_per_epoch(plan: Plan, config: TrainConfig) -> int:
    """Optimizer steps of one epoch, the same for each."""
    filled = [len(indices) for indices in plan.buckets.values()] if config.data.group_data else [len(plan.clips)]
    return sum(math.ceil(clips / clips_per_step(config)) for clips in filled)
