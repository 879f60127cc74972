"""The generated data set: what its captions say is what its pictures show, in the layout that training reads."""

import itertools
import json
import os
import pickle
import random
import shutil

import numpy as np
import pytest

from osp_fast.assets.shapes import (
    BACKGROUNDS,
    COLOURS,
    HELD_OUT,
    KINDS,
    MOTIONS,
    SHAPES,
    TRAINED,
    Kind,
    Scene,
    captions,
    ensure_data,
    generate_shapes,
)
from osp_fast.config import TRAIN_PRESETS, DataConfig
from osp_fast.data.annotations import read_entries
from osp_fast.data.buckets import load_plan
from osp_fast.data.decode import read_video
from osp_fast.errors import UserError


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes") / "data"
    generate_shapes(folder, clips=30, images=12)
    return folder


def centre(frame: np.ndarray, background) -> np.ndarray:
    """(column, row) of the middle of what is not background."""
    weight = np.abs(frame.astype(float) - background).sum(axis=-1)
    weight[weight < 60] = 0
    rows, columns = np.indices(weight.shape)
    return np.array([(columns * weight).sum(), (rows * weight).sum()]) / weight.sum()


def test_plan_of_the_tiny_preset(data, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # paths in data.txt are found beside it
    config = DataConfig(
        data=str(data / "data.txt"), num_frames=17, max_height=64, max_width=64, force_resolution=True, hw_stride=16
    )
    plan = load_plan(config, seed=0)
    assert not plan.dropped
    assert {str(bucket): len(clips) for bucket, clips in plan.buckets.items()} == {"17x64x64": 30, "1x64x64": 12}
    assert all(os.path.isfile(clip.entry.file) for clip in plan.clips)


def test_captions_say_what_is_shown(data):
    for entry in list(read_entries(str(data / "data.txt")))[:30]:
        words = entry.captions[0].split()
        colour, shape = words[1:3]
        background = np.array(BACKGROUNDS[entry.captions[0].split(" on a ")[1].removesuffix(" background")])
        motion = next(name for name, words in MOTIONS.items() if words.moves in entry.captions[0])
        video = read_video(entry.file)
        assert video.shape == (33, 64, 64, 3) and shape in SHAPES
        np.testing.assert_allclose(video[:, 1, 1], np.broadcast_to(background, (33, 3)), atol=12)
        first, last = centre(video[0], background), centre(video[-1], background)
        column, row = np.round(first).astype(int)
        in_the_middle = background if shape == "ring" else COLOURS[colour]
        np.testing.assert_allclose(video[0, row, column], in_the_middle, atol=25)
        assert np.linalg.norm(video[0].astype(float) - COLOURS[colour], axis=-1).min() < 25
        moved = (last - first) / 64
        expected = np.array(MOTIONS[motion].direction)
        assert (np.abs(moved) > 0.2).tolist() == (expected != 0).tolist()
        assert (moved * expected).sum() >= 0 and np.abs(moved * (expected == 0)).max() < 0.03


def test_shapes_differ_and_edges_are_smooth():
    pictures = {}
    for shape in SHAPES:
        scene = Scene(Kind("white", shape, "still", "black"), 0.2, 0.3, (0.5, 0.5))
        pictures[shape] = scene.frames(1, 64)[0, :, :, 0] / 245
    areas = {shape: picture.sum() for shape, picture in pictures.items()}
    assert areas["circle"] == pytest.approx(np.pi * 12.8**2, rel=0.01)
    assert areas["ring"] == pytest.approx(areas["circle"], rel=0.02)
    assert areas["bar"] == pytest.approx(areas["circle"], rel=0.02)
    for picture in pictures.values():
        assert ((picture > 0.02) & (picture < 0.98)).sum() > 20
    for one, other in itertools.combinations(pictures.values(), 2):
        assert np.abs(one - other).sum() > 0.55 * areas["circle"]
    assert pictures["ring"][32, 32] == 0 and pictures["ring"][32, 20] == 1
    assert pictures["bar"].sum(axis=1).max() == pytest.approx(2 * 1.33 * 12.8, abs=1)  # level


def test_every_kind_occurs():
    scenes = [Scene.draw(number, seed=0) for number in range(len(TRAINED))]
    assert {scene.kind for scene in scenes} == set(TRAINED)
    assert len(COLOURS) >= 6 and len(SHAPES) >= 3 and len(MOTIONS) >= 5 and len(BACKGROUNDS) >= 3
    for scene in random.Random(0).sample(scenes, 20):
        frames = scene.frames(9, 64)
        background = np.array(BACKGROUNDS[scene.kind.background])
        shown = np.abs(frames - background).sum(axis=(1, 2, 3)).astype(float)
        assert np.ptp(shown) < 0.02 * shown.mean()  # nothing is cut off at the border on the way


def test_held_out_kinds_cover_every_name_and_are_in_no_data_set(data):
    assert set(HELD_OUT) | set(TRAINED) == set(KINDS) and not set(HELD_OUT) & set(TRAINED)
    assert len(set(HELD_OUT)) == len(HELD_OUT) == 30 and len(KINDS) == 270
    for number, names in enumerate((COLOURS, SHAPES, MOTIONS, BACKGROUNDS)):
        counts = [sum(kind[number] == name for kind in HELD_OUT) for name in names]
        assert min(counts) == max(counts) == 30 // len(names)
    assert {scene.kind for scene in (Scene.draw(n, 1, HELD_OUT) for n in range(30))} == set(HELD_OUT)
    shown = {caption for entry in read_entries(str(data / "data.txt")) for caption in entry.captions}
    assert not shown & {caption for kind in HELD_OUT for caption in captions(kind)}


def test_captions_say_the_same_in_several_ways(data):
    for kind in KINDS:
        for moving in (True, False):
            texts = captions(kind, moving)
            assert len(set(texts)) == 4 and not any("{" in text for text in texts)
            for text in texts:
                assert all(word in text for word in (kind.colour, kind.shape, kind.background))
                assert (kind.motion in text) == (moving or kind.motion in kind.background)
    assert all(len(entry.captions) == 4 for entry in read_entries(str(data / "data.txt")))


def test_the_presets_data_is_made_where_it_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = []
    monkeypatch.setattr("osp_fast.assets.shapes.generate_shapes", made.append)
    ensure_data("data.txt")
    ensure_data(None)
    assert made == []
    ensure_data(TRAIN_PRESETS["tiny"]["data"])
    assert [str(folder) for folder in made] == ["tiny/data"]


def test_the_same_again(data, tmp_path):
    generate_shapes(tmp_path / "again", clips=30, images=12)
    names = sorted(str(path.relative_to(data)) for path in data.rglob("*") if path.is_file())
    assert len(names) == 47
    for name in names:
        assert (data / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    generate_shapes(tmp_path / "other", clips=2, images=2, seed=1)
    assert (tmp_path / "other/shapes/images/0000.jpg").read_bytes() != (data / "shapes/images/0000.jpg").read_bytes()


def test_layout(data):
    videos = json.loads((data / "videos.json").read_text())
    more = pickle.loads((data / "more_videos.pkl").read_bytes())
    assert (len(videos), len(more)) == (24, 6)
    assert videos[0].keys() == {"path", "cap", "resolution", "aesthetic", "num_frames", "fps"}
    assert (data / "data.txt").read_text() == "shapes,videos.json\nshapes,more_videos.pkl\nshapes,images.json\n"


def test_complete_or_absent(tmp_path, monkeypatch):
    folder = tmp_path / "data"
    generate_shapes(folder, clips=2, images=1, size=32, frames=5)
    stamp = (folder / "data.txt").stat().st_mtime_ns
    generate_shapes(folder, clips=2, images=1, size=32, frames=5)
    assert (folder / "data.txt").stat().st_mtime_ns == stamp  # finished: kept
    generate_shapes(folder, clips=3, images=1, size=32, frames=5)
    assert len(list((folder / "shapes/clips").iterdir())) == 3  # other arguments: made anew
    shutil.rmtree(folder)

    with monkeypatch.context() as patch:
        patch.setattr("osp_fast.assets.shapes.write_image", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            generate_shapes(folder, clips=2, images=1, size=32, frames=5)
    assert not folder.exists()
    generate_shapes(folder, clips=2, images=1, size=32, frames=5)
    assert sorted(os.listdir(tmp_path)) == ["data"]

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("words")
    with pytest.raises(UserError, match="mine exists and is not a generated data set"):
        generate_shapes(tmp_path / "mine", clips=2, images=1)
    assert (tmp_path / "mine" / "thesis.txt").exists()
