"""What the host learns of each step, without ever waiting for the step that the GPU is at."""

from collections import deque
from typing import Any, NamedTuple

import torch
from torch import Tensor

LAG = 1  # steps of a GPU that the host is ahead of what it knows


class Record(NamedTuple):
    """A step that is done: what was noted when it was submitted, and its numbers."""

    note: Any
    numbers: list[float]


class Records:
    """Numbers on their way from the device: `put` after each step, and take what comes out.

    On a GPU they are copied to pinned memory behind the step and read when the next one has been submitted, so that the
    GPU never waits for the host: the numbers of a step come out one call later. On a CPU they come out at once. How
    late depends on the device alone, so that all ranks learn of a step at the same place.
    """

    def __init__(self, device: torch.device):
        self._lag = LAG if device.type == "cuda" else 0
        self._waiting: deque[tuple[Any, Tensor, Any]] = deque()

    def put(self, note: Any, numbers: Tensor) -> list[Record]:
        """Take a step's numbers (n,), on the device, and return the records that are due."""
        if numbers.device.type == "cuda":
            pinned = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            pinned.copy_(numbers, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
            self._waiting.append((note, pinned, copied))
        else:
            self._waiting.append((note, numbers, None))
        return self._take(self._lag)

    def flush(self) -> list[Record]:
        """Wait for all steps, and return the records that are left."""
        return self._take(0)

    def _take(self, left: int) -> list[Record]:
        taken = []
        while len(self._waiting) > left:
            note, numbers, copied = self._waiting.popleft()
            if copied is not None:
                copied.synchronize()
            taken.append(Record(note, numbers.tolist()))
        return taken
