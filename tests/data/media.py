"""Videos of every kind that the decoder must get right, and the frames that a plain sequential decode gives."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def picture(number: int, height: int = 48, width: int = 64) -> np.ndarray:
    """A picture (height, width, 3) that differs from its neighbours everywhere: sliding ramps and a moving block."""
    rows, columns = np.mgrid[:height, :width]
    red = (rows * 3 + number * 7) % 256
    green = (columns * 2 + number * 5) % 256
    blue = np.full_like(red, number * 11 % 256)
    frame = np.stack([red, green, blue], axis=-1).astype(np.uint8)
    x = number * 3 % (width - 8)
    frame[4:12, x : x + 8] = 255
    return frame


def write_clip(
    path: Path,
    frames: int = 24,
    *,
    height: int = 48,
    width: int = 64,
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    times: list[int] | None = None,
    rotation: float | None = None,
    pix_fmt: str = "yuv420p",
    muxing: dict[str, str] | None = None,
) -> Path:
    """Encode `picture(0)`, `picture(1)`, ... at 24 fps, or at the given times in units of 1/240 s."""
    with av.open(str(path), "w", options=muxing or {}) as container:
        stream = container.add_stream(codec, rate=24, options={"threads": "1", **(options or {})})
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 240)
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(number, height, width))
            if times is not None:
                frame.pts, frame.time_base = times[number], Fraction(1, 240)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def cut_start(source: Path, target: Path, frames: int) -> Path:
    """Copy the packets so that an edit list hides the first `frames` frames."""
    with av.open(str(source)) as reader, av.open(str(target), "w") as writer:
        stream = reader.streams.video[0]
        copy = writer.add_stream_from_template(stream)
        shift = int(Fraction(frames, 24) / stream.time_base)
        for packet in reader.demux(stream):
            if packet.dts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, copy
                writer.mux(packet)
    return target


def shown_frames(path: Path) -> np.ndarray:
    """All frames (T, H, W, 3) as a plain decode from the start delivers them, not turned."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def set_track_rotation(path: Path, degrees: float) -> None:
    """Write a rotation of any angle into the track header of an mp4 file."""
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 4
    matrix = start + (40 if data[start] == 0 else 52)
    angle = np.deg2rad(degrees)
    values = [np.cos(angle), np.sin(angle), 0, -np.sin(angle), np.cos(angle), 0, 0, 0, 16384]
    data[matrix : matrix + 36] = np.round(np.array(values) * 65536).astype(">i4").tobytes()
    path.write_bytes(data)
