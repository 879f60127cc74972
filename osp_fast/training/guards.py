"""What stops a run: signals and non-finite gradients."""

import json
import math
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from osp_fast.errors import UserError

SKIPPED_FILE = "skipped.jsonl"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class StopSignals:
    """Within the block, SIGINT, SIGTERM, SIGUSR1 and SIGHUP ask for a stop at the next step boundary.

    `received` is the signal, or None. A second SIGINT interrupts at once. Outside the main thread, where Python cannot
    set handlers, nothing is changed.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            # One that is ignored stays so: nohup means it.
            for number in (number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)

    def adopt(self, number: int) -> None:
        """Take over the signal that another rank has received; 0: none has."""
        if number and self.received is None:
            self.received = signal.Signals(number)

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells report it: SIGHUP 129, SIGINT 130, SIGUSR1 138, SIGTERM 143; else 0."""
        return 128 + self.received if self.received is not None else 0


class NonFiniteGuard:
    """Counts the steps whose gradient was infinite or not a number, and ends a run that has only such steps."""

    def __init__(self, limit: int, skipped: int = 0, in_a_row: int = 0):
        self.limit = limit
        self.skipped = skipped
        self.in_a_row = in_a_row

    def finite(self) -> None:
        """A step was good."""
        self.in_a_row = 0

    def non_finite(self, step: int, clips: Sequence[str]) -> str:
        """A step's update was skipped. Returns the sentence to print.

        Args:
            clips: paths of the clips that are to blame, or of all clips of the step.

        Raises:
            UserError: this was the `limit`th such step in a row.
        """
        self.skipped += 1
        self.in_a_row += 1
        named = ", ".join(clips)
        if self.in_a_row >= self.limit:
            raise UserError(
                f"the gradient was not finite for {self.in_a_row} steps in a row (last: step {step}, clips {named}):"
                " lower --learning_rate, resume an older checkpoint, or raise --max_skipped_steps"
            )
        return f"step {step}: the gradient is not finite, no update was made (clips: {named})"


def note_skipped(output_dir: Path, step: int, norm: float, clips: Sequence[dict]) -> str | None:
    """Append a skipped step and the clips that are to blame to `output_dir/skipped.jsonl`.

    Returns why that is not possible, None if it is: a full disk is no reason to end a run.
    """

    def plain(value: Any) -> Any:
        return str(value) if isinstance(value, float) and not math.isfinite(value) else value

    blamed = [{name: plain(value) for name, value in clip.items()} for clip in clips]
    file = output_dir / SKIPPED_FILE
    try:
        with file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(dict(step=step, grad_norm=plain(norm), clips=blamed)) + "\n")
    except OSError as error:
        return f"{file} cannot be written ({error}): make room"
    return None
