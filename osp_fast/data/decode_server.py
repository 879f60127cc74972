"""The child process that decodes: JSON lines in and out, pixels through memory shared with the parent.

    python -m osp_fast.data.decode_server MEMORY_FD

One request is one line on stdin, the fields of a `ClipRequest` and `alarm_s`; one answer is one line on stdout, `{}` or
`{"reason": ..., "whole_file": ...}`. The process ends with its stdin, also while it decodes, and by an alarm from the
kernel should even that be blocked, so it cannot outlive its parent for long.
"""

import json
import mmap
import os
import queue
import signal
import sys
import threading
import warnings
from typing import TextIO

import numpy as np

from osp_fast.data.clip_request import ClipRequest, DecodeError
from osp_fast.data.decode import decode_clip


def main() -> None:
    """Serve requests until stdin ends."""
    import av
    import PIL.Image  # noqa: F401  here, so that the first deadline need not cover it

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    av.logging.set_level(None)
    warnings.simplefilter("ignore")
    answers = os.fdopen(os.dup(1), "w")
    requests = os.fdopen(os.dup(0))
    for stream in (0, 1):  # libraries that print or ask cannot disturb the protocol
        os.dup2(os.open(os.devnull, os.O_RDWR), stream)
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(requests, lines), daemon=True).start()
    memory = _Memory(int(sys.argv[1]))
    print(json.dumps({}), file=answers, flush=True)
    while True:
        print(json.dumps(_serve(lines.get(), memory)), file=answers, flush=True)


def _read(requests: TextIO, lines: "queue.SimpleQueue[str]") -> None:
    """Hand on the requests; end the process when the parent is gone, whatever it is doing."""
    for line in requests:
        lines.put(line)
    os._exit(0)


class _Memory:
    """The shared memory, which the parent enlarges when it needs to."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._bytes = np.empty(0, np.uint8)

    def array(self, shape: tuple[int, ...]) -> np.ndarray:
        size = os.fstat(self._fd).st_size
        if size != self._bytes.size:
            self._bytes = np.frombuffer(mmap.mmap(self._fd, size), np.uint8)
        return self._bytes[: int(np.prod(shape))].reshape(shape)


def _serve(line: str, memory: _Memory) -> dict:
    fields = json.loads(line)
    signal.setitimer(signal.ITIMER_REAL, fields.pop("alarm_s"))
    request = ClipRequest(**{**fields, "indices": tuple(fields["indices"]), "rect": tuple(fields["rect"])})
    try:
        decode_clip(request, memory.array(request.shape))
    except DecodeError as error:
        return {"reason": error.reason, "whole_file": error.whole_file}
    except Exception as error:  # a file that breaks the decoder in an unforeseen way must not end the process
        return {"reason": f"cannot be decoded: {type(error).__name__}: {error}", "whole_file": False}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return {}


if __name__ == "__main__":
    main()
