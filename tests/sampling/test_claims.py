"""Work shared through a folder."""

import subprocess
import sys
import threading
import time

import pytest

from osp_fast.sampling import claims as module
from osp_fast.sampling.claims import Claims


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(module, "POLL_SECONDS", 0.01)


def work(folder, items, seconds=0.002, died=()):
    """Do what falls to this worker; returns it. `died`: items that it lets go undone."""
    did = []
    for item, claim in Claims(folder / "locks").share(items, str, lambda item: (folder / item).exists()):
        time.sleep(seconds)
        if item not in died:
            (folder / item).touch()
        did.append(item)
        claim.release()
    return did


def test_each_item_is_done_once(tmp_path):
    items, done = [f"item{number}" for number in range(40)], []
    workers = [threading.Thread(target=lambda: done.extend(work(tmp_path, items))) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted(done) == sorted(items)


def test_what_is_done_is_left_alone(tmp_path):
    for name in ("a", "c"):
        (tmp_path / name).touch()
    assert work(tmp_path, ["a", "b", "c", "d"]) == ["b", "d"]
    assert work(tmp_path, ["a", "b", "c", "d"]) == []


def test_an_item_that_was_let_go_undone_is_another_ones(tmp_path):
    assert work(tmp_path, ["a", "b"], died=["a"]) == ["a", "b"]
    assert work(tmp_path, ["a", "b"]) == ["a"]


def test_a_process_that_is_killed_frees_its_item(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from osp_fast.sampling.claims import Claims\n"
        f"claim = Claims(Path({str(tmp_path / 'locks')!r})).take('a'); print('mine', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "mine\n"
    waited = []
    claims = Claims(tmp_path / "locks")
    assert claims.take("a") is None
    threading.Timer(0.2, other.kill).start()
    for item, claim in claims.share(["a", "b"], str, lambda item: (tmp_path / item).exists(), waited.append):
        (tmp_path / item).touch()
        claim.release()
    assert waited == [["a"]] and (tmp_path / "a").exists() and (tmp_path / "b").exists()
    other.wait()


def test_an_item_is_offered_while_the_last_one_is_finished_elsewhere(tmp_path):
    """As clips are: one is decoded and written while the next one is denoised."""
    held = []
    for item, claim in Claims(tmp_path / "locks").share(["a", "b"], str, lambda item: (tmp_path / item).exists()):
        held.append((item, claim))
    assert [item for item, _ in held] == ["a", "b"]
    assert Claims(tmp_path / "locks").take("a") is None
    held[0][1].release()
    assert Claims(tmp_path / "locks").take("a") is not None


def test_nothing_is_left(tmp_path):
    work(tmp_path, ["a"])
    claims = Claims(tmp_path / "locks")
    claims.tidy()
    assert not (tmp_path / "locks").exists()
    claims.tidy()
    assert claims.take("a") is not None  # a late comer makes the folder anew
