"""Where jobs are measured: in this process, or in one of its own that a broken kernel or a hanging case cannot outlive.

After an illegal access a process cannot use its GPU any more, and a compiler may abort it: with `Worker` the case that
did it is a sentence in the results, and the next one starts afresh.
"""

import contextlib
import gc
import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any, Protocol

import torch

from bench.baselines import installed_packages
from bench.measure import ceilings, environment, require_cuda
from bench.results import Ceilings, Row
from bench.suites import Job, Options, Setting, reason_of
from osp_fast.errors import UserError

LEAST_SECONDS, TIMES_PREDICTED = 90.0, 5.0  # that a job may take before it is ended
START_SECONDS = 180.0  # to import everything and measure the ceilings
END_SECONDS = 10.0
JobsOf = Callable[[Sequence[str], Options], list[Job]]


class Failed(Exception):
    """A job that ended without its last rows; the message says why."""


class Measurer(Protocol):
    """Measures jobs one by one."""

    env: dict[str, Any]

    def rows(self, job: Job) -> Iterator[Row]:
        """Its rows as they come. Raises `Failed`, and `UserError` where it cannot be measured here."""

    def close(self) -> None:
        """Ends it."""


class InProcess:
    """Measures here: on a CPU, on which nothing breaks, and in a worker."""

    def __init__(self, device: torch.device, limits: Ceilings | None = None, **setting: Any):
        limits = limits or ceilings(device)
        self.env = environment(device, limits) | {"packages": installed_packages()}
        self.device = device
        self._setting = Setting(device, limits, **setting)

    def rows(self, job: Job) -> Iterator[Row]:
        try:
            yield from job.measure(self._setting)
        except UserError:
            raise
        except Exception as error:  # one job that breaks must not hide the others
            traceback.print_exc()
            raise Failed(reason_of(error)) from error
        finally:
            with contextlib.suppress(RuntimeError):  # of a broken context, which `_works` finds out
                _let_go(self.device)

    def close(self) -> None:
        pass


class Worker:
    """Measures on the GPU in a child, which is started anew when a job has broken it or took far too long.

    jobs_of, make: functions of a module, which make the jobs again, and what measures them, in the child
    """

    def __init__(
        self, names: Sequence[str], options: Options, jobs_of: JobsOf, make: Callable[[], InProcess] | None = None
    ):
        self._arguments = (tuple(names), options, jobs_of, make or on_gpu)
        self._process: Any = None
        self.env = self._start()

    def _start(self) -> dict[str, Any]:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, *self._arguments))
        self._process.start()
        theirs.close()
        return self._receive(time.monotonic() + START_SECONDS, "the first answer of its process")

    def rows(self, job: Job) -> Iterator[Row]:
        if self._process is None:
            self._start()
        limit = max(LEAST_SECONDS, TIMES_PREDICTED * job.seconds)
        deadline = time.monotonic() + limit
        self._connection.send((job.suite, job.case))
        while (row := self._receive(deadline, f"the case, ended after {limit:.0f} s,")) is not None:
            yield row

    def _receive(self, deadline: float, what: str) -> Any:
        """What the child says next. Raises what it says was raised, and `Failed` if it has died or takes too long."""
        try:
            if not self._connection.poll(max(0.0, deadline - time.monotonic())):
                raise Failed(f"{what} did not come in time")
            kind, value = self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.join(END_SECONDS)
            code = self._process.exitcode
            self.close()
            raise Failed(f"its process ended with {'signal' if (code or 0) < 0 else 'code'} {abs(code or 0)}") from None
        except Failed:
            self.close()
            raise
        if kind == "user error":
            raise UserError(value)
        if kind in ("failed", "broken"):
            if kind == "broken":
                self.close()
            raise Failed(value)
        return value

    def close(self) -> None:
        if self._process is not None:
            self._connection.close()
            self._process.join(END_SECONDS / 5)
            self._process.kill()
            self._process.join(END_SECONDS)
            self._process = None


def _serve(
    connection: Connection, names: Sequence[str], options: Options, jobs_of: JobsOf, make: Callable[[], InProcess]
) -> None:
    """The child: sends its environment, then the rows of each job that it is asked for, None behind the last."""
    with contextlib.suppress(EOFError, BrokenPipeError, KeyboardInterrupt):
        try:
            measurer = make()
            jobs = {(job.suite, job.case): job for job in jobs_of(names, options)}
        except Exception as error:
            connection.send(_said(error))
            return
        connection.send(("env", measurer.env))
        while True:
            answer: tuple[str, Any] = ("row", None)
            try:
                for row in measurer.rows(jobs[connection.recv()]):
                    connection.send(("row", row))
            except (Failed, UserError) as error:
                answer = _said(error)
            if not _works(measurer.device):  # after this nothing runs in this process
                connection.send(("broken", answer[1] or "it broke the GPU's context"))
                return
            connection.send(answer)


def _said(error: Exception) -> tuple[str, str]:
    return ("user error", str(error)) if isinstance(error, UserError) else ("failed", reason_of(error))


def on_gpu() -> InProcess:
    """What a worker has on a GPU."""
    return InProcess(require_cuda("run"), say=_say)


def _works(device: torch.device) -> bool:
    try:
        return bool((torch.ones(8, device=device) + 1).sum() == 16)
    except RuntimeError:
        return False


def _let_go(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _say(line: str) -> None:
    print(line, flush=True)
