"""The history of a run: metrics.jsonl and, if asked for, TensorBoard."""

import contextlib
import errno
import json
import math
import os
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from osp_fast.config import RunConfig
from osp_fast.errors import UserError

FILE_NAME = "metrics.jsonl"
NO_CURVES = ("step", "epoch", "samples_seen", "time")


class MetricsLog:
    """Appends one JSON object for each logged step to `output_dir/metrics.jsonl`.

    A killed run may have logged steps after its last checkpoint; the resumed run computes them again. So its lines
    after `resumed_step` are dropped first, together with a line that the kill cut short: the file is one history.

    Args:
        run: `output_dir` must exist; `logging_dir` is inside it unless absolute.
        resumed_step: the step the run continues from, 0 for a new run.
        report: gets a sentence when something cannot be written.

    Raises:
        UserError: TensorBoard is asked for without the package tensorboard, or a file cannot be written.
    """

    def __init__(self, run: RunConfig, resumed_step: int, report: Callable[[str], None]):
        self.file = Path(run.output_dir) / FILE_NAME
        self._report = report
        self._waiting: deque[bytes] = deque()
        self._troubled = False
        self._board = None
        try:
            if run.report_to != "none":
                self._board = _open_tensorboard(Path(run.output_dir) / run.logging_dir, resumed_step)
            drop_lines_after(self.file, resumed_step)
            self._lines = self.file.open("ab", buffering=0)
        except OSError as error:
            raise UserError(
                f"{error.filename or self.file} cannot be written ({error.strerror}): correct --output_dir or "
                "--logging_dir"
            ) from error

    def write(self, record: dict[str, Any]) -> None:
        """Append a record, which has a `step`; it is in the operating system's hands when this returns.

        Numbers that are not finite become null: JSON has no word for them.

        A full disk ends no run: records wait until there is room, and `report` gets one sentence.
        """
        record = {name: None if _not_finite(value) else value for name, value in record.items()}
        self._waiting.append((json.dumps(record) + "\n").encode())
        self._write_waiting()
        if self._board is not None:
            for name, value in record.items():
                if isinstance(value, int | float) and name not in NO_CURVES:
                    self._add_scalar(f"train/{name}", value, record["step"])

    def _write_waiting(self) -> None:
        size = self._lines.seek(0, os.SEEK_END)
        try:
            while self._waiting:
                if self._lines.write(self._waiting[0]) < len(self._waiting[0]):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                size += len(self._waiting.popleft())
        except OSError as error:
            os.truncate(self.file, size)  # no half line stays
            if not self._troubled:
                self._report(f"{self.file} cannot be written ({error.strerror}): make room; its lines wait until then")
            self._troubled = True
        else:
            self._troubled = False

    def _add_scalar(self, name: str, value: float, step: int) -> None:
        try:
            self._board.add_scalar(name, value, step)
        except OSError as error:  # of its thread that writes, from which it does not recover
            self._report(f"TensorBoard's file cannot be written ({error}): this run goes on without it")
            self._board = None

    @property
    def board(self) -> Any:
        """TensorBoard's writer, None without one."""
        return self._board

    def close(self) -> None:
        """Close both; TensorBoard writes what it still holds."""
        self._write_waiting()
        self._lines.close()
        if self._board is not None:
            with contextlib.suppress(OSError):
                self._board.close()


def drop_lines_after(file: Path, step: int) -> None:
    """Rewrite a metrics file, atomically, without the lines of later steps and without lines that are not whole."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int) and record["step"] <= step:
            kept.append(line + "\n")
    rewritten = file.with_name(f".{file.name}.writing")
    with rewritten.open("w", encoding="utf-8") as out:
        out.writelines(kept)
        out.flush()
        os.fsync(out.fileno())
    rewritten.replace(file)


def _not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _open_tensorboard(folder: Path, resumed_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(
            "--report_to needs the package tensorboard: install it (pip install tensorboard), or use --report_to none"
        ) from error
    # `purge_step` hides the steps that a killed run logged after its last checkpoint.
    return SummaryWriter(str(folder), purge_step=resumed_step + 1 if resumed_step else None)
