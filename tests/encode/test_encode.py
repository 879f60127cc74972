"""python -m osp_fast.encode, and training from what it makes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from encoding import contents, losses, same, small

from osp_fast.data.cache_shards import shards
from osp_fast.data.latent_cache import SHARDS, LatentCache
from osp_fast.errors import UserError
from osp_fast.models.text_encoder import TextEncoder


def test_training_from_the_cache_is_training(run, tmp_path, monkeypatch):
    """Clips of one window and one caption: nothing is drawn otherwise, so all losses are equal; resumed, too."""
    said = run("encode")
    assert "rank 0: 8 clips and 4 captions encoded, 0 and 0 were there, 0 clips broken" in said
    assert "clip 8/8: " in said and "0:00:00 left" in said
    options = dict(max_train_steps=9, log_interval=1, cfg=0.3, checkpointing_steps=5)
    run("train", "plain", latent_cache=None, **options)

    def nothing(*arguments, **options):
        raise AssertionError("neither networks nor decoders are needed")

    monkeypatch.setattr("osp_fast.models.text_encoder.TextEncoder.from_pretrained", nothing)
    monkeypatch.setattr("osp_fast.models.wfvae.WFVAE.from_pretrained", nothing)
    monkeypatch.setattr("osp_fast.data.video.Decoder._start", nothing)
    said = run("train", "cached", **options)
    assert f"latent cache {tmp_path / 'cache'}: holds all 8 clips" in said
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "plain"), rel=1e-6)
    run("train", "cached2", **{**options, "max_train_steps": 5})
    run("train", "cached2", **options, resume_from_checkpoint="latest")
    assert losses(tmp_path / "cached2") == losses(tmp_path / "cached")


def test_mixed_sizes_in_bfloat16_with_a_dropped_caption(run, tmp_path):
    options = dict(mixed_precision="bf16", group_data=False, cfg=1.0, log_interval=1)
    run("encode", **options)
    cache = LatentCache(tmp_path / "cache")
    assert {tensor.dtype for tensor in contents(cache.folder).values()} == {torch.bfloat16}
    run("train", "plain", latent_cache=None, **options)
    run("train", "cached", **options)
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "plain"), rel=1e-6)


def test_variants_are_windows_and_captions(run, assets, tmp_path):
    annotation = assets["data"].parent / "clips.json"
    entries = json.loads(annotation.read_text())
    for entry in entries:
        entry["cap"] = ["a red square", "a blue square", "a green square", "red", "blue", "green"]
    annotation.write_text(json.dumps(entries))
    options = dict(num_frames=5, cache_variants=3, max_train_steps=12)
    said = run("encode", **options)
    cache = contents(tmp_path / "cache")
    assert 8 < sum(name.startswith("clip.") for name in cache) <= 4 + 3 * 4
    assert 4 <= sum(name.startswith("text.") for name in cache) <= 7
    run("train", **options)
    said = run("encode", **options)
    assert ": 0 clips and 0 captions encoded" in said
    with pytest.raises(UserError, match=r"of 80 clips cannot be read, the first of them .*: run python -m osp_fast.e"):
        run("train", "other", **{**options, "cache_variants": 10})


def test_a_broken_video_is_left_out_as_in_training(run, assets, tmp_path):
    video = assets["data"].parent / "5.mp4"
    video.write_bytes(video.read_bytes()[:200])
    said = run("encode")
    assert "1 broken" in said and "7 clips and 4 captions encoded" in said and said.rstrip().endswith("1 clips broken")
    (line,) = (tmp_path / "cache" / "rejects-r0000.jsonl").read_text().splitlines()
    assert json.loads(line)["path"].endswith("/5.mp4")
    run("train", "cached", max_train_steps=8, log_interval=1)
    rejected = [json.loads(line) for line in (tmp_path / "cached/rejects.jsonl").read_text().splitlines()]
    assert [Path(one["path"]).name for one in rejected] == ["5.mp4"] and rejected[0]["substitute"]
    run("train", "plain", latent_cache=None, max_train_steps=8, log_interval=1)
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "plain"), rel=1e-6)
    with pytest.raises(UserError, match="more than --max_bad_samples 0"):
        run("encode", max_bad_samples=0)


def test_what_is_neither_file_nor_missing_is_broken_once(run, assets, tmp_path):
    """A folder in a video's place: it has a size and a time, but no contents."""
    (assets["data"].parent / "5.mp4").unlink()
    (assets["data"].parent / "5.mp4").mkdir()
    run("encode")
    kept = len(shards(tmp_path / "cache" / SHARDS))
    run("train")
    assert "7 and 4 were there, 1 clips broken" in run("encode")  # tried again, and nothing new to tell
    assert len(shards(tmp_path / "cache" / SHARDS)) == kept


def test_two_roots_with_equal_names_sizes_and_times(run, assets, tmp_path):
    data, other = assets["data"].parent, tmp_path / "other"
    shutil.copytree(data, other)
    first, second = sorted(path.name for path in data.glob("*.png"))[:2]
    shutil.copy(data / second, other / first)
    length = 8 + max((folder / first).stat().st_size for folder in (data, other))
    for folder in (data, other):
        file = folder / first
        file.write_bytes(file.read_bytes().ljust(length, b"\0"))  # behind the picture's end
        os.utime(file, ns=(7, 7))
    entries = [one for one in json.loads((data / "clips.json").read_text()) if one["path"] == first]
    (data / "clips.json").write_text(json.dumps(entries))
    assets["data"].write_text(f"{data},{data / 'clips.json'}\n{other},{data / 'clips.json'}\n")
    run("encode")
    clips = [tensor for name, tensor in contents(tmp_path / "cache").items() if name.startswith("clip.")]
    assert len(clips) == 2 and not torch.allclose(*clips)
    run("train", max_train_steps=1)
    assert ": 0 clips and 0 captions encoded, 2 and" in run("encode")


def test_a_small_memory_makes_small_batches(run, tmp_path):
    run("encode")
    run("encode", latent_cache=tmp_path / "small", vae_memory="3MiB")
    assert same(contents(tmp_path / "small"), contents(tmp_path / "cache"))
    with pytest.raises(UserError, match="VAE encode of .* needs at least"):
        run("encode", latent_cache=tmp_path / "none", vae_memory="1MiB")


def test_what_was_encoded_before_an_error_is_kept(run, tmp_path, monkeypatch):
    monkeypatch.setattr("osp_fast.training.precompute.CAPTIONS_AT_ONCE", 1)
    forward, calls = TextEncoder.forward, []

    def full(encoder, texts):
        calls.append(texts)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(encoder, texts)

    monkeypatch.setattr(TextEncoder, "forward", full)
    with pytest.raises(UserError, match="encoding captions does not fit into the memory of cpu"):
        run("encode")
    assert len(contents(tmp_path / "cache")) == 2
    assert "2 captions encoded, 0 and 2 were there" in run("encode")


def test_a_line_that_is_repeated_is_encoded_once(run, assets, tmp_path):
    annotation = assets["data"].parent / "clips.json"
    entries = json.loads(annotation.read_text())
    annotation.write_text(json.dumps(entries + entries))
    assert "rank 0: 8 clips and 4 captions encoded" in run("encode")
    run("train")


def test_as_a_program_bad_input_is_one_sentence(assets, tmp_path):
    command = [sys.executable, "-m", "osp_fast.encode", *small.flags(**assets, output=tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: --latent_cache is missing: name the folder that latents and text states go to\n"
