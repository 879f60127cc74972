"""Signals become a wish to stop; non-finite steps are counted; parallel runs are refused."""

import os
import signal

import pytest

from osp_fast.config import RunConfig
from osp_fast.errors import UserError
from osp_fast.training.guards import MAX_SKIPPED_IN_A_ROW, NonFiniteGuard, StopSignals, refuse_parallel_runs


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
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
    guard = NonFiniteGuard(skipped=4)
    for step in range(1, MAX_SKIPPED_IN_A_ROW):
        assert "a.mp4" in guard.non_finite(step, ["a.mp4"])
    guard.finite()
    for step in range(MAX_SKIPPED_IN_A_ROW - 1):
        guard.non_finite(step, ["b.mp4"])
    with pytest.raises(UserError, match=r"step 77, clips c.mp4, d.mp4.*--learning_rate"):
        guard.non_finite(77, ["c.mp4", "d.mp4"])
    assert guard.skipped == 4 + 2 * MAX_SKIPPED_IN_A_ROW - 1


@pytest.mark.parametrize("sp_size, world_size, words", [(2, None, "--sp_size 2"), (1, "8", "WORLD_SIZE=8")])
def test_parallel_runs_are_refused(monkeypatch, sp_size, world_size, words):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if world_size:
        monkeypatch.setenv("WORLD_SIZE", world_size)
    with pytest.raises(UserError, match=f"{words}.*not part of this version"):
        refuse_parallel_runs(RunConfig(sp_size=sp_size))


@pytest.mark.parametrize("world_size", [None, "1"])
def test_one_process_may_train(monkeypatch, world_size):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if world_size:
        monkeypatch.setenv("WORLD_SIZE", world_size)
    assert refuse_parallel_runs(RunConfig()) is None  # it did not raise
