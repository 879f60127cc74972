"""Signals become a wish to stop; non-finite steps are counted and listed."""

import json
import os
import signal

import pytest

from osp_fast.errors import UserError
from osp_fast.training.guards import NonFiniteGuard, StopSignals, note_skipped


@pytest.mark.parametrize(
    "number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138), (signal.SIGHUP, 129)]
)
def test_a_signal_is_noted_and_handlers_come_back(number, code):
    before = signal.getsignal(number)
    with StopSignals() as stop:
        assert stop.received is None and stop.exit_code == 0
        os.kill(os.getpid(), number)
        assert stop.received == number and stop.exit_code == code
    assert signal.getsignal(number) is before


def test_a_second_interrupt_is_immediate():
    with StopSignals():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_non_finite_steps_in_a_row_end_the_run():
    guard = NonFiniteGuard(limit=5, skipped=4)
    for step in range(1, 5):
        assert "a.mp4" in guard.non_finite(step, ["a.mp4"])
    guard.finite()
    for step in range(4):
        guard.non_finite(step, ["b.mp4"])
    with pytest.raises(UserError, match=r"step 77, clips c.mp4, d.mp4.*--learning_rate"):
        guard.non_finite(77, ["c.mp4", "d.mp4"])
    assert guard.skipped == 4 + 2 * 5 - 1


def test_skipped_steps_are_listed_and_a_full_disk_is_only_told(tmp_path):
    clip = dict(path="a.mp4", clip_index=3, slot=1, loss=float("nan"), rank=0)
    assert note_skipped(tmp_path, 7, float("inf"), [clip]) is None
    assert note_skipped(tmp_path, 8, 2.0, []) is None
    lines = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert lines[0] == dict(step=7, grad_norm="inf", clips=[dict(clip, loss="nan")]) and lines[1]["grad_norm"] == 2.0
    assert "make room" in note_skipped(tmp_path / "absent", 9, 1.0, [clip])
