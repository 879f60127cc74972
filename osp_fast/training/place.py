"""The place of a run in its steps and in its data: where it starts, and how many steps there are."""

import hashlib
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from osp_fast.config import TrainConfig, as_dict
from osp_fast.data.buckets import Bucket, Plan, by_count
from osp_fast.data.order import ranks_per_clip
from osp_fast.models.dit import DIT_CONFIGS
from osp_fast.models.wfvae_stream import SPACE_STRIDE, TIME_STRIDE
from osp_fast.training.resume import check_resume
from osp_fast.training.state import FILE_NAME as STATE_FILE
from osp_fast.training.state import TrainerState, read_state, recipe_of, versions


@dataclass(frozen=True)
class BatchSizes:
    """How many clips a step takes.

    micro: of a micro-batch on one rank, or on those that compute it together, for each bucket of the plan
    accumulation: micro-batches of a step
    ranks: of the run
    together: ranks that compute a micro-batch of the bucket together; one where it is not named
    """

    micro: dict[Bucket, int]
    accumulation: int
    ranks: int
    together: dict[Bucket, int] = field(default_factory=dict)

    @property
    def steps(self) -> dict[Bucket, int]:
        """Clips of a step on all ranks, for each bucket."""
        return {
            bucket: clips * self.accumulation * self.ranks // self.together.get(bucket, 1)
            for bucket, clips in self.micro.items()
        }

    @property
    def for_order(self) -> int | dict[Bucket, int]:
        """`steps` as `epoch_batches` takes them: one number where it is the same for all."""
        return dict(self.steps) if len(set(self.steps.values())) > 1 else next(iter(self.steps.values()))

    def by_name(self) -> dict[str, int]:
        """`steps` as a checkpoint has them."""
        return {str(bucket): clips for bucket, clips in sorted(self.steps.items())}


def batch_sizes(plan: Plan, config: TrainConfig, ranks: int) -> BatchSizes:
    """The batches of a plan."""
    micro = {bucket: micro_batch_clips(config, bucket) for bucket in plan.buckets}
    together = {bucket: ranks_per_clip(bucket, config.run.sp_size, config.data.group_data) for bucket in plan.buckets}
    return BatchSizes(micro, config.optimizer.gradient_accumulation_steps, ranks, together)


def micro_batch_clips(config: TrainConfig, bucket: Bucket) -> int:
    """Clips of a micro-batch: `--train_batch_size`, or `--train_sp_batch_size` where ranks share them; or as many as
    `--tokens_per_batch` holds for each of these ranks, but at least one."""
    budget, run = config.optimizer.tokens_per_batch, config.run
    together = ranks_per_clip(bucket, run.sp_size, config.data.group_data)
    if budget is None:
        return config.optimizer.train_batch_size if together == 1 else run.train_sp_batch_size
    return max(1, together * budget // video_tokens(bucket, config.model.model))


def encoded_at_once(config: TrainConfig, bucket: Bucket) -> int:
    """Clips of a micro-batch that one rank encodes: all, or the largest part where ranks take turns."""
    together = ranks_per_clip(bucket, config.run.sp_size, config.data.group_data)
    return -(-micro_batch_clips(config, bucket) // together)


def latent_size(bucket: Bucket) -> tuple[int, int, int]:
    """(T, H, W) of a bucket's latents."""
    return (bucket.frames - 1) // TIME_STRIDE + 1, bucket.height // SPACE_STRIDE, bucket.width // SPACE_STRIDE


def video_tokens(bucket: Bucket, model: str) -> int:
    """Tokens of one clip of a bucket in the DiT that `--model` names."""
    return math.prod(length // p for length, p in zip(latent_size(bucket), DIT_CONFIGS[model].patch, strict=True))


def starting_point(
    config: TrainConfig, plan: Plan, sizes: BatchSizes, checkpoint: Path | None, notify: Callable[[str], None]
) -> TrainerState:
    """The place that the run starts from: its beginning, or the checkpoint's. Raises `UserError` if that does not fit.

    The checkpoint keeps its counters; its settings become those of this run.
    """
    fingerprint = plan_fingerprint(plan)
    settings = dict(
        batch_sizes=sizes.by_name(),
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
    if config.model.pretrained is not None and config.model.lora_rank is None:
        notify(f"--pretrained {config.model.pretrained} is not used: --resume_from_checkpoint overrides it")
    for notice in check_resume(state, config, sizes.by_name(), fingerprint, str(checkpoint)):
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


def steps_per_epoch(plan: Plan, sizes: BatchSizes, group_data: bool) -> int:
    """Optimizer steps of one epoch, the same for each."""
    if not group_data:
        return math.ceil(len(plan.clips) / max(sizes.steps.values()))
    return sum(math.ceil(len(indices) / sizes.steps[bucket]) for bucket, indices in plan.buckets.items())
