"""Batches of clips: the same for any number of workers and ranks and after a resume, with broken files replaced."""

import hashlib
import itertools
import json
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from media import FRAMES, entry, picture, shown_frames, write_broken_and_sound, write_clip
from PIL import Image

from osp_fast.config import DataConfig
from osp_fast.data.buckets import Bucket, Plan, load_plan
from osp_fast.data.dataset import ClipLoader, StepBatch
from osp_fast.data.geometry import Geometry
from osp_fast.data.rejects import RejectLog
from osp_fast.data.resize import resize_and_crop
from osp_fast.errors import UserError


def write_data(folder: Path, entries: list[dict]) -> DataConfig:
    """data.txt for the entries, and settings that make buckets 9x32x32 and 1x32x32 of them."""
    (folder / "all.json").write_text(json.dumps(entries))
    (folder / "data.txt").write_text(f"{folder},{folder / 'all.json'}\n")
    return DataConfig(
        data=str(folder / "data.txt"),
        num_frames=9,
        max_height=32,
        max_width=48,
        min_height=32,
        min_width=32,
        hw_stride=16,
        dataloader_num_workers=2,
        decode_timeout=30.0,
    )


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> tuple[Plan, DataConfig]:
    """Six videos and three images."""
    folder = tmp_path_factory.mktemp("good")
    entries = []
    for number in range(6):
        write_clip(folder / f"{number}.mp4", FRAMES + number, options={"x264-params": "keyint=9:bframes=2"})
        entries.append(entry(f"{number}.mp4", f"video number {number}", num_frames=FRAMES + number))
    for number in range(3):
        Image.fromarray(picture(number)).save(folder / f"{number}.png")
        entries.append(entry(f"{number}.png", f"image number {number}"))
    config = write_data(folder, entries)
    return load_plan(config, seed=1), config


def make_loader(plan: Plan, config: DataConfig, folder: Path, **rest) -> ClipLoader:
    rejects = RejectLog(folder / "rejects.jsonl", config.max_bad_samples)
    settings = dict(seed=1, global_batch_size=4, drop_caption=0.1, chinese=False, rejects=rejects)
    return ClipLoader(plan, config, **{**settings, **rest})


def take(loader: ClipLoader, count: int) -> list[StepBatch]:
    with loader:
        return list(itertools.islice(loader, count))


def digest(pixels: torch.Tensor) -> str:
    return hashlib.sha256(pixels.numpy().tobytes()).hexdigest()


def facts(batches: list[StepBatch]) -> list[tuple]:
    """Everything about the clips, in order."""
    return [
        (b.epoch, b.index, b.batches_in_epoch, c.slot, c.clip_index, c.path, c.bucket, c.caption, digest(c.pixels))
        for b in batches
        for c in b.clips
    ]


def test_resize():
    frames = np.stack([picture(number, 50, 70) for number in range(7)])
    geometry, bucket = Geometry((0, 70, 0, 50), 33, 46), Bucket(7, 32, 32)
    pixels = resize_and_crop(frames, geometry, bucket)
    planes = torch.from_numpy(frames).permute(0, 3, 1, 2).double()
    full = F.interpolate(planes, (33, 46), mode="bilinear", antialias=True, align_corners=True)
    expected = full[:, :, 0:32, 7:39].transpose(0, 1)  # round(0.5) = 0
    assert pixels.shape == (3, 7, 32, 32) and pixels.dtype == torch.uint8
    assert (pixels.double() - expected).abs().max() <= 0.5001
    same = resize_and_crop(frames, Geometry((0, 70, 0, 50), 50, 70), Bucket(7, 48, 64))
    assert (same.permute(1, 2, 3, 0).numpy() == frames[:, 1:49, 3:67]).all()
    assert not np.shares_memory(same.numpy(), frames)


def test_resize_in_slices(monkeypatch):
    frames = np.stack([picture(number, 50, 70) for number in range(7)])
    arguments = frames, Geometry((0, 70, 0, 50), 33, 46), Bucket(7, 32, 32)
    whole = resize_and_crop(*arguments)
    monkeypatch.setattr("osp_fast.data.resize.SLICE_BYTES", 2 * 50 * 70 * 12 + 1)
    assert (resize_and_crop(*arguments) == whole).all()


def test_clips_are_what_the_plan_says(good, tmp_path):
    plan, config = good
    for batch in take(make_loader(plan, config, tmp_path, drop_caption=0.0), 6):
        assert batch.batches_in_epoch == 3 and len(batch.clips) == 4 and batch.wait_s >= 0
        for slot, clip in enumerate(batch.clips):
            planned = plan.clips[clip.clip_index]
            assert (clip.slot, clip.path, clip.bucket) == (slot, planned.entry.path, planned.bucket)
            assert clip.pixels.shape == (3, *clip.bucket) and clip.pixels.dtype == torch.uint8
            assert clip.caption == planned.entry.captions[0]
            if not planned.entry.is_image:
                truth = resize_and_crop(
                    shown_frames(planned.entry.file), planned.geometry, Bucket(99, *clip.bucket[1:])
                )
                starts = [
                    start for start in range(truth.shape[1] - 8) if (truth[:, start : start + 9] == clip.pixels).all()
                ]
                assert len(starts) == 1


def test_epochs_hold_every_clip_and_differ(good, tmp_path):
    plan, config = good
    batches = take(make_loader(plan, config, tmp_path), 9)
    places = [(batch.epoch, batch.index) for batch in batches]
    assert places == [(epoch, index) for epoch in range(3) for index in range(3)]
    order = [[c.clip_index for b in batches if b.epoch == epoch for c in b.clips] for epoch in range(3)]
    assert all(set(clips) == set(range(9)) for clips in order) and order[0] != order[1]
    windows = {f[-1] for f in facts(batches) if f[5].endswith("0.mp4")}
    assert len(windows) > 1  # another part of the video in another epoch


@pytest.mark.parametrize("group_data", [False, True])
def test_ranks_that_share_clips_load_each_once(good, tmp_path, group_data):
    plan, config = good
    config = DataConfig(**{**config.__dict__, "group_data": group_data, "dataloader_num_workers": 1})
    whole = take(make_loader(plan, config, tmp_path), 6)
    shared = dict(world_size=4, sp_size=2)
    each = [take(make_loader(plan, config, tmp_path, rank=rank, **shared), 6) for rank in range(4)]
    for number, expected in enumerate(whole):
        batches = [ranks[number] for ranks in each]
        clips = sorted(fact for batch in batches for fact in facts([batch]))
        assert clips == sorted(facts([expected]))
        images = group_data and expected.clips[0].bucket.frames == 1
        assert [batch.ranks_per_clip for batch in batches] == [1 if images else 2] * 4
        assert [batch.slots for batch in batches] == ([[0], [1], [2], [3]] if images else [[0, 1]] * 2 + [[2, 3]] * 2)
        for rank, batch in enumerate(batches):
            assert {clip.slot for clip in batch.clips} <= set(batch.slots)
            assert {clip.rank for clip in batch.clips} == {rank} and batch.size == 4
    # Another start, another share: turns go by the place in the epoch.
    place = each[1][4].epoch, each[1][4].index
    again = make_loader(plan, config, tmp_path, rank=1, **shared, epoch=place[0], first_batch=place[1])
    assert facts(take(again, 2)) == facts(each[1][4:])


def test_a_rank_without_a_turn_gets_the_batch_all_the_same(good, tmp_path):
    plan, config = good
    sharing = dict(global_batch_size=1, world_size=2, sp_size=2)
    each = [take(make_loader(plan, config, tmp_path, rank=rank, **sharing), 8) for rank in range(2)]
    assert [[len(batch.clips) for batch in batches] for batches in each] == [[1, 0] * 4, [0, 1] * 4]
    assert [batch.slots for batches in each for batch in batches] == [[0]] * 16


@pytest.mark.parametrize("group_data", [False, True])
def test_workers_ranks_and_resume_do_not_change_contents(good, tmp_path, group_data):
    plan, config = good
    config = DataConfig(**{**config.__dict__, "group_data": group_data})
    whole = facts(take(make_loader(plan, config, tmp_path), 8))
    one = DataConfig(**{**config.__dict__, "dataloader_num_workers": 1})
    three = DataConfig(**{**config.__dict__, "dataloader_num_workers": 3})
    assert facts(take(make_loader(plan, one, tmp_path), 8)) == whole
    shares = [facts(take(make_loader(plan, three, tmp_path, rank=rank, world_size=2), 8)) for rank in range(2)]
    assert sorted(shares[0] + shares[1]) == sorted(whole) and len(shares[0]) == len(shares[1])
    epoch, index = whole[5 * 4][:2]
    assert facts(take(make_loader(plan, config, tmp_path, epoch=epoch, first_batch=index), 3)) == whole[5 * 4 :]
    if group_data:
        assert all(len({f[6] for f in whole[i : i + 4]}) == 1 for i in range(0, 32, 4))
    else:
        assert any(len({f[6] for f in whole[i : i + 4]}) > 1 for i in range(0, 32, 4))


def test_captions_are_dropped_as_often_as_asked(good, tmp_path):
    plan, config = good
    captions = [c.caption for b in take(make_loader(plan, config, tmp_path, drop_caption=0.5), 12) for c in b.clips]
    assert 10 < captions.count("") < 38


def test_iterating_twice_starts_again(good, tmp_path):
    with make_loader(*good, tmp_path) as loader:
        first = facts(list(itertools.islice(loader, 2)))
        assert facts(list(itertools.islice(loader, 2))) == first


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> tuple[Plan, DataConfig, dict[str, str]]:
    """Ten broken files among twelve good ones, and the reasons."""
    folder = tmp_path_factory.mktemp("mixed")
    entries, reasons = write_broken_and_sound(folder)
    config = write_data(folder, entries)
    config.decode_timeout = 1.0
    return load_plan(config, seed=1), config, {str(folder / name): reason for name, reason in reasons.items()}


def test_broken_files_are_replaced_and_listed(mixed, tmp_path):
    plan, config, reasons = mixed
    assert len(plan.clips) == 22
    start = time.monotonic()
    batches = take(make_loader(plan, config, tmp_path), 18)
    assert batches[-1].epoch == 2
    assert time.monotonic() - start < 20
    for batch in batches:
        for clip in batch.clips:
            assert clip.path not in reasons and clip.path == plan.clips[clip.clip_index].entry.path
            assert clip.pixels.shape == (3, *clip.bucket) and clip.caption in (
                "",
                *plan.clips[clip.clip_index].entry.captions,
            )
    log = [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert {line["path"]: line["reason"] for line in log} == reasons
    assert len(log) == 10 and all(line["file"] == line["path"] for line in log)
    buckets = {clip.entry.path: clip.bucket for clip in plan.clips}
    assert all(buckets[line["substitute"]] == buckets[line["path"]] for line in log)

    # The replacements are the same with another number of workers, and when the broken files are not known yet.
    whole = facts(batches)
    one = DataConfig(**{**config.__dict__, "dataloader_num_workers": 1})
    assert facts(take(make_loader(plan, one, tmp_path, epoch=1), 6)) == [f for f in whole if f[0] == 1]


def test_too_many_broken_files(mixed, tmp_path):
    plan, config, _ = mixed
    strict = DataConfig(**{**config.__dict__, "max_bad_samples": 2})
    with pytest.raises(UserError, match=r"\d files are broken, more than --max_bad_samples 2: .*bad_"):
        take(make_loader(plan, strict, tmp_path), 18)


def test_no_sound_clip_at_all(tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    config = write_data(tmp_path, [entry("none.mp4", "a"), entry("text.mp4", "b")])
    with pytest.raises(
        UserError,
        match=r"no clip of the data set can be decoded \(.*none\.mp4: missing, .*text\.mp4: not a video, .*\)",
    ):
        take(make_loader(load_plan(config, seed=1), config, tmp_path), 1)


def test_close_ends_a_hang_at_once(tmp_path):
    os.mkfifo(tmp_path / "hang.mp4")
    config = write_data(tmp_path, [entry("hang.mp4", "a")])
    config.decode_timeout = 60.0
    before = threading.active_count()
    loader = make_loader(load_plan(config, seed=1), config, tmp_path)
    waiter = threading.Thread(target=lambda: list(loader), daemon=True)
    waiter.start()
    time.sleep(1.0)
    children = [decoder._child.pid for crew in loader._crews for decoder in crew._decoders if decoder._child]
    assert children
    start = time.monotonic()
    loader.close()
    assert time.monotonic() - start < 3
    assert not any(os.path.exists(f"/proc/{pid}") for pid in children)
    waiter.join(5)
    assert threading.active_count() == before


def test_a_bucket_without_a_sound_clip_is_filled_from_another(tmp_path):
    entries = [entry("gone.png", "lost"), entry("gone_too.png", "lost")]
    for number in range(4):
        write_clip(tmp_path / f"{number}.mp4", FRAMES)
        entries.append(entry(f"{number}.mp4", f"video number {number}"))
    config = write_data(tmp_path, entries)
    config.group_data = True
    plan = load_plan(config, seed=1)
    assert len(plan.buckets) == 2
    batches = take(make_loader(plan, config, tmp_path), 9)
    for batch in batches:
        assert {clip.bucket for clip in batch.clips} == {Bucket(9, 32, 32)}
        assert all(clip.pixels.shape == (3, 9, 32, 32) for clip in batch.clips)
    assert {line["path"] for line in map(json.loads, (tmp_path / "rejects.jsonl").read_text().splitlines())} == {
        str(tmp_path / name) for name in ("gone.png", "gone_too.png")
    }
    again = take(make_loader(plan, config, tmp_path, epoch=batches[-1].epoch), 1)
    assert facts(again) == [fact for fact in facts(batches) if fact[0] == batches[-1].epoch and fact[1] == 0]


def test_one_wrong_annotation_does_not_condemn_the_file(tmp_path):
    write_clip(tmp_path / "0.mp4", FRAMES)
    entries = [entry("0.mp4", "right"), entry("0.mp4", "wrong", num_frames=FRAMES + 9)]
    config = write_data(tmp_path, entries)
    config.dataloader_num_workers = 1
    batches = take(make_loader(load_plan(config, seed=1), config, tmp_path), 8)
    assert {clip.caption for batch in batches for clip in batch.clips} == {"right", ""}


def test_a_stop_does_not_wait_for_a_hanging_decode(tmp_path):
    os.mkfifo(tmp_path / "hang.mp4")
    config = write_data(tmp_path, [entry("hang.mp4", "a")])
    stop = threading.Event()
    threading.Timer(1.0, stop.set).start()
    start = time.monotonic()
    assert take(make_loader(load_plan(config, seed=1), config, tmp_path, stopped=stop.is_set), 1) == []
    assert time.monotonic() - start < 6
