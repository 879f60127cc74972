"""Worker threads with a decoder each."""

import contextlib
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from osp_fast.data.video import Decoder

CLOSE_TIMEOUT_S = 10.0
PREFETCH = 2  # clips per worker that are decoded ahead


class Crew:
    """Calls `load(decoder, *place)` in `workers` threads, in the order of `submit`.

    The threads are daemons: a program that ends without `close` does not wait for them. timeout_s: of one decoding.
    """

    def __init__(self, workers: int, timeout_s: float, load: Callable[..., Any]) -> None:
        self._load = load
        self._tasks: queue.SimpleQueue[tuple | None] = queue.SimpleQueue()
        self._closing = threading.Lock()
        self._closed = False
        self._decoders = [Decoder(timeout_s) for _ in range(workers)]
        self._threads = [threading.Thread(target=self._work, args=(each,), daemon=True) for each in self._decoders]
        for thread in self._threads:
            thread.start()

    def submit(self, *place: Any) -> Future:
        """The future of `load(decoder, *place)`; cancelled if the crew is closed before its turn."""
        future: Future = Future()
        with self._closing:
            if self._closed:
                future.cancel()
            else:
                self._tasks.put((future, *place))
        return future

    def close(self) -> None:
        """End everything, also a decoder that hangs; what was not loaded yet never will be."""
        with self._closing:
            self._closed = True
        with contextlib.suppress(queue.Empty):
            while (task := self._tasks.get_nowait()) is not None:
                task[0].cancel()
        for _ in self._threads:
            self._tasks.put(None)
        for decoder in self._decoders:
            decoder.close()
        for thread in self._threads:
            thread.join(CLOSE_TIMEOUT_S)

    def _work(self, decoder: Decoder) -> None:
        while (task := self._tasks.get()) is not None:
            future, *place = task
            try:
                future.set_result(self._load(decoder, *place))
            except Exception as error:  # raised again where the result is due
                future.set_exception(error)
