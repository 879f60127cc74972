"""The user page's flags and cases, each run as a command on generated data with the tiny model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from osp_fast.assets.shapes import generate_shapes

TRAIN = "--preset tiny --max_train_steps 1 --train_batch_size 2 --report_to none --device cpu"
SIZES = {
    "case 1, fixed size and length": (
        "--max_height 48 --max_width 64 --force_resolution --num_frames 9 --drop_short_ratio 1.0",
        {"1x48x64", "9x48x64"},
    ),
    "case 2, variable length": (
        "--drop_short_ratio 0.0 --group_data --num_frames 45",
        {"1x64x64", "33x64x64"},
    ),
    "speed": ("--num_frames 17 --speed_factor 1.25", {"1x64x64", "17x64x64"}),
}
BOUNDS = {
    "case 3, absolute resolution": (
        "--max_height 48 --max_width 48 --min_height 32 --min_width 32 --group_data --num_frames 9",
        {"1x48x48", "9x48x48"},
    ),
    "case 3, by area": (
        "--max_hxw 1024 --min_hxw 256 --hw_stride 32 --group_data --num_frames 9",
        {"1x32x32", "9x32x32"},
    ),
    "all combined": (
        "--max_hxw 2304 --min_hxw 1024 --group_data --num_frames 17 --drop_short_ratio 0.0",
        {"1x48x48", "17x48x48"},
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a small data set."""
    folder = tmp_path_factory.mktemp("seed_page")
    generate_shapes(folder / "small", clips=6, images=4)
    return folder


def run(folder: Path, module: str, flags: str, *more: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", f"osp_fast.{module}", *flags.split(), *more]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def trained(folder: Path, flags: str, output: str) -> str:
    done = run(folder, "train", f"{TRAIN} --data small/data.txt --output_dir {output} {flags}")
    assert done.returncode == 0, done.stderr
    return done.stderr


def inspected(folder: Path, flags: str) -> dict:
    done = run(folder, "inspect", f"--data small/data.txt --hw_stride 16 --json plan.json {flags}")
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "plan.json").read_text())


@pytest.mark.parametrize("case", [*SIZES, *BOUNDS])
def test_cases_of_the_page_make_their_buckets(folder, case):
    flags, buckets = {**SIZES, **BOUNDS}[case]
    if "--max" not in flags:
        flags += " --max_height 64 --max_width 64 --force_resolution"
    plan = inspected(folder, flags)
    assert {entry["bucket"] for entry in plan["kept"]} == buckets and not plan["dropped"]


@pytest.mark.parametrize("case", SIZES)
def test_cases_of_the_page_train(folder, case):
    flags, _ = SIZES[case]
    printed = trained(folder, flags, case.split(",")[0].replace(" ", "_"))
    assert "trained 1 steps" in printed


def test_weights_from_an_earlier_stage_and_resuming(folder):
    trained(folder, "", "stage_1")
    trained(folder, "--pretrained stage_1/checkpoint-1/model_ema", "stage_2")
    again = f"{TRAIN} --data small/data.txt --output_dir stage_2 --resume_from_checkpoint latest --max_train_steps 2"
    done = run(folder, "train", f"{again} --pretrained stage_1/checkpoint-1/model")
    assert done.returncode == 0, done.stderr
    assert "overrides" in done.stderr and (folder / "stage_2/checkpoint-2/model_ema/recipe.json").is_file()
    sample = "--preset tiny --num_frames 1 --height 32 --width 32 --guidance_scale 7.5 --num_sampling_steps 4"
    sample += " --sample_method EulerAncestralDiscrete"
    done = run(folder, "sample", f"{sample} --model_path stage_2 --save_img_path out --text_prompt", "a red circle")
    assert done.returncode == 0, done.stderr
    assert (folder / "out/EulerAncestralDiscrete_0_gs7.5_s4.jpg").is_file()


def test_gpus_that_are_not_there_are_missed_in_one_sentence(folder):
    done = run(folder, "train", f"{TRAIN} --data small/data.txt --sp_size 8 --train_sp_batch_size 2")
    assert done.returncode == 2 and "--sp_size 8 is more than the one GPU of the run" in done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")] == done.stderr.splitlines()
