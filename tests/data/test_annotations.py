"""Annotations: what is read, what is refused as a whole, and which odd entries are counted instead of fatal."""

import json
import math
import os
import pickle
from pathlib import Path

import pytest

from osp_fast.data.annotations import Dropped, Entry, read_entries
from osp_fast.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden" / "data"
VIDEO = {"path": "a.mp4", "cap": ["A cat."], "resolution": {"height": 480, "width": 640}, "num_frames": 100, "fps": 30}
IMAGE = {"path": "a.JPG", "cap": "A cat.", "resolution": {"height": 480, "width": 640}}


def write(folder, records, name="a.json", root="root"):
    content = records if isinstance(records, bytes) else json.dumps(records).encode()
    (folder / name).write_bytes(content)
    (folder / "data.txt").write_text(f"{root},{name}\n")
    return str(folder / "data.txt")


def read_one(folder, record):
    (result,) = read_entries(write(folder, [record]))
    return result


def test_a_video(tmp_path):
    record = {**VIDEO, "aesthetic": 5, "crop": [0, 640, 10, 470], "cut": [5, 95], "tech": "odd", "motion": None}
    assert read_one(tmp_path, record) == Entry(
        path="root/a.mp4",
        file="root/a.mp4",
        captions=("A cat.",),
        height=480,
        width=640,
        num_frames=100,
        fps=30.0,
        aesthetic=5.0,
        crop=(0, 640, 10, 470),
        cut=(5, 95),
        is_image=False,
        root="root",
    )
    assert read_one(tmp_path, record).name == "a.mp4"


def test_an_image_has_one_frame_whatever_else_it_says(tmp_path):
    entry = read_one(tmp_path, {**IMAGE, "num_frames": "many", "fps": -1, "cut": [9, 3]})
    assert (entry.is_image, entry.num_frames, entry.cut) == (True, 1, None)
    assert entry.captions == ("A cat.",)


@pytest.mark.parametrize("extension", ["jpg", "jpeg", "png", "webp"])
def test_image_extensions(tmp_path, extension):
    assert read_one(tmp_path, {**IMAGE, "path": f"a.{extension}"}).is_image


def test_absent_optional_fields(tmp_path):
    record = {**VIDEO, "crop": None, "cut": None, "aesthetic": None}
    del record["fps"]
    entry = read_one(tmp_path, record)
    assert (entry.fps, entry.aesthetic, entry.crop, entry.cut) == (24.0, None, None, None)


def test_whole_numbers_may_be_written_as_floats(tmp_path):
    record = {**VIDEO, "num_frames": 100.0, "resolution": {"height": 480.0, "width": 640.0}, "cut": [1.0, 9.0]}
    entry = read_one(tmp_path, record)
    assert (entry.num_frames, entry.height, entry.width, entry.cut) == (100, 480, 640, (1, 9))
    assert isinstance(entry.num_frames, int)


def test_blank_captions_do_not_count(tmp_path):
    assert read_one(tmp_path, {**VIDEO, "cap": ["", "x", " "]}).captions == ("x",)


HUGE = 10**400
ODD_ENTRIES = [
    ("no caption", {"cap": None}),
    ("no caption", {"cap": []}),
    ("no caption", {"cap": " "}),
    ("no caption", {"cap": [""]}),
    ("no caption", {"cap": None, "resolution": None}),  # judged in the spec's order
    ("malformed cap", {"cap": 3}),
    ("malformed cap", {"cap": {"en": "x"}}),
    ("malformed cap", {"cap": ["x", 3]}),
    ("malformed cap", {"cap": ["x", None]}),
    ("malformed cap", {"cap": "x" * 20_001}),
    ("no resolution", {"resolution": None}),
    ("malformed resolution", {"resolution": [480, 640]}),
    ("malformed resolution", {"resolution": {}}),
    ("malformed resolution", {"resolution": {"height": 480}}),
    ("malformed resolution", {"resolution": {"height": "480", "width": 640}}),
    ("malformed resolution", {"resolution": {"height": 480.5, "width": 640}}),
    ("malformed resolution", {"resolution": {"height": True, "width": 640}}),
    ("malformed resolution", {"resolution": {"height": HUGE, "width": 640}}),
    ("non-positive resolution", {"resolution": {"height": 0, "width": 640}}),
    ("non-positive resolution", {"resolution": {"height": 480, "width": -640}}),
    ("malformed path", {"path": None}),
    ("malformed path", {"path": ""}),
    ("malformed path", {"path": 3}),
    ("malformed path", {"path": "a\0b.mp4"}),
    ("malformed path", {"path": "a\ud800b.mp4"}),
    ("no num_frames", {"num_frames": None}),
    ("malformed num_frames", {"num_frames": "100"}),
    ("malformed num_frames", {"num_frames": 0}),
    ("malformed num_frames", {"num_frames": 99.5}),
    ("malformed num_frames", {"num_frames": math.inf}),
    ("malformed num_frames", {"num_frames": HUGE}),
    ("malformed fps", {"fps": math.nan}),
    ("malformed fps", {"fps": 0}),
    ("malformed fps", {"fps": -24}),
    ("malformed fps", {"fps": 1e-300}),
    ("malformed fps", {"fps": "24"}),
    ("malformed fps", {"fps": True}),
    ("malformed aesthetic", {"aesthetic": "high"}),
    ("malformed aesthetic", {"aesthetic": math.nan}),
    ("malformed crop", {"crop": [0, 640, 0]}),
    ("malformed crop", {"crop": "0,640,0,480"}),
    ("malformed crop", {"crop": [0, 640, 0, 480.5]}),
    ("malformed crop", {"crop": [5, 5, 0, 480]}),
    ("malformed crop", {"crop": [0, 641, 0, 480]}),
    ("malformed crop", {"crop": [-1, 640, 0, 480]}),
    ("malformed crop", {"crop": [0, 640, 480, 0]}),
    ("malformed cut", {"cut": [5]}),
    ("malformed cut", {"cut": [9, 3]}),
    ("malformed cut", {"cut": [3, 3]}),
    ("malformed cut", {"cut": [-1, 3]}),
    ("malformed cut", {"cut": ["a", 3]}),
    ("malformed cut", {"cut": {"begin": 0}}),
]


@pytest.mark.parametrize(("reason", "change"), ODD_ENTRIES)
def test_an_odd_entry_is_dropped_with_its_reason(tmp_path, reason, change):
    content = json.dumps([VIDEO, {**VIDEO, **change}, IMAGE]).encode()
    before, odd, after = read_entries(write(tmp_path, content))
    assert isinstance(before, Entry) and isinstance(after, Entry)
    assert isinstance(odd, Dropped)
    assert odd.reason == reason
    assert odd.where.endswith("a.json, entry 2")


@pytest.mark.parametrize("record", [None, 3, "a.mp4", [], [VIDEO]])
def test_an_entry_that_is_no_object(tmp_path, record):
    assert read_one(tmp_path, record).reason == "malformed entry"


def test_absent_keys(tmp_path):
    reasons = {}
    for key in ("path", "cap", "resolution", "num_frames"):
        reasons[key] = read_one(tmp_path, {k: v for k, v in VIDEO.items() if k != key}).reason
    assert reasons == {
        "path": "malformed path",
        "cap": "no caption",
        "resolution": "no resolution",
        "num_frames": "no num_frames",
    }


def test_json_and_pickle_say_the_same(tmp_path):
    records = [VIDEO, IMAGE, {**VIDEO, "cap": None}]
    write(tmp_path, records)
    (tmp_path / "b.pkl").write_bytes(pickle.dumps(records))
    (tmp_path / "data.txt").write_text(f"root,{tmp_path}/a.json\n\n   \nroot , {tmp_path}/b.pkl \n")
    results = list(read_entries(str(tmp_path / "data.txt")))
    assert results[:2] == results[3:5]
    assert (results[2].reason, results[5].reason) == ("no caption", "no caption")


def test_progress_is_a_line_per_file():
    lines = []
    assert len(list(read_entries(str(GOLDEN / "data.txt"), lines.append))) == 800
    assert [line.split(": ")[1] for line in lines] == [
        "400 entries, 32 of them unusable as written",
        "200 entries, 11 of them unusable as written",
        "200 entries, 12 of them unusable as written",
    ]


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class OutsideReference(pickle.Pickler):
    def persistent_id(self, obj):
        return "elsewhere" if obj == "x" else None


def test_a_pickle_runs_nothing(tmp_path):
    made = tmp_path / "made"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        data = write(tmp_path, pickle.dumps([Bomb(made)], protocol), "a.pkl")
        with pytest.raises(UserError, match=r"a\.pkl: the pickle is refused because it refers to .*mkdir"):
            list(read_entries(data))
    assert not made.exists()


@pytest.mark.parametrize("harmless", [{1, 2}, frozenset([1]), bytearray(b"x"), complex(1, 2)])
def test_a_pickle_may_not_even_name_builtins(tmp_path, harmless):
    data = write(tmp_path, pickle.dumps([harmless], 0), "a.pkl")
    with pytest.raises(UserError, match="the pickle is refused"):
        list(read_entries(data))


def test_a_pickle_with_outside_references_is_refused(tmp_path):
    with open(tmp_path / "b.pkl", "wb") as file:
        OutsideReference(file).dump(["x"])
    data = write(tmp_path, (tmp_path / "b.pkl").read_bytes(), "a.pkl")
    with pytest.raises(UserError, match="refers to objects outside the file"):
        list(read_entries(data))


@pytest.mark.parametrize("damage", range(1, 40, 3))
def test_a_damaged_pickle_names_the_file(tmp_path, damage):
    content = pickle.dumps([VIDEO])
    data = write(tmp_path, content[:damage], "a.pkl")
    with pytest.raises(UserError, match=r"a\.pkl: the pickle is refused"):
        list(read_entries(data))


BROKEN_FILES = [
    (b"", r"a\.json: not valid JSON"),
    (b"[{]", r"a\.json: not valid JSON .*line 1 column 3"),
    (b'[{"path": "a.mp4",}]', r"a\.json: not valid JSON"),
    (b'["\xff"]', r"a\.json: not valid JSON"),
    (b"[" * 100_000, r"a\.json: not valid JSON"),
    (b"{}", r"a\.json: the annotation must be a list of entries, got dict"),
    (b"3", r"a\.json: the annotation must be a list of entries, got int"),
]


@pytest.mark.parametrize(("content", "message"), BROKEN_FILES)
def test_a_broken_json_names_the_file(tmp_path, content, message):
    data = write(tmp_path, content)
    with pytest.raises(UserError, match=message) as caught:
        list(read_entries(data))
    assert "\n" not in str(caught.value)


BROKEN_LINES = [
    ("", "names no annotation"),
    ("\n  \n", "names no annotation"),
    ("root\n", "line 1: write it as DATA_ROOT,ANNOTATION"),
    ("\nroot,\n", "line 2: write it as DATA_ROOT,ANNOTATION"),
    (",a.json\n", "line 1: write it as"),
    ("root,a.json,b.json\n", "line 1: write it as"),
    ("root,a.csv\n", "line 1: the annotation 'a.csv' must be a .json or a .pkl"),
    ("root,nowhere.json\n", "line 1: the annotation nowhere.json cannot be opened .*No such file"),
    ("root,folder.json\n", "line 1: the annotation .*folder.json cannot be opened .*directory"),
]


@pytest.mark.parametrize(("text", "message"), BROKEN_LINES)
def test_a_broken_data_txt_names_the_line(tmp_path, text, message):
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "data.txt").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        list(read_entries(str(tmp_path / "data.txt")))
    assert "data.txt" in str(caught.value)


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"])
def test_an_unreadable_data_txt(tmp_path, content):
    if content is not None:
        (tmp_path / "data.txt").write_bytes(content)
    with pytest.raises(UserError, match=r"data\.txt: --data cannot be read"):
        list(read_entries(str(tmp_path / "data.txt")))


def test_relative_paths_prefer_the_current_directory(tmp_path, monkeypatch):
    beside, current = tmp_path / "beside", tmp_path / "current"
    for folder, name in ((beside, "beside.mp4"), (current, "current.mp4")):
        (folder / "root").mkdir(parents=True)
        write(folder, [{**VIDEO, "path": name}])
    monkeypatch.chdir(current)
    (entry,) = read_entries(str(beside / "data.txt"))
    assert (entry.path, entry.file) == ("root/current.mp4", "root/current.mp4")


def test_relative_paths_are_found_beside_data_txt(tmp_path, monkeypatch):
    beside, current = tmp_path / "beside", tmp_path / "current"
    (beside / "root").mkdir(parents=True)
    current.mkdir()
    monkeypatch.chdir(current)
    (entry,) = read_entries(write(beside, [VIDEO]))
    assert entry.path == "root/a.mp4"
    assert entry.file == str(beside / "root" / "a.mp4")


def test_a_data_root_that_is_nowhere_is_left_as_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (entry,) = read_entries(write(tmp_path, [VIDEO], root="gone/"))
    assert entry.path == entry.file == "gone/a.mp4"
