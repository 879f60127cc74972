"""Training on several ranks: the same as on one, resumed on any number of them, and stopped by one for all."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))

from ranks import RankProcesses, run_ranks
from training import small, train, train_apart, train_each, train_with, train_with_a_fault_in_saving

from osp_fast.models.dit import DiT
from osp_fast.training.checkpoint import verify
from osp_fast.training.hang_report import EXIT_HANG

BATCH = 4  # clips of a step


@pytest.fixture(scope="module")
def assets(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("assets")
    return dict(
        data=small.write_data(root / "data", images=6, videos=3),
        text_encoder=small.write_text_encoder(root / "text_encoder"),
    )


@pytest.fixture(scope="module")
def flags(assets):
    def make(output: Path, ranks: int, **changed) -> list[str]:
        settings = dict(
            train_batch_size=BATCH // ranks,
            dataloader_num_workers=1,
            start_timeout=40,
            max_train_steps=6,
            checkpointing_steps=3,
            # AdamW makes steps of full size out of gradients that are rounding alone, unless told what is nothing.
            adam_epsilon=1e-4,
            use_ema=True,
            report_to="none",
        )
        return small.flags(**assets, output=output, **{**settings, **changed})

    return make


@pytest.fixture(scope="module")
def alone(flags, tmp_path_factory) -> Path:
    """The output of one rank."""
    output = tmp_path_factory.mktemp("alone") / "run"
    run_ranks(1, output.parent / "logs", train, flags(output, 1))
    return output


def history(output: Path) -> list[dict]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in ("step", "epoch", "loss", "grad_norm", "samples_seen")} for line in lines]


def assert_same_run(found: Path, expected: Path) -> None:
    """Equal within rounding: losses, gradient norms, weights and averages."""
    for one, other in zip(history(found), history(expected), strict=True):
        assert one == pytest.approx(other, rel=2e-5)
    for folder in ("model", "model_ema"):
        states = [DiT.from_pretrained(run / "checkpoint-6" / folder).state_dict() for run in (found, expected)]
        a, b = (torch.cat([tensor.flatten() for tensor in state.values()]) for state in states)
        assert (a - b).norm() <= 1e-5 * b.norm(), folder


def tensors(checkpoint: Path) -> dict[str, bytes]:
    return {
        f"{file.relative_to(checkpoint)} {name}": tensor.numpy().tobytes()
        for file in checkpoint.rglob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def test_two_ranks_train_as_one_and_resume_bit_for_bit(flags, alone, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_ranks(2, tmp_path / "a", train, flags(whole, 2))
    assert_same_run(whole, alone)
    run_ranks(2, tmp_path / "b", train, flags(parts, 2, max_train_steps=3))
    printed = run_ranks(2, tmp_path / "c", train, flags(parts, 2, resume_from_checkpoint="latest")).printed()
    assert "going on from" in printed and "step 3, epoch" in printed
    assert history(parts) == history(whole)
    expected = tensors(whole / "checkpoint-6")
    assert tensors(parts / "checkpoint-6") == expected
    assert sum("optimizer/shard-00002" in name for name in expected) > 10


def test_four_ranks_hold_copies_and_others_go_on_from_them(flags, alone, tmp_path):
    output = tmp_path / "run"
    run_ranks(4, tmp_path / "a", train, flags(output, 4, max_train_steps=3, shard_size=2, offload_ema=True))
    # Two ranks, with two micro-batches each, and then one.
    resumed = dict(resume_from_checkpoint="latest", checkpointing_steps=1)
    two = flags(output, 4, max_train_steps=5, gradient_accumulation_steps=2, **resumed)
    run_ranks(2, tmp_path / "b", train, two)
    run_ranks(1, tmp_path / "c", train, flags(output, 1, gradient_checkpointing=True, **resumed))
    assert_same_run(output, alone)


def test_another_global_batch_is_refused_on_every_rank(flags, alone, tmp_path):
    checkpoint = alone / "checkpoint-3"
    ranks = RankProcesses(2, tmp_path, train, (flags(tmp_path / "run", 1, resume_from_checkpoint=checkpoint),))
    assert ranks.codes() == [2, 2]
    assert "was trained with 4 clips of 1x32x32 per step" in ranks.printed(0) and "not 8" in ranks.printed(1)


@pytest.mark.parametrize("name, code", [("SIGTERM", 143), ("SIGUSR1", 138)])
def test_a_signal_to_one_rank_saves_and_stops_all(flags, alone, tmp_path, name, code):
    output = tmp_path / "run"
    ranks = RankProcesses(2, tmp_path, train_with, (f"{name} 1 4", flags(output, 2)))
    assert ranks.codes() == [code, code], ranks.printed()
    assert f"{name}: stopped after step 4" in ranks.printed(0) and "Traceback" not in ranks.printed()
    run_ranks(2, tmp_path / "again", train, flags(output, 2, resume_from_checkpoint="latest"))
    assert_same_run(output, alone)


def test_what_one_rank_finds_broken_ends_all_and_loses_no_step(flags, tmp_path):
    ranks = RankProcesses(2, tmp_path, train_with, ("fault 1 2", flags(tmp_path / "run", 2)))
    assert ranks.codes() == [2, 2], ranks.printed()
    for rank in range(2):
        assert "too many files are broken; the steps until now are saved in" in ranks.printed(rank)
    assert (tmp_path / "run" / "checkpoint-2" / "SHA256SUMS").is_file()


def test_a_bad_batch_on_one_rank_is_skipped_by_all_and_its_clip_named(flags, tmp_path):
    output = tmp_path / "run"
    ranks = run_ranks(2, tmp_path, train_with, "nan 1 2", flags(output, 2, max_train_steps=4, log_interval=1))
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines] == [0, 0, 1, 1] and lines[2]["loss"] is None
    (skipped,) = (json.loads(line) for line in (output / "skipped.jsonl").read_text().splitlines())
    assert skipped["step"] == 3 and [(clip["rank"], clip["slot"], clip["loss"]) for clip in skipped["clips"]] == [
        (1, 2, "nan")
    ]
    assert f"step 3: the gradient is not finite, no update was made (clips: {skipped['clips'][0]['path']})" in (
        ranks.printed(0)
    )
    state = DiT.from_pretrained(output / "checkpoint-4" / "model").state_dict()
    assert all(tensor.isfinite().all() for tensor in state.values())


def test_a_rank_that_hangs_is_named_and_ends_all(flags, tmp_path):
    output = tmp_path / "run"
    ranks = RankProcesses(2, tmp_path, train_with, ("hang 1 4", flags(output, 2, hang_seconds=2, hang_factor=3)))
    assert ranks.codes() == [EXIT_HANG] * 2, ranks.printed()
    assert re.search(r"step 5 hangs for \d+ s: .*rank 1 .*'waiting for data'", ranks.printed(0)), ranks.printed(0)
    assert "--resume_from_checkpoint latest" in ranks.printed(0)
    report = (output / "hang-step-5-rank-1.txt").read_text()
    assert "in make" in report and "training.py" in report  # where it hangs
    assert (output / "hang-step-5-rank-0.txt").is_file()
    assert (output / "checkpoint-3" / "SHA256SUMS").is_file()


def test_output_folders_that_are_not_shared_are_refused(flags, tmp_path):
    ranks = RankProcesses(2, tmp_path, train_apart, (str(tmp_path), flags(Path("run"), 2)))
    assert ranks.codes() == [2, 2], ranks.printed()
    assert "--output_dir run" in ranks.printed(0) and "on a disk that all machines share" in ranks.printed(0)
    assert not list(tmp_path.glob("machine-*/run/.shared-*"))


def test_any_error_of_one_rank_while_saving_is_told_and_hangs_none(flags, tmp_path):
    output = tmp_path / "run"
    ranks = run_ranks(2, tmp_path, train_with_a_fault_in_saving, flags(output, 2))
    assert "checkpoint-3 could not be written (rank 1: this rank cannot count)" in ranks.printed(0)
    assert "training goes on" in ranks.printed(0)
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-6"]
    verify(output / "checkpoint-6")


def test_ranks_with_other_flags_are_refused(flags, tmp_path):
    each = [flags(tmp_path / "run", 2, learning_rate=rate) for rate in (0.01, 0.02)]
    ranks = RankProcesses(2, tmp_path, train_each, (each,))
    assert ranks.codes() == [2, 2], ranks.printed()
    assert "rank 1 was started with --learning_rate 0.02, rank 0 with --learning_rate 0.01" in ranks.printed(0)
