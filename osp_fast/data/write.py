"""Videos, images, grids and contact sheets on disk; a file is complete or absent."""

import math
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import numpy as np

from osp_fast.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
WAITING_PIECES = 2  # of a video, between those who make them and the encoder
GRID_GAP = 2  # pixels between the cells of a grid
SHEET_MARGIN = 8  # pixels around each row of a contact sheet
SHEET_CELL = 96  # pixels; smaller frames are enlarged on a contact sheet, by a whole factor
CAPTION_SIZE = 14  # pixels, height of a contact sheet's letters


def write_video(path: str | Path, frames: np.ndarray, fps: float, crf: int = 17) -> None:
    """Write uint8 frames (T, H, W, 3), RGB, by a `VideoWriter`. Raises UserError if the file cannot be written."""
    with VideoWriter(path, fps, crf) as writer:
        writer.write(_checked(frames, 4))


class _Discarded(Exception):
    """The caller failed, so the video is not to be."""


class VideoWriter:
    """A video that is written as its frames come, as H.264 that every player and browser shows.

    `fps` is in frames per second; `crf` is x264's quality, 0 (best) .. 51. Colours are BT.709, limited range. A row or
    column is repeated where H or W is odd, which yuv420p cannot hold. A thread encodes, so that the caller can make the
    next frames meanwhile. A context manager: the file is there when it is left, or not at all if by an exception.
    UserErrors, if the file cannot be written, come from the next call.
    """

    def __init__(self, path: str | Path, fps: float, crf: int = 17):
        self._path, self._crf = path, crf
        self._rate = Fraction(fps).limit_denominator(1001)
        self._pieces: queue.Queue[np.ndarray | None] = queue.Queue(WAITING_PIECES)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._ended = self._discarded = False

    def __enter__(self) -> "VideoWriter":
        self._thread = threading.Thread(target=self._run, name=f"writer of {self._path}", daemon=True)
        self._thread.start()
        return self

    def write(self, frames: np.ndarray) -> None:
        """Add uint8 frames (T, H, W, 3), RGB, all of one size; they must not be changed afterwards."""
        frames = _checked(frames, 4)
        if self._error is not None:
            raise self._error
        self._pieces.put(frames)

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._discarded = kind is not None
        self._pieces.put(None)
        self._thread.join()
        if kind is None and self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            self._encode(self._given())
        except Exception as error:  # told to the caller, in its own thread
            self._error = error
            for _ in self._given():  # so that it is not left waiting
                pass

    def _given(self) -> Iterator[np.ndarray]:
        """The pieces until the end, which is met once."""
        while not self._ended:
            piece = self._pieces.get()
            self._ended = piece is None
            if piece is not None:
                yield piece

    def _encode(self, pieces: Iterator[np.ndarray]) -> None:
        import av
        from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, VideoReformatter

        fast = {"movflags": "+faststart"}
        with _replacing(self._path) as unfinished, av.open(unfinished, "w", options=fast) as container:
            rate = self._rate
            stream = container.add_stream("libx264", rate=rate, options={"crf": str(self._crf), **_reproducible()})
            stream.pix_fmt = "yuv420p"
            context = stream.codec_context
            context.thread_count = 2  # a fixed number: the bytes depend on it
            context.colorspace, context.color_range = int(Colorspace.ITU709), int(ColorRange.MPEG)
            context.color_primaries, context.color_trc = int(ColorPrimaries.BT709), int(ColorTrc.BT709)
            reformatter = VideoReformatter()
            number = 0
            for piece in pieces:
                odd = [(0, 0), (0, piece.shape[1] % 2), (0, piece.shape[2] % 2), (0, 0)]
                for frame in np.pad(piece, odd, mode="edge") if any(map(sum, odd)) else piece:
                    if number == 0:
                        stream.height, stream.width = frame.shape[:2]
                    picture = reformatter.reformat(
                        av.VideoFrame.from_ndarray(np.ascontiguousarray(frame)),
                        format="yuv420p",
                        dst_colorspace=Colorspace.ITU709,
                        dst_color_range=ColorRange.MPEG,
                    )
                    picture.pts, picture.time_base = number, 1 / rate
                    container.mux(stream.encode(picture))
                    number += 1
            if self._discarded:
                raise _Discarded
            container.mux(stream.encode(None))


def write_image(path: str | Path, frame: np.ndarray, quality: int = 95) -> None:
    """Write a uint8 frame (H, W, 3), RGB, as the suffix of `path` says; `quality` is that of .jpg and .webp.

    Raises UserError if the suffix is unknown or the file cannot be written.
    """
    from PIL import Image

    if Path(path).suffix.lower() not in IMAGE_SUFFIXES:
        raise UserError(f"{path}: an image's name must end with one of {', '.join(IMAGE_SUFFIXES)}")
    image = Image.fromarray(np.ascontiguousarray(_checked(frame, 3)))
    with _replacing(path) as unfinished:
        image.save(unfinished, quality=quality)


def video_grid(videos: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """Videos (T, H, W, 3) side by side, `columns` in a row, on black: uint8 (longest T, grid H, grid W, 3).

    Shorter videos keep their last frame; smaller ones sit in the upper left corner of their cell.
    """
    videos = [_checked(video, 4) for video in videos]
    frames, height, width = np.max([video.shape[:3] for video in videos], axis=0)
    columns = min(columns, len(videos))
    rows = math.ceil(len(videos) / columns)
    cell_h, cell_w = height + GRID_GAP, width + GRID_GAP
    grid = np.zeros((frames, rows * cell_h - GRID_GAP, columns * cell_w - GRID_GAP, 3), np.uint8)
    for place, video in enumerate(videos):
        y, x = place // columns * cell_h, place % columns * cell_w
        grid[: len(video), y : y + video.shape[1], x : x + video.shape[2]] = video
        grid[len(video) :, y : y + video.shape[1], x : x + video.shape[2]] = video[-1]
    return grid


def image_grid(frames: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """Frames (H, W, 3) side by side, `columns` in a row, on black: uint8 (grid H, grid W, 3)."""
    return video_grid([_checked(frame, 3)[None] for frame in frames], columns)[0]


def contact_sheet(
    path: str | Path, videos: Sequence[np.ndarray], captions: Sequence[str], columns_of_frames: int = 5
) -> None:
    """Write one image with a row for each video (T, H, W, 3): its caption, below it frames spread over its length."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(CAPTION_SIZE)
    strips = [_strip(_checked(video, 4), columns_of_frames) for video in videos]
    width = max(strip.shape[1] for strip in strips)
    titles = [_wrap(caption, width, font.getlength) for caption in captions]
    line = CAPTION_SIZE + 4
    heights = [
        len(title) * line + strip.shape[0] + 2 * SHEET_MARGIN for title, strip in zip(titles, strips, strict=True)
    ]
    sheet = Image.new("RGB", (width + 2 * SHEET_MARGIN, sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    y = 0
    for title, strip, height in zip(titles, strips, heights, strict=True):
        for number, text in enumerate(title):
            draw.text((SHEET_MARGIN, y + SHEET_MARGIN + number * line), text, fill="black", font=font)
        sheet.paste(Image.fromarray(strip), (SHEET_MARGIN, y + SHEET_MARGIN + len(title) * line))
        y += height
    write_image(path, np.asarray(sheet))


def _strip(video: np.ndarray, count: int) -> np.ndarray:
    """`count` frames (fewer if there are not so many) from the first to the last, side by side."""
    chosen = np.linspace(0, len(video) - 1, min(count, len(video))).round().astype(int)
    enlarge = max(1, SHEET_CELL // video.shape[1])
    frames = video[chosen].repeat(enlarge, axis=1).repeat(enlarge, axis=2)
    return image_grid(list(frames), len(frames))


def _wrap(text: str, width: int, length: Callable[[str], float]) -> list[str]:
    """The text in lines of at most `width` pixels; a longer word stays whole."""
    lines: list[str] = []
    for word in text.split():
        if lines and length(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _checked(frames: np.ndarray, dimensions: int) -> np.ndarray:
    """The frames, if they are uint8 RGB with the given number of dimensions and not empty; else ValueError."""
    if frames.dtype != np.uint8 or frames.ndim != dimensions or frames.shape[-1] != 3 or not frames.size:
        raise ValueError(f"frames must be uint8, RGB, {dimensions}-D: got {frames.dtype} {frames.shape}")
    return frames


def _reproducible() -> dict[str, str]:
    """Options that keep x264 from its AVX-512 code, which lets bytes of unused memory into its decisions."""
    cpu = Path("/proc/cpuinfo")
    return {"x264-params": "asm=avx2"} if cpu.exists() and "avx512" in cpu.read_text() else {}


@contextmanager
def _replacing(path: str | Path) -> Iterator[str]:
    """A temporary name beside `path`; what is written there becomes `path` on success and is removed otherwise."""
    path = Path(path)
    unfinished = path.with_name(f".{path.stem}.unfinished{path.suffix}")
    try:
        yield str(unfinished)
        os.replace(unfinished, path)
    except OSError as error:  # FFmpeg's errors are among them
        raise UserError(f"{path} cannot be written ({error.strerror or error}): name another folder") from error
    finally:
        unfinished.unlink(missing_ok=True)
