"""`python -m osp_fast.assets.build` on a small scale, and the embedded model that it made on the full one."""

import json
import re
from pathlib import Path

import pytest

from osp_fast.assets import build
from osp_fast.assets.shapes import HELD_OUT
from osp_fast.assets.vae_training import reconstruction_quality
from osp_fast.config import EMBEDDED_MODEL
from osp_fast.errors import UserError
from osp_fast.models.dit import DIT_CONFIGS
from osp_fast.models.weights import read_recipe
from osp_fast.models.wfvae import WFVAE
from osp_fast.pipeline import ModelFolders, VideoPipeline

SMALL = "--clips 4 --images 2 --text_steps 1 --vae_steps 2 --dit_steps 2"


def test_a_small_build_is_complete_and_goes_on(tmp_path, capfd, monkeypatch):
    arguments = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "made"), *SMALL.split()]
    monkeypatch.setattr(build, "HELD_OUT", HELD_OUT[:2])
    build.main(arguments)
    said = capfd.readouterr().err
    assert "VAE step 2/2" in said and "trained 2 steps" in said
    card = json.loads((tmp_path / "made" / build.CARD).read_text())
    assert card["sizes"] == dict(clips=4, images=2, text_steps=1, vae_steps=2, dit_steps=2)
    assert set(card["seconds"]) == {"data", "text encoder", "vae", "latents", "dit"}
    folders = ModelFolders(*(tmp_path / "made" / part for part in ("dit", "vae", "text_encoder")))
    pipeline = VideoPipeline.from_folders(folders, read_recipe(folders.dit))
    size = dict(num_frames=5, height=32, width=32)
    (clip,) = pipeline.generate(["a red circle"], seed=0, steps=2, guidance_scale=1.0, method="DDIM", **size)
    assert clip.frames.shape == (5, 32, 32, 3)

    commands = []
    monkeypatch.setattr(build, "_type", lambda module, words, folder: commands.append((module, words)))
    build.main(arguments)
    said = capfd.readouterr().err
    assert "VAE step" not in said and "work/vae is there" in said and "work/text_encoder is there" in said
    (encode, _), (train, words) = commands
    assert (encode, train) == ("osp_fast.encode", "osp_fast.train") and "--resume_from_checkpoint latest" in " ".join(
        words
    )


def test_mistakes_end_in_one_sentence(tmp_path):
    with pytest.raises(UserError, match="--vae_steps 0 is too few"):
        build.main(["--work", str(tmp_path / "work"), "--vae_steps", "0"])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        build.main(["--work", str(tmp_path / "file")])


def test_the_embedded_model_is_what_its_card_says(tmp_path):
    card = json.loads((EMBEDDED_MODEL / build.CARD).read_text())
    for part, size in card["bytes"].items():
        files = [file for file in (EMBEDDED_MODEL / part).rglob("*") if file.is_file()]
        assert sum(file.stat().st_size for file in files) == size
    assert set(card["bytes"]) == {"dit", "vae", "text_encoder"} and sum(card["bytes"].values()) <= build.LARGEST
    vae = WFVAE.from_pretrained(EMBEDDED_MODEL / "vae").requires_grad_(False)
    quality = reconstruction_quality(vae, build.held_out_clips(tmp_path))
    assert quality.psnr == pytest.approx(card["vae_psnr"], abs=0.05) and quality.psnr >= 30
    modes = {DIT_CONFIGS["tiny"].attention_mode(block) for block in range(DIT_CONFIGS["tiny"].num_layers)}
    assert modes == {"full", "single", "group"}
    recipe = read_recipe(EMBEDDED_MODEL / "dit")
    assert recipe.prediction_type == "v_prediction" and recipe.rescale_betas_zero_snr and not recipe.rectified_flow
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (megabytes, decibels) = re.search(r"([\d.]+) MB in all.*?([\d.]+) dB", readme, re.DOTALL).groups()
    assert float(megabytes) == pytest.approx(sum(card["bytes"].values()) / 1e6, abs=0.05)
    assert float(decibels) == pytest.approx(card["vae_psnr"], abs=0.05)
