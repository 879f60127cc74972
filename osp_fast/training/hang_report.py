"""What is written down of a run that hangs: where every thread is, what was called between the GPUs, who is behind."""

import contextlib
import faulthandler
import json
import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch._C import _distributed_c10d

from osp_fast.parallel.deadline import in_time
from osp_fast.parallel.heartbeats import BEAT_S, Heartbeats

# EX_TEMPFAIL of sysexits.h: starting again, from the last checkpoint, is likely to help.
EXIT_HANG = 75
ANSWER_S = 10.0  # for whatever might hang itself
CALLS_S = 5.0  # for all ranks to say how many collectives they called
STDERR = 2


@dataclass(frozen=True)
class Hang:
    """A rank's step that does not end.

    place: what it is at
    seconds: since the end of the step before
    limit_s: that a step may take
    clips: of the step
    """

    rank: int
    step: int
    place: str
    seconds: float
    limit_s: float
    clips: Sequence[str] = ()

    @property
    def stem(self) -> str:
        """Of the names of the files."""
        return f"hang-step-{self.step}-rank-{self.rank}"


def report_hang(
    folder: Path,
    hang: Hang,
    describe: Callable[[], dict] | None = None,
    heartbeats: Heartbeats | None = None,
    alarm: dict[str, Any] | None = None,
    beat_s: float = BEAT_S,
) -> None:
    """Write down what this rank does, find out who is behind, tell the user, and wait until all ranks have done so.

    alarm: what the rank says that found the hang; None: this one has found it. Rank 0 and that rank print a sentence.
    """
    report = ReportFile(folder / f"{hang.stem}.txt")
    report.write(_header(hang, found_here=alarm is None))
    report.stacks()
    if describe is not None:
        report.answer("what loads the data", describe)
    if alarm is None:
        alarm = _raise_alarm(hang, heartbeats, report, beat_s)
    else:
        report.write(f"\nthe ranks, says rank {alarm['rank']}: {alarm['words']}")
    calls = report.answer("collectives", lambda: write_collectives(folder / f"{hang.stem}-collectives.json"))
    words = alarm["words"]
    if heartbeats is not None and calls is not None and alarm["answering"] > 1:
        fewest = report.answer(
            "who waits", lambda: heartbeats.find_fewest_calls(calls.number, alarm["answering"], CALLS_S)
        )
        if fewest is not None and not alarm["sure"]:
            words = f"{words}; {fewest}"
    if hang.rank in (0, alarm["rank"]):
        print_past_locks(
            f"step {alarm['step']} hangs for {alarm['seconds']:.0f} s: {words}; what the threads of rank {hang.rank} do"
            f" is in {report.name}, each rank writes such a file; the run ends with exit code {EXIT_HANG}: go on with"
            " --resume_from_checkpoint latest"
        )
    report.close()
    if heartbeats is not None:
        with contextlib.suppress(RuntimeError, TimeoutError):  # the store's host may be the first to end
            in_time(lambda: heartbeats.wait_for_reports(alarm["answering"], ANSWER_S), 2 * ANSWER_S)


def _raise_alarm(hang: Hang, heartbeats: Heartbeats | None, report: "ReportFile", beat_s: float) -> dict[str, Any]:
    """Find out which rank is behind, and tell all. Returns what the first rank to do so says."""
    words = f"in '{hang.place}'"
    alarm = dict(rank=hang.rank, step=hang.step, seconds=hang.seconds, words=words, sure=True, answering=1)
    if heartbeats is None:
        return alarm
    verdict = report.answer("the ranks", lambda: asdict(heartbeats.find_behind(beat_s)))
    if verdict is None:
        return dict(alarm, words=f"{words}, and the other ranks cannot be asked")
    alarm.update(verdict)
    with contextlib.suppress(RuntimeError, TimeoutError):
        return in_time(lambda: heartbeats.alarm(alarm), ANSWER_S)
    return alarm


class ReportFile:
    """A file that is with the operating system at once: the process may be killed at any moment.

    Where it cannot be written, stderr is used, and told why. name: where the report is, for the user.
    """

    def __init__(self, file: Path):
        self.name = str(file)
        try:
            self._fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        except OSError as error:
            self._fd, self.name = STDERR, "this output"
            self.write(f"{file} cannot be written ({error.strerror}): the report follows")

    def write(self, text: str) -> None:
        """Append lines."""
        data = f"{text}\n".encode(errors="backslashreplace")
        try:
            while data:
                data = data[os.write(self._fd, data) :]
        except OSError as error:
            if self._fd != STDERR:
                self.name = f"{self.name} (cut short: {error.strerror}) and this output"
                self.close()
                self.write(text)

    def close(self) -> None:
        """Close the file; what is written after that goes to stderr."""
        if self._fd != STDERR:
            os.close(self._fd)
            self._fd = STDERR

    def stacks(self) -> None:
        """Append the Python stack of every thread, the latest call first. C code shows as the call that led to it."""
        self.write("\nPython stacks, the latest call first:")
        faulthandler.dump_traceback(file=self._fd, all_threads=True)

    def answer(self, title: str, ask: Callable[[], Any]) -> Any:
        """Append what `ask` returns, and return it; None if it fails or takes too long, which is noted."""
        try:
            found = in_time(ask, ANSWER_S)
        except Exception as error:  # whatever state the run is in
            self.write(f"\n{title}: not known ({type(error).__name__}: {error})")
            return None
        self.write(f"\n{title}: {_text(found)}")
        return found


@dataclass(frozen=True)
class Calls:
    """How many collectives this process has called, of all its groups, and where the last ones are written down."""

    number: int
    where: str

    def __str__(self) -> str:
        return f"{self.number} called; {self.where}"


def write_collectives(file: Path) -> Calls | None:
    """Write PyTorch's flight recorder, JSON; None where there is no process group. Raises OSError.

    PyTorch 2.11 and later have it for NCCL in builds with NCCL, for gloo in all.
    """
    if not dist.is_initialized():
        return None
    nccl = "nccl" in dist.get_backend_config() and hasattr(_distributed_c10d, "_dump_nccl_trace_json")
    record = _distributed_c10d._dump_nccl_trace_json() if nccl else _distributed_c10d._dump_fr_trace_json()
    known = json.loads(record)
    groups = known.get("pg_status", {}).values()
    number = sum(max(0, int(group["last_enqueued_collective"])) for group in groups)
    entries = known.get("entries", [])
    if not entries:
        return Calls(number, "none of them was recorded: set TORCH_FR_BUFFER_SIZE to how many calls are to be kept")
    file.write_bytes(record)
    return Calls(number, f"the last {len(entries)} are in {file}")


def print_past_locks(text: str) -> None:
    """A line on stderr, past Python's buffer, whose lock the thread that hangs may hold."""
    line = ("\n" if os.isatty(STDERR) else "") + f"{text}\n"  # a terminal's last line is the bar's
    with contextlib.suppress(OSError):
        os.write(STDERR, line.encode(errors="backslashreplace"))


def _header(hang: Hang, found_here: bool) -> str:
    found = f"a step may take {hang.limit_s:.0f} s" if found_here else "another rank reports a hang"
    return "\n".join(
        [
            f"rank {hang.rank} on {socket.gethostname()}, process {os.getpid()}, {time.strftime('%F %T %z')}",
            f"step {hang.step}, in '{hang.place}', {hang.seconds:.0f} s after the step before; {found}",
            "clips of the step:" if hang.clips else "clips of the step: not known yet",
            *(f"  {clip}" for clip in hang.clips),
        ]
    )


def _text(found: Any) -> str:
    if isinstance(found, dict):
        return "".join(f"\n  {key}: {value}" for key, value in found.items())
    return str(found)
