"""What stops a run: signals, non-finite gradients, and layouts that this version does not train on."""

import signal
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any

from osp_fast.config import RunConfig
from osp_fast.device import check_single_process
from osp_fast.errors import UserError

MAX_SKIPPED_IN_A_ROW = 10


def refuse_parallel_runs(run: RunConfig) -> None:
    """Raise `UserError` for a run on several GPUs, which this version cannot do."""
    if run.sp_size > 1:
        raise UserError(
            f"--sp_size {run.sp_size}: sequence parallelism is not part of this version, train with --sp_size 1"
        )
    check_single_process("training")


class StopSignals:
    """Within the block, SIGINT and SIGTERM ask for a stop at the next step boundary instead of killing the process.

    `received` is the signal, or None. A second SIGINT interrupts at once. Outside the main thread, where Python cannot
    set handlers, nothing is changed.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
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

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells report it: 130 for SIGINT, 143 for SIGTERM; 0 without a signal."""
        return 128 + self.received if self.received is not None else 0


class NonFiniteGuard:
    """Counts the steps whose gradient was infinite or not a number, and ends a run that has only such steps."""

    def __init__(self, skipped: int = 0, in_a_row: int = 0):
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
            UserError: this was the tenth such step in a row.
        """
        self.skipped += 1
        self.in_a_row += 1
        named = ", ".join(clips)
        if self.in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise UserError(
                f"the gradient was not finite for {self.in_a_row} steps in a row (last: step {step}, clips {named}):"
                " lower --learning_rate, or resume an older checkpoint"
            )
        return f"step {step}: the gradient is not finite, no update was made (clips: {named})"
