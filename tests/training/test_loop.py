"""The loop: resuming is exact, bad gradients are skipped, signals stop it at a step, the end is always saved."""

import copy
import io
import itertools
import json
import math
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from osp_fast.config import TrainConfig, as_dict
from osp_fast.errors import UserError
from osp_fast.models.dit import DiT
from osp_fast.parallel.world import Ranks, World
from osp_fast.progress import Progress
from osp_fast.training.build import load_trainable
from osp_fast.training.guards import StopSignals
from osp_fast.training.loop import Trainer
from osp_fast.training.metrics import MetricsLog
from osp_fast.training.optimizer import state_tensors
from osp_fast.training.output import lock_output, prepare_output
from osp_fast.training.prepare import BatchFeed, BatchMaker
from osp_fast.training.state import TrainerState, read_state
from osp_fast.training.watchdog import Watchdog


@pytest.fixture
def config(tmp_path) -> TrainConfig:
    config = TrainConfig()
    config.run.output_dir = str(tmp_path / "run")
    config.run.report_to = "none"
    config.run.use_ema, config.run.ema_decay = True, 0.9
    config.run.checkpointing_steps = 4
    config.optimizer.learning_rate, config.optimizer.lr_scheduler = 0.01, "cosine"
    config.optimizer.lr_warmup_steps = 2
    config.optimizer.train_batch_size = 2
    return config


@pytest.fixture
def train(make_loss, make_batches):
    """Train up to a step, from a checkpoint if one is given. Returns the trainer and what was printed."""

    def run(config: TrainConfig, until: int, checkpoint: Path | None = None, batches=None, total: int = 8):
        Path(config.run.output_dir).mkdir(exist_ok=True)
        if checkpoint is None:
            state = TrainerState(0, 0, 0, 0, 0, 0, 0, {}, "clips", as_dict(config), {}, {})
            loss = make_loss(config)
        else:
            state = read_state(checkpoint / "trainer_state.json")
            loss = make_loss(config, dit=load_trainable(checkpoint / "model"))
        stream = io.StringIO()
        progress = Progress(total, stream=stream)
        world = World(Ranks(), torch.device("cpu"))
        trainer = Trainer(config, world, loss.loss, state, total, progress)
        if checkpoint is not None:
            trainer.load(checkpoint)
        trainer.clip_loss = loss
        batches = batches or make_batches(3, state.epoch, state.batch)
        metrics = MetricsLog(config.run, state.step, progress.message)
        watchdog = Watchdog(Path(config.run.output_dir), 0, 10.0, 60.0)
        with StopSignals() as stop, watchdog:
            feed = BatchFeed(stop_after(batches, until - state.step), loss.maker, state.step, 2)
            trainer.run(feed, metrics, stop, watchdog)
        metrics.close()
        return trainer, stream.getvalue()

    return run


def stop_after(batches, steps: int):
    """So many batches, and then a SIGTERM to this process instead of a batch."""
    yield from itertools.islice(batches, steps)
    os.kill(os.getpid(), signal.SIGTERM)
    yield None


def history(config: TrainConfig) -> list[dict]:
    lines = (Path(config.run.output_dir) / "metrics.jsonl").read_text().splitlines()
    timings = ("s_per_step", "data_wait_s", "tokens_per_s", "model_tflops", "memory_", "time")
    return [{key: value for key, value in json.loads(line).items() if not key.startswith(timings)} for line in lines]


def everything(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {
        **{f"weight {name}": tensor for name, tensor in trainer.loss.dit.state_dict().items()},
        **{f"average {name}": tensor for name, tensor in trainer.update.ema.named_average().items()},
        **{
            f"optimizer {name}": tensor
            for name, tensor in state_tensors(trainer.update.optimizer, trainer.shards).items()
        },
    }


def checkpoints(config: TrainConfig) -> list[str]:
    return sorted(path.name for path in Path(config.run.output_dir).glob("checkpoint-*"))


@pytest.mark.parametrize("stopped_at", [4, 5])
def test_a_resumed_run_is_the_run_that_never_stopped(config, train, stopped_at):
    whole, _ = train(config, 8)
    other = copy.deepcopy(config)
    other.run.output_dir += "-resumed"
    train(other, stopped_at)
    assert checkpoints(other)[-1] == f"checkpoint-{stopped_at}"
    resumed, _ = train(other, 8, Path(other.run.output_dir) / f"checkpoint-{stopped_at}")
    assert history(other) == history(config) and len(history(config)) == 8
    expected = everything(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in everything(resumed).items())
    assert replace(resumed.state, config={}) == replace(whole.state, config={})


def test_the_run_learns_and_counts(config, train, make_batches, make_loss):
    config.run.log_interval, config.run.checkpointing_steps = 5, 1000
    config.optimizer.lr_scheduler = "constant"
    one = next(make_batches(3))
    trainer, printed = train(config, 60, total=60, batches=itertools.cycle([one]))
    lines = history(config)
    assert [line["step"] for line in lines] == list(range(5, 61, 5))
    assert [line["samples_seen"] for line in lines] == list(range(15, 181, 15)) and lines[-1]["lr"] == 0.01
    # The same draws for the untrained and the trained model, or chance would decide.
    with torch.no_grad():
        before, after = (
            torch.stack([loss(one.clips, step) for step in range(20)]).mean()
            for loss in (make_loss(config), trainer.clip_loss)
        )
    assert after < 0.8 * before
    assert "step 60/60" in printed
    # Saved at the end although no interval ended there.
    assert checkpoints(config) == ["checkpoint-60"]


def test_the_place_in_the_data_moves_on(config, train):
    trainer, _ = train(config, 5)
    assert (trainer.state.epoch, trainer.state.batch) == (1, 2)
    trainer, _ = train(copy.deepcopy(config), 6, Path(config.run.output_dir) / "checkpoint-5")
    assert (trainer.state.epoch, trainer.state.batch) == (2, 0)


def poisoned(batches, trouble: range):
    """Batches, with a NaN in the loss of one clip of those that are in `trouble` (counted from 0)."""
    for number, batch in enumerate(batches):
        if number in trouble:
            batch.clips[1].caption = "poison"
        yield batch


@pytest.fixture
def poison(monkeypatch):
    """Captions "poison" give a latent that is not a number."""
    honest = BatchMaker.read

    def read(self, clips, step):
        contents = honest(self, clips, step)
        for clip, each in zip(clips, contents, strict=True):
            if clip.caption == "poison":
                each.latent.fill_(float("nan"))
        return contents

    monkeypatch.setattr(BatchMaker, "read", read)


def test_a_bad_gradient_is_skipped_and_told(config, train, make_batches, poison):
    config.run.checkpointing_steps = 1
    trainer, printed = train(config, 3, batches=poisoned(make_batches(3), range(1, 2)))
    lines = history(config)
    assert [line["skipped"] for line in lines] == [0, 1, 1]
    assert "step 2: the gradient is not finite, no update was made (clips: 0-1-1)" in printed
    assert lines[1]["loss"] is None and lines[1]["grad_norm"] is None and math.isfinite(lines[2]["loss"])
    folder = Path(config.run.output_dir)
    before, after = (DiT.from_pretrained(folder / f"checkpoint-{step}" / "model").state_dict() for step in (1, 2))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(tensor.isfinite().all() for tensor in everything(trainer).values())
    assert trainer.update.ema.updates == 2


def test_only_bad_gradients_end_the_run(config, train, make_batches, poison):
    with pytest.raises(UserError, match=f"not finite for {config.optimizer.max_skipped_steps} steps in a row"):
        train(config, 50, batches=poisoned(make_batches(3), range(2, 50)), total=50)
    assert len(history(config)) == 2 + config.optimizer.max_skipped_steps - 1


def test_bad_gradients_prune_no_good_checkpoint(config, train, make_batches, poison):
    config.run.checkpointing_steps, config.run.checkpoints_total_limit = 1, 2
    with pytest.raises(UserError, match="not finite"):
        train(config, 50, batches=poisoned(make_batches(3), range(3, 50)), total=50)
    kept = {path.name for path in Path(config.run.output_dir).glob("checkpoint-*")}
    assert {"checkpoint-2", "checkpoint-3"} <= kept  # of before the trouble


def test_an_average_that_is_gone_is_missed_and_a_new_one_starts_from_the_weights(config, train):
    train(config, 4)
    checkpoint = Path(config.run.output_dir) / "checkpoint-4"
    shutil.rmtree(checkpoint / "model_ema")
    with pytest.raises(UserError, match=r"model_ema/config.json is missing"):
        train(copy.deepcopy(config), 5, checkpoint)
    config.run.use_ema = False
    train(config, 6, checkpoint)
    config.run.use_ema = True
    trainer, _ = train(config, 7, Path(config.run.output_dir) / "checkpoint-6")
    average = trainer.update.ema.named_average()
    assert all(torch.equal(parameter, average[name]) for name, parameter in trainer.loss.dit.named_parameters())


def test_a_new_run_does_not_mix_with_an_old_one(config, train):
    train(config, 5)
    output = Path(config.run.output_dir)
    with pytest.raises(UserError, match=r"already holds checkpoint-5.*--resume_from_checkpoint latest"):
        prepare_output(config, print)
    config.run.resume_from_checkpoint = "latest"
    assert prepare_output(config, print) == output / "checkpoint-5"
    config.run.resume_from_checkpoint = "checkpoint-5"
    assert prepare_output(config, print) == output / "checkpoint-5"
    config.run.resume_from_checkpoint = "checkpoint-4"
    with pytest.raises(UserError, match=r"already holds checkpoint-5, which a run from .*checkpoint-4 would mix with"):
        prepare_output(config, print)
    config.run.resume_from_checkpoint = str(output / "checkpoint-4")
    config.run.output_dir += "-elsewhere"
    assert prepare_output(config, print) == output / "checkpoint-4"


def test_an_output_folder_that_cannot_be_made_is_named(config, tmp_path):
    (tmp_path / "file").touch()
    config.run.output_dir = str(tmp_path / "file" / "run")
    with pytest.raises(UserError, match=r"--output_dir .*file/run cannot be used"):
        prepare_output(config, print)


def test_broken_data_loses_no_step(config, train, make_batches):
    def three_then_none():
        yield from itertools.islice(make_batches(3), 3)
        raise UserError("too many files are broken")

    with pytest.raises(UserError, match="too many files are broken; the steps until now are saved in .*checkpoint-3"):
        train(config, until=8, batches=three_then_none())
    assert read_state(Path(config.run.output_dir) / "checkpoint-3" / "trainer_state.json").step == 3


def test_data_that_is_broken_from_the_start_saves_nothing(config, train):
    def none():
        raise UserError("no clip can be decoded")
        yield

    with pytest.raises(UserError, match="^no clip can be decoded$"):
        train(config, until=8, batches=none())
    assert not list(Path(config.run.output_dir).glob("checkpoint-*"))


@pytest.mark.parametrize("background", [False, True])
def test_a_last_checkpoint_that_cannot_be_written_is_an_error(config, train, monkeypatch, background):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    config.run.async_save = background
    train(config, 4)
    monkeypatch.setattr("osp_fast.training.saver.write_state", full)
    with pytest.raises(UserError, match=r"checkpoint-6 could not be written .*go on from them with --resume"):
        train(copy.deepcopy(config), 6, Path(config.run.output_dir) / "checkpoint-4")
    assert checkpoints(config) == ["checkpoint-4"] and len(history(config)) == 6


def test_two_runs_do_not_write_to_one_folder(config):
    with lock_output(config, print), pytest.raises(UserError, match="another run writes to --output_dir"):
        lock_output(config, print)
    lock_output(config, print).close()
