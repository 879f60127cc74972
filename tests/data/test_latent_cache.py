"""Identities of files, shards, and what a cache says of clips that it does not hold."""

import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import safetensors
import torch
from hypothesis import given
from hypothesis import strategies as st

from osp_fast.config import DataConfig
from osp_fast.data import cache_shards
from osp_fast.data.annotations import Entry
from osp_fast.data.buckets import Bucket, Clip, Plan
from osp_fast.data.cache_shards import ShardReader, ShardWriter, locked, read_records, shards
from osp_fast.data.clip_request import DecodeError
from osp_fast.data.geometry import Geometry
from osp_fast.data.identity import MISSING, Identities
from osp_fast.data.latent_cache import (
    SHARDS,
    LatentCache,
    Missing,
    caption_key,
    clip_key,
    clip_record,
    padded_states,
    text_record,
    variant_caption,
    variant_frames,
    windows,
)
from osp_fast.errors import UserError


def entry_of(file, path="a.mp4", frames=40, captions=("a red square",)):
    return Entry(f"root/{path}", str(file), tuple(captions), 48, 64, frames, 24.0, None, None, None, False, "root")


def clip_of(file, **options):
    entry = entry_of(file, **options)
    return Clip(entry, Bucket(9, 32, 48), Geometry((0, 64, 0, 48), 36, 48))


def test_a_file_is_itself_as_long_as_its_contents_are(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"one")
    identity = Identities().of(file)
    assert identity.size == 3 and Identities().is_still(identity, file)
    os.utime(file, ns=(1, 1))  # a copy with a new time
    assert Identities().is_still(identity, file)
    file.write_bytes(b"two")
    assert not Identities().is_still(identity, file)
    file.write_bytes(b"longer")
    assert not Identities().is_still(identity, file)
    file.unlink()
    assert not Identities().is_still(identity, file)
    assert Identities().of(file) == MISSING and Identities().is_still(MISSING, file)
    os.mkfifo(file)  # reading it would never end
    assert Identities().of(file) == MISSING


def test_contents_are_read_only_where_the_time_is_new(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_bytes(b"one")
    identities, read = Identities(), []
    hashed = "osp_fast.data.identity._sha256"
    monkeypatch.setattr(hashed, lambda path: read.append(path) or "hash")
    identity = identities.of(file)
    assert identities.is_still(identity, file) and len(read) == 1
    os.utime(file, ns=(1, 1))
    assert identities.is_still(identity, file) and identities.is_still(identity, file) and len(read) == 2


@given(
    st.lists(
        st.tuples(st.sampled_from([torch.bfloat16, torch.float32]), st.lists(st.integers(0, 3), max_size=3)),
        min_size=1,
        max_size=5,
    )
)
def test_shards_hold_what_was_added(tmp_path_factory, items):
    folder = tmp_path_factory.mktemp("shards")
    generator = torch.Generator().manual_seed(0)
    tensors = {f"{n}": torch.randn(shape, generator=generator).to(dtype) for n, (dtype, shape) in enumerate(items)}
    writer = ShardWriter(folder, 3)
    for name, tensor in tensors.items():
        writer.add(name, tensor, {"number": name, "text": "ü\n"})
    writer.add("nothing", None, {"number": "none"})
    writer.flush()
    writer.flush()
    (shard,) = shards(folder)
    assert shard.name == "000000-r0003.safetensors" and shard.stat().st_mode & 0o444 == 0o444
    records = read_records(shard)
    assert {name: record["number"] for name, record in records.items()} == {
        **{name: name for name in tensors},
        "nothing": "none",
    }
    reader = ShardReader()
    for name, tensor in tensors.items():
        found = reader.tensor(shard, name)
        assert found.dtype == tensor.dtype and torch.equal(found, tensor)


def write_shard(folder: Path, values: list[float]) -> Path:
    folder.mkdir(exist_ok=True)
    writer = ShardWriter(folder, 0)
    for number, value in enumerate(values):
        writer.add(str(number), torch.tensor([value]), {})
    writer.flush()
    return shards(folder)[-1]


def test_a_header_is_parsed_once_for_all_items_and_threads(tmp_path, monkeypatch):
    opened = []
    plain = safetensors.safe_open
    monkeypatch.setattr(safetensors, "safe_open", lambda path, **options: opened.append(path) or plain(path, **options))
    files = [write_shard(tmp_path, [10.0 * shard + item for item in range(8)]) for shard in range(3)]
    reader = ShardReader()
    places = [(shard, item) for shard in range(3) for item in range(8)] * 4
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda place: reader.tensor(files[place[0]], str(place[1])).item(), places))
    assert found == [10.0 * shard + item for shard, item in places]
    assert sorted(opened) == files

    monkeypatch.setattr(cache_shards, "MAPPED_SHARDS", 2)
    opened.clear()
    reader = ShardReader()
    for shard in (0, 1, 2, 2, 1, 0):
        reader.tensor(files[shard], "0")
    assert opened == [*files, files[0]]


def test_a_file_that_changes_while_it_is_mapped(tmp_path):
    shard = write_shard(tmp_path / "a", [1.0, 2.0])
    reader = ShardReader()
    assert reader.tensor(shard, "1") == 2
    other = write_shard(tmp_path / "b", [3.0, 4.0, 5.0])
    shard.write_bytes(other.read_bytes())
    assert reader.tensor(shard, "1") == 4
    shard.write_bytes(other.read_bytes()[:40])
    with pytest.raises(UserError, match=f"{shard.name}: 1 cannot be read .*osp_fast.encode"):
        reader.tensor(shard, "1")
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name}: 1 cannot be read .*No such file"):
        reader.tensor(shard, "1")


@pytest.mark.parametrize("limit", ["SHARD_BYTES", "SHARD_ITEMS", "SHARD_SECONDS"])
def test_a_shard_is_written_when_it_is_time(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(cache_shards, limit, {"SHARD_BYTES": 32, "SHARD_ITEMS": 2, "SHARD_SECONDS": 0.0}[limit])
    writer = ShardWriter(tmp_path, 0)
    for number in range(4):
        writer.add(str(number), torch.zeros(4), {})
    assert len(shards(tmp_path)) == (4 if limit == "SHARD_SECONDS" else 2)
    assert len(shards(tmp_path)) == len(list(tmp_path.iterdir()))
    again = ShardWriter(tmp_path, 0)
    again.add("more", torch.zeros(1), {})
    again.flush()
    assert sorted(read_records(shards(tmp_path)[-1])) == ["more"]


def test_what_a_kill_left_is_removed_by_its_own_rank(tmp_path):
    for rank in (0, 1):
        (tmp_path / f".000000-r000{rank}.safetensors.part").write_bytes(b"half")
    ShardWriter(tmp_path, 0)
    assert [path.name for path in tmp_path.iterdir()] == [".000000-r0001.safetensors.part"]


def test_a_full_disk_loses_nothing_that_is_written(tmp_path, monkeypatch):
    writer = ShardWriter(tmp_path, 0)
    writer.add("a", torch.zeros(4), {})
    writer.flush()

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_shards.os, "replace", full)
    writer.add("b", torch.zeros(4), {})
    with pytest.raises(UserError, match=r"000001-r0000.safetensors cannot be written .*No space left.*make room"):
        writer.flush()
    assert [path.name for path in tmp_path.iterdir()] == ["000000-r0000.safetensors"]


def test_a_truncated_shard_is_named(tmp_path):
    (tmp_path / SHARDS).mkdir()
    writer = ShardWriter(tmp_path / SHARDS, 0)
    writer.add("a", torch.zeros(400), {})
    writer.flush()
    (shard,) = shards(tmp_path / SHARDS)
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"000000-r0000.safetensors is not a complete shard .*delete it"):
        LatentCache(tmp_path)


def test_a_record_that_is_none(tmp_path):
    (tmp_path / SHARDS).mkdir()
    writer = ShardWriter(tmp_path / SHARDS, 0)
    writer.add("a", torch.zeros(4), {"kind": "clip"})
    writer.flush()
    with pytest.raises(UserError, match="the record of a is broken"):
        LatentCache(tmp_path)


def test_a_second_writer_is_refused(tmp_path):
    with locked(tmp_path, 0):
        with locked(tmp_path, 1):
            pass
        with pytest.raises(UserError, match="another osp_fast.encode writes there"), locked(tmp_path, 0):
            pass
    with locked(tmp_path, 0):
        pass


@pytest.fixture
def stored(tmp_path):
    """A file, its clip, and a cache with its moments and caption."""
    file = tmp_path / "a.mp4"
    file.write_bytes(b"video")
    clip, identities = clip_of(file), Identities()
    indices = variant_frames(clip, 0, DataConfig(num_frames=9))
    key = clip_key(clip, indices)
    moments = torch.randn(16, 3, 4, 6, generator=torch.Generator().manual_seed(0)).bfloat16()
    folder = tmp_path / "cache"
    (folder / SHARDS).mkdir(parents=True)
    writer = ShardWriter(folder / SHARDS, 0)
    writer.add(f"clip.{key}", moments, clip_record(clip, key, indices, identities.of(file)))
    writer.add("text", torch.ones(3, 5), text_record("a red square"))
    writer.flush()
    return folder, clip, indices, moments


def test_a_clip_is_read_back_by_many_threads(stored):
    folder, clip, indices, moments = stored
    cache, found = LatentCache(folder), []
    threads = [threading.Thread(target=lambda: found.append(cache.moments(clip, indices))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and all(torch.equal(one, moments) for one in found)
    assert cache.text("a red square").shape == (3, 5) and not cache.holds_text("")
    with pytest.raises(Missing, match="the caption 'a blue square' is not encoded"):
        cache.text("a blue square")


def test_what_changed_is_never_read(stored):
    folder, clip, indices, _ = stored
    cache = LatentCache(folder)
    with pytest.raises(Missing, match="with other frames, another crop or another size"):
        cache.find(clip, [n + 1 for n in indices])
    cropped = Clip(clip.entry, clip.bucket, Geometry((1, 64, 0, 48), 36, 48))
    with pytest.raises(Missing, match="another crop"):
        cache.find(cropped, indices)
    smaller = Clip(clip.entry, Bucket(9, 32, 32), clip.geometry)
    with pytest.raises(Missing, match="another size"):
        cache.find(smaller, indices)
    with pytest.raises(Missing, match="it is not encoded"):
        cache.find(clip_of(clip.entry.file, path="b.mp4"), indices)
    with open(clip.entry.file, "wb") as file:
        file.write(b"other")
    with pytest.raises(Missing, match=r"a\.mp4 has changed since it was encoded"):
        cache.find(clip, indices)


def test_two_files_of_one_name_have_their_own_items(stored, tmp_path):
    """As two DATA_ROOTs may have; and a clip that was broken and is encoded later."""
    folder, clip, indices, moments = stored
    other_file = tmp_path / "other.mp4"
    other_file.write_bytes(b"another video")
    other, key = clip_of(other_file), clip_key(clip, indices)
    assert clip_key(other, indices) == key
    writer = ShardWriter(folder / SHARDS, 0)
    record = clip_record(other, key, indices, Identities().of(other_file))
    writer.add(f"clip.{key}", None, record | {"reject": "no video stream", "whole_file": False})
    writer.flush()
    cache = LatentCache(folder)
    assert torch.equal(cache.moments(clip, indices), moments)
    with pytest.raises(DecodeError, match="no video stream") as error:
        cache.moments(other, indices)
    assert not error.value.whole_file
    writer.add(f"clip.{key}", -moments, record)
    writer.flush()
    assert torch.equal(LatentCache(folder).moments(other, indices), -moments)


def test_variants_are_the_entrys_own():
    config = DataConfig(num_frames=9, cache_variants=4)
    clip = clip_of("a.mp4", captions=["a square", "a red square", "red"])
    assert variant_frames(clip, 2, config) == variant_frames(clip, 2, config)
    drawn = {tuple(variant_frames(clip, variant, config)) for variant in range(4)}
    assert len(drawn) > 1 and all(len(frames) == 9 for frames in drawn)
    assert len({variant_caption(clip.entry, variant, False) for variant in range(8)}) == 3
    short = clip_of("b.mp4", path="b.mp4", frames=9)
    plan = Plan([clip, short], buckets={clip.bucket: [0, 1]})
    found = list(windows(plan, config))
    assert [one.entry.path for one, *_ in found] == ["root/a.mp4"] * len(drawn) + ["root/b.mp4"]
    assert len({key for *_, key in found}) == len(found)


def test_states_are_padded_with_zeros():
    states, mask = padded_states([torch.ones(2, 3), torch.ones(4, 3)], 4)
    assert states.sum((1, 2)).tolist() == [6, 12] and mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert json.dumps(text_record("a")) and caption_key("a") != caption_key("b")
