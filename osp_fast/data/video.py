"""Decoding under a deadline: a child process that can be killed, and memory that both sides see."""

import contextlib
import dataclasses
import json
import mmap
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

import osp_fast
from osp_fast.data.clip_request import ClipRequest, DecodeError
from osp_fast.errors import UserError

START_TIMEOUT_S = 120.0  # for Python and the libraries, also on a busy machine with slow disks
ALARM_MARGIN_S = 30.0  # beyond its deadline a child without a parent ends itself
MAX_CLIP_BYTES = 16 << 30  # a clip that needs more has a mistake in its annotation


class _ChildEnded(Exception):
    """The child closed its output."""


class Decoder:
    """Decodes clips in a child process, each under a deadline of `timeout_s` seconds.

    A child that exceeds it, crashes or answers nonsense is killed and replaced at the next use. For one thread at a
    time; only `close` may be called from another, and it ends a running `decode`. Also a context manager.
    """

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._child: subprocess.Popen | None = None
        self._errors_fd = _anonymous_file()  # the children's stderr
        self._memory_fd = _anonymous_file()
        self._memory = np.empty(0, np.uint8)
        self._closed = False
        self._state = threading.Lock()  # guards _child and _closed
        self._use = threading.Lock()  # held while the child and the files are in use

    def __enter__(self) -> "Decoder":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def decode(self, request: ClipRequest) -> np.ndarray:
        """Pixels of the clip, uint8 (T, H, W, 3), RGB: a view of memory that the next call overwrites.

        Raises DecodeError if the file is broken, takes too long or crashes the decoder; UserError if no decoder
        process can be started.
        """
        size = int(np.prod(request.shape, dtype=np.int64))
        if not 0 < size <= MAX_CLIP_BYTES:
            raise DecodeError(f"{'x'.join(map(str, request.shape))} is not the shape of a clip")
        with self._use:
            child = self._running_child()
            self._enlarge_memory(size)
            fields = {**dataclasses.asdict(request), "file": os.path.abspath(request.file)}
            self._ask(child, {**fields, "alarm_s": self.timeout_s + ALARM_MARGIN_S})
            return self._memory[:size].reshape(request.shape)

    @property
    def closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        """Kill the child, which ends a running `decode`, and give back the memory."""
        with self._state:
            closed, self._closed = self._closed, True
            if self._child is not None:
                self._child.kill()
        if closed:
            return
        with self._use:
            if self._child is not None:
                self._discard(self._child)
            self._memory = np.empty(0, np.uint8)
            os.close(self._memory_fd)
            os.close(self._errors_fd)

    def _running_child(self) -> subprocess.Popen:
        with self._state:
            if self._closed:
                raise DecodeError("the decoder is closed", whole_file=False)
            if self._child is not None and self._child.poll() is None:
                return self._child
            child = self._child = self._start()
        try:
            answer = self._answer(child, START_TIMEOUT_S)
        except _ChildEnded:
            self._discard(child)
            self._check_open()
            raise UserError(f"the video decoder's process does not start: {self._last_words()}") from None
        if answer is None:
            self._discard(child)
            raise UserError(f"the video decoder's process does not start in {START_TIMEOUT_S:g} s: free the machine")
        return child

    def _start(self) -> subprocess.Popen:
        paths = [str(Path(osp_fast.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        return subprocess.Popen(
            [sys.executable, "-m", "osp_fast.data.decode_server", str(self._memory_fd)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors_fd,
            pass_fds=[self._memory_fd],
            start_new_session=True,  # Ctrl-C is this process's to handle, also while the child starts
            env={**os.environ, **one_thread, "PYTHONPATH": os.pathsep.join(paths)},
        )

    def _enlarge_memory(self, size: int) -> None:
        """Pages are only taken when the child writes to them, which it does when the file proved to be sound."""
        if size > self._memory.size:
            os.ftruncate(self._memory_fd, size)
            self._memory = np.frombuffer(mmap.mmap(self._memory_fd, size), np.uint8)

    def _ask(self, child: subprocess.Popen, question: dict) -> None:
        """Have the child decode; raises DecodeError unless it did."""
        try:
            child.stdin.write(json.dumps(question).encode() + b"\n")
            child.stdin.flush()
            answer = self._answer(child, self.timeout_s)
        except (_ChildEnded, OSError):
            code = self._discard(child)
            self._check_open()
            how = signal.Signals(-code).name if code < 0 else f"code {code}: {self._last_words()}"
            raise DecodeError(f"crashes the decoder ({how})", whole_file=False) from None
        except ValueError:
            self._discard(child)
            raise DecodeError("makes the decoder answer nonsense", whole_file=False) from None
        if answer is None:
            self._discard(child)
            raise DecodeError(f"decoding took more than {self.timeout_s:g} s (--decode_timeout)")
        if "reason" in answer:
            raise DecodeError(answer["reason"], answer["whole_file"])

    def _answer(self, child: subprocess.Popen, timeout_s: float) -> dict | None:
        """The child's next answer, None if it does not come in time; _ChildEnded, or ValueError for nonsense."""
        deadline = time.monotonic() + timeout_s
        poll = select.poll()
        poll.register(child.stdout, select.POLLIN)
        line = b""
        while not line.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not poll.poll(left * 1000):
                return None
            part = os.read(child.stdout.fileno(), 1 << 16)
            if not part:
                raise _ChildEnded
            line += part
        answer = json.loads(line)
        if not isinstance(answer, dict) or answer.keys() not in (set(), {"reason", "whole_file"}):
            raise ValueError(f"{answer!r} is no answer")
        return answer

    def _discard(self, child: subprocess.Popen) -> int:
        """Kill the child if need be; its exit code."""
        child.kill()
        code = child.wait()
        with self._state:
            self._child = None
        for pipe in (child.stdin, child.stdout):
            with contextlib.suppress(OSError):  # what could not be written any more
                pipe.close()
        return code

    def _check_open(self) -> None:
        if self._closed:
            raise DecodeError("the decoder is closed", whole_file=False)

    def _last_words(self) -> str:
        """The last line that a child wrote to stderr."""
        size = os.fstat(self._errors_fd).st_size
        text = os.pread(self._errors_fd, 4096, max(0, size - 4096)).decode(errors="replace")
        return text.strip().rsplit("\n", 1)[-1] or "no message"


def _anonymous_file() -> int:
    """File descriptor of a file in memory without a name: it is gone with the last process that has it open."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("osp_fast_clip")
    fd, name = tempfile.mkstemp(prefix="osp_fast_clip")
    os.unlink(name)
    return fd
