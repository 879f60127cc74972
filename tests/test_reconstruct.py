"""python -m osp_fast.reconstruct: what it writes, what it prints, what it refuses."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from osp_fast.assets.shapes import Scene
from osp_fast.config import EMBEDDED_MODEL
from osp_fast.data.decode import read_video
from osp_fast.data.quality import Quality
from osp_fast.data.write import write_image, write_video
from osp_fast.errors import UserError
from osp_fast.reconstruct import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """vae/, clip.mp4 of 23 frames of 70 x 66 pixels, and picture.png."""
    folder = tmp_path_factory.mktemp("reconstruct")
    shutil.copytree(EMBEDDED_MODEL / "vae", folder / "vae")
    frames = np.pad(Scene.draw(1, 0).frames(23, 64), [(0, 0), (3, 3), (1, 1), (0, 0)], mode="edge")
    write_video(folder / "clip.mp4", frames, 12, crf=1)
    write_image(folder / "picture.png", frames[0])
    return folder


def run(folder: Path, *flags: str, video: str = "clip.mp4") -> None:
    main([str(folder / video), "--ae_path", str(folder / "vae"), "--device", "cpu", *flags])


def test_a_clip(folder, capsys):
    run(folder, "--vae_memory", "7MiB", "--dtype", "fp32", "--output", str(folder / "small.mp4"))
    small = json.loads(capsys.readouterr().out)
    run(folder, "--vae_memory", "auto")
    said = capsys.readouterr()
    result = json.loads(said.out)
    assert result["frames"] == 21 and result["psnr"] > 24 and result["ssim"] > 0.8
    assert small["psnr"] == pytest.approx(result["psnr"], abs=0.01)  # other pieces, the same result
    assert "VAE encode of 21x64x64" in said.err and "left" in said.err
    written, original = read_video(folder / "clip.reconstruction.mp4"), read_video(folder / "clip.mp4")
    assert written.shape == (21, 64, 64, 3)
    expected = torch.from_numpy(original[:21, 3:67, 1:65].copy()).movedim(3, 1) / 255
    quality = Quality()
    quality.add(torch.from_numpy(written).movedim(3, 1) / 255, expected)
    assert quality.psnr == pytest.approx(result["psnr"], abs=1)  # the video's own compression


def test_bfloat16(folder, capsys):
    for dtype in ("fp32", "bf16"):
        run(folder, "--dtype", dtype, "--output", str(folder / f"{dtype}.mp4"))
    exact, rounded = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert rounded["psnr"] == pytest.approx(exact["psnr"], abs=0.1)


def test_nothing_is_overwritten_unless_asked_for(folder, capsys):
    target = folder / "kept.mp4"
    target.write_bytes(b"mine")
    with pytest.raises(UserError, match="kept.mp4 exists: add --overwrite"):
        run(folder, "--output", str(target))
    assert target.read_bytes() == b"mine"
    run(folder, "--output", str(target), "--overwrite")
    assert len(read_video(target)) == 21
    with pytest.raises(UserError, match="is the video itself"):
        run(folder, "--output", str(folder / "clip.mp4"), "--overwrite")


def test_a_picture(folder, capsys):
    run(folder, video="picture.png")
    assert json.loads(capsys.readouterr().out)["frames"] == 1
    assert (folder / "picture.reconstruction.png").exists()


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--output", "nowhere/a.mp4"], "the folder nowhere is missing"),
        (["--output", "a.gif"], "ends with .mp4"),
        (["--vae_memory", "1KiB"], "needs at least"),
        (["--vae_memory", "much"], "'much' is not an amount of memory"),
    ],
)
def test_what_cannot_be_is_refused(folder, tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    (folder / "clip.reconstruction.mp4").unlink(missing_ok=True)
    with pytest.raises(UserError, match=words):
        run(folder, *flags)
    assert not list(tmp_path.iterdir()) and not (folder / "clip.reconstruction.mp4").exists()


def test_a_broken_video_leaves_nothing(folder, capsys):
    broken = folder / "broken.mp4"
    broken.write_bytes((folder / "clip.mp4").read_bytes()[:600])
    with pytest.raises(UserError, match="broken.mp4 cannot be read as a video"):
        run(folder, video="broken.mp4")
    assert not list(folder.glob("*broken.reconstruction*"))


def test_exit_code_2_in_one_sentence(folder):
    command = [sys.executable, "-m", "osp_fast.reconstruct", "missing.mp4", "--ae_path", str(folder / "vae")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: missing.mp4 cannot be read as a video: missing")
    assert done.stderr.count("\n") == 1
