"""From a source frame to the pixels of a bucket: crop, resize, centre-crop.

Sizes are computed in integers: floor(h * sqrt(area / (h * w))) is the integer square root of h * area / w, so a side
that fits exactly never loses a stride to rounding.
"""

import math
from dataclasses import dataclass

from osp_fast.config import DataConfig
from osp_fast.data.annotations import Dropped

ASPECT_RATIO = "aspect ratio"
TOO_SMALL = "too small"

MAX_ASPECT = 2  # height / width, or its inverse


@dataclass(frozen=True, slots=True)
class Geometry:
    """What is done to each source frame, in this order; all in pixels.

    The rectangle `source` = (x0, x1, y0, y1) is cut out, resized to `resize_h` x `resize_w`, and the centre of the
    bucket's size is cropped from that (`centre_offset`).
    """

    source: tuple[int, int, int, int]
    resize_h: int
    resize_w: int


def centre_offset(length: int, cropped: int) -> int:
    """Where a centre crop of `cropped` pixels starts in `length` pixels; half a pixel goes to the even side."""
    return round((length - cropped) / 2)


def place(
    height: int, width: int, crop: tuple[int, int, int, int] | None, config: DataConfig
) -> tuple[Geometry, int, int]:
    """The geometry of a source frame of height x width, and its bucket's height and width.

    The first rule that the flags give is used: `--force_resolution`, `--max_hxw`, `--max_height` with `--max_width`.
    Raises `Dropped`.
    """
    source = crop if crop is not None else (0, width, 0, height)
    if config.force_resolution:
        geometry = _forced(source, config.max_height, config.max_width)
        return geometry, config.max_height, config.max_width
    x0, x1, y0, y1 = source
    resize_h, resize_w = _fit(y1 - y0, x1 - x0, config)
    bucket_h, bucket_w = (side - side % config.hw_stride for side in (resize_h, resize_w))
    if bucket_h == 0 or bucket_w == 0 or _below_minimum(bucket_h, bucket_w, config):
        raise Dropped(TOO_SMALL)
    if bucket_h > MAX_ASPECT * bucket_w or bucket_w > MAX_ASPECT * bucket_h:
        raise Dropped(ASPECT_RATIO)
    return Geometry(source, resize_h, resize_w), bucket_h, bucket_w


def _forced(source: tuple[int, int, int, int], target_h: int, target_w: int) -> Geometry:
    """The centre of `source` that has the target's aspect ratio, resized (also up) to the target."""
    x0, x1, y0, y1 = source
    height, width = y1 - y0, x1 - x0
    # (h / w) / (target_h / target_w) without division
    ratio, target_ratio = height * target_w, width * target_h
    if ratio > MAX_ASPECT * target_ratio or target_ratio > MAX_ASPECT * ratio:
        raise Dropped(ASPECT_RATIO)
    if ratio > target_ratio:
        cropped = max(1, width * target_h // target_w)
        y0 += centre_offset(height, cropped)
        y1 = y0 + cropped
    else:
        cropped = max(1, height * target_w // target_h)
        x0 += centre_offset(width, cropped)
        x1 = x0 + cropped
    return Geometry((x0, x1, y0, y1), target_h, target_w)


def _fit(height: int, width: int, config: DataConfig) -> tuple[int, int]:
    """The size after shrinking to the greatest area, or to the greatest height and width; never enlarged."""
    if config.max_hxw is not None:
        if height * width <= config.max_hxw:
            return height, width
        return math.isqrt(config.max_hxw * height // width), math.isqrt(config.max_hxw * width // height)
    max_h, max_w = config.max_height, config.max_width
    if height <= max_h and width <= max_w:
        return height, width
    if height * max_w >= width * max_h:  # the height binds
        return max_h, width * max_h // height
    return height * max_w // width, max_w


def _below_minimum(height: int, width: int, config: DataConfig) -> bool:
    if config.max_hxw is not None:
        least = config.max_hxw / 4 if config.min_hxw is None else config.min_hxw
        return height * width < least
    return height < (config.min_height or 0) or width < (config.min_width or 0)
