"""A step that does not end: found, written down, named, and ended.

A hang of one rank looks the same on all of them: they wait. So each rank tells the others what it does
(`osp_fast.parallel.heartbeats`), and the first that waits too long says which rank is behind.

What this can do depends on Python's lock. A thread that waits for the GPU, the network, a disk or another thread has
given the lock away, and everything here works. Code in C that computes for ever without giving it away stops all
Python: then only faulthandler's timer, which is C too, still works. It writes the stacks to stderr and ends the process
with exit code 1 at about the same time; the other ranks report this one as silent. The stacks are Python's: of code in
C, and of kernels on the GPU, they show the call that led there. A process that the GPU's driver does not let go cannot
be ended by itself at all.
"""

import contextlib
import faulthandler
import os
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from osp_fast.parallel.deadline import in_time
from osp_fast.parallel.heartbeats import BEAT_S, WAITING_FOR_RANKS, Heartbeats
from osp_fast.training.hang_report import ANSWER_S, EXIT_HANG, STDERR, Hang, report_hang

WAITING_FOR_DATA, TRAINING, DONE = "waiting for data", "training", "done"
REMEMBERED = 50  # steps whose median is the usual time
FIRST_STEPS = 3  # they compile, tune and fill caches: no median is taken before so many are done
FIRST_FACTOR = 4  # the limit until then, in `least_s`
PHASE_FACTOR = 24  # the limit of a phase, in `least_s`: two hours by default
REPORT_S = 120.0  # for the report: should it hang too, faulthandler's timer ends the process
MARGIN_S = 15.0  # of that timer behind the thread that watches: the others are to see a rank that is silent, not gone


@dataclass(frozen=True)
class Mark:
    """What the main thread does, replaced as a whole, so that other threads read it without a lock.

    began: when the clock that `limit_s` is held against started, monotonic seconds
    since: when `place` was entered
    """

    step: int
    place: str
    began: float
    since: float
    limit_s: float
    clips: tuple[str, ...] = ()
    excused: bool = False


class Watchdog:
    """Within the block, a step that takes longer than max(factor x the median of the last 50, least_s) ends the run.

    The clock of a step runs from the end of the step before, so that waiting for data is part of it. Until three steps
    are done the limit is 4 x `least_s`. Time within `phase` is no part of a step, and has a limit of 24 x `least_s`.
    While another rank is in such a phase, waiting for it is no hang either.

    On a hang every rank writes `folder/hang-step-N-rank-R.txt`: time, step, clips, the stacks of all threads, what
    `describe` says, what each rank does; and PyTorch's flight recorder beside it, `...-collectives.json`. Rank 0 and
    the rank that found it say so in one sentence on stderr; then all end with exit code `EXIT_HANG`, without any
    clean-up.

    Args:
        folder: exists.
        factor: 0 = no watchdog; nothing is started.
        least_s: no step is a hang before so many seconds.
        describe: what else to write, as from the data's threads; asked in a thread of its own, for 10 s at most.
        heartbeats: None in a run of one process.
        waits_for_ranks: whether the wait for data is one for other ranks, which are to load some of it.
        on_hang: called last with `EXIT_HANG`, from another thread; does not return.
        step: steps done before.
        beat_s: seconds between two looks at the clock, and between two beats.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        factor: float,
        least_s: float,
        describe: Callable[[], dict] | None = None,
        heartbeats: Heartbeats | None = None,
        waits_for_ranks: Callable[[], bool] = lambda: False,
        on_hang: Callable[[int], Any] = os._exit,
        step: int = 0,
        beat_s: float = BEAT_S,
    ):
        self._folder, self._rank, self._factor, self._least_s = folder, rank, factor, least_s
        self._describe, self._heartbeats, self._on_hang = describe, heartbeats, on_hang
        self._waits_for_ranks = waits_for_ranks
        self._beat_s = beat_s
        self._seconds: deque[float] = deque(maxlen=REMEMBERED)
        now = time.monotonic()
        self._mark = Mark(step + 1, WAITING_FOR_DATA, now, now, self.limit_s)
        self._ended = threading.Event()
        self._reporting = threading.Lock()  # taken once, for good
        self._reported = threading.Event()
        self._threads: list[threading.Thread] = []

    @property
    def limit_s(self) -> float:
        """How long the present step may take, seconds."""
        if len(self._seconds) < FIRST_STEPS:
            return FIRST_FACTOR * self._least_s
        return max(self._factor * statistics.median(self._seconds), self._least_s)

    def __enter__(self) -> "Watchdog":
        now = time.monotonic()
        self._mark = replace(self._mark, began=now, since=now)
        if self._factor > 0:
            self._threads = [threading.Thread(target=self._watch, daemon=True, name="watchdog")]
            if self._heartbeats is not None:
                self._threads.append(threading.Thread(target=self._tell, daemon=True, name="heartbeats"))
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if self._reporting.locked():  # such as an error because a rank that hung has ended first
            self._reported.wait(REPORT_S)
        self._ended.set()
        if not self._threads:
            return
        for thread in self._threads:
            thread.join(2 * self._beat_s)
        faulthandler.cancel_dump_traceback_later()
        if self._heartbeats is not None:
            place = DONE if kind is None else f"left with {kind.__name__}"
            with contextlib.suppress(RuntimeError, TimeoutError):  # the others may have gone, and their store
                in_time(lambda: self._heartbeats.leave_training(self._mark.step, place, kind is not None), ANSWER_S)

    def step_started(self, step: int, clips: Sequence[str] = ()) -> None:
        """The batch of step `step`, from 1, is there: its clips."""
        self._mark = replace(self._mark, step=step, place=TRAINING, since=time.monotonic(), clips=tuple(clips))

    def step_done(self) -> None:
        """The step is over; the wait for the next one's data begins."""
        now = time.monotonic()
        self._seconds.append(now - self._mark.began)
        self._mark = Mark(self._mark.step + 1, WAITING_FOR_DATA, now, now, self.limit_s)

    @contextlib.contextmanager
    def within(self, place: str) -> Iterator[None]:
        """A part of a step, for the report; `heartbeats.WAITING_FOR_RANKS` where the host waits for all ranks."""
        before = self._mark.place
        self._mark = replace(self._mark, place=place, since=time.monotonic())
        try:
            yield
        finally:
            self._mark = replace(self._mark, place=before, since=time.monotonic())

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Saving, validation, compiling: what may take long, and is no part of a step."""
        outer, now = self._mark, time.monotonic()
        limit_s = PHASE_FACTOR * self._least_s
        self._mark = replace(outer, place=name, began=now, since=now, limit_s=limit_s, excused=True)
        try:
            yield
        finally:
            gone = time.monotonic() - now
            self._mark = replace(outer, began=outer.began + gone, since=outer.since + gone)

    def _watch(self) -> None:
        """The thread that looks at the clock; it waits for nobody but in `in_time`."""
        while not self._reporting.locked():
            mark, now = self._mark, time.monotonic()
            left_s = mark.began + mark.limit_s - now
            # Counts from now, without Python: it goes off if this thread is not let run until then.
            faulthandler.dump_traceback_later(max(left_s, ANSWER_S) + MARGIN_S, exit=True, file=STDERR)
            if left_s < 0 and not self._waits_for_excused(mark, now) and self._mark.began == mark.began:
                self._report(mark)  # it has not ended while the others were asked
            if self._ended.wait(min(self._beat_s, self._least_s / 4)):
                return

    def _waits_for_excused(self, mark: Mark, now: float) -> bool:
        """Whether another rank saves or validates, which may take as long as a phase may."""
        if self._heartbeats is None or now - mark.began > PHASE_FACTOR * self._least_s:
            return False
        try:
            beats = in_time(self._heartbeats.read, ANSWER_S)
        except (RuntimeError, TimeoutError):
            return False
        return any(beat is not None and beat.excused for beat in beats)

    def _tell(self) -> None:
        """The thread that beats, and hears of a hang that another rank has found. It may block; the clock goes on."""
        while not self._ended.is_set():
            mark = self._mark
            elsewhere = mark.place == WAITING_FOR_DATA and self._waits_for_ranks()
            place, seconds = WAITING_FOR_RANKS if elsewhere else mark.place, time.monotonic() - mark.since
            try:
                alarm = self._heartbeats.beat(mark.step, place, seconds, mark.excused)
            except RuntimeError:  # the store's host is gone: the clock still counts
                return
            if alarm is not None and not self._reporting.locked():
                threading.Thread(target=self._report, args=(mark, alarm), daemon=True, name="hang_report").start()
            self._ended.wait(self._beat_s)

    def _report(self, mark: Mark, alarm: dict[str, Any] | None = None) -> None:
        """Report the hang and end. alarm: what the rank says that found it; None: this one has."""
        if not self._reporting.acquire(blocking=False):
            return  # another thread is at it
        faulthandler.dump_traceback_later(REPORT_S, exit=True, file=STDERR)
        seconds = time.monotonic() - mark.began
        hang = Hang(self._rank, mark.step, mark.place, seconds, mark.limit_s, mark.clips)
        try:
            report_hang(self._folder, hang, self._describe, self._heartbeats, alarm, self._beat_s)
        finally:
            self._on_hang(EXIT_HANG)
            self._reported.set()
