"""The training loop."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from osp_fast.config import TrainConfig
from osp_fast.data.dataset import StepBatch
from osp_fast.engine.compile import RecompileCounter
from osp_fast.engine.cuda_graphs import GraphedBuckets
from osp_fast.errors import UserError
from osp_fast.models.dit import DiT
from osp_fast.models.lora import fused_state, has_lora
from osp_fast.parallel.collectives import RankLost
from osp_fast.parallel.heartbeats import WAITING_FOR_RANKS
from osp_fast.parallel.shards import LocalShards
from osp_fast.parallel.world import World
from osp_fast.progress import Progress
from osp_fast.training.checkpoint import list_checkpoints, load_optimizer
from osp_fast.training.ema import EMA
from osp_fast.training.guards import NonFiniteGuard, StopSignals, note_skipped
from osp_fast.training.metrics import MetricsLog
from osp_fast.training.observe import Observer
from osp_fast.training.optimizer import build_optimizer, learning_rate_rule, set_learning_rate
from osp_fast.training.pace import Pace
from osp_fast.training.profile import StepProfiler
from osp_fast.training.records import Record, Records
from osp_fast.training.saver import Saver, take_snapshot
from osp_fast.training.state import TrainerState, recipe_of
from osp_fast.training.step import DenoisingLoss, MicroBatch, Update, accumulate_gradients
from osp_fast.training.watchdog import Watchdog

# What a rank says before each step; the greatest word of all ranks is done.
GO, END, STOP, FAULT = range(4)
LAST_WRITE_S = 600.0  # for a checkpoint on its way when an error ends the run; other ranks may have gone


@dataclass
class StepNote:
    """What is known of a step when it is submitted; its numbers follow (`Records`)."""

    step: int
    batch: StepBatch
    learning_rate: float
    samples_seen: int
    pace: dict[str, float]


class Trainer:
    """A run in progress: the DiT, its optimizer and average, and the place in the data.

    Args:
        loss: of the DiT, whose weights are spread over the ranks of `mesh` if there are several.
        state: the place to go on from.
        total_steps: optimizer steps of the whole run.
        cpu_mesh: the same ranks as CPUs; None in a run of one process.
        validate: what `--validation_steps` asks for, given the DiT and the steps done; all ranks call it together.

    Raises:
        UserError: the optimizer that is asked for cannot be had.
    """

    def __init__(
        self,
        config: TrainConfig,
        world: World,
        loss: DenoisingLoss,
        state: TrainerState,
        total_steps: int,
        progress: Progress,
        cpu_mesh: DeviceMesh | None = None,
        validate: Callable[[DiT, int], object] | None = None,
    ):
        run = config.run
        self.config, self.world, self.loss, self.state, self.progress = config, world, loss, state, progress
        self.total_steps = total_steps
        self._cpu_mesh, self._validate = cpu_mesh, validate
        self.shards = LocalShards(loss.dit)
        optimizer = build_optimizer(self.shards.local, config.optimizer)
        ema = EMA(self.shards, run.ema_decay, run.ema_start_step, run.offload_ema) if run.use_ema else None
        copies = world.size // (run.shard_size or world.size)
        self.update = Update(self.shards, optimizer, ema, world, config.optimizer.max_grad_norm, copies)
        self.recompiled: RecompileCounter | None = None  # graphs that were compiled after the warm-up
        self.graphs: GraphedBuckets | None = None
        self.profiler = StepProfiler(run.profile, Path(run.output_dir), world.rank, world.device, progress.message)
        self.observer = Observer(self.update, list(loss.dit.parameters()), world.device, progress.message)
        self.pace = Pace(loss.dit.config, config.model.lora_rank, world.device, world.size)
        self.learning_rate = learning_rate_rule(config.optimizer, total_steps)
        self.guard = NonFiniteGuard(config.optimizer.max_skipped_steps, state.skipped, state.skipped_in_a_row)
        self.saver = Saver(
            Path(run.output_dir),
            loss.dit,
            recipe_of(config),
            world,
            limit=run.checkpoints_total_limit,
            keep_every=run.checkpoints_keep_every,
            background=run.async_save,
        )

    def load(self, checkpoint: Path) -> None:
        """Go on from a checkpoint, whose `model` is in the DiT already; all ranks must call it.

        Raises:
            UserError: its tensors do not load strictly.
        """
        load_optimizer(checkpoint, self.update.optimizer, self.shards, self.world)
        # Without updates there is either no average in the checkpoint, or one that equals the weights.
        if self.update.ema is not None and self.state.ema_updates > 0:
            self.update.ema.load(_saved_average(checkpoint, self.loss.dit), self.state.ema_updates)
        self.saver.saved = checkpoint
        present = list_checkpoints(Path(self.config.run.output_dir))
        self.saver.passed_over = {step for step, _ in present if step > self.state.step}

    def run(
        self,
        batches: Iterable[tuple[StepBatch, list[MicroBatch]]],
        metrics: MetricsLog | None,
        stop: StopSignals,
        watchdog: Watchdog,
    ) -> Path:
        """Train until the last step or a stop signal. Returns the last checkpoint, which is always up to date.

        metrics: of the first rank; watchdog: entered, ends the process when a step hangs

        Raises:
            UserError: the last checkpoint cannot be written, the gradients stay non-finite, or no more clips can be
                had; in the last case the steps until there are saved.
        """
        run, state = self.config.run, self.state
        records = Records(self.world.device)
        self.progress.begin()
        batches, started_at = iter(batches), state.step
        while state.step < self.total_steps:
            started = time.monotonic()
            word, item, fault = self._next(batches, stop, watchdog)
            if word != GO:
                break
            batch, made = item
            watchdog.step_started(state.step + 1, [str(clip.path) for clip in batch.clips])
            samples_seen = state.samples_seen + batch.size
            note = StepNote(state.step + 1, batch, self.learning_rate(state.step), samples_seen, {})
            due = records.put(note, self.step(made, note.learning_rate))
            self._advance(batch)
            self.pace.add(made, time.monotonic() - started, batch.wait_s)
            note.pace.update(self.pace.facts())
            if self._is_logged(note.step):
                self.pace.restart()
            self._learn(due, metrics)
            self._tell_fault(wait=False)
            with watchdog.phase("writing the profile") if self.profiler.writes_next else nullcontext():
                self.profiler.step(note.step)
            if state.step % run.checkpointing_steps == 0:
                with watchdog.phase("saving"):
                    self._learn(records.flush(), metrics)
                    self.save()
            if self._validate is not None and state.step % run.validation_steps == 0:
                with watchdog.phase("validation"):
                    self._learn(records.flush(), metrics)
                    self.validate()
            watchdog.step_done()
        with watchdog.phase("ending"):
            self._learn(records.flush(), metrics)
            if state.step < self.total_steps and word == FAULT:
                self._give_up(fault, saves=state.step > started_at)
            return self.finish()

    def _next(
        self, batches: Iterator[tuple[StepBatch, list[MicroBatch]]], stop: StopSignals, watchdog: Watchdog
    ) -> tuple[int, tuple[StepBatch, list[MicroBatch]] | None, UserError | None]:
        """What all ranks do next, this rank's batch, and what is wrong with it; all ranks must call it."""
        word, item, fault = GO, None, None
        if stop.received is None or self.config.run.sp_size > 1:  # others may wait for what this rank loads
            try:
                item = next(batches, None)
            except RankLost:
                raise
            except UserError as error:
                word, fault = FAULT, error
        if word != FAULT and stop.received is not None:  # perhaps received while waiting for data
            word = STOP
        elif word == GO and item is None:
            word = END
        with watchdog.within(WAITING_FOR_RANKS):
            word, number = self.world.greatest(word, stop.received or 0)
        stop.adopt(number)
        return word, item, fault

    def _give_up(self, fault: UserError | None, saves: bool) -> None:
        """Raise what a rank found wrong with its data, once what was trained is saved."""
        faults = [found for found in self.world.gather(None if fault is None else str(fault)) if found is not None]
        if saves:
            raise UserError(f"{faults[0]}; the steps until now are saved in {self.finish()}") from fault
        raise UserError(faults[0]) from fault

    def step(self, batches: Sequence[MicroBatch], learning_rate: float) -> Tensor:
        """One optimizer step, without a wait for the GPU. Returns its numbers, on the device (`Update`)."""
        losses = accumulate_gradients(self.loss, batches, self.graphs)
        set_learning_rate(self.update.optimizer, [learning_rate] * len(self.update.optimizer.param_groups))
        return self.update(losses, self.state.step + 1)

    def _advance(self, batch: StepBatch) -> None:
        state = self.state
        state.step += 1
        state.samples_seen += batch.size
        last = batch.index + 1 == batch.batches_in_epoch
        state.epoch, state.batch = (batch.epoch + 1, 0) if last else (batch.epoch, batch.index + 1)

    def _is_logged(self, step: int) -> bool:
        return step % self.config.run.log_interval == 0 or step == self.total_steps

    def _learn(self, records: Sequence[Record], metrics: MetricsLog) -> None:
        """Take note of steps whose numbers have come: show, log, count the skipped ones."""
        for note, (loss, norm, skipped, not_finite, *clip_losses) in records:
            if skipped:
                blamed = blamed_clips(note.batch, clip_losses, self.world.rank, any_blamed=not_finite > 0)
                self._skipped(note, norm, blamed)
            else:
                self.guard.finite()
            seconds, wait = note.pace["s_per_step"], note.pace["data_wait_s"]
            facts = f"loss {loss:.4f}, {seconds:.2f} s/step, {wait / seconds:.0%} waiting for data"
            if "mfu" in note.pace:
                facts += f", {note.pace['mfu']:.1%} MFU"
            self.progress.show(note.step, f"step {note.step}/{self.total_steps}", facts)
            if self._is_logged(note.step) and self.world.is_first:
                metrics.write(
                    dict(
                        step=note.step,
                        epoch=note.batch.epoch,
                        loss=loss,
                        lr=note.learning_rate,
                        grad_norm=norm,
                        **note.pace,
                        skipped=self.guard.skipped,
                        recompiled=0 if self.recompiled is None else self.recompiled.count,
                        **self.observer(),
                        samples_seen=note.samples_seen,
                        time=time.time(),
                    )
                )

    def _skipped(self, note: StepNote, norm: float, blamed: list[dict]) -> None:
        """Name and count a step whose gradient was not finite. Raises `UserError` if there were too many in a row."""
        blamed = [dict(clip, rank=rank) for rank, clips in enumerate(self.world.gather(blamed)) for clip in clips]
        if self.world.is_first:
            trouble = note_skipped(Path(self.config.run.output_dir), note.step, norm, blamed)
            if trouble is not None:
                self.progress.message(trouble)
        self.progress.message(self.guard.non_finite(note.step, [clip["path"] for clip in blamed]))

    def save(self) -> None:
        """Save the present step, unless that was done already. What it writes may still be on its way.

        A checkpoint that cannot be written is reported, and training goes on.
        """
        state = self.state
        if self.saver.saved is not None and self.saver.saved.name == f"checkpoint-{state.step}":
            return
        self._tell_fault(wait=True)
        state.skipped, state.skipped_in_a_row = self.guard.skipped, self.guard.in_a_row
        state.ema_updates = self.update.ema.updates if self.update.ema is not None else 0
        snapshot = take_snapshot(
            dataclasses.replace(state),
            self.loss.dit,
            self.shards,
            self.update.optimizer,
            self.update.ema,
            self.world,
            self._cpu_mesh,
        )
        # While gradients are not finite the weights may be ruined already: keep every older checkpoint.
        self.saver.save(snapshot, prune=not self.guard.in_a_row)

    def validate(self) -> None:
        """Show what the model can do: with the average, if there is one, as sampling will use it."""
        ema = self.update.ema
        self.loss.dit.share_tokens(None)  # each rank samples whole clips; the next micro-batch shares as it needs
        with nullcontext() if ema is None else ema.in_place_of_weights():
            self._validate(self.loss.dit, self.state.step)

    def close(self) -> None:
        """Let a checkpoint on its way arrive, write what was profiled, and give the sensors back."""
        self.saver.close(LAST_WRITE_S if self.world.alone else LAST_WRITE_S / 10)
        self.profiler.close()
        self.observer.close()

    def _tell_fault(self, wait: bool) -> None:
        fault = self.saver.fault(wait)
        if fault is not None:
            self.progress.message(f"{fault}; training goes on")

    def finish(self) -> Path:
        """Save the present step and wait until it is written. Returns the checkpoint. Raises `UserError`."""
        self._tell_fault(wait=True)
        self.save()
        fault = self.saver.fault()
        if fault is not None:
            hint = ", go on from them with --resume_from_checkpoint latest" if self.saver.saved is not None else ""
            raise UserError(f"{fault}{hint}")
        return self.saver.saved


def _saved_average(checkpoint: Path, dit: DiT) -> dict[str, Tensor]:
    """The average in a checkpoint, whole tensors by parameter name. Raises `UserError`."""
    if has_lora(dit):
        return fused_state(dit, checkpoint / "lora_ema")
    return DiT.from_pretrained(checkpoint / "model_ema").state_dict()


def blamed_clips(batch: StepBatch, losses: Sequence[float], rank: int, any_blamed: bool) -> list[dict]:
    """The clips that this rank has loaded whose loss is not finite; all of them if no rank has one (the gradient alone
    overflowed)."""
    loaded = [(clip, loss) for clip, loss in zip(batch.clips, losses, strict=True) if clip.rank == rank]
    blamed = [(clip, loss) for clip, loss in loaded if not (any_blamed and math.isfinite(loss))]
    return [dict(path=str(clip.path), clip_index=clip.clip_index, slot=clip.slot, loss=loss) for clip, loss in blamed]
