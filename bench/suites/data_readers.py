"""What the suite `data` reads with: a video of its own, and ways from that file to the pixels of a bucket.

Each reader takes a `Task` and gives the clip's frames, resized and cropped: ours as uint8 (3, T, H, W), upstream's as
float32 in [-1, 1], as it hands them to the VAE; `as_levels` makes one of both.
"""

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.results import OURS, REFERENCE, STRONG
from osp_fast.data.annotations import Entry
from osp_fast.data.buckets import Bucket, Clip
from osp_fast.data.dataset import clip_pixels
from osp_fast.data.geometry import Geometry, centre_offset
from osp_fast.data.resize import resize_and_crop
from osp_fast.data.rgb import usable_cores
from osp_fast.data.video import Decoder

FPS, KEYFRAMES = 24, 72  # a keyframe every three seconds
DECODE_TIMEOUT = 120.0

Reader = Callable[[], Tensor]


@dataclass(frozen=True)
class Source:
    """A video: frames of height x width pixels."""

    frames: int
    height: int
    width: int


@dataclass(frozen=True)
class Task:
    """Frames first .. first + bucket.frames - 1 of a file, for a bucket."""

    file: Path
    source: Source
    first: int
    bucket: Bucket
    caption: str = "waves over a grey plain"

    @property
    def indices(self) -> list[int]:
        return list(range(self.first, self.first + self.bucket.frames))

    @property
    def clip(self) -> Clip:
        """As a plan has it: all of the picture, resized to cover the bucket."""
        source = self.source
        scale = max(self.bucket.height / source.height, self.bucket.width / source.width)
        resized = (
            max(self.bucket.height, round(scale * source.height)),
            max(self.bucket.width, round(scale * source.width)),
        )
        entry = Entry(
            path=str(self.file),
            file=str(self.file),
            captions=(self.caption,),
            height=source.height,
            width=source.width,
            num_frames=source.frames,
            fps=float(FPS),
            aesthetic=None,
            crop=None,
            cut=None,
            is_image=False,
        )
        return Clip(entry, self.bucket, Geometry((0, source.width, 0, source.height), *resized))


def write_source(file: Path, source: Source) -> None:
    """A video in H.264: waves that slide, no two frames alike, with some noise."""
    import av

    rows, columns = np.mgrid[: 2 * source.height, : 2 * source.width]
    texture = (128 + 60 * np.sin(columns / 37) + 50 * np.sin(rows / 23 + columns / 91)).astype(np.uint8)
    noise = np.random.default_rng(0).integers(0, 14, texture.shape, dtype=np.uint8)
    options = {"preset": "ultrafast", "crf": "22", "g": str(KEYFRAMES), "bf": "2"}
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options=options)
        stream.height, stream.width, stream.pix_fmt = source.height, source.width, "yuv420p"
        for number in range(source.frames):
            y, x = number * 7 % source.height, number * 5 % source.width
            planes = np.full((source.height * 3 // 2, source.width), 128, np.uint8)
            planes[: source.height] = (
                texture[y : y + source.height, x : x + source.width]
                + noise[x % source.height :, y % source.width :][: source.height, : source.width]
            )
            frame = av.VideoFrame.from_ndarray(planes, format="yuv420p")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def exact_pixels(task: Task) -> Tensor:
    """The clip in levels 0 .. 255, float64 (3, T, H, W): every frame decoded from the start, resized in float64."""
    return _resized(torch.from_numpy(_from_start(task)).double(), task).transpose(0, 1)


def as_levels(found: Tensor) -> Tensor:
    """What a reader gives, in levels 0 .. 255."""
    return found if found.dtype == torch.uint8 else (found + 1) * 127.5


def _from_start(task: Task) -> np.ndarray:
    """Frames (T, h, w, 3): the file is decoded up to the last of them."""
    import av

    wanted, frames = set(task.indices), []
    with av.open(str(task.file)) as container:
        for number, frame in enumerate(container.decode(video=0)):
            if number in wanted:
                frames.append(frame.to_ndarray(format="rgb24"))
            if len(frames) == len(wanted):
                break
    return np.stack(frames)


def _sought(task: Task) -> np.ndarray:
    """The same from the keyframe in front of the first, with all of the decoder's threads; for constant rates."""
    import av

    frames = []
    with av.open(str(task.file)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_type = "AUTO"
        first = round(task.first / FPS / stream.time_base)
        container.seek(first, stream=stream)
        for frame in container.decode(stream):
            if frame.pts >= first:
                frames.append(frame.to_ndarray(format="rgb24"))
            if len(frames) == task.bucket.frames:
                break
    return np.stack(frames)


def _resized(frames: Tensor, task: Task) -> Tensor:
    """Floating frames (T, h, w, 3) -> (T, 3, H, W): all at once, then the centre."""
    geometry, bucket = task.clip.geometry, task.bucket
    size = (geometry.resize_h, geometry.resize_w)
    out = F.interpolate(frames.permute(0, 3, 1, 2), size, mode="bilinear", antialias=True, align_corners=True)
    top, left = centre_offset(size[0], bucket.height), centre_offset(size[1], bucket.width)
    return out[..., top : top + bucket.height, left : left + bucket.width]


def upstream_pixels(task: Task) -> Tensor:
    """Upstream's way: the file from its start, frames to one float tensor, resized, cropped, scaled to [-1, 1]."""
    frames = torch.from_numpy(_from_start(task)).float()
    return (_resized(frames, task) / 255 * 2 - 1).transpose(0, 1)


def _of_uint8(frames: np.ndarray, task: Task) -> Tensor:
    return resize_and_crop(frames, task.clip.geometry, task.bucket)


def readers(task: Task, stack: ExitStack) -> Iterator[tuple[str, str, Callable[[], Reader]]]:
    """(name, role, what makes it). `stack` ends what they start. A maker raises ImportError for what is missing."""

    def ours() -> Reader:
        decoder = stack.enter_context(Decoder(DECODE_TIMEOUT))
        return lambda: clip_pixels(decoder, task.clip, task.indices, usable_cores())

    yield OURS, "ours", ours
    yield REFERENCE, "reference", lambda: lambda: upstream_pixels(task)
    yield STRONG, "strong", lambda: lambda: _of_uint8(_sought(task), task)
    yield "decord", "peer", lambda: _decord(_found("decord"), task)
    yield "torchcodec", "peer", lambda: _torchcodec(_found("torchcodec"), task)


def _decord(decord: Any, task: Task) -> Reader:
    def read() -> Tensor:
        video = decord.VideoReader(str(task.file), num_threads=usable_cores())
        return _of_uint8(video.get_batch(task.indices).asnumpy(), task)

    return read


def _torchcodec(torchcodec: Any, task: Task) -> Reader:
    def read() -> Tensor:
        video = torchcodec.decoders.VideoDecoder(
            str(task.file), dimension_order="NHWC", num_ffmpeg_threads=usable_cores()
        )
        return _of_uint8(video.get_frames_at(task.indices).data.numpy(), task)

    return read


def _found(name: str) -> Any:
    if not installed(name):
        raise ImportError(f"{name} is not installed")
    if name == "torchcodec":
        importlib.import_module("torchcodec.decoders")
    return importlib.import_module(name)


def installed(name: str) -> bool:
    """Whether a package is there; it is not imported."""
    return importlib.util.find_spec(name) is not None
