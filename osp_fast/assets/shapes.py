"""A generated data set in the real layout: coloured shapes that move, as H.264 clips and jpg images with captions.

    data.txt           three lines DATA_ROOT,ANNOTATION; the root of all is `shapes`
    videos.json        four fifths of the clips; more_videos.pkl: the others
    images.json
    shapes/clips/      33 frames of 64 x 64 at 24 fps by default, so that windows of 17 frames exist
    shapes/images/
    generated.json     the arguments; written last, so that it marks a finished folder

A kind is what a caption says: colour, shape, motion and background. Some kinds are held out, for judging a model by
what it never saw (`HELD_OUT`).

Every picture is drawn from a formula: a shape's edge is where its signed distance is 0, and coverage falls from 1 to 0
over one pixel around it, which smooths edges and makes motion by less than a pixel visible.
"""

import itertools
import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from osp_fast.config import TRAIN_PRESETS
from osp_fast.data.write import write_image, write_video
from osp_fast.errors import UserError
from osp_fast.seeding import python_random

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 190, 70),
    "blue": (60, 110, 240),
    "yellow": (240, 210, 50),
    "purple": (160, 70, 200),
    "white": (245, 245, 245),
}
BACKGROUNDS = {"dark blue": (16, 24, 72), "black": (0, 0, 0), "grey": (112, 112, 112)}


class Motion(NamedTuple):
    """In words, and as (column, row)."""

    moves: str
    moving: str
    direction: tuple[int, int]


MOTIONS = {
    "right": Motion("moves to the right", "moving to the right", (1, 0)),
    "left": Motion("moves to the left", "moving to the left", (-1, 0)),
    "up": Motion("moves up", "moving up", (0, -1)),
    "down": Motion("moves down", "moving down", (0, 1)),
    "still": Motion("stays still", "standing still", (0, 0)),
}
RADIUS = (0.18, 0.22)  # of a shape, as a part of the picture's side
TRAVEL = (0.3, 0.4)  # of a moving shape from first to last frame, as a part of the picture's side
REACH = 1.35  # radii, from a shape's centre to its farthest point but for a bar's corners
PICKLED_PART = 0.2  # of the clips, described in a .pkl instead of the .json
DATA_ROOT = "shapes"
REPORT_EVERY = 50  # files between two lines of progress
FPS = 24


def circle(x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Signed distance to a circle around the origin, pixels, negative inside."""
    return np.hypot(x, y) - radius


def ring(x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Signed distance to a ring between 0.66 and 1.2 `radius` from the origin: a circle's area."""
    return np.abs(np.hypot(x, y) - 0.93 * radius) - 0.27 * radius


def bar(x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Signed distance (inside and near the edges) to a level bar, 1.33 by 0.59 `radius` from its centre."""
    return np.maximum(np.abs(x) - 1.33 * radius, np.abs(y) - 0.59 * radius)


# They differ by most of their area. Where shapes differ by their corners alone, they are told apart only once most of
# the noise is gone, and guidance, which goes away from the mean of what could be, bends circles into diamonds.
SHAPES: dict[str, Callable[[np.ndarray, np.ndarray, float], np.ndarray]] = {
    "circle": circle,
    "ring": ring,
    "bar": bar,
}


# Not everybody says it in the same words; of an entry's captions one is drawn each time.
CLIP_CAPTIONS = (
    "a {colour} {shape} {moves} on a {background} background",
    "{colour} {shape} {moving}, {background} background",
    "on a {background} background, a {colour} {shape} {moves}",
    "a {shape} in {colour} that {moves} in front of {background}",
)
PICTURE_CAPTIONS = (
    "a {colour} {shape} on a {background} background",
    "{colour} {shape}, {background} background",
    "on a {background} background, a {colour} {shape}",
    "a {shape} in {colour} in front of {background}",
)


class Kind(NamedTuple):
    """What a caption says of a clip: names in COLOURS, SHAPES, MOTIONS and BACKGROUNDS."""

    colour: str
    shape: str
    motion: str
    background: str


KINDS = tuple(itertools.starmap(Kind, itertools.product(COLOURS, SHAPES, MOTIONS, BACKGROUNDS)))


def _held_out() -> tuple[Kind, ...]:
    """Every pair of colour and motion once, shapes and backgrounds in turn: all names occur, about equally often."""
    shapes, backgrounds = tuple(SHAPES), tuple(BACKGROUNDS)
    pairs = itertools.product(enumerate(COLOURS), enumerate(MOTIONS))
    return tuple(
        Kind(colour, shapes[(i + j) % len(shapes)], motion, backgrounds[(i - j) % len(backgrounds)])
        for (i, colour), (j, motion) in pairs
    )


HELD_OUT = _held_out()
TRAINED = tuple(kind for kind in KINDS if kind not in HELD_OUT)


@dataclass(frozen=True)
class Scene:
    """What a clip shows. Lengths are parts of the picture's side; `start` is (column, row) of the shape's centre."""

    kind: Kind
    radius: float
    travel: float
    start: tuple[float, float]

    @classmethod
    def draw(cls, number: int, seed: int, kinds: Sequence[Kind] = TRAINED) -> "Scene":
        """Scene `number`: the kinds in a shuffled order, each once before the first comes again."""
        order = list(kinds)
        python_random("shapes order", seed).shuffle(order)
        kind = order[number % len(order)]
        draw = python_random("shape", seed, number)
        radius, travel = draw.uniform(*RADIUS), draw.uniform(*TRAVEL)
        margin = REACH * radius
        start = []
        for direction in MOTIONS[kind.motion].direction:
            low = margin + max(0, -direction) * travel
            high = 1 - margin - max(0, direction) * travel
            start.append(draw.uniform(low, high))
        return cls(kind, radius, travel, (start[0], start[1]))

    def frames(self, count: int, size: int) -> np.ndarray:
        """The clip, uint8 (count, size, size, 3): the shape covers its distance at constant speed."""
        kind = self.kind
        time = np.linspace(0, 1, count)[:, None, None] if count > 1 else np.zeros((1, 1, 1))
        x0, y0 = (
            (start + direction * self.travel * time) * size
            for start, direction in zip(self.start, MOTIONS[kind.motion].direction, strict=True)
        )
        centres = np.arange(size) + 0.5
        distance = SHAPES[kind.shape](centres[None, None, :] - x0, centres[None, :, None] - y0, self.radius * size)
        coverage = np.clip(0.5 - distance, 0, 1)[..., None]
        colour, background = np.array(COLOURS[kind.colour]), np.array(BACKGROUNDS[kind.background])
        return np.round(background + coverage * (colour - background)).astype(np.uint8)


def captions(kind: Kind, moving: bool = True) -> list[str]:
    """What can be seen, in several ways to say it; `moving` tells of the motion too."""
    motion = MOTIONS[kind.motion]
    words = dict(kind._asdict(), moves=motion.moves, moving=motion.moving)
    return [caption.format(**words) for caption in (CLIP_CAPTIONS if moving else PICTURE_CAPTIONS)]


def generate_shapes(
    folder: str | Path, clips: int = 240, images: int = 90, *, size: int = 64, frames: int = 33, seed: int = 0
) -> None:
    """Make the data set in `folder`, which is complete or absent at any time; a finished one is kept as it is.

    `size` is the side of the pictures, pixels, even; `frames` the length of the clips. The same arguments give the same
    bytes with the same versions of the libraries. Raises UserError if the folder holds anything else.
    """
    folder = Path(folder)
    arguments = dict(clips=clips, images=images, size=size, frames=frames, seed=seed, version=4)
    mark = folder / "generated.json"

    def finished() -> bool:
        return mark.exists() and mark.read_text() == json.dumps(arguments)

    if finished():
        return
    if folder.exists() and not mark.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} exists and is not a generated data set: name another folder, or remove it")
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    try:
        _write_data_set(unfinished, clips, images, size, frames, seed)
        (unfinished / mark.name).write_text(json.dumps(arguments))
        if not finished():  # another process may have been faster
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(unfinished, folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}): use a folder that can") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def ensure_data(data: str | None) -> None:
    """Make the data set of `--preset tiny` if `--data` names it. Raises UserError if it cannot be written."""
    if data == TRAIN_PRESETS["tiny"]["data"]:
        generate_shapes(Path(data).parent)


def _write_data_set(unfinished: Path, clips: int, images: int, size: int, frames: int, seed: int) -> None:
    """Everything but the mark that the folder is finished."""
    for kind in ("clips", "images"):
        (unfinished / DATA_ROOT / kind).mkdir(parents=True)
    scenes = [Scene.draw(number, seed) for number in range(max(clips, images))]
    videos = [_write_clip(unfinished, number, scenes[number], frames, size, clips) for number in range(clips)]
    pictures = [_write_picture(unfinished, number, scenes[-1 - number], size, images) for number in range(images)]
    pickled = round(clips * PICKLED_PART)
    (unfinished / "videos.json").write_text(json.dumps(videos[pickled:], indent=1))
    (unfinished / "more_videos.pkl").write_bytes(pickle.dumps(videos[:pickled], protocol=4))
    (unfinished / "images.json").write_text(json.dumps(pictures, indent=1))
    annotations = ("videos.json", "more_videos.pkl", "images.json")
    (unfinished / "data.txt").write_text("".join(f"{DATA_ROOT},{name}\n" for name in annotations))


def _write_clip(folder: Path, number: int, scene: Scene, frames: int, size: int, total: int) -> dict:
    """Write clip `number`; its annotation."""
    path = f"clips/{number:04d}.mp4"
    write_video(folder / DATA_ROOT / path, scene.frames(frames, size), FPS)
    _report("clips", number + 1, total)
    return {**_entry(path, captions(scene.kind), size), "num_frames": frames, "fps": FPS}


def _write_picture(folder: Path, number: int, scene: Scene, size: int, total: int) -> dict:
    """Write image `number`, the first frame of the scene; its annotation."""
    path = f"images/{number:04d}.jpg"
    write_image(folder / DATA_ROOT / path, scene.frames(1, size)[0])
    _report("images", number + 1, total)
    return _entry(path, captions(scene.kind, moving=False), size)


def _entry(path: str, texts: list[str], size: int) -> dict:
    # An aesthetic score in the middle: no sentence about it lengthens the caption.
    return {"path": path, "cap": texts, "resolution": {"height": size, "width": size}, "aesthetic": 5.0}


def _report(kind: str, done: int, total: int) -> None:
    if done % REPORT_EVERY == 0 or done == total:
        print(f"generated {done} of {total} {kind}", file=sys.stderr, flush=True)
