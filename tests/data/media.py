"""Videos of every kind that the decoder must get right or refuse, and the frames of a plain sequential decode."""

import os
import random
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

FRAMES = 24


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


def entry(path: str, caption: str, **rest) -> dict:
    """An annotation of a clip that `write_clip` makes."""
    resolution = {"height": 48, "width": 64}
    return {"path": path, "cap": caption, "resolution": resolution, "num_frames": FRAMES, "fps": 24, **rest}


def broken_files(folder: Path) -> dict[str, tuple[dict, str]]:
    """Name -> (annotation, reason) of a file of each broken kind."""
    names = ["zero", "truncated", "text", "folder", "missing", "pixel", "count", "hang", "tilted", "picture"]
    names = {name: f"bad_{name}.{'png' if name == 'picture' else 'mp4'}" for name in names}
    (folder / names["zero"]).touch()
    whole = write_clip(folder / names["truncated"], FRAMES).read_bytes()
    (folder / names["truncated"]).write_bytes(whole[: len(whole) // 2])
    (folder / names["text"]).write_text("no video\n" * 100)
    (folder / names["folder"]).mkdir()
    write_clip(folder / names["pixel"], FRAMES, height=2, width=2)
    write_clip(folder / names["count"], FRAMES)
    os.mkfifo(folder / names["hang"])
    set_track_rotation(write_clip(folder / names["tilted"], FRAMES), 37)
    Image.fromarray(picture(0)[:1, :1]).save(folder / names["picture"])
    reasons = {
        "zero": "empty (0 bytes)",
        "truncated": "truncated or damaged: an mp4 file without a readable index",
        "text": "not a video, or damaged",
        "folder": "is a directory",
        "missing": "missing",
        "pixel": "decoded size 2x2 differs from annotated 64x48",
        "count": f"has only {FRAMES} frames, but the annotation says 40",
        "hang": "decoding took more than 1 s (--decode_timeout)",
        "tilted": "rotation of 37 degrees is not a multiple of 90",
        "picture": "decoded size 1x1 differs from annotated 64x48",
    }
    frames = {"count": 40}
    return {
        names[name]: (entry(names[name], f"bad {name}", num_frames=frames.get(name, FRAMES)), reason)
        for name, reason in reasons.items()
    }


def write_broken_and_sound(folder: Path) -> tuple[list[dict], dict[str, str]]:
    """Ten broken files and twelve sound ones: their annotations, shuffled, and the broken ones' name -> reason."""
    broken = broken_files(folder)
    entries = [annotation for annotation, _ in broken.values()]
    for number in range(9):
        write_clip(folder / f"{number}.mp4", FRAMES)
        entries.append(entry(f"{number}.mp4", f"video number {number}"))
    for number in range(3):
        Image.fromarray(picture(number)).save(folder / f"{number}.png")
        entries.append(entry(f"{number}.png", f"image number {number}"))
    random.Random(0).shuffle(entries)
    return entries, {name: reason for name, (_, reason) in broken.items()}
