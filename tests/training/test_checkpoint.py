"""Checkpoints are complete or absent, whatever fails, and load strictly."""

import dataclasses
import errno
import json
import os
import shutil

import pytest
import torch

from osp_fast.config import OptimizerConfig, TrainConfig, as_dict
from osp_fast.errors import UserError
from osp_fast.models.dit import DiT, DiTConfig
from osp_fast.models.weights import read_recipe
from osp_fast.seeding import torch_generator
from osp_fast.training import checkpoint as module
from osp_fast.training.checkpoint import (
    find_checkpoint,
    list_checkpoints,
    load_training_state,
    remove_leftovers,
    save_checkpoint,
)
from osp_fast.training.ema import EMA
from osp_fast.training.optimizer import build_optimizer, state_tensors
from osp_fast.training.state import TrainerState, read_state, recipe_of, versions

CONFIG = TrainConfig()
RECIPE = recipe_of(CONFIG)


class Run:
    """A small model, its optimizer and average, after one step."""

    def __init__(self, seed: int = 0):
        shape = DiTConfig(
            num_layers=1, num_attention_heads=1, attention_head_dim=12, caption_channels=8, cross_attention_dim=12
        )
        self.dit = DiT.create(shape, seed)
        self.ema = EMA(self.dit, 0.5)
        self.optimizer = build_optimizer(self.dit, OptimizerConfig(learning_rate=0.01))
        for step in (1, 2):
            for name, parameter in self.dit.named_parameters():
                parameter.grad = torch.randn(parameter.shape, generator=torch_generator("gradient", step, name))
            self.optimizer.step()
            self.ema.update(step)

    def save(self, folder, step, limit=None, ema=True):
        state = trainer_state(step)
        return save_checkpoint(folder, state, self.dit, self.ema if ema else None, self.optimizer, RECIPE, limit)


def trainer_state(step: int) -> TrainerState:
    return TrainerState(
        step=step,
        epoch=1,
        batch=2,
        samples_seen=4 * step,
        skipped=1,
        skipped_in_a_row=0,
        ema_updates=2,
        data_fingerprint="abc",
        config=as_dict(CONFIG),
        recipe=dataclasses.asdict(RECIPE),
        versions=versions(),
    )


@pytest.fixture(scope="module")
def run() -> Run:
    return Run()


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_written_comes_back_bit_for_bit(tmp_path, run):
    folder = run.save(tmp_path, 2)
    assert names(folder) == ["model", "model_ema", "optimizer.safetensors", "trainer_state.json"]
    assert read_state(folder / "trainer_state.json") == trainer_state(2)
    assert read_recipe(folder / "model") == read_recipe(folder / "model_ema") == RECIPE
    dit, average = DiT.from_pretrained(folder / "model"), DiT.from_pretrained(folder / "model_ema")
    for name, parameter in run.dit.named_parameters():
        assert torch.equal(dict(dit.named_parameters())[name], parameter)
        assert torch.equal(dict(average.named_parameters())[name], run.ema.named_average()[name])
    optimizer = build_optimizer(dit, OptimizerConfig())
    load_training_state(folder, dit, optimizer)
    expected = state_tensors(run.optimizer, run.dit)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state_tensors(optimizer, dit).items())
    assert any(tensor.any() for tensor in expected.values())


def test_the_oldest_go_only_after_the_newest_is_there(tmp_path, run, monkeypatch):
    for step in (1, 2):
        run.save(tmp_path, step)
    seen = []
    remove = module._remove
    monkeypatch.setattr(module, "_remove", lambda folder: (seen.append((folder.name, names(tmp_path))), remove(folder)))
    run.save(tmp_path, 3, limit=2, ema=False)
    pruned = [(name, present) for name, present in seen if name == "checkpoint-1"]
    assert pruned == [("checkpoint-1", ["checkpoint-1", "checkpoint-2", "checkpoint-3"])]
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-3"]
    assert not (tmp_path / "checkpoint-3" / "model_ema").exists()


def failing_after(calls: int, function):
    """`function`, which raises as a full disk does from its call number `calls` on."""
    count = [0]

    def call(*args, **kwargs):
        count[0] += 1
        if count[0] > calls:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return function(*args, **kwargs)

    return call


@pytest.mark.parametrize(
    "function, calls", [("write_tensors", 0), ("write_state", 0), ("sync", 0), ("sync", 5), ("read_only", 0)]
)
def test_a_failed_write_leaves_the_older_ones_and_nothing_else(tmp_path, run, monkeypatch, function, calls):
    run.save(tmp_path, 1)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    if function == "read_only":
        monkeypatch.setattr("pathlib.Path.mkdir", failing_after(0, None))
    else:
        monkeypatch.setattr(module, function, failing_after(calls, getattr(module, function)))
    with pytest.raises(UserError, match=r"checkpoint-2 could not be written .*No space left"):
        run.save(tmp_path, 2, limit=1)
    assert names(tmp_path) == ["checkpoint-1"]
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_a_full_disk_while_the_model_is_written(tmp_path, run, monkeypatch):
    run.save(tmp_path, 1)
    monkeypatch.setattr("osp_fast.models.weights.save_file", failing_after(1, lambda *args, **kwargs: None))
    monkeypatch.setattr("osp_fast.models.weights.sync", lambda path: None)
    with pytest.raises(UserError, match="checkpoint-2 could not be written"):
        run.save(tmp_path, 2, limit=1)
    assert names(tmp_path) == ["checkpoint-1"]


def test_what_a_kill_left_is_no_checkpoint_and_is_removed(tmp_path, run, monkeypatch):
    run.save(tmp_path, 1)

    def killed(*args):
        raise SystemExit

    # A kill runs no clean-up code.
    monkeypatch.setattr(module.shutil, "rmtree", lambda *args, **kwargs: None)
    monkeypatch.setattr(module, "write_state", killed)
    with pytest.raises(SystemExit):
        run.save(tmp_path, 2)
    monkeypatch.undo()
    monkeypatch.setattr(module.shutil, "rmtree", killed)
    with pytest.raises(SystemExit):
        module._remove_oldest(tmp_path, newest=9, limit=1)
    monkeypatch.undo()
    assert len(names(tmp_path)) == 2 and list_checkpoints(tmp_path) == []
    remove_leftovers(tmp_path)
    assert names(tmp_path) == []


@pytest.mark.parametrize("damaged", ["truncated", "missing", "another model"])
def test_an_optimizer_file_that_does_not_fit_is_refused(tmp_path, run, damaged):
    folder = run.save(tmp_path, 1)
    file = folder / "optimizer.safetensors"
    dit = run.dit
    if damaged == "truncated":
        file.write_bytes(file.read_bytes()[:-1])
    elif damaged == "missing":
        file.unlink()
    else:
        dit = DiT.create(dataclasses.replace(run.dit.config, num_layers=2), 0)
    with pytest.raises(UserError, match=r"optimizer\.safetensors.*resume from another checkpoint"):
        load_training_state(folder, dit, build_optimizer(dit, OptimizerConfig()))


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda text: text[:40], "cannot be read"),
        (lambda text: text.replace('"batch"', '"bath"'), "the field batch is missing"),
        (lambda text: text.replace('"batch": 2', '"batch": "2"'), "the field batch is missing or not of type int"),
        (lambda text: "[]", "is not a JSON object"),
    ],
)
def test_a_damaged_state_is_named(tmp_path, run, damage, words):
    file = run.save(tmp_path, 1, ema=False) / "trainer_state.json"
    file.write_text(damage(file.read_text()))
    with pytest.raises(UserError, match=f"trainer_state.json.*{words}"):
        read_state(file)


def test_latest_is_the_greatest_complete_one(tmp_path, run):
    messages = []
    assert find_checkpoint("latest", tmp_path / "absent", messages.append) is None
    assert "training starts from the beginning" in messages.pop()
    for step in (9, 10, 100):
        run.save(tmp_path, step, ema=False)
    (tmp_path / "checkpoint-1000").mkdir()
    shutil.copytree(tmp_path / "checkpoint-9", tmp_path / "checkpoint-500-copy")
    (tmp_path / "checkpoint-100" / "trainer_state.json").write_text(json.dumps(dict(step=100)))
    assert find_checkpoint("latest", tmp_path, messages.append) == tmp_path / "checkpoint-10"
    assert ["checkpoint-1000" in messages[0], "checkpoint-100 " in messages[1], len(messages)] == [True, True, 2]


def test_a_named_checkpoint(tmp_path, run):
    folder = run.save(tmp_path, 4, ema=False)
    assert find_checkpoint(str(folder), tmp_path / "other", print) == folder
    assert find_checkpoint("checkpoint-4", tmp_path, print) == folder
    with pytest.raises(UserError, match=r"checkpoint-5 does not exist; checkpoints in .*: checkpoint-4"):
        find_checkpoint("checkpoint-5", tmp_path, print)


def test_an_incomplete_folder_in_the_way_is_replaced(tmp_path, run):
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "stray").touch()
    folder = run.save(tmp_path, 3, ema=False)
    assert names(tmp_path) == ["checkpoint-3"] and "stray" not in names(folder)


def test_latest_does_not_start_anew_beside_checkpoints_that_it_cannot_read(tmp_path, run):
    folder = run.save(tmp_path, 3)
    (folder / "trainer_state.json").write_text("{}")
    with pytest.raises(UserError, match=r"no checkpoint in .* can be read .*the field step is missing"):
        find_checkpoint("latest", tmp_path, print)
