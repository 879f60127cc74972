"""The demo from beginning to end, with a few steps, and what it refuses."""

import subprocess
import sys
from pathlib import Path

import pytest

from osp_fast.assets.shapes import HELD_OUT, MOTIONS, captions
from osp_fast.data.decode import read_video
from osp_fast.demo import PROMPTS, main
from osp_fast.errors import UserError


def test_the_demo_samples_trains_resumes_and_samples_again(tmp_path):
    out = tmp_path / "demo"
    (out / "tiny/run/checkpoint-9").mkdir(parents=True)  # of an earlier demo
    (out / ".osp_fast_demo").touch()
    command = [sys.executable, "-m", "osp_fast.demo", "--out", str(out), "--steps", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    videos = [Path(line) for line in done.stdout.splitlines() if line.endswith(".mp4")]
    assert len(videos) == 2 * len(PROMPTS) and all(read_video(video).shape == (17, 64, 64, 3) for video in videos)
    assert (out / "before/contact_sheet.png").is_file() and (out / "after/contact_sheet.png").is_file()
    assert "going on from tiny/run/checkpoint-1" in done.stderr


def test_its_prompts_are_held_out():
    held_out = {captions(kind)[0]: kind for kind in HELD_OUT}
    assert {held_out[prompt].motion for prompt in PROMPTS} == set(MOTIONS)


def test_it_touches_no_folder_of_others(tmp_path):
    (tmp_path / "mine").write_text("a file")
    with pytest.raises(UserError, match="not the demo's"):
        main(["--out", str(tmp_path)])
    with pytest.raises(UserError, match="cannot be used"):
        main(["--out", str(tmp_path / "mine")])
    with pytest.raises(UserError, match="at least 2"):
        main(["--out", str(tmp_path / "new"), "--steps", "1"])
