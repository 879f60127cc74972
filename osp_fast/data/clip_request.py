"""What is asked of a decoder, and how it says no; shared by the parent and its decoding child process."""

from dataclasses import dataclass


class DecodeError(Exception):
    """A clip cannot be decoded; `reason` is for the user.

    `whole_file` tells that no clip of the file can be decoded, whichever frames are asked for.
    """

    def __init__(self, reason: str, whole_file: bool = True) -> None:
        super().__init__(reason)
        self.reason = reason
        self.whole_file = whole_file


@dataclass(frozen=True)
class ClipRequest:
    """Which frames of a file, and what its annotation promises.

    `indices` are presentation numbers in ascending order (repeats allowed; (0,) for an image). `rect` is x0, x1, y0, y1
    in pixels of the picture as shown; `height`, `width` (pixels, as shown) and `num_frames` are the annotation's.
    `threads` limits the decoder's threads (0: as many as there are cores).
    """

    file: str
    indices: tuple[int, ...]
    rect: tuple[int, int, int, int]
    height: int
    width: int
    num_frames: int
    is_image: bool
    threads: int = 0

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape (T, H, W, 3) of the decoded uint8 pixels."""
        x0, x1, y0, y1 = self.rect
        return len(self.indices), y1 - y0, x1 - x0, 3
