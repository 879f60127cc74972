"""Training on ranks that share clips: the same as on one, whoever loads which clip, and ended by one for all."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))

from ranks import RankProcesses, run_ranks
from training import share_by_hand, small, train, train_counting, train_with

from osp_fast.errors import EXIT_USER_ERROR
from osp_fast.models.dit import DiT

ROOT = Path(__file__).parents[2]
CLIPS, STEPS, HALF = 4, 10, 5  # clips of a step


@pytest.fixture(scope="module")
def assets(tmp_path_factory) -> dict[str, Path]:
    """Images and videos."""
    root = tmp_path_factory.mktemp("assets")
    return dict(
        data=small.write_data(root / "data", images=4, videos=6),
        text_encoder=small.write_text_encoder(root / "text_encoder"),
    )


@pytest.fixture(scope="module")
def flags(assets):
    """Of a run of so many ranks and ranks for a clip, whose steps have `CLIPS` clips."""

    def make(output: Path, ranks: int, sp_size: int, **changed) -> list[str]:
        settings = dict(
            sp_size=sp_size,
            train_sp_batch_size=CLIPS * sp_size // ranks,
            train_batch_size=CLIPS // ranks,
            start_timeout=40,
            max_train_steps=STEPS,
            checkpointing_steps=HALF,
            # AdamW makes steps of full size out of gradients that are rounding alone, unless told what is nothing.
            adam_epsilon=1e-4,
            force_resolution=True,
            max_height=32,
            max_width=32,
            max_hxw=None,
            min_hxw=None,
        )
        return small.flags(**assets, output=output, **{**settings, **changed})

    return make


@pytest.fixture(scope="module")
def alone(flags, tmp_path_factory) -> Path:
    """The output of one rank."""
    output = tmp_path_factory.mktemp("alone") / "run"
    run_ranks(1, output.parent / "logs", train, flags(output, 1, 1))
    return output


def history(output: Path) -> list[dict]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in ("step", "epoch", "loss", "grad_norm", "samples_seen")} for line in lines]


def assert_same_run(found: Path, expected: Path, first: int = 0) -> None:
    """Equal within rounding from the step after `first` on: losses, gradient norms, weights and averages."""
    for one, other in zip(history(found), history(expected)[first:], strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    for folder in ("model", "model_ema"):
        states = [DiT.from_pretrained(run / f"checkpoint-{STEPS}" / folder).state_dict() for run in (found, expected)]
        a, b = (torch.cat([tensor.flatten() for tensor in state.values()]) for state in states)
        assert (a - b).norm() <= 1e-5 * b.norm(), folder


def tensors(checkpoint: Path) -> dict[str, bytes]:
    return {
        f"{file.relative_to(checkpoint)} {name}": tensor.numpy().tobytes()
        for file in checkpoint.rglob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def reads(folder: Path) -> list[list[str]]:
    """Of each rank, which clips it has encoded."""
    return [path.read_text().splitlines() for path in sorted(folder.glob("reads-*.txt"))]


def test_two_groups_train_as_one_rank_and_others_go_on(flags, alone, tmp_path):
    output = tmp_path / "run"
    done = run_ranks(4, tmp_path / "a", train_counting, str(tmp_path), flags(output, 4, 2))
    assert_same_run(output, alone)
    assert "4 GPUs: 2 groups of 2, each shares the tokens of its clips; images are not shared" in done.printed(0)
    each = reads(tmp_path)
    assert Counter(read for ranks in each for read in ranks) == Counter(
        f"{step} {slot}" for step in range(STEPS) for slot in range(CLIPS)
    )  # every clip once, on all ranks together
    assert {len(ranks) for ranks in each} == {STEPS}
    half = output / f"checkpoint-{HALF}"
    for ranks, sp_size in ((1, 1), (4, 4)):
        resumed = tmp_path / f"{sp_size}"
        others = flags(resumed, ranks, sp_size, resume_from_checkpoint=half)
        run_ranks(ranks, tmp_path / f"logs-{sp_size}", train, others)
        assert_same_run(resumed, alone, first=HALF)


def test_one_group_trains_as_one_rank_and_resumes_bit_for_bit(flags, alone, tmp_path):
    output, resumed = tmp_path / "run", tmp_path / "resumed"
    run_ranks(2, tmp_path / "a", train, flags(output, 2, 2, gradient_checkpointing=True))
    assert_same_run(output, alone)
    again = flags(resumed, 2, 2, gradient_checkpointing=True, resume_from_checkpoint=output / f"checkpoint-{HALF}")
    run_ranks(2, tmp_path / "b", train, again)
    assert history(resumed) == history(output)[HALF:]
    assert tensors(resumed / f"checkpoint-{STEPS}") == tensors(output / f"checkpoint-{STEPS}")


def test_mixed_batches_are_shared_whole(flags, tmp_path):
    """Images beside videos in one batch, padded: masks too are the same on all ranks. A bad clip is named once."""
    changed = dict(group_data=None, max_train_steps=3, validation_steps=2)
    changed |= dict(validation_sampling_steps=2, validation_prompt="red")
    for ranks in (1, 2):
        arguments = flags(tmp_path / f"{ranks}", ranks, ranks, **changed)
        run_ranks(ranks, tmp_path / f"logs-{ranks}", train_with, "nan 0 2", arguments)
    one, other = (history(tmp_path / f"{ranks}") for ranks in (1, 2))
    for a, b in zip(one[:2], other[:2], strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    skipped = [json.loads((tmp_path / f"{ranks}" / "skipped.jsonl").read_text()) for ranks in (1, 2)]
    assert all(each["step"] == 3 and len(each["clips"]) == 1 and each["clips"][0]["rank"] == 0 for each in skipped)
    assert all((tmp_path / f"{ranks}" / "validation" / "step-2" / "0.json").is_file() for ranks in (1, 2))


@pytest.mark.parametrize(
    "trouble, code, words",
    [
        ("fault 1 2", EXIT_USER_ERROR, "too many files are broken; the steps until now are saved in"),
        ("SIGTERM 1 2", 143, "SIGTERM: stopped after step"),
    ],
)
def test_what_ends_one_rank_of_a_group_ends_all(flags, tmp_path, trouble, code, words):
    ranks = RankProcesses(2, tmp_path, train_with, (trouble, flags(tmp_path / "run", 2, 2)))
    assert ranks.codes() == [code, code], ranks.printed()
    assert words in ranks.printed(0) and "Traceback" not in ranks.printed()


def test_a_rank_that_is_killed_ends_the_others_in_a_sentence(flags, tmp_path):
    ranks = RankProcesses(2, tmp_path, train_with, ("SIGKILL 1 2", flags(tmp_path / "run", 2, 2)))
    assert ranks.codes() == [EXIT_USER_ERROR, -9], ranks.printed()
    assert "error: rank 0 of 2 waits in vain for another rank (" in ranks.printed(0)
    assert "Traceback" not in ranks.printed(0)


def test_what_ranks_load_for_each_other_and_how_it_ends(tmp_path):
    run_ranks(2, tmp_path, share_by_hand)


def test_torchrun(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words = "--preset tiny --sp_size 2 --train_sp_batch_size 2 --max_train_steps 2 --report_to none --device cpu"
    words += " --train_batch_size 1"
    command = [*torchrun, "-m", "osp_fast.train", *words.split(), "--output_dir", str(tmp_path / "run")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "2 GPUs share the tokens of each clip" in done.stderr
    assert [line["samples_seen"] for line in history(tmp_path / "run")] == [2, 4]
