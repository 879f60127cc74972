"""What a clip of the generated kind shows, read from its pixels: colour, shape, motion and background.

The background is the colour of the border. A pixel's weight is its distance from the background as a part of the
shape's, so that blurred edges count in part. Shapes differ in central moments: a bar spreads farther to the sides than
up and down, a ring farther than a disc of its area. Motion is the track of the centroids. What cannot be read, because
it is none of what `assets/shapes.py` draws, is None: a checker that always names something would find in noise what was
asked for.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from osp_fast.assets.shapes import BACKGROUNDS, COLOURS

NEAR = 70.0  # levels of 255, Euclidean: no farther is a colour from the one that it is called
UNIFORM = 0.9  # of the border's pixels are near its colour
CONTRAST = 40.0  # levels: a shape differs from the background by more
FAINT = 0.4  # of the shape's contrast: less is none of it
INSIDE = 0.85  # of the shape's contrast: a pixel well inside
AREA = (0.02, 0.25)  # of the picture
# How solid a shape is: area^2 / (4 pi sqrt(mu20 mu02)): 1 for a disc and an ellipse, 0.95 for a bar, 0.54 for the ring.
SOLID, HOLLOW = 0.87, (0.4, 0.72)
HOLE = 0.35  # of the weight of a pixel well inside: the middle of a ring has less
# How uneven it spreads: (mu20 - mu02) / (mu20 + mu02) is 0.67 for a bar and 0 for the others; 2 mu11 over the same sum
# is 0 for all, but not for what lies aslant.
ROUND, LONG = 0.2, (0.45, 0.85)
# Harmonics of moments: a triangle's third is 2.3, a half disc's 1.2, a square's fourth 0.6, those of disc and ring 0. A
# bar squeezed until it spreads evenly is a square, which an ellipse and two discs that overlap are not.
SKEWED, FOURFOLD, LIKE_A_SQUARE = 0.5, 0.3, -0.4
PLAIN = 0.8  # of the pixels well inside have the shape's colour
AGREEMENT = 0.6  # of the frames
STILL, MOVING = 0.06, 0.1  # of the picture's side, from the first to the last frame
ASTRAY, JUMP = 0.06, 0.12  # of the side: from where constant speed would be, and from one frame to the next


class Reading(NamedTuple):
    """Names as in `Kind`; None where nothing can be read."""

    colour: str | None = None
    shape: str | None = None
    motion: str | None = None
    background: str | None = None


class Blob(NamedTuple):
    """The shape in one frame: centre (column, row) as a part of the picture's side; names, None if unreadable."""

    centre: np.ndarray
    colour: str | None
    shape: str | None


def read_kind(frames: np.ndarray) -> Reading:
    """Read a clip, uint8 (T, H, W, 3)."""
    pixels = frames.astype(np.float64)
    border = np.concatenate([pixels[:, [0, -1]].reshape(-1, 3), pixels[:, :, [0, -1]].reshape(-1, 3)])
    behind = np.median(border, axis=0)
    if (np.linalg.norm(border - behind, axis=1) < NEAR).mean() < UNIFORM:
        return Reading()
    background = nearest(behind, BACKGROUNDS)
    blobs = [read_frame(frame, behind) for frame in pixels]
    found = [blob for blob in blobs if blob is not None]
    if len(found) < AGREEMENT * len(blobs):
        return Reading(background=background)
    motion = read_motion(np.stack([blob.centre for blob in found])) if len(found) == len(blobs) else None
    colour, shape = (agreed([getattr(blob, name) for blob in found], len(blobs)) for name in ("colour", "shape"))
    return Reading(colour, shape, motion, background)


def nearest(colour: np.ndarray, names: Mapping[str, tuple[int, int, int]]) -> str | None:
    """The name of the colour (3,) that is nearest, None if none is near."""
    distances = {name: float(np.linalg.norm(colour - np.array(value))) for name, value in names.items()}
    name = min(distances, key=distances.__getitem__)
    return name if distances[name] < NEAR else None


def agreed(names: Sequence[str | None], frames: int) -> str | None:
    """What most of the frames say, if enough do."""
    name, count = Counter(names).most_common(1)[0]
    return name if count >= AGREEMENT * frames else None


def read_frame(frame: np.ndarray, behind: np.ndarray) -> Blob | None:
    """The shape in one frame (H, W, 3) before a background (3,), None if there is nothing of its size."""
    distance = np.linalg.norm(frame - behind, axis=-1)
    contrast = np.percentile(distance, 100 * (1 - AREA[0]))
    weight = np.clip(distance / max(contrast, CONTRAST), 0, 1)
    weight[weight < FAINT] = 0
    if contrast < CONTRAST or not AREA[0] <= weight.mean() <= AREA[1]:
        return None
    rows, columns = np.indices(weight.shape) + 0.5
    area = weight.sum()
    centre = np.array([(weight * columns).sum(), (weight * rows).sum()]) / area
    inside = frame[distance > INSIDE * contrast]
    typical = np.median(inside, axis=0)
    plain = (np.linalg.norm(inside - typical, axis=1) < NEAR).mean() >= PLAIN
    colour = nearest(typical, COLOURS) if plain else None
    shape = read_shape(weight, columns - centre[0], rows - centre[1])
    return Blob(centre / np.array(weight.shape[::-1]), colour, shape)


def read_shape(weight: np.ndarray, x: np.ndarray, y: np.ndarray) -> str | None:
    """circle, ring or bar by the central moments of weights at x, y (all (H, W)); None for any other."""
    area, wide, high = (float((weight * values).sum()) for values in (1, x**2, y**2))
    solid = area**2 / (4 * np.pi * np.sqrt(wide * high))
    uneven, oblique = (wide - high) / (wide + high), 2 * float((weight * x * y).sum()) / (wide + high)
    long = LONG[0] < uneven < LONG[1]
    third, fourth = harmonics(weight, x / np.sqrt(wide / area), y / np.sqrt(high / area))
    if abs(oblique) > ROUND or third > SKEWED or not (long or abs(uneven) < ROUND):
        return None
    if long:
        return "bar" if solid > SOLID and fourth.real < LIKE_A_SQUARE else None
    if abs(fourth) > FOURFOLD:
        return None
    if solid > SOLID:
        return "circle"
    middle = weight[np.hypot(x, y) < 0.5 * np.sqrt((wide + high) / area / 2)]
    return "ring" if HOLLOW[0] < solid < HOLLOW[1] and middle.mean() < HOLE else None


def harmonics(weight: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[float, complex]:
    """Third (its size) and fourth harmonic of the angle in moments of weights at x, y (all (H, W)), which spread by 1.

    A square's fourth is -0.6 with level sides, 0.6 on its tip, imaginary halfway between.
    """
    angle = (x + 1j * y) / np.sqrt(2)
    area = weight.sum()
    return float(abs((weight * angle**3).sum() / area)) * 2**1.5, complex((weight * angle**4).sum() / area)


def read_motion(centres: np.ndarray) -> str | None:
    """right, left, up, down or still, of a track of centres (T, 2) as parts of the side; None for any other."""
    if len(centres) < 2:
        return None
    way = centres[-1] - centres[0]
    line = centres[0] + np.linspace(0, 1, len(centres))[:, None] * way
    if np.abs(np.diff(centres, axis=0)).max() > JUMP:
        return None
    if np.abs(centres - centres[0]).max() < STILL:
        return "still"
    along = int(np.abs(way).argmax())
    if abs(way[along]) < MOVING or np.abs(centres - line).max() > ASTRAY or abs(way[1 - along]) > MOVING:
        return None
    return (("left", "right"), ("up", "down"))[along][int(way[along] > 0)]
