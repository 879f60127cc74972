"""Read data.txt and its annotation files into lean entries.

A broken file ends in one `UserError`. A broken entry does not: a data set of a million entries must survive an odd
one, so it is yielded as a `Dropped` with its reason, which the plan counts.
"""

import json
import math
import os
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, NoReturn

from osp_fast.errors import UserError

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")
ANNOTATION_EXTENSIONS = (".json", ".pkl")
DEFAULT_FPS = 24.0
FPS_BOUNDS = (0.01, 10_000.0)  # frames per second; beyond them a number is a mistake, not a frame rate
MAX_INTEGER = 2**31 - 1  # of pixels or frames; keeps all arithmetic on them exact
# The text encoder reads 512 tokens; a "caption" far beyond that is a mistake, and slow to clean.
MAX_CAPTION_CHARACTERS = 20_000

NO_CAPTION = "no caption"
NO_RESOLUTION = "no resolution"
NON_POSITIVE_RESOLUTION = "non-positive resolution"
NO_NUM_FRAMES = "no num_frames"
MALFORMED = "malformed "  # followed by the field


@dataclass(frozen=True, slots=True)
class Entry:
    """One usable line of an annotation: a video or an image with its captions.

    Lengths are frames of the source file, sizes its pixels.
    """

    path: str  # DATA_ROOT/path exactly as written; how the entry is named in reports
    file: str  # where it is on disk
    captions: tuple[str, ...]  # at least one, none blank, as written (not cleaned)
    height: int
    width: int
    num_frames: int  # 1 for images
    fps: float
    aesthetic: float | None
    crop: tuple[int, int, int, int] | None  # x0, x1, y0, y1
    cut: tuple[int, int] | None  # first usable frame, frame after the last one
    is_image: bool
    root: str = ""  # DATA_ROOT as written

    @property
    def name(self) -> str:
        """The path as the annotation has it, the same wherever the data are."""
        return self.path.removeprefix(self.root).lstrip("/")


class Dropped(Exception):
    """Why one entry is not used. `reason` is what drops are counted by, `where` names the entry."""

    def __init__(self, reason: str, where: str = ""):
        super().__init__(reason)
        self.reason = reason
        self.where = where


class _PlainUnpickler(pickle.Unpickler):
    """Reads lists, dicts, strings and numbers. A pickle that names any code is refused before the code is imported."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it refers to {f'{module}.{name}'!r}")

    def persistent_load(self, pid: Any) -> NoReturn:
        raise pickle.UnpicklingError("it refers to objects outside the file")


def read_entries(data: str, report: Callable[[str], None] | None = None) -> Iterator[Entry | Dropped]:
    """Every entry of every annotation file that data.txt names, in annotation order.

    `data` is the path of data.txt: lines `DATA_ROOT,ANNOTATION`, blank lines ignored. Relative paths in it are relative
    to the current directory, as upstream; what is not there is looked for beside data.txt. An entry that cannot be used
    is yielded as a `Dropped`. `report` gets one line per annotation file.

    Raises `UserError` for a file that is missing or broken as a whole.
    """
    for root, annotation, line in _read_data_lines(data):
        records = _load_records(annotation, f"{data}, line {line}")
        dropped = 0
        folder = _locate(root, data)
        for number, record in enumerate(records, start=1):
            try:
                yield parse_entry(record, root, folder)
            except Dropped as drop:
                dropped += 1
                drop.where = f"{annotation}, entry {number}"
                yield drop
        if report is not None:
            report(f"read {annotation}: {len(records)} entries, {dropped} of them unusable as written")
        del records  # before the next file is loaded: both at once may not fit


def _read_data_lines(data: str) -> list[tuple[str, str, int]]:
    """(DATA_ROOT as written, path of the annotation file, line number) of each line of data.txt."""
    try:
        with open(data, encoding="utf-8-sig") as file:
            lines = [line.strip() for line in file]
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{data}: --data cannot be read ({reason}); give a text file of DATA_ROOT,ANNOTATION lines"
        ) from error
    parts = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        fields = [field.strip() for field in line.split(",")]
        if len(fields) != 2 or not all(fields):
            raise UserError(f"{data}, line {number}: write it as DATA_ROOT,ANNOTATION with one comma, got {line!r}")
        root, annotation = fields
        if not annotation.lower().endswith(ANNOTATION_EXTENSIONS):
            raise UserError(f"{data}, line {number}: the annotation {annotation!r} must be a .json or a .pkl file")
        parts.append((root, _locate(annotation, data), number))
    if not parts:
        raise UserError(f"{data}: --data names no annotation; add a line DATA_ROOT,ANNOTATION")
    return parts


def _locate(path: str, data: str) -> str:
    """`path`, or where it is beside data.txt if it is relative and not in the current directory."""
    beside = os.path.join(os.path.dirname(data), path)
    return beside if not os.path.exists(path) and os.path.exists(beside) else path


def _load_records(annotation: str, where: str) -> list | tuple:
    """The list in an annotation file; `where` names the line of data.txt that asked for it."""
    try:
        with open(annotation, "rb") as file:
            records = _load_pickle(file) if annotation.lower().endswith(".pkl") else json.loads(file.read())
    except OSError as error:
        raise UserError(
            f"{where}: the annotation {annotation} cannot be opened ({error.strerror}); correct its path"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{annotation}: not valid JSON ({error}); write the annotation again") from error
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{annotation}: the pickle is refused because {error}; write it again as a plain list of dicts"
        ) from error
    if not isinstance(records, list | tuple):
        raise UserError(f"{annotation}: the annotation must be a list of entries, got {type(records).__name__}")
    return records


def _load_pickle(file: BinaryIO) -> Any:
    try:
        return _PlainUnpickler(file).load()
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # damaged bytes can make the unpickler raise nearly anything
        raise pickle.UnpicklingError(f"it is damaged ({type(error).__name__}: {error})") from error


def parse_entry(record: Any, root: str, folder: str) -> Entry:
    """One annotation record as an `Entry`; fields that are not used (tech, motion, ...) are not looked at.

    `root` is DATA_ROOT as written, `folder` where it is on disk. Raises `Dropped`.
    """
    if not isinstance(record, dict):
        raise Dropped(MALFORMED + "entry")
    name = record.get("path")
    if not isinstance(name, str) or not _is_file_name(name):
        raise Dropped(MALFORMED + "path")
    captions = _captions(record.get("cap"))
    height, width = _resolution(record.get("resolution"))
    crop = _crop(record.get("crop"), height, width)
    is_image = name.lower().endswith(IMAGE_EXTENSIONS)
    num_frames, fps, cut = (1, DEFAULT_FPS, None) if is_image else _timing(record)
    path = os.path.join(root, name)
    return Entry(
        path=path,
        file=path if folder == root else os.path.join(folder, name),
        captions=captions,
        height=height,
        width=width,
        num_frames=num_frames,
        fps=fps,
        aesthetic=_aesthetic(record.get("aesthetic")),
        crop=crop,
        cut=cut,
        is_image=is_image,
        root=root,
    )


def _is_file_name(name: str) -> bool:
    """Whether a file can have this name, and reports, which are UTF-8, can say it."""
    try:
        return bool(name) and b"\0" not in name.encode()
    except UnicodeEncodeError:
        return False


def _captions(cap: Any) -> tuple[str, ...]:
    texts = (cap,) if isinstance(cap, str) else () if cap is None else cap
    if not isinstance(texts, list | tuple):
        raise Dropped(MALFORMED + "cap")
    if not all(isinstance(text, str) and len(text) <= MAX_CAPTION_CHARACTERS for text in texts):
        raise Dropped(MALFORMED + "cap")
    captions = tuple(text for text in texts if text.strip())
    if not captions:
        raise Dropped(NO_CAPTION)
    return captions


def _resolution(resolution: Any) -> tuple[int, int]:
    if resolution is None:
        raise Dropped(NO_RESOLUTION)
    if not isinstance(resolution, dict):
        raise Dropped(MALFORMED + "resolution")
    height, width = (_integer(resolution.get(side), "resolution") for side in ("height", "width"))
    if height <= 0 or width <= 0:
        raise Dropped(NON_POSITIVE_RESOLUTION)
    return height, width


def _crop(crop: Any, height: int, width: int) -> tuple[int, int, int, int] | None:
    if crop is None:
        return None
    x0, x1, y0, y1 = _integers(crop, 4, "crop")
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise Dropped(MALFORMED + "crop")
    return x0, x1, y0, y1


def _timing(record: dict) -> tuple[int, float, tuple[int, int] | None]:
    """num_frames, fps and cut of a video."""
    if record.get("num_frames") is None:
        raise Dropped(NO_NUM_FRAMES)
    num_frames = _integer(record["num_frames"], "num_frames")
    if num_frames <= 0:
        raise Dropped(MALFORMED + "num_frames")
    fps = record.get("fps")
    fps = DEFAULT_FPS if fps is None else _number(fps, "fps")
    if not FPS_BOUNDS[0] <= fps <= FPS_BOUNDS[1]:
        raise Dropped(MALFORMED + "fps")
    if record.get("cut") is None:
        return num_frames, fps, None
    begin, end = _integers(record["cut"], 2, "cut")
    if not 0 <= begin < end:
        raise Dropped(MALFORMED + "cut")
    return num_frames, fps, (begin, end)


def _aesthetic(score: Any) -> float | None:
    return None if score is None else _number(score, "aesthetic")


def _number(value: Any, field: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MAX_INTEGER:
        raise Dropped(MALFORMED + field)  # NaN and infinities fail the comparison
    return float(value)


def _integer(value: Any, field: str) -> int:
    """A whole number; 720.0 is one, as tables with gaps write integers that way."""
    number = _number(value, field)
    if not math.floor(number) == number:
        raise Dropped(MALFORMED + field)
    return int(number)


def _integers(values: Any, count: int, field: str) -> list[int]:
    if not isinstance(values, list | tuple) or len(values) != count:
        raise Dropped(MALFORMED + field)
    return [_integer(value, field) for value in values]
