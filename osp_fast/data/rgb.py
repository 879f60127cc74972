"""Decoded video frames to upright RGB in their place of the destination, in threads beside the decoder."""

import math
import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from osp_fast.data.clip_request import DecodeError

CONVERTER_LIMIT = 4  # threads; memory bandwidth is the limit, more gain nothing


def usable_cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Orientation:
    """How a decoded picture becomes the shown one: swap rows and columns, then reverse them."""

    swap: bool = False
    reverse_rows: bool = False
    reverse_columns: bool = False

    @classmethod
    def of_frame(cls, frame: Any) -> "Orientation":
        """The orientation that the frame's display matrix asks for; DecodeError unless it keeps pixels square.

        The matrix (ISO 14496-12, track header) shows the sample at column p, row q at column a p + c q, row b p + d q.
        """
        for data in frame.side_data:
            if data.type.name == "DISPLAYMATRIX":
                a, b, _, c, d = (int(value) for value in np.frombuffer(bytes(data), np.int32)[:5])
                small = max(abs(a), abs(b)) // 1000
                if abs(b) <= small and abs(c) <= small:
                    return cls(False, d < 0, a < 0)
                if abs(a) <= small and abs(d) <= small:
                    return cls(True, b < 0, c < 0)
                degrees = round(math.degrees(math.atan2(b, a))) % 360
                raise DecodeError(f"rotation of {degrees} degrees is not a multiple of 90", whole_file=False)
        return cls()

    def shown_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width, as shown, of a decoded picture of the given height and width."""
        return (width, height) if self.swap else (height, width)

    def apply(self, picture: np.ndarray) -> np.ndarray:
        """The picture (H, W, 3) as shown: a view."""
        picture = picture.swapaxes(0, 1) if self.swap else picture
        return picture[:: -1 if self.reverse_rows else 1, :: -1 if self.reverse_columns else 1]


class RgbWriter:
    """Converts decoded frames to RGB and writes the rectangle of each into its slots of `out` (T, H, W, 3) uint8.

    `rect` is x0, x1, y0, y1 of the picture as shown. Used as a context manager; leaving it waits for the conversions
    and raises the first error among them.
    """

    def __init__(self, out: np.ndarray, rect: tuple[int, int, int, int]) -> None:
        self._out = out
        self._rect = rect
        workers = min(CONVERTER_LIMIT, usable_cores())
        self._pool = ThreadPoolExecutor(workers)
        self._room = threading.BoundedSemaphore(2 * workers)  # bounds the decoded frames that wait
        self._local = threading.local()
        self._pending: list[Future] = []

    def __enter__(self) -> "RgbWriter":
        return self

    def __exit__(self, kind: Any, value: Any, trace: Any) -> None:
        self._pool.shutdown(wait=True, cancel_futures=kind is not None)
        if kind is None:
            for future in self._pending:
                future.result()

    def put(self, frame: Any, slots: list[int], orientation: Orientation) -> None:
        """Convert `frame` in a thread; waits while too many frames wait."""
        self._room.acquire()
        self._pending.append(self._pool.submit(self._write, frame, slots, orientation))

    def _write(self, frame: Any, slots: list[int], orientation: Orientation) -> None:
        from av.video.reformatter import VideoReformatter

        try:
            if not hasattr(self._local, "reformatter"):
                self._local.reformatter = VideoReformatter()
            rgb = self._local.reformatter.reformat(frame, format="rgb24", threads=1)
            plane = rgb.planes[0]
            strides = (plane.line_size, 3, 1)
            picture = orientation.apply(np.ndarray((rgb.height, rgb.width, 3), np.uint8, buffer=plane, strides=strides))
            x0, x1, y0, y1 = self._rect
            for slot in slots:
                np.copyto(self._out[slot], picture[y0:y1, x0:x1])
        finally:
            self._room.release()
