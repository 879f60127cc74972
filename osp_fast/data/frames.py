"""Which source frames a clip consists of.

The plan (how many frames can this entry give?) and the loader (which ones, this time?) both start from `grid_length`
and `usable_frames`, so they cannot disagree. Frame rates are handled as exact ratios of integers: the k-th frame at
`train_fps` is source frame floor(k * fps / train_fps), and rounding errors of that product would repeat or skip frames.

Terms: *source frames* are numbered in the file; the *grid* is what is left of the usable source frames after
resampling to `train_fps`; a *clip* is the part of the grid that is trained on.
"""

import math
import random
from collections.abc import Callable

from osp_fast.config import DataConfig
from osp_fast.data.annotations import Dropped, Entry

TOO_MANY_FRAMES = "too many frames"
SHORTER_THAN_NUM_FRAMES = "shorter than num_frames"
TOO_FEW_FRAMES = "too few frames"

MAX_LENGTH_RATIO = 5  # a video longer than this many clips is left out, as upstream
SAME_FPS_TOLERANCE = 0.1  # frames per second; closer rates count as equal
LATENT_STRIDE = 4  # frames per latent frame after the first one
MIN_CLIP_FRAMES = 29  # shortest clip, unless --num_frames is shorter


def usable_frames(entry: Entry) -> tuple[int, int]:
    """First usable source frame and the number of usable ones (spec: frames start at cut[0])."""
    if entry.cut is None:
        return 0, entry.num_frames
    begin, end = entry.cut
    return begin, min(entry.num_frames, end - begin)


def frame_step(fps: float, train_fps: float) -> tuple[int, int]:
    """Source frames per grid frame as an exact ratio (numerator, denominator), both positive."""
    if abs(fps - train_fps) < SAME_FPS_TOLERANCE:
        return 1, 1
    fps_numerator, fps_denominator = float(fps).as_integer_ratio()
    train_numerator, train_denominator = float(train_fps).as_integer_ratio()
    return fps_numerator * train_denominator, fps_denominator * train_numerator


def grid_length(entry: Entry, config: DataConfig) -> int:
    """Frames of a video at `train_fps`: ceil(usable frames * train_fps / fps)."""
    numerator, denominator = frame_step(entry.fps, config.train_fps)
    return -(-usable_frames(entry)[1] * denominator // numerator)


def clip_length(entry: Entry, config: DataConfig, short_coin: Callable[[], float]) -> int:
    """Frames T of the clip that an entry gives: 4n + 1, or 1 for an image.

    `short_coin` draws a number in [0, 1); it decides whether a video shorter than `--num_frames` is dropped
    (`--drop_short_ratio`), and is asked about those only. Raises `Dropped`.
    """
    if entry.is_image:
        return 1
    longest = MAX_LENGTH_RATIO * (config.num_frames * entry.fps / config.train_fps * config.speed_factor)
    if entry.num_frames > longest:
        raise Dropped(TOO_MANY_FRAMES)
    available = grid_length(entry, config)
    if available < config.num_frames and short_coin() < config.drop_short_ratio:
        raise Dropped(SHORTER_THAN_NUM_FRAMES)
    latent_frames = (min(available, config.num_frames) - 1) // LATENT_STRIDE + 1
    latent_frames -= latent_frames % config.sp_frame_multiple
    frames = (latent_frames - 1) * LATENT_STRIDE + 1
    if frames < min(MIN_CLIP_FRAMES, config.num_frames):
        raise Dropped(TOO_FEW_FRAMES)
    return frames


def frame_indices(entry: Entry, bucket_frames: int, config: DataConfig, draw: random.Random) -> list[int]:
    """The `bucket_frames` source frame numbers, ascending, for one use of a clip; [0] for an image.

    The grid has L frames (`grid_length`), a clip up to N = `--num_frames`:

    - L <= N: the first `bucket_frames` of the grid.
    - L > N: a random window of N grid frames, of which the first `bucket_frames` are used.
    - L > N and `--speed_factor` f > 1: a step s is drawn uniformly from [1, min(f, (L - 1) / (N - 1))], and the window
      takes the grid frames start + floor(j * s), j < N. The upper bound is where N frames just fill the grid, so a
      clip is never sped up beyond what its length allows; s = 1 is the plain window.

    A source slower than `train_fps` repeats frames. Two numbers are taken from `draw` in all cases. `bucket_frames` is
    the entry's `clip_length`; raises `ValueError` if the entry cannot give that many.
    """
    step_draw, start_draw = draw.random(), draw.random()
    if entry.is_image:
        return [0]
    available = grid_length(entry, config)
    window = config.num_frames
    if bucket_frames > min(available, window):
        raise ValueError(f"{entry.path} has {available} frames at {config.train_fps} fps, not {bucket_frames}")
    step, start = 1.0, 0
    if available > window:
        if window > 1:
            step += step_draw * (min(config.speed_factor, (available - 1) / (window - 1)) - 1.0)
        span = math.floor((window - 1) * step) + 1
        start = int(start_draw * (available - span + 1))
    first, _ = usable_frames(entry)
    numerator, denominator = frame_step(entry.fps, config.train_fps)
    positions = (start + math.floor(j * step) for j in range(bucket_frames))
    return [first + position * numerator // denominator for position in positions]
