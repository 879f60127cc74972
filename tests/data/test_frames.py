"""Frame selection: the counts and indices of the spec, and that plan and loader never disagree."""

import dataclasses
import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from osp_fast.config import DataConfig
from osp_fast.data.annotations import Dropped, Entry
from osp_fast.data.frames import clip_length, frame_indices, grid_length, usable_frames


def video(num_frames, fps=24.0, cut=None):
    return Entry("a.mp4", "a.mp4", ("x",), 480, 640, num_frames, fps, None, None, cut, False)


def never():
    raise AssertionError("the coin was tossed")


@pytest.mark.parametrize(
    ("entry", "train_fps", "expected"),
    [
        (video(100), 24, 100),
        (video(100, 24.09), 24, 100),  # closer than 0.1: every frame
        (video(100, 24.1), 24, 100),  # 99.585 frames
        (video(100, 30), 24, 80),
        (video(101, 30), 24, 81),
        (video(240, 60), 24, 96),
        (video(100, 29.97), 24, 81),
        (video(100, 16), 24, 150),
        (video(100, 25), 24, 96),
        (video(100, 24, (10, 60)), 24, 50),
        (video(100, 24, (10, 500)), 24, 100),
        (video(100, 60, (0, 50)), 24, 20),
        (video(100, 23.976), 29.97, 125),
    ],
)
def test_grid_length(entry, train_fps, expected):
    assert grid_length(entry, DataConfig(train_fps=train_fps)) == expected


def test_every_second_frame_of_a_faster_source():
    config = DataConfig(num_frames=29, drop_short_ratio=0)
    assert frame_indices(video(57, 48), 29, config, random.Random(0)) == list(range(0, 57, 2))


def test_a_slower_source_repeats_frames():
    config = DataConfig(num_frames=5)
    assert frame_indices(video(3, 12.0), 5, config, random.Random(0)) in ([0, 0, 1, 1, 2], [0, 1, 1, 2, 2])


def test_frames_start_at_the_cut():
    config = DataConfig(num_frames=93, drop_short_ratio=0)
    assert frame_indices(video(100, 24, (40, 71)), 29, config, random.Random(0)) == list(range(40, 69))


def test_an_image_is_frame_0():
    image = dataclasses.replace(video(1), is_image=True)
    assert frame_indices(image, 1, DataConfig(), random.Random(0)) == [0]
    assert clip_length(image, DataConfig(sp_frame_multiple=4), never) == 1


@pytest.mark.parametrize(
    ("available", "multiple", "expected"),
    [(93, 1, 93), (200, 1, 93), (92, 1, 89), (32, 1, 29), (29, 1, 29), (93, 4, 93), (93, 8, 93), (93, 5, 77)],
)
def test_clip_length(available, multiple, expected):
    config = DataConfig(drop_short_ratio=0, sp_frame_multiple=multiple)
    assert clip_length(video(available), config, never if available >= 93 else lambda: 0.5) == expected


@pytest.mark.parametrize(
    ("entry", "changes", "reason"),
    [
        (video(466), {}, "too many frames"),
        (video(1163, 60), {}, "too many frames"),  # 5 * 93 * 60 / 24 = 1162.5
        (video(466, 24, (0, 93)), {}, "too many frames"),  # of the file, whatever its cut
        (video(92), {"drop_short_ratio": 1.0}, "shorter than num_frames"),
        (video(92), {"drop_short_ratio": 0.51}, "shorter than num_frames"),
        (video(28), {"drop_short_ratio": 0.0}, "too few frames"),
        (video(16), {"drop_short_ratio": 0.0, "num_frames": 17}, "too few frames"),
        (video(35), {"drop_short_ratio": 0.0, "sp_frame_multiple": 16}, "too few frames"),
    ],
)
def test_drops(entry, changes, reason):
    with pytest.raises(Dropped) as caught:
        clip_length(entry, DataConfig(**changes), lambda: 0.5)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("entry", "changes", "expected"),
    [
        (video(465), {}, 93),
        (video(1162, 60), {}, 93),
        (video(581), {"speed_factor": 1.25}, 93),  # 5 * 93 * 1.25 = 581.25
        (video(92), {"drop_short_ratio": 0.5}, 89),
        (video(17), {"num_frames": 17}, 17),
        (video(5), {"num_frames": 1}, 1),
    ],
)
def test_kept(entry, changes, expected):
    assert clip_length(entry, DataConfig(**changes), lambda: 0.5) == expected


def test_a_long_clip_is_windowed_at_random_over_all_of_it():
    config = DataConfig(num_frames=29)
    windows = [frame_indices(video(40), 29, config, random.Random(seed)) for seed in range(400)]
    assert all(window == list(range(window[0], window[0] + 29)) for window in windows)
    assert {window[0] for window in windows} == set(range(12))  # starts 0 .. 40 - 29


def steps_of(window):
    return {after - before for before, after in itertools.pairwise(window)}


def test_speed_factor_plays_long_clips_faster_by_up_to_f():
    config = DataConfig(num_frames=29, speed_factor=2.0)
    spans = [
        window[-1] - window[0]
        for window in (frame_indices(video(120), 29, config, random.Random(seed)) for seed in range(400))
    ]
    assert 28 <= min(spans) <= 29  # about the plain window
    assert 55 <= max(spans) <= 56  # 28 steps of at most 2 frames
    assert 40 < sum(spans) / len(spans) < 44  # uniform: 42 on average


def test_speed_is_limited_by_the_length_of_the_clip():
    config = DataConfig(num_frames=29, speed_factor=10.0)
    for seed in range(200):
        window = frame_indices(video(40), 29, config, random.Random(seed))
        assert steps_of(window) <= {1, 2}
        assert window[-1] <= 39


def test_speed_factor_leaves_short_clips_alone():
    config = DataConfig(num_frames=29, speed_factor=2.0)
    assert frame_indices(video(29), 29, config, random.Random(3)) == list(range(29))


def test_two_numbers_are_drawn_in_all_cases():
    config = DataConfig(num_frames=29, speed_factor=2.0, drop_short_ratio=0)
    expected = random.Random(5)
    expected.random(), expected.random()
    image = dataclasses.replace(video(1), is_image=True)
    for entry, length in ((video(29), 29), (video(100), 29), (image, 1)):
        draw = random.Random(5)
        frame_indices(entry, length, config, draw)
        assert draw.getstate() == expected.getstate()


def test_a_bucket_longer_than_the_clip_is_a_mistake():
    with pytest.raises(ValueError, match=r"a\.mp4 has 50 frames at 24"):
        frame_indices(video(50), 93, DataConfig(), random.Random(0))


@st.composite
def videos_and_configs(draw):
    num_frames = draw(st.integers(1, 2000))
    rates = st.one_of(st.sampled_from([16.0, 23.976, 24.0, 25.0, 29.97, 30.0, 60.0]), st.floats(0.5, 240.0))
    cut = None
    if draw(st.booleans()):
        begin = draw(st.integers(0, 500))
        cut = (begin, begin + draw(st.integers(1, 3000)))
    config = DataConfig(
        num_frames=4 * draw(st.integers(0, 30)) + 1,
        train_fps=draw(rates),
        speed_factor=draw(st.floats(1.0, 4.0)),
        drop_short_ratio=draw(st.sampled_from([0.0, 0.5])),
        sp_frame_multiple=draw(st.integers(1, 4)),
    )
    return video(num_frames, draw(rates), cut), config


@settings(max_examples=1000)
@given(case=videos_and_configs(), seed=st.integers(0, 2**32))
def test_what_the_plan_promises_the_loader_gives(case, seed):
    entry, config = case
    try:
        length = clip_length(entry, config, lambda: 0.7)
    except Dropped:
        return
    latent_frames = (length - 1) // 4 + 1
    assert (length - 1) % 4 == 0 and latent_frames % config.sp_frame_multiple == 0
    assert min(29, config.num_frames) <= length <= config.num_frames
    first, usable = usable_frames(entry)
    assert usable <= entry.num_frames
    indices = frame_indices(entry, length, config, random.Random(seed))
    assert len(indices) == length
    assert indices == sorted(indices)
    assert first <= indices[0] and indices[-1] < first + usable
    rate = 1.0 if abs(entry.fps - config.train_fps) < 0.1 else entry.fps / config.train_fps
    assert max(steps_of(indices), default=0) <= math.ceil(math.ceil(config.speed_factor) * rate)
