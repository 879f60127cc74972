"""The training loop."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from osp_fast.config import TrainConfig
from osp_fast.data.dataset import StepBatch
from osp_fast.errors import UserError
from osp_fast.models.dit import DiT
from osp_fast.progress import Progress
from osp_fast.training.checkpoint import (
    find_checkpoint,
    list_checkpoints,
    load_training_state,
    remove_leftovers,
    save_checkpoint,
)
from osp_fast.training.ema import EMA
from osp_fast.training.guards import NonFiniteGuard, StopSignals
from osp_fast.training.metrics import MetricsLog
from osp_fast.training.optimizer import build_optimizer, learning_rate_rule, set_learning_rate
from osp_fast.training.state import TrainerState, recipe_of
from osp_fast.training.step import ClipLoss, accumulate_gradients


def prepare_output(config: TrainConfig, notify: Callable[[str], None]) -> Path | None:
    """Make `--output_dir` ready and find the checkpoint that the run goes on from (None: a new run).

    Raises:
        UserError: the run would mix with another one's checkpoints, or the folder cannot be written.
    """
    output_dir = Path(config.run.output_dir)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        remove_leftovers(output_dir)
    except OSError as error:
        raise UserError(f"--output_dir {output_dir} cannot be used ({error}): choose another folder") from error
    present = list_checkpoints(output_dir)
    if config.run.resume_from_checkpoint is None:
        if present:
            raise UserError(
                f"--output_dir {output_dir} already holds {present[-1][1].name}: go on from it with"
                " --resume_from_checkpoint latest, or choose another --output_dir"
            )
        return None
    checkpoint = find_checkpoint(config.run.resume_from_checkpoint, output_dir, notify)
    if checkpoint is not None and config.run.resume_from_checkpoint != "latest":
        names = [path.name for _, path in present]
        elsewhere = checkpoint.resolve().parent != output_dir.resolve()
        if names and (elsewhere or checkpoint.name != names[-1]):
            raise UserError(
                f"--output_dir {output_dir} already holds {names[-1]}, which a run from {checkpoint} would mix with:"
                " move it away, or choose another --output_dir"
            )
    return checkpoint


class Trainer:
    """A run in progress: the DiT, its optimizer and average, and the place in the data.

    Args:
        checkpoint: the folder to go on from, whose state is `state`; its `model` is already in `clip_loss.dit`.
        state: the place to go on from.
        total_steps: optimizer steps of the whole run.

    Raises:
        UserError: the checkpoint's tensors do not load strictly.
    """

    def __init__(
        self, config: TrainConfig, clip_loss: ClipLoss, state: TrainerState, checkpoint: Path | None, total_steps: int
    ):
        run = config.run
        self.config = config
        self.clip_loss = clip_loss
        self.dit = clip_loss.dit
        self.state = state
        self.total_steps = total_steps
        self.output_dir = Path(run.output_dir)
        self.recipe = recipe_of(config)
        self.optimizer = build_optimizer(self.dit, config.optimizer)
        self.learning_rate = learning_rate_rule(config.optimizer, total_steps)
        self.guard = NonFiniteGuard(state.skipped, state.skipped_in_a_row)
        self.ema = EMA(self.dit, run.ema_decay, run.ema_start_step, run.offload_ema) if run.use_ema else None
        self.saved: Path | None = None
        if checkpoint is not None:
            self._load(checkpoint)

    def _load(self, checkpoint: Path) -> None:
        load_training_state(checkpoint, self.dit, self.optimizer)
        # Without updates there is either no average in the checkpoint, or one that equals the weights.
        if self.ema is not None and self.state.ema_updates > 0:
            self.ema.load(DiT.from_pretrained(checkpoint / "model_ema"), self.state.ema_updates)
        self.saved = checkpoint

    def run(self, batches: Iterable[StepBatch], metrics: MetricsLog, progress: Progress, stop: StopSignals) -> Path:
        """Train until the last step or a stop signal. Returns the last checkpoint, which is always up to date.

        Raises:
            UserError: a checkpoint cannot be written, the gradients stay non-finite, or no more clips can be had; in
                the last case the steps until there are saved.
        """
        interval = Interval()
        batches = iter(batches)
        started_at = self.state.step
        while self.state.step < self.total_steps and stop.received is None:
            started = time.monotonic()
            try:
                batch = next(batches, None)
            except UserError as error:
                if self.state.step == started_at:
                    raise
                raise UserError(f"{error}; the steps until now are saved in {self.save()}") from error
            if batch is None:  # stopped while waiting for data
                break
            loss, gradient_norm, rate = self._step(batch, progress)
            interval.add(time.monotonic() - started, batch.wait_s)
            step, seconds, wait = self.state.step, interval.seconds_per_step, interval.wait_per_step
            facts = f"loss {loss:.4f}, {seconds:.2f} s/step, {wait / seconds:.0%} waiting for data"
            progress.show(step, f"step {step}/{self.total_steps}", facts)
            if step % self.config.run.log_interval == 0 or step == self.total_steps:
                metrics.write(
                    dict(
                        step=step,
                        epoch=batch.epoch,
                        loss=loss,
                        lr=rate,
                        grad_norm=gradient_norm,
                        s_per_step=seconds,
                        data_wait_s=wait,
                        skipped=self.guard.skipped,
                        samples_seen=self.state.samples_seen,
                        time=time.time(),
                    )
                )
                interval = Interval()
            if step % self.config.run.checkpointing_steps == 0:
                self.save()
        return self.save()

    def _step(self, batch: StepBatch, progress: Progress) -> tuple[float, float, float]:
        """One optimizer step. Returns the batch's mean loss, the gradient's norm before clipping, the learning rate."""
        state = self.state
        losses = accumulate_gradients(self.clip_loss, batch.clips, self.config.optimizer.train_batch_size, state.step)
        norm = torch.nn.utils.clip_grad_norm_(self.dit.parameters(), self.config.optimizer.max_grad_norm)
        # The step's only wait for the GPU: everything that the CPU must know comes over at once.
        *clip_losses, gradient_norm = torch.cat((losses, norm.detach().reshape(1))).tolist()
        rate = self.learning_rate(state.step)
        if all(map(math.isfinite, (*clip_losses, gradient_norm))):
            set_learning_rate(self.optimizer, [rate] * len(self.optimizer.param_groups))
            self.optimizer.step()
            if self.ema is not None:
                self.ema.update(state.step + 1)
            self.guard.finite()
        else:
            progress.message(self.guard.non_finite(state.step + 1, blamed_clips(batch, clip_losses)))
        self.optimizer.zero_grad(set_to_none=True)
        state.step += 1
        state.samples_seen += len(batch.clips)
        last = batch.index + 1 == batch.batches_in_epoch
        state.epoch, state.batch = (batch.epoch + 1, 0) if last else (batch.epoch, batch.index + 1)
        return sum(clip_losses) / len(clip_losses), gradient_norm, rate

    def save(self) -> Path:
        """Write a checkpoint of the present step, unless it is there already. Raises `UserError`."""
        if self.saved is not None and self.saved.name == f"checkpoint-{self.state.step}":
            return self.saved
        state = self.state
        state.skipped, state.skipped_in_a_row = self.guard.skipped, self.guard.in_a_row
        state.ema_updates = self.ema.updates if self.ema is not None else 0
        # While gradients are not finite the weights may be ruined already: keep every older checkpoint.
        limit = None if self.guard.in_a_row else self.config.run.checkpoints_total_limit
        self.saved = save_checkpoint(self.output_dir, state, self.dit, self.ema, self.optimizer, self.recipe, limit)
        return self.saved


def blamed_clips(batch: StepBatch, losses: Sequence[float]) -> list[str]:
    """Paths of the clips whose loss is not finite; of all clips if each loss is (the gradient alone overflowed)."""
    blamed = [clip for clip, loss in zip(batch.clips, losses, strict=True) if not math.isfinite(loss)]
    return [str(clip.path) for clip in blamed or batch.clips]


class Interval:
    """The time of the steps since the last log entry, without that of checkpoints."""

    def __init__(self) -> None:
        self._steps = 0
        self._seconds = 0.0
        self._wait_s = 0.0

    def add(self, seconds: float, wait_s: float) -> None:
        """A step took `seconds`, `wait_s` of which it waited for its data."""
        self._steps += 1
        self._seconds += seconds
        self._wait_s += wait_s

    @property
    def seconds_per_step(self) -> float:
        """Mean seconds of a step."""
        return self._seconds / self._steps

    @property
    def wait_per_step(self) -> float:
        """Mean seconds that a step waited for its data."""
        return self._wait_s / self._steps
