"""One line that says how long work goes: a bar on a terminal, plain lines in a file."""

import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TextIO

PLAIN_SECONDS = 5.0


class Progress:
    """Progress through `total` equal units of work, of which `first` were done before.

    On a terminal it is a tqdm bar. Elsewhere it is a plain line whenever `PLAIN_SECONDS` have passed since the last
    one, for the first and the last unit, and for milestones; each ends with the time left. `quiet`: nothing at all, as
    for ranks beside the one that speaks.
    """

    def __init__(
        self,
        total: int,
        first: int = 0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        quiet: bool = False,
    ):
        self._stream = stream or sys.stderr
        self._first, self._total = first, total
        self._clock = clock
        self._started_at = clock()
        self._shown_at = float("-inf")
        self._bar = None
        self._quiet = quiet
        if self._stream.isatty() and not quiet:
            from tqdm import tqdm

            self._bar = tqdm(initial=first, total=total, unit="step", file=self._stream, dynamic_ncols=True)

    def begin(self) -> None:
        """Let the estimate count from now: what was done since the start was preparation."""
        self._started_at = self._clock()

    def expect(self, total: int) -> None:
        """Let there be `total` units in all, as is known by now."""
        self._total = total
        if self._bar is not None:
            self._bar.total = total

    def pace(self, done: int) -> float:
        """Mean seconds per unit since the start; `done` units, more than `first`, are done."""
        return (self._clock() - self._started_at) / (done - self._first)

    def show(self, done: int, what: str, facts: str, milestone: bool = False) -> None:
        """Show that `done` units are done: `what` names the place ("step 3/10"), `facts` tells about it."""
        if self._quiet:
            return
        if self._bar is not None:
            with suppress(OSError):
                self._bar.set_description_str(what, refresh=False)
                self._bar.set_postfix_str(facts, refresh=False)
                self._bar.update(done - self._bar.n)
            return
        now = self._clock()
        if milestone or now - self._shown_at >= PLAIN_SECONDS or done == self._total:
            left = duration(self.pace(done) * (self._total - done))
            say(f"{what}: {facts}, {left} left", self._stream)
            self._shown_at = now

    def message(self, text: str) -> None:
        """Print a line without tearing the bar."""
        if self._quiet:
            return
        if self._bar is not None:
            with suppress(OSError):
                self._bar.write(text, file=self._stream)
        else:
            say(text, self._stream)

    def close(self) -> None:
        """Leave the bar as it is and go to a new line."""
        if self._bar is not None:
            self._bar.close()


def say(line: str, stream: TextIO | None = None) -> None:
    """Print a line on stderr or `stream`, at once also into a pipe.

    Where nobody can read it, because a log's disk is full or a pipe's reader has gone, the work goes on without.
    """
    with suppress(OSError):
        print(line, file=stream or sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Seconds as hours:minutes:seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
