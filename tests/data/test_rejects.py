"""The list of broken files."""

import json
import threading

import pytest

from osp_fast.data.rejects import RejectLog
from osp_fast.errors import UserError


def lines(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_each_file_once(tmp_path):
    file = tmp_path / "run" / "rejects.jsonl"
    log = RejectLog(file, 5)
    for _ in range(3):
        log.add("a/1.mp4", "/data/a/1.mp4", "missing", "a/2.mp4")
    log.add("a/ü\n.mp4", "/data/a/ü\n.mp4", "empty (0 bytes)", None)
    first, second = lines(file)
    assert first.pop("time")[:2] == "20"
    assert first == {"path": "a/1.mp4", "file": "/data/a/1.mp4", "reason": "missing", "substitute": "a/2.mp4"}
    assert second["path"] == "a/ü\n.mp4" and second["substitute"] is None
    with open(file, "a") as cut_short:
        cut_short.write('{"path": "a/3.m\n')
    resumed = RejectLog(file, 5)
    resumed.add("a/1.mp4", "/data/a/1.mp4", "missing", None)  # is listed already
    resumed.add("a/4.mp4", "/data/a/4.mp4", "missing", None)
    assert len(file.read_text().splitlines()) == 4


def test_limit(tmp_path):
    log = RejectLog(tmp_path / "rejects.jsonl", 4)
    for number in range(4):
        log.add(f"{number}.mp4", f"/{number}.mp4", "missing", None)
    message = (
        r"^5 files are broken, more than --max_bad_samples 4: 0\.mp4, 1\.mp4, 2\.mp4, \.\.\. \(see .*rejects\.jsonl\)$"
    )
    with pytest.raises(UserError, match=message):
        log.add("4.mp4", "/4.mp4", "missing", None)
    assert len(lines(tmp_path / "rejects.jsonl")) == 5
    with pytest.raises(UserError, match=r"^1 file is broken, more than --max_bad_samples 0: a\.mp4 \("):
        RejectLog(tmp_path / "none.jsonl", 0).add("a.mp4", "/a.mp4", "missing", None)


def test_many_threads(tmp_path):
    log = RejectLog(tmp_path / "rejects.jsonl", 10**6)
    add = [
        threading.Thread(target=lambda: [log.add(f"{n}", f"/{n}", "x" * 500, None) for n in range(50)]) for _ in "1234"
    ]
    for thread in add:
        thread.start()
    for thread in add:
        thread.join()
    assert sorted(int(line["path"]) for line in lines(tmp_path / "rejects.jsonl")) == list(range(50))


def test_unwritable(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--output_dir"):
        RejectLog(tmp_path / "file" / "rejects.jsonl", 3).add("a", "/a", "missing", None)
