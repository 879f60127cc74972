"""One line that says how the training goes: a bar on a terminal, plain lines in a file."""

import sys
import time
from collections.abc import Callable
from typing import TextIO

PLAIN_SECONDS = 5.0


class Progress:
    """Shows the step, the loss, seconds per step, the share of them spent waiting for data, and the time left.

    On a terminal it is a tqdm bar. Elsewhere it is a plain line whenever `PLAIN_SECONDS` have passed since the last
    one, and for the first and the last step.
    """

    def __init__(
        self,
        first_step: int,
        total_steps: int,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._stream = stream or sys.stderr
        self._first, self._total = first_step, total_steps
        self._clock = clock
        self._started_at = clock()
        self._shown_at = float("-inf")
        self._bar = None
        if self._stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(initial=first_step, total=total_steps, unit="step", file=self._stream, dynamic_ncols=True)

    def step(self, step: int, loss: float, seconds: float, wait_share: float) -> None:
        """Show the state after `step` steps.

        Args:
            seconds: mean seconds per step of late.
            wait_share: share of them, 0 to 1, that waited for data.
        """
        facts = f"loss {loss:.4f}, {seconds:.2f} s/step, {100 * wait_share:.0f}% waiting for data"
        if self._bar is not None:
            self._bar.set_postfix_str(facts, refresh=False)
            self._bar.update(step - self._bar.n)
            return
        now = self._clock()
        if now - self._shown_at >= PLAIN_SECONDS or step == self._total:
            per_step = (now - self._started_at) / (step - self._first)
            left = _duration(per_step * (self._total - step))
            print(f"step {step}/{self._total}: {facts}, {left} left", file=self._stream, flush=True)
            self._shown_at = now

    def message(self, text: str) -> None:
        """Print a line without tearing the bar."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Leave the bar as it is and go to a new line."""
        if self._bar is not None:
            self._bar.close()


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
