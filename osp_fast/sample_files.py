"""The files of sampled clips: each clip as a video or an image that is written while it is decoded, and all in a grid.

Sampling and the validation of a training run write the same.
"""

import math
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch

from osp_fast import __version__
from osp_fast.data.write import VideoWriter, image_grid, video_grid, write_image, write_video

GRID_WIDTH = 3840  # pixels; a grid that would be wider is made of shrunk clips, which also bounds the memory


def versions() -> dict[str, str]:
    """What made a clip, for its sidecar."""
    import diffusers

    return {"osp_fast": __version__, "torch": torch.__version__, "diffusers": diffusers.__version__}


def clip_path(stem: Path, num_frames: int) -> Path:
    """stem.mp4, or stem.jpg for one frame."""
    return stem.with_name(stem.name + (".jpg" if num_frames == 1 else ".mp4"))


class ClipFiles:
    """The files of a run's clips, one after the other, each written while its frames come. A context manager.

    stem: of a clip's number -> its path without suffix.
    """

    def __init__(self, stem: Callable[[int], Path], num_frames: int, fps: float):
        self._stem, self._num_frames, self._fps = stem, num_frames, fps
        self._open = ExitStack()
        self._writer: VideoWriter | None = None

    def __enter__(self) -> "ClipFiles":
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.__exit__(*exception)

    def path(self, index: int) -> Path:
        """Of a clip: .mp4, or .jpg for one frame."""
        return clip_path(self._stem(index), self._num_frames)

    def write(self, index: int, frames: np.ndarray) -> None:
        """Add frames (t, H, W, 3) to clip `index`. Raises UserError if its file cannot be written."""
        if self._num_frames == 1:
            write_image(self.path(index), frames[0])
            return
        if self._writer is None:
            self._writer = self._open.enter_context(VideoWriter(self.path(index), self._fps))
        self._writer.write(frames)

    def finish(self, index: int) -> Path:
        """Complete a clip whose frames have all come; its path. Raises UserError if its file cannot be written."""
        self._writer = None
        self._open.close()
        return self.path(index)


class Grid:
    """All clips of a run side by side, `columns` in a row; each is `width` pixels wide and shrunk if need be."""

    def __init__(self, columns: int, width: int):
        self._columns = columns
        self._shrink = math.ceil(columns * width / GRID_WIDTH)
        self._clips: list[np.ndarray] = []

    @classmethod
    def of(cls, clips: int, width: int) -> "Grid":
        """About as many rows as columns."""
        return cls(math.ceil(math.sqrt(clips)), width)

    def add(self, frames: np.ndarray) -> None:
        """The next clip, uint8 (T, H, W, 3)."""
        self._clips.append(smaller(frames, self._shrink))

    def write(self, stem: Path, fps: float) -> Path:
        """Write stem.mp4, or stem.jpg for clips of one frame; returns the path. Raises UserError if it cannot be."""
        path = clip_path(stem, len(self._clips[0]))
        if path.suffix == ".jpg":
            write_image(path, image_grid([frames[0] for frames in self._clips], self._columns))
        else:
            write_video(path, video_grid(self._clips, self._columns), fps)
        return path


def smaller(frames: np.ndarray, factor: int) -> np.ndarray:
    """Frames (T, H, W, 3) with height and width divided by a whole number: the mean of each square of pixels."""
    if factor == 1:
        return frames
    height, width = (size // factor for size in frames.shape[1:3])
    squares = frames[:, : height * factor, : width * factor].reshape(len(frames), height, factor, width, factor, 3)
    return squares.mean((2, 4), dtype=np.float32).round().astype(np.uint8)
