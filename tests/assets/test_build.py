"""`python -m osp_fast.assets.build` on a small scale, and the embedded model that it made on the full one."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bench.shape_checker import read_kind

from osp_fast.assets.build import CARD, LARGEST, held_out_clips, main
from osp_fast.assets.shapes import HELD_OUT, captions
from osp_fast.assets.vae_training import reconstruction_quality
from osp_fast.config import EMBEDDED_MODEL
from osp_fast.errors import UserError
from osp_fast.models.dit import DIT_CONFIGS
from osp_fast.models.weights import read_recipe
from osp_fast.models.wfvae import WFVAE
from osp_fast.pipeline import ModelFolders, VideoPipeline

SMALL = "--clips 4 --images 2 --text_steps 1 --vae_steps 2 --dit_steps 2"


def test_a_small_build_is_complete_and_goes_on(tmp_path):
    command = [sys.executable, "-m", "osp_fast.assets.build", "--work", "work", "--out", "made", *SMALL.split()]
    first, again = (subprocess.run(command, cwd=tmp_path, capture_output=True, text=True) for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert again.returncode == 0, again.stderr
    assert "VAE step" in first.stderr and "VAE step" not in again.stderr
    assert "work/vae is there" in again.stderr and "is already at step 2 of 2" in again.stderr
    card = json.loads((tmp_path / "made" / CARD).read_text())
    assert card["sizes"] == dict(clips=4, images=2, text_steps=1, vae_steps=2, dit_steps=2)
    assert set(card["seconds"]) == {"data", "text encoder", "vae", "latents", "dit"}
    folders = ModelFolders(*(tmp_path / "made" / part for part in ("dit", "vae", "text_encoder")))
    pipeline = VideoPipeline.from_folders(folders, read_recipe(folders.dit))
    (clip,) = pipeline.generate(["a red circle"], seed=0, num_frames=5, height=32, width=32, steps=1)
    assert clip.frames.shape == (5, 32, 32, 3)


def test_mistakes_end_in_one_sentence(tmp_path):
    with pytest.raises(UserError, match="--vae_steps 0 is too few"):
        main(["--work", str(tmp_path / "work"), "--vae_steps", "0"])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        main(["--work", str(tmp_path / "file")])


def test_the_embedded_model_is_what_its_card_says(tmp_path):
    card = json.loads((EMBEDDED_MODEL / CARD).read_text())
    for part, size in card["bytes"].items():
        files = [file for file in (EMBEDDED_MODEL / part).rglob("*") if file.is_file()]
        assert sum(file.stat().st_size for file in files) == size
    assert set(card["bytes"]) == {"dit", "vae", "text_encoder"} and sum(card["bytes"].values()) <= LARGEST
    vae = WFVAE.from_pretrained(EMBEDDED_MODEL / "vae").requires_grad_(False)
    quality = reconstruction_quality(vae, held_out_clips(tmp_path))
    assert quality.psnr == pytest.approx(card["vae_psnr"], abs=0.05) and quality.psnr >= 30
    modes = {DIT_CONFIGS["tiny"].attention_mode(block) for block in range(DIT_CONFIGS["tiny"].num_layers)}
    assert modes == {"full", "single", "group"}
    recipe = read_recipe(EMBEDDED_MODEL / "dit")
    assert recipe.prediction_type == "v_prediction" and recipe.rescale_betas_zero_snr and not recipe.rectified_flow
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (megabytes, decibels) = re.search(r"([\d.]+) MB in all.*?([\d.]+) dB", readme, re.DOTALL).groups()
    assert float(megabytes) == pytest.approx(sum(card["bytes"].values()) / 1e6, abs=0.05)
    assert float(decibels) == pytest.approx(card["vae_psnr"], abs=0.05)


def test_the_embedded_model_shows_what_it_is_asked_for():
    """Four of the combinations that it was not trained on, one of each direction; `bench run prompts` counts more."""
    folders = ModelFolders(*(EMBEDDED_MODEL / part for part in ("dit", "vae", "text_encoder")))
    pipeline = VideoPipeline.from_folders(folders, read_recipe(folders.dit))
    kinds = HELD_OUT[5:9]
    clips = pipeline.generate(
        [captions(kind)[0] for kind in kinds],
        seed=0,
        num_frames=17,
        height=64,
        width=64,
        steps=10,
        guidance_scale=5.0,
        negative_prompt="",
        method="DPMSolverMultistep",
        max_sequence_length=16,
    )
    with torch.no_grad():
        readings = [read_kind(clip.frames) for clip in clips]
    right = [
        [found == asked for found, asked in zip(read, kind, strict=True)]
        for read, kind in zip(readings, kinds, strict=True)
    ]
    assert sum(map(sum, right)) >= 15, list(zip(readings, kinds, strict=True))
