"""Frames by presentation number, exactly: the one place that reads pixels from videos and images.

A frame's number is its place, from 0, in the order in which a player shows the file: B-frames are counted where they
are shown, frames that an edit list cuts away are not counted, and the frame rate may vary. Packets are read from a
little in front of the needed frames on, and their timestamps give the numbers (`packet_scan.py`); decoding starts at
the keyframe at or before the first needed frame and ends with the last needed packet, while other threads convert the
decoded frames to RGB (`rgb.py`).

Runs in a child process (`decode_server.py`), so it imports neither torch nor anything that does.
"""

import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from osp_fast.data.clip_request import ClipRequest, DecodeError
from osp_fast.data.packet_scan import PacketScan
from osp_fast.data.rgb import Orientation, RgbWriter
from osp_fast.errors import UserError

PIXEL_LIMIT = 1 << 27  # of a picture; larger ones are taken for decompression bombs


def decode_clip(request: ClipRequest, out: np.ndarray) -> None:
    """Decode the frames that `request` names into `out`, uint8 of shape `request.shape`, RGB.

    Raises DecodeError where the file is missing, damaged, or not what its annotation says.
    """
    x0, x1, y0, y1 = request.rect
    if not (0 <= x0 < x1 <= request.width and 0 <= y0 < y1 <= request.height):
        raise DecodeError(f"area {list(request.rect)} is not inside {request.width}x{request.height}")
    _check_file(request.file)
    if request.is_image:
        _decode_image(request, out)
    else:
        _decode_video(request, out)


def _check_file(file: str) -> None:
    """Refuse what is no file or holds nothing. A pipe may pass: the deadline deals with it."""
    try:
        status = os.stat(file)
    except FileNotFoundError:
        raise DecodeError("missing") from None
    except OSError as error:
        raise DecodeError(f"cannot be opened: {error.strerror}") from None
    if stat.S_ISDIR(status.st_mode):
        raise DecodeError("is a directory")
    if stat.S_ISREG(status.st_mode) and status.st_size == 0:
        raise DecodeError("empty (0 bytes)")


def _check_size(height: int, width: int, request: ClipRequest) -> None:
    if (height, width) != (request.height, request.width):
        annotated = f"{request.width}x{request.height}"
        raise DecodeError(f"decoded size {width}x{height} differs from annotated {annotated}", whole_file=False)


# Images -------------------------------------------------------------------------------------------------------------


def _decode_image(request: ClipRequest, out: np.ndarray) -> None:
    """Decode an image as it is shown (EXIF orientation applied, alpha ignored) into every frame of `out`."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(request.file) as image:
            if image.width * image.height > PIXEL_LIMIT:
                raise DecodeError(f"{image.width}x{image.height} is more than {PIXEL_LIMIT} pixels")
            pixels = _image_to_rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError:
        raise DecodeError("not an image") from None
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise DecodeError(f"damaged image: {error}") from None
    _check_size(pixels.shape[0], pixels.shape[1], request)
    x0, x1, y0, y1 = request.rect
    out[:] = pixels[y0:y1, x0:x1]


def _image_to_rgb(image: Any) -> np.ndarray:
    """A Pillow image of any mode -> uint8 (H, W, 3); 16-bit grey keeps its upper byte, where Pillow would clip."""
    if image.mode.startswith("I"):
        grey = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    return np.asarray(image.convert("RGB"))


# Videos -------------------------------------------------------------------------------------------------------------


def _decode_video(request: ClipRequest, out: np.ndarray) -> None:
    """Decode from the nearest keyframe; where that does not give every frame, from the start of the file."""
    import av

    for from_start in (False, True):
        with _open(request.file, request.threads) as (container, stream):
            try:
                missing = _decode_stream(container, stream, request, out, from_start)
            except (av.error.FFmpegError, ValueError) as error:
                raise DecodeError(f"cannot be decoded: {error}", whole_file=False) from None
        if missing is None:
            return
    raise DecodeError(f"frame {missing} cannot be decoded", whole_file=False)


def _decode_stream(container: Any, stream: Any, request: ClipRequest, out: np.ndarray, from_start: bool) -> int | None:
    """Decode the frames into `out`; the number of the first that the decoder does not deliver, or None."""
    scan = PacketScan(container, stream, request.indices[0], request.indices[-1], from_start)
    if scan.numbered:
        _check_count(scan, request)
        timestamps = scan.timestamps(request.indices)
        packets = scan.packets(timestamps)
        frames = _decode_packets(stream, packets, set(timestamps))
        if packets and not from_start:
            frames = _behind_intra(frames, packets[0].pts)
        return _write_frames(((frame.pts, frame) for frame in frames), timestamps, request, out)
    # Without usable timestamps, count the frames that the decoder delivers.
    with _open(request.file, request.threads) as (container, stream):
        frames = _decode_packets(stream, container.demux(stream))
        missing = _write_frames(enumerate(frames), list(request.indices), request, out)
    if missing is not None:
        reason = f"has no frame {missing}, but the annotation says {request.num_frames} frames"
        raise DecodeError(reason, whole_file=False)
    return None


@contextmanager
def _open(file: str, threads: int) -> Iterator[tuple[Any, Any]]:
    """The file's av container and its main video stream (a cover picture is none), set up for decoding."""
    import av

    try:
        container = av.open(file)
    except av.error.InvalidDataError:
        raise DecodeError(_why_invalid(file)) from None
    except (av.error.FFmpegError, ValueError) as error:
        raise DecodeError(f"cannot be opened: {error}") from None
    with container:
        stream = container.streams.best("video")
        if stream is None:
            raise DecodeError("no video stream")
        context = stream.codec_context
        if context is None:
            raise DecodeError("no decoder for its video codec")
        context.thread_type = "AUTO"
        context.thread_count = threads
        context.options = {"max_pixels": str(PIXEL_LIMIT)}
        yield container, stream


def _why_invalid(file: str) -> str:
    with open(file, "rb") as handle:
        if handle.read(12)[4:8] == b"ftyp":
            return "truncated or damaged: an mp4 file without a readable index"
    return "not a video, or damaged"


def _check_count(scan: PacketScan, request: ClipRequest) -> None:
    """Hold the number of frames against the annotation's, from the container's index where that suffices."""
    size = os.path.getsize(request.file)
    end = max((entry.pos + entry.size for entry in scan.index), default=0)
    if end > size:
        raise DecodeError(f"truncated: {size} of at least {end} bytes")
    if not scan.complete and scan.stored < request.num_frames:
        scan.read_to_end()
    stored = max(scan.stored, scan.total)
    if scan.complete and stored < request.num_frames:
        reason = f"has only {stored} frames, but the annotation says {request.num_frames}"
        raise DecodeError(reason, whole_file=False)
    if request.indices[-1] >= scan.shown_total:
        shown = f"only {scan.shown_total} of its {stored} frames are shown"
        raise DecodeError(f"frame {request.indices[-1]} is needed, but {shown}", whole_file=False)


def _decode_packets(stream: Any, packets: Iterable[Any], wanted: set[int] | None = None) -> Iterator[Any]:
    """Frames of the packets, then those that the decoder still holds; packets that it refuses are passed over.

    With `wanted`, the timestamps of the frames that matter, H.264 frames beside them that no other frame refers to
    need not be decoded (other codecs mark such frames less reliably).
    """
    import av

    context = stream.codec_context
    skip = wanted is not None and context.name == "h264"
    for packet in packets:
        if not packet.size:
            continue
        if skip:
            context.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
        try:
            yield from context.decode(packet)
        except av.error.InvalidDataError:  # as players do; a frame that is missing in the end is an error
            continue
    yield from context.decode(None)


def _behind_intra(frames: Iterator[Any], timestamp: int) -> Iterator[Any]:
    """The frames from the one at `timestamp` on if that is an intact intra-coded picture, else none.

    What a container calls a keyframe may be the start of a gradual refresh, behind which frames are whole much later.
    """
    from av.video.frame import PictureType

    for frame in frames:
        if frame.pts == timestamp:
            if frame.pict_type == PictureType.I and not frame.is_corrupt:
                yield frame
                yield from frames
            return


def _write_frames(
    frames: Iterable[tuple[int, Any]], keys: list[int], request: ClipRequest, out: np.ndarray
) -> int | None:
    """Write the frame of key keys[i] (ascending) into out[i]; the number of the first missing frame, or None."""
    slots: dict[int, list[int]] = {}
    for slot, key in enumerate(keys):
        slots.setdefault(key, []).append(slot)
    orientation = None
    with RgbWriter(out, request.rect) as writer:
        for key, frame in frames:
            if key not in slots or frame.is_corrupt:
                continue
            orientation = orientation or Orientation.of_frame(frame)
            _check_size(*orientation.shown_size(frame.height, frame.width), request)
            writer.put(frame, slots.pop(key), orientation)
            if not slots:
                return None
    return request.indices[min(slots.values())[0]]


@dataclass(frozen=True)
class VideoFacts:
    """Of a video as shown: pixels, frames per second (0: unknown), and how many frames its file says it has (or 0)."""

    height: int
    width: int
    fps: float
    frames: int


@contextmanager
def open_video(file: str | Path, piece: int = 4) -> Iterator[tuple[VideoFacts, Iterator[np.ndarray]]]:
    """A video's facts and its frames as shown, in pieces uint8 (t, H, W, 3), decoded in this process as they are taken.

    Raises UserError, also from the frames, if the file cannot be read as a video.
    """
    import av

    try:
        _check_file(str(file))
        with _open(str(file), threads=0) as (container, stream):
            frames = _decode_packets(stream, container.demux(stream))
            first = next(frames, None)
            if first is None:
                raise DecodeError("no frame can be decoded")
            orientation = Orientation.of_frame(first)
            rate = float(stream.average_rate or 0)
            count = stream.frames or round(float((stream.duration or 0) * (stream.time_base or 0)) * rate)
            facts = VideoFacts(*orientation.shown_size(first.height, first.width), rate, count)
            yield facts, _pieces(chain((first,), frames), facts, orientation, piece)
    except (DecodeError, av.error.FFmpegError, ValueError) as error:
        raise UserError(f"{file} cannot be read as a video: {error}; give a video file") from None


def _pieces(frames: Iterator[Any], facts: VideoFacts, orientation: Orientation, piece: int) -> Iterator[np.ndarray]:
    """Decoded frames in arrays of up to `piece` frames. Raises DecodeError where the picture's size changes."""
    while group := list(islice(frames, piece)):
        out = np.empty((len(group), facts.height, facts.width, 3), np.uint8)
        with RgbWriter(out, (0, facts.width, 0, facts.height)) as writer:
            for slot, frame in enumerate(group):
                if orientation.shown_size(frame.height, frame.width) != (facts.height, facts.width):
                    raise DecodeError("the size of its pictures changes")
                writer.put(frame, [slot], orientation)
        yield out


def read_video(file: str | Path) -> np.ndarray:
    """All frames of a video as shown, uint8 (T, H, W, 3), decoded in this process; UserError if that fails."""
    with open_video(file) as (_, pieces):
        return np.concatenate(list(pieces))


def read_image(file: str | Path) -> np.ndarray:
    """An image as shown, uint8 (H, W, 3); UserError if it cannot be read."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            return np.asarray(_image_to_rgb(image))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as an image ({error}): make it again") from None
