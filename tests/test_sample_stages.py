"""What `python -m osp_fast.sample` does beside denoising: plans of memory, text networks, step caches."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from osp_fast.data.captions import clean_caption
from osp_fast.data.decode import read_video
from osp_fast.errors import UserError
from osp_fast.sample import main

sys.path.insert(0, str(Path(__file__).parent / "sampling"))
sys.path.insert(0, str(Path(__file__).parent / "models"))
from small import command_line, run, save_text_encoder, small_dit, small_flags
from small_refiner import save_refiner


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    small_dit().save_pretrained(root / "dit")
    save_text_encoder(root / "text")
    return root


@pytest.fixture
def flags(models, tmp_path):
    return small_flags(models, tmp_path / "out")


def test_a_budget_is_planned_and_kept_to(flags, capsys):
    plain = read_video(run(flags) / "DDIM_0_gs3.0_s2.mp4").astype(int)
    capsys.readouterr()
    folder = run(flags, memory_budget="100MiB")
    printed = capsys.readouterr().err
    assert re.search(
        r"memory: at most [\d.]+ MiB of 100.0 MiB on the device\n  text encoder: .*\n  denoising: ", printed
    )
    assert np.array_equal(read_video(folder / "DDIM_0_gs3.0_s2.mp4"), plain)
    with pytest.raises(UserError, match=r"--memory_budget 0.1 MiB is too little: .* needs [\d.]+ MiB"):
        run(flags, memory_budget="100KiB")
    assert not list(folder.glob("*.mp4"))


def test_a_dry_run_needs_no_model(flags, models, capsys):
    """That of the released model, on a GPU that is not here; and of folders that hold a config.json alone."""
    size = dict(num_frames=93, height=480, width=640, device=None)
    peaks = []
    for budget in (10, 24, 80):
        main(command_line(size, dry_run=True, memory_budget=f"{budget}GiB"))
        printed = capsys.readouterr().out
        found = re.search(r"at most ([\d.]+) GiB of ([\d.]+) GiB on the device", printed)
        assert float(found[1]) <= float(found[2]) == budget
        assert re.search(r"predicted: [\d.]+ s a step, [\d.]+ s a clip", printed) and "text encoder: " in printed
        peaks.append(float(found[1]))
    assert peaks[0] < peaks[1] == peaks[2]
    main(command_line(flags, dry_run=True, memory_budget="1GiB"))
    printed = capsys.readouterr().out
    assert printed.startswith(f"{models / 'dit'}, 5x16x32, 2 model calls, torch.float32: 1.00 GiB of a CPU")


def test_a_refiner_rewrites_the_prompts(flags, tmp_path, capsys):
    chat = save_refiner(tmp_path / "chat")
    folder = run(flags, text_prompt=["a red circle", "moves left"], caption_refiner=chat, refiner_max_tokens=12)
    plain = run(flags, text_prompt=["a red circle", "moves left"], save_img_path=tmp_path / "plain")
    for index, prompt in enumerate(("a red circle", "moves left")):
        facts = json.loads((folder / f"DDIM_{index}_gs3.0_s2.json").read_text())
        assert facts["prompt"] == prompt and facts["caption_refiner"] == str(chat)
        assert facts["refined_prompt"] and facts["refined_prompt"] != prompt
        assert facts["full_prompt"] == "high quality, high aesthetic, " + clean_caption(facts["refined_prompt"], False)
        assert "refined: " + facts["refined_prompt"] in capsys.readouterr().err or index
        assert (folder / f"DDIM_{index}_gs3.0_s2.mp4").read_bytes() != (
            plain / f"DDIM_{index}_gs3.0_s2.mp4"
        ).read_bytes()
    drawn = [
        json.loads(next(run(flags, caption_refiner=chat, refiner_temperature=5, seed=seed).glob("*.json")).read_text())
        for seed in (1, 1, 2)
    ]
    words = [facts["refined_prompt"] for facts in drawn]
    assert words[0] == words[1] != words[2]


def test_text_networks_in_8_bits(flags, tmp_path):
    plain, other = (
        read_video(run(flags, text_prompt=[prompt]) / "DDIM_0_gs3.0_s2.mp4").astype(int)
        for prompt in ("A red circle", "left")
    )
    folder = run(flags, text_8bit=True)
    assert json.loads((folder / "DDIM_0_gs3.0_s2.json").read_text())["text_8bit"] is True
    rounded = read_video(folder / "DDIM_0_gs3.0_s2.mp4").astype(int)
    assert 0 < np.abs(rounded - plain).mean() < np.abs(other - plain).mean() / 2


def test_the_step_cache_tells_what_it_skipped(flags):
    folder = run(flags, num_sampling_steps=6, step_cache=0.9)
    facts = json.loads((folder / "DDIM_0_gs3.0_s6.json").read_text())
    assert facts["step_cache"] == 0.9 and facts["calls"] == 6 and 0 < facts["step_cache_skipped"] < 6
