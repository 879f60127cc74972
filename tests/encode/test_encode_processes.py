"""Ranks, signals and kills of osp_fast.encode."""

import json
import os
import signal
import time

import pytest
import torch
from encoding import contents, same, small, start

from osp_fast.cli import parse_train
from osp_fast.data.buckets import load_plan
from osp_fast.data.cache_shards import read_records, shards
from osp_fast.data.identity import Identities
from osp_fast.data.latent_cache import SHARDS, LatentCache
from osp_fast.encode import encode, share_of_process
from osp_fast.errors import UserError
from osp_fast.training.cached import networks_of
from osp_fast.training.precompute import Share, encode_captions, encode_clips, prepare_folder


def test_a_signal_ends_the_wait_for_a_hanging_file(assets, tmp_path):
    """And a file of which several clips are cut is tried once."""
    data = assets["data"].parent
    (data / "4.mp4").unlink()
    os.mkfifo(data / "4.mp4")
    entries = json.loads((data / "clips.json").read_text())
    (data / "clips.json").write_text(json.dumps([entries[4]]))
    process = start(assets, tmp_path / "cache", 1, {}, decode_timeout=50)
    until = time.monotonic() + 60
    while not shards(tmp_path / "cache" / SHARDS):  # the captions
        assert time.monotonic() < until and process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    time.sleep(1)
    begun = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 143 and time.monotonic() - begun < 15


def test_a_stop_during_captions_loads_no_vae(assets, tmp_path):
    config, _ = parse_train(small.flags(**assets, output=tmp_path / "none", latent_cache=tmp_path / "cache"))
    plan = load_plan(config.data, 0)
    networks, identities = networks_of(config), Identities()
    prepare_folder(tmp_path / "cache", networks, identities, 0, print)
    cache = LatentCache(tmp_path / "cache", identities)

    def never():
        raise AssertionError("nothing is to be loaded")

    for counts in (
        encode_captions(cache, plan, config, networks, Share(), never, lambda: True),
        encode_clips(cache, plan, config, Share(), never, torch.device("cpu"), lambda: True, print),
    ):
        assert counts.encoded == 0


def test_any_number_of_ranks_makes_the_same_cache(run, assets, tmp_path, monkeypatch):
    run("encode")
    one = contents(tmp_path / "cache")
    for world in (2, 3):
        folder = tmp_path / f"cache{world}"
        config, _ = parse_train(small.flags(**assets, output=tmp_path / "none", latent_cache=folder))
        for rank in range(world):
            assert encode(config, Share(rank, world)) == 0
        found = contents(folder)
        assert same(found, one)
        assert len({path.name.split("-")[1] for path in shards(folder / SHARDS)}) == world
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert share_of_process() == Share(2, 3, 3)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert share_of_process() == Share(2, 3, 1)
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(UserError, match="RANK 3 is not one of WORLD_SIZE 3"):
        share_of_process()


def test_two_processes_beside_each_other_one_killed_and_started_again(run, assets, tmp_path):
    run("encode")
    one, folder = contents(tmp_path / "cache"), tmp_path / "cache2"
    processes = [start(assets, folder, 1, {"RANK": str(rank), "WORLD_SIZE": "2"}) for rank in range(2)]
    until = time.monotonic() + 60
    while not any(name.name.endswith("r0001.safetensors") for name in shards(folder / SHARDS)):
        assert time.monotonic() < until and processes[1].poll() is None, processes[1].stderr.read()
        time.sleep(0.002)
    processes[1].send_signal(signal.SIGKILL)
    assert processes[0].communicate(timeout=60) and processes[0].returncode == 0
    processes[1].communicate()
    kept = {path.name: path.read_bytes() for path in shards(folder / SHARDS)}
    assert contents(folder).keys() < one.keys()
    with pytest.raises(UserError, match="cannot be read|is not encoded"):
        run("train", latent_cache=folder)
    said = run("encode", latent_cache=folder)  # now with one rank
    found = contents(folder)
    assert same(found, one)
    assert all((folder / SHARDS / name).read_bytes() == before for name, before in kept.items())
    encoded = sum(name.startswith("clip.") for shard in shards(folder / SHARDS) if shard.name not in kept
                  for name in read_records(shard))  # fmt: skip
    assert f"rank 0: {encoded} clips" in said and encoded < 8
    run("train", latent_cache=folder)


def test_a_signal_stops_at_a_shard(assets, tmp_path):
    process = start(assets, tmp_path / "cache", 1, {})
    until = time.monotonic() + 60
    while not shards(tmp_path / "cache" / SHARDS):
        assert time.monotonic() < until and process.poll() is None, process.stderr.read()
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143 and "SIGTERM: stopped; go on with the same command" in said
    assert not list((tmp_path / "cache" / SHARDS).glob("*.part"))
