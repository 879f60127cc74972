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
from osp_fast.parallel.shards import LocalShards
from osp_fast.parallel.world import Ranks, World
from osp_fast.seeding import torch_generator
from osp_fast.training import checkpoint as module
from osp_fast.training import saver as saver_module
from osp_fast.training.checkpoint import (
    find_checkpoint,
    list_checkpoints,
    load_optimizer,
    remove_leftovers,
    superfluous,
)
from osp_fast.training.ema import EMA
from osp_fast.training.optimizer import build_optimizer, state_tensors, step_tensors
from osp_fast.training.saver import Saver, take_snapshot
from osp_fast.training.state import TrainerState, read_state, recipe_of, versions

CONFIG = TrainConfig()
RECIPE = recipe_of(CONFIG)
ALONE = World(Ranks(), torch.device("cpu"))


class Run:
    """A small model, its optimizer and average, after one step."""

    def __init__(self, seed: int = 0):
        shape = DiTConfig(
            num_layers=1, num_attention_heads=1, attention_head_dim=12, caption_channels=8, cross_attention_dim=12
        )
        self.dit = DiT.create(shape, seed)
        self.shards = LocalShards(self.dit)
        self.ema = EMA(self.shards, 0.5)
        self.optimizer = build_optimizer(self.shards.local, OptimizerConfig(learning_rate=0.01))
        for step in (1, 2):
            for name, parameter in self.dit.named_parameters():
                parameter.grad = torch.randn(parameter.shape, generator=torch_generator("gradient", step, name))
            self.shards.collect_gradients()
            self.optimizer.step()
            self.ema.update(step)

    def save(self, folder, step, limit=None, ema=True, background=False, keep_every=None):
        """Save as training does. Returns the checkpoint, or why it could not be written."""
        saver = Saver(folder, self.dit, RECIPE, ALONE, limit=limit, keep_every=keep_every, background=background)
        saver.save(self.snapshot(step, ema))
        return saver.fault() or saver.saved

    def snapshot(self, step, ema=True):
        ema = self.ema if ema else None
        return take_snapshot(trainer_state(step), self.dit, self.shards, self.optimizer, ema, ALONE, None)


def trainer_state(step: int) -> TrainerState:
    return TrainerState(
        step=step,
        epoch=1,
        batch=2,
        samples_seen=4 * step,
        skipped=1,
        skipped_in_a_row=0,
        ema_updates=2,
        batch_sizes={"1x16x16": 4},
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


@pytest.mark.parametrize("background", [False, True])
def test_what_is_written_comes_back_bit_for_bit(tmp_path, run, background):
    folder = run.save(tmp_path, 2, background=background)
    assert names(folder) == ["SHA256SUMS", "model", "model_ema", "optimizer", "trainer_state.json"]
    assert read_state(folder / "trainer_state.json") == trainer_state(2)
    assert read_recipe(folder / "model") == read_recipe(folder / "model_ema") == RECIPE
    dit, average = DiT.from_pretrained(folder / "model"), DiT.from_pretrained(folder / "model_ema")
    for name, parameter in run.dit.named_parameters():
        assert torch.equal(dict(dit.named_parameters())[name], parameter)
        assert torch.equal(dict(average.named_parameters())[name], run.ema.named_average()[name])
    shards = LocalShards(dit)
    optimizer = build_optimizer(shards.local, OptimizerConfig())
    load_optimizer(folder, optimizer, shards, ALONE)
    expected = state_tensors(run.optimizer, run.shards)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state_tensors(optimizer, shards).items())
    assert any(tensor.any() for tensor in expected.values())
    assert {float(step) for step in step_tensors(optimizer)} == {2.0}


def test_a_snapshot_does_not_change_with_the_run(tmp_path):
    run = Run()
    kept = {name: tensor.detach().clone() for name, tensor in run.dit.state_dict().items()}
    moments = {name: tensor.clone() for name, tensor in state_tensors(run.optimizer, run.shards).items()}
    snapshot = run.snapshot(2)
    with torch.no_grad():
        for tensor in (*run.dit.parameters(), *state_tensors(run.optimizer, run.shards).values()):
            tensor.fill_(7.0)
    saver = Saver(tmp_path, run.dit, RECIPE, ALONE)
    saver.save(snapshot)
    assert saver.fault() is None
    assert all(torch.equal(t, kept[n]) for n, t in DiT.from_pretrained(saver.saved / "model").state_dict().items())
    load_optimizer(saver.saved, run.optimizer, run.shards, ALONE)
    assert all(torch.equal(t, moments[n]) for n, t in state_tensors(run.optimizer, run.shards).items())


def test_the_oldest_go_only_after_the_newest_is_there(tmp_path, run, monkeypatch):
    for step in (1, 2):
        run.save(tmp_path, step)
    seen = []
    remove = saver_module.remove_checkpoint

    def watch(folder):
        seen.append((folder.name, names(tmp_path)))
        remove(folder)

    monkeypatch.setattr(saver_module, "remove_checkpoint", watch)
    run.save(tmp_path, 3, limit=2, ema=False)
    pruned = [(name, present) for name, present in seen if name == "checkpoint-1"]
    assert pruned == [("checkpoint-1", ["checkpoint-1", "checkpoint-2", "checkpoint-3"])]
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-3"]
    assert not (tmp_path / "checkpoint-3" / "model_ema").exists()


@pytest.mark.parametrize(
    "limit, keep_every, gone",
    [(None, None, []), (1, None, [1, 2, 3, 4, 5]), (3, None, [1, 2, 3]), (2, 2, [1, 3]), (1, 4, [1, 2, 3, 5])],
)
def test_which_checkpoints_stay(limit, keep_every, gone):
    assert superfluous([1, 2, 3, 4, 5, 6], 6, limit, keep_every) == gone


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
    "function, calls",
    [
        ("write_weights_file", 0),
        ("write_weights_file", 1),
        ("dcp.save", 0),
        ("write_state", 0),
        ("write_manifest", 0),
        ("sync", 0),
        ("sync", 5),
        ("read_only", 0),
    ],
)
def test_a_failed_write_leaves_the_older_ones_and_nothing_else(tmp_path, run, monkeypatch, function, calls):
    run.save(tmp_path, 1)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with monkeypatch.context() as patched:
        if function == "read_only":
            patched.setattr("pathlib.Path.mkdir", failing_after(0, None))
        elif function == "dcp.save":
            patched.setattr(saver_module.dcp, "save", failing_after(calls, None))
        else:
            patched.setattr(saver_module, function, failing_after(calls, getattr(saver_module, function)))
        fault = run.save(tmp_path, 2, limit=1, background=True)
    assert "checkpoint-2 could not be written (" in fault and "No space left" in fault
    assert names(tmp_path) == ["checkpoint-1"]
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert run.save(tmp_path, 3, limit=1) == tmp_path / "checkpoint-3"
    assert names(tmp_path) == ["checkpoint-3"]


def test_what_a_kill_left_is_no_checkpoint_and_is_removed(tmp_path, run, monkeypatch):
    run.save(tmp_path, 1)

    def killed(*args):
        raise SystemExit

    # A kill runs no clean-up code.
    monkeypatch.setattr(saver_module.shutil, "rmtree", lambda *args, **kwargs: None)
    monkeypatch.setattr(saver_module, "write_state", killed)
    with pytest.raises(SystemExit):
        run.save(tmp_path, 2)
    monkeypatch.undo()
    monkeypatch.setattr(module.shutil, "rmtree", killed)
    with pytest.raises(SystemExit):
        module.remove_checkpoint(tmp_path / "checkpoint-1")
    monkeypatch.undo()
    assert len(names(tmp_path)) == 2 and list_checkpoints(tmp_path) == []
    remove_leftovers(tmp_path)
    assert names(tmp_path) == []


@pytest.mark.parametrize("damaged", ["truncated", "missing", "another model"])
def test_an_optimizer_state_that_does_not_fit_is_refused(tmp_path, run, damaged):
    folder = run.save(tmp_path, 1)
    file = next((folder / "optimizer").iterdir())
    dit = run.dit
    if damaged == "truncated":
        file.write_bytes(file.read_bytes()[:-1])
    elif damaged == "missing":
        file.unlink()
    else:
        dit = DiT.create(dataclasses.replace(run.dit.config, num_layers=2), 0)
    shards = LocalShards(dit)
    with pytest.raises(UserError, match=r"checkpoint-1/optimizer .*resume from another checkpoint"):
        load_optimizer(folder, build_optimizer(shards.local, OptimizerConfig()), shards, ALONE)


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


@pytest.mark.parametrize("damage", ["truncated", "one bit", "missing", "no manifest", "hostile manifest"])
def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path, run, damage):
    for step in (1, 2):
        run.save(tmp_path, step)
    folder = tmp_path / "checkpoint-2"
    file = folder / "model" / "diffusion_pytorch_model.safetensors"
    whole = file.read_bytes()
    if damage == "truncated":
        file.write_bytes(whole[:-100])
    elif damage == "one bit":
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    elif damage == "missing":
        file.unlink()
    elif damage == "no manifest":
        (folder / "SHA256SUMS").unlink()
    else:
        (folder / "SHA256SUMS").write_text(f"{'0' * 64}  ../../outside\n")
    messages = []
    assert find_checkpoint("latest", tmp_path, messages.append) == tmp_path / "checkpoint-1"
    blamed = "SHA256SUMS" if "manifest" in damage else "diffusion_pytorch_model.safetensors"
    assert len(messages) == 1 and "checkpoint-2 is damaged and is passed over" in messages[0] and blamed in messages[0]
    with pytest.raises(UserError, match=f"checkpoint-2/.*{blamed}.*resume from another checkpoint"):
        find_checkpoint("checkpoint-2", tmp_path, print)


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
    with pytest.raises(UserError, match=r"no checkpoint in .* is sound .*the field step is missing"):
        find_checkpoint("latest", tmp_path, print)


def test_a_checkpoint_under_another_name_or_with_a_stray_part_is_refused(tmp_path, run):
    folder = run.save(tmp_path, 3)
    stray = folder / "optimizer" / "shard-00002-model-00001-of-00001.safetensors"
    stray.touch()
    with pytest.raises(UserError, match=r"shard-00002.* is no part of the checkpoint"):
        find_checkpoint("checkpoint-3", tmp_path, print)
    stray.unlink()
    folder.rename(tmp_path / "checkpoint-5")
    with pytest.raises(UserError, match="checkpoint-5 holds step 3: give it its name back"):
        find_checkpoint("checkpoint-5", tmp_path, print)


def test_a_damaged_checkpoint_does_not_count_among_those_that_stay(tmp_path, run):
    for step in (2, 4):
        run.save(tmp_path, step)
    saver = Saver(tmp_path, run.dit, RECIPE, ALONE, limit=2, background=False)
    saver.passed_over = {4}
    saver.save(run.snapshot(5))
    assert saver.fault() is None and names(tmp_path) == ["checkpoint-2", "checkpoint-4", "checkpoint-5"]
    saver.save(run.snapshot(6))
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-5", "checkpoint-6"]
