"""Hangs in one process; those of several ranks are in tests/parallel/test_hangs.py."""

import statistics
import threading
import time

import pytest
import torch.distributed as dist

from osp_fast.parallel.heartbeats import WAITING_FOR_RANKS, Heartbeats
from osp_fast.training import hang_report
from osp_fast.training.hang_report import EXIT_HANG, Hang, ReportFile, report_hang
from osp_fast.training.watchdog import (
    FIRST_FACTOR,
    FIRST_STEPS,
    PHASE_FACTOR,
    TRAINING,
    WAITING_FOR_DATA,
    Watchdog,
)

LEAST_S = 0.2


class Hangs:
    """Watchdogs that note the exit codes in place of ending the process."""

    def __init__(self, folder):
        self.folder, self.codes, self.found = folder, [], threading.Event()

    def watchdog(self, factor=3.0, rank=0, **more) -> Watchdog:
        return Watchdog(self.folder, rank, factor, LEAST_S, on_hang=self.note, beat_s=0.02, **more)

    def note(self, code: int) -> None:
        self.codes.append(code)
        self.found.set()


@pytest.fixture
def hangs(tmp_path) -> Hangs:
    return Hangs(tmp_path)


def quick_steps(watchdog: Watchdog, first: int = 1, number: int = FIRST_STEPS) -> None:
    for step in range(first, first + number):
        watchdog.step_started(step)
        watchdog.step_done()


def stuck_in_a_reader(event: threading.Event) -> bool:
    return event.wait(10)


def test_the_limit_follows_the_median(monkeypatch, hangs):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    watchdog = hangs.watchdog(factor=10)
    taken = [50.0, 1.0, 2.0, 3.0, 4.0]  # the first compiles
    for step, seconds in enumerate(taken, 1):
        expected = FIRST_FACTOR * LEAST_S if step <= FIRST_STEPS else 10 * statistics.median(taken[: step - 1])
        assert watchdog.limit_s == expected
        with watchdog.phase("saving"):
            now[0] += 1000.0
        now[0] += seconds / 2  # the wait for data counts
        watchdog.step_started(step)
        now[0] += seconds / 2
        watchdog.step_done()
    assert watchdog.limit_s == 30.0
    for step in range(6, 60):
        now[0] += 0.001
        watchdog.step_started(step)
        watchdog.step_done()
    assert watchdog.limit_s == LEAST_S


def test_a_hang_is_written_down_told_and_ended(hangs, tmp_path, capfd):
    with hangs.watchdog(describe=lambda: {"worker 0": "decodes c.mp4"}, step=10) as watchdog:
        quick_steps(watchdog, first=11)
        watchdog.step_started(14, ["a.mp4", "b.mp4"])
        with watchdog.within("gathering"):
            assert stuck_in_a_reader(hangs.found)
    assert hangs.codes == [EXIT_HANG] and EXIT_HANG not in (0, 1, 2, 130, 138, 143)
    file = tmp_path / "hang-step-14-rank-0.txt"
    report = file.read_text()
    for words in ("step 14, in 'gathering'", "  a.mp4", "  b.mp4", "stuck_in_a_reader", "worker 0: decodes c.mp4"):
        assert words in report
    assert list(tmp_path.iterdir()) == [file]  # no collectives in one process
    told = capfd.readouterr().err
    assert told.count("\n") == 1 and str(file) in told and "step 14 hangs for 0 s: in 'gathering'" in told
    assert f"exit code {EXIT_HANG}" in told


def test_the_wait_for_data_and_the_first_steps_are_watched_too(hangs, tmp_path):
    with hangs.watchdog():
        began = time.monotonic()
        assert hangs.found.wait(10)
        assert time.monotonic() - began > FIRST_FACTOR * LEAST_S
    assert "step 1, in 'waiting for data'" in (tmp_path / "hang-step-1-rank-0.txt").read_text()


def test_what_takes_long_for_a_reason_is_no_hang(hangs, monkeypatch):
    with hangs.watchdog() as watchdog:
        quick_steps(watchdog)
        watchdog.step_started(4)
        with watchdog.phase("saving"), watchdog.phase("the last one first"):
            assert not hangs.found.wait(3 * LEAST_S)
        assert not hangs.found.wait(LEAST_S / 4)
        monkeypatch.setattr("osp_fast.training.watchdog.PHASE_FACTOR", 1)
        with watchdog.phase("validation"):
            assert hangs.found.wait(10)
    assert PHASE_FACTOR > 10


def test_off(hangs):
    before = threading.active_count()
    with hangs.watchdog(factor=0.0, heartbeats=Heartbeats(dist.HashStore(), 0, 1)) as watchdog:
        assert threading.active_count() == before
        watchdog.step_started(1)
        watchdog.step_done()


def test_nothing_is_left_running(hangs):
    before = threading.active_count()
    with hangs.watchdog(heartbeats=Heartbeats(dist.HashStore(), 0, 1)) as watchdog:
        quick_steps(watchdog)
        assert threading.active_count() == before + 2
    assert threading.active_count() == before and not hangs.found.wait(2 * LEAST_S)


def test_waiting_for_a_rank_that_saves_is_no_hang(hangs, monkeypatch):
    monkeypatch.setattr(hang_report, "ANSWER_S", 0.5)  # rank 1 never reports
    store = dist.HashStore()
    saving = Heartbeats(store, 1, 2, "b")
    saving.beat(4, "saving", 0.0, excused=True)
    with hangs.watchdog(heartbeats=Heartbeats(store, 0, 2, "a")) as watchdog:
        quick_steps(watchdog)
        with watchdog.within(WAITING_FOR_RANKS):
            assert not hangs.found.wait(3 * LEAST_S)
            saving.leave_training(4, "left with KeyError", failed=True)
            assert hangs.found.wait(10)
    report = (hangs.folder / "hang-step-4-rank-0.txt").read_text()
    assert "rank 1 (host b) is at step 4 in 'left with KeyError'" in report


def test_a_wait_for_clips_of_other_ranks_is_told_as_such(hangs):
    store, waiting, until = dist.HashStore(), [True], time.monotonic() + 10
    with hangs.watchdog(factor=1e6, heartbeats=Heartbeats(store, 0, 1), waits_for_ranks=lambda: waiting[0]) as watchdog:
        for place, waiting[0] in ((WAITING_FOR_RANKS, True), (WAITING_FOR_DATA, False)):
            while (beat := Heartbeats(store, 1, 1).read()[0]) is None or beat.place != place:
                assert time.monotonic() < until, beat
        waiting[0] = True
        watchdog.step_started(1)
        while Heartbeats(store, 1, 1).read()[0].place != TRAINING:
            assert time.monotonic() < until


def test_all_ranks_report_what_one_has_found(hangs, monkeypatch, capfd):
    monkeypatch.setattr(hang_report, "ANSWER_S", 3.0)
    store, codes = dist.HashStore(), [threading.Event(), threading.Event()]
    ranks = [
        Watchdog(
            hangs.folder,
            rank,
            factor,
            LEAST_S,
            heartbeats=Heartbeats(store, rank, 2, f"node-{rank}"),
            on_hang=lambda code, rank=rank: codes[rank].set(),
            beat_s=0.02,
        )
        for rank, factor in enumerate((1e6, 3.0))  # rank 0 would wait for long
    ]
    with ranks[0], ranks[1]:
        for watchdog in ranks:
            quick_steps(watchdog)
        ranks[0].step_started(4, ["slow.mp4"])
        ranks[1].step_started(4, ["quick.mp4"])
        with ranks[1].within(WAITING_FOR_RANKS):
            assert codes[1].wait(10) and codes[0].wait(10)
    reports = [(hangs.folder / f"hang-step-4-rank-{rank}.txt").read_text() for rank in range(2)]
    words = "rank 0 (host node-0) is at step 4 in 'training'"
    assert words in reports[1] and f"says rank 1: {words}" in reports[0]
    assert "slow.mp4" in reports[0]
    assert capfd.readouterr().err.count(f"s: {words}") == 2  # of rank 0 and of the one that found it


def test_an_error_does_not_overtake_the_report(hangs, tmp_path):
    with pytest.raises(RuntimeError), hangs.watchdog(describe=lambda: time.sleep(0.3) or {"done": 1}) as watchdog:
        quick_steps(watchdog)
        while not list(tmp_path.iterdir()):
            time.sleep(0.01)
        raise RuntimeError("connection closed by peer")
    assert hangs.codes == [EXIT_HANG] and "done: 1" in (tmp_path / "hang-step-4-rank-0.txt").read_text()


def test_parts_of_a_report_that_fail_or_hang_take_nothing_from_the_rest(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(hang_report, "ANSWER_S", 0.1)
    never = threading.Event()
    report_hang(tmp_path, Hang(0, 1, "training", 9.0, 5.0), describe=never.wait, heartbeats=None)
    report_hang(tmp_path, Hang(1, 1, "training", 9.0, 5.0), describe=lambda: {}["gone"], heartbeats=None)
    never.set()
    assert "what loads the data: not known (TimeoutError" in (tmp_path / "hang-step-1-rank-0.txt").read_text()
    assert "what loads the data: not known (KeyError" in (tmp_path / "hang-step-1-rank-1.txt").read_text()
    assert capfd.readouterr().err.count("step 1 hangs for 9 s: in 'training'") == 2


def test_a_report_that_cannot_be_written_goes_to_stderr(tmp_path, capfd):
    report_hang(tmp_path / "gone", Hang(0, 1, "training", 9.0, 5.0, ["a.mp4"]))
    told = capfd.readouterr().err
    assert "cannot be written (No such file" in told and "a.mp4" in told and "report_hang" in told
    report = ReportFile("/dev/full")
    report.write("lost")
    assert "lost" in capfd.readouterr().err and "No space left" in report.name
