"""`bench run data`: from a file to the pixels of a clip, and from a latent cache, beside doing all of it live.

Videos are made by PyAV in a temporary folder: H.264, a keyframe every three seconds. All of it is a CPU's work but the
VAE's, which runs on the GPU where there is one; times are wall times on the CPU's clock either way.

- decode: ours, the loader's own (`osp_fast/data/video.py`), a process beside, with all cores; reference, upstream's
  default: the file from its start, all frames resized as one float tensor; strong, PyAV that seeks to the keyframe and
  uses all threads; decord and torchcodec where they are installed. Right is what differs from PyAV's full decode,
  resized in float64, by no more than its rounding.
- cache: ours, a clip's moments and its caption's states read from a latent cache (`osp_fast/encode.py`); variant, ours
  live: decoded, encoded by VAE and text encoder; reference, upstream's live. The networks are tiny: what is live takes
  longer by as much as real ones are larger, what is cached does not.
"""

import functools
import tempfile
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from bench.accuracy import exact_float32, relative_error
from bench.measure import Contestant, Effort, Timing
from bench.results import OURS, REFERENCE, Row
from bench.suites import Job, Options, Setting, reason_of
from bench.suites.data_readers import (
    Source,
    Task,
    as_levels,
    exact_pixels,
    installed,
    readers,
    upstream_pixels,
    write_source,
)
from bench.suites.stock_vae import StockEncoder
from bench.suites.vae import make_vae
from osp_fast.data.buckets import Bucket

SUITE = "data"
SMALL, LARGE = (192, 320), (720, 1280)
# Case -> (the video, its first frame that is wanted, the bucket).
DECODE = {
    "decode all of 93x192x320": (Source(93, *SMALL), 0, Bucket(93, 160, 256)),
    "decode amid 960x192x320": (Source(960, *SMALL), 611, Bucket(93, 160, 256)),
    "decode amid 120x720x1280": (Source(120, *LARGE), 83, Bucket(29, 352, 640)),
}
CACHE = {"cache 29x192x320": (Source(93, *SMALL), 31, Bucket(29, 160, 256))}
SECONDS = {"decode": 15.0, "cache": 10.0}
DECODE_TOLERANCE = (
    0.01  # levels rounded, once to pixels and once by the conversion from YUV; another frame is off by 0.1
)
CACHE_TOLERANCE = 0.02  # of moments from pixels that are rounded
EFFORT = Effort(rounds=5, seconds=0.5, fewest=5, warm_seconds=0.0)
TEXT_TOKENS = 64
CPU = torch.device("cpu")


def jobs(options: Options) -> list[Job]:
    """The same cases on every device. Clips of other sizes (`options.sizes`) are for suites that compute them."""
    found = []
    for case, (source, first, bucket) in {**DECODE, **CACHE}.items():
        kind = case.split()[0]
        measure = functools.partial(_measure, measure_decode if kind == "decode" else measure_cache, case)
        found.append(Job(SUITE, case, SECONDS[kind], functools.partial(measure, source, first, bucket)))
    return found


def _measure(
    measure: Callable[[str, Task, Setting], list[Row]],
    case: str,
    source: Source,
    first: int,
    bucket: Bucket,
    setting: Setting,
) -> list[Row]:
    """The rows of a case on a video made for it; one row that says so where what it needs is not installed."""
    needed = ("av",) if measure is measure_decode else ("av", "transformers", "tokenizers", "safetensors")
    if missing := [name for name in needed if not installed(name)]:
        note = f"not measured: {' and '.join(missing)} not installed"
        return [Row(SUITE, case, OURS, "ours", "uint8", _shape(bucket), note=note)]
    with tempfile.TemporaryDirectory(prefix="osp_fast_bench") as folder:
        task = Task(Path(folder) / "clip.mp4", source, first, bucket)
        write_source(task.file, source)
        return measure(case, task, setting)


def measure_decode(case: str, task: Task, setting: Setting) -> list[Row]:
    """A row for each reader."""
    expected = exact_pixels(task)
    with ExitStack() as stack:
        makers = [(name, role, make) for name, role, make in readers(task, stack)]

        def error(found: Tensor) -> float:
            return relative_error(as_levels(found), expected)

        rows = _rows(case, "uint8", task.bucket, makers, error, DECODE_TOLERANCE, setting)
    for row in rows:
        if row.ms is not None:
            row.figures["frames_per_second"] = task.bucket.frames / row.ms * 1e3
    return rows


@torch.no_grad()
def measure_cache(case: str, task: Task, setting: Setting) -> list[Row]:
    """What training gets of a clip, moments and text states: from a cache, or computed live."""
    from bench.suites.data_cache import embedded_encoder, filled_cache

    device, folder = setting.device, task.file.parent
    vae, texts = make_vae("tiny", device, torch.float32), embedded_encoder(TEXT_TOKENS, device)
    stock = StockEncoder(vae, channels_last=False)
    exact = StockEncoder(vae.cpu() if device == CPU else make_vae("tiny", CPU, torch.float32), channels_last=False)
    with exact_float32():
        expected = exact((exact_pixels(task).float() / 127.5 - 1)[None])[0]
    states, mask = texts([task.caption])
    expected_text = states[0][mask[0].bool()].cpu()

    def text() -> Tensor:
        states, mask = texts([task.caption])
        return states[0][mask[0].bool()].cpu()

    with ExitStack() as stack:
        read = next(make for _, role, make in readers(task, stack) if role == "ours")()

        def live() -> tuple[Tensor, Tensor]:
            posterior = vae.encode(read()[None].to(device))
            return torch.cat((posterior.mean, posterior.logvar), dim=1)[0].cpu(), text()

        def upstream() -> tuple[Tensor, Tensor]:
            return stock(upstream_pixels(task)[None].to(device))[0].cpu(), text()

        cache = filled_cache(folder / "cache", task, *live())
        clip, indices = task.clip, task.indices

        def cached() -> tuple[Tensor, Tensor]:
            return cache.moments(clip, indices), cache.text(task.caption)

        makers = [
            (OURS, "ours", lambda: cached),
            (REFERENCE, "reference", lambda: upstream),
            (f"{OURS} live", "variant", lambda: live),
        ]

        def error(found: tuple[Tensor, Tensor]) -> float:
            return max(relative_error(found[0], expected), relative_error(found[1], expected_text))

        return _rows(case, "float32", task.bucket, makers, error, CACHE_TOLERANCE, setting)


def _rows(
    case: str,
    dtype: str,
    bucket: Bucket,
    makers: Iterable[tuple[str, str, Callable]],
    error: Callable[..., float],
    tolerance: float,
    setting: Setting,
) -> list[Row]:
    """Check what each reader gives, then time those that are right, on the CPU's clock."""
    rows, calls = [], []
    for name, role, make in makers:
        row = Row(SUITE, case, name, role, dtype, _shape(bucket))
        rows.append(row)
        try:
            call = make()
            row.rel_err = error(call())
        except Exception as raised:  # whatever a library raises is the reason why it is not measured
            row.note = reason_of(raised) if role != "ours" else f"FAILED: {reason_of(raised)}"
            continue
        row.ok = row.rel_err <= tolerance
        if row.ok:
            calls.append(Contestant(name, [call]))
        else:
            row.note = f"WRONG, not timed: off by {row.rel_err:.1e}"
    timings = setting.timer(calls, CPU, EFFORT)
    for row in rows:
        timing = timings.get(row.impl)
        if isinstance(timing, Timing):
            for name, value in timing.fields().items():
                setattr(row, name, value)
        elif timing is not None:
            row.note = reason_of(timing)
    return rows


def _shape(bucket: Bucket) -> dict[str, int]:
    return dict(zip(("frames", "height", "width"), bucket, strict=True))
