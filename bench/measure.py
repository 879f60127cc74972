"""Times of calls that take turns, beside two ceilings of the same device and run.

Implementations are measured in rounds: each runs a few times, then the next, in both orders, so that what a device's
clocks, heat or other users do meanwhile meets all of them. Inputs rotate, and on a GPU the L2 cache is overwritten
before each run; times are of device events around each run.
"""

import contextlib
import datetime
import functools
import itertools
import math
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from osp_fast.kernels.launch import interpreting, selected_path
from torch import Tensor

from bench.results import MIB, Ceilings
from osp_fast.engine.telemetry import Telemetry
from osp_fast.errors import UserError

# Of the ceilings: bytes of a copy, and the side of a product in bf16 on a GPU and in float32 on a CPU.
COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 26}
MATMUL_SIZE = {"cuda": 8192, "cpu": 1024}
MOST_INPUT_SETS = 16


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    rounds: turns of each implementation
    seconds, fewest: of running, and runs, that each gets at least over all rounds; warm_seconds: of running before
    most: runs at most, of calls so short that overwriting the cache takes longer
    """

    rounds: int = 5
    seconds: float = 0.4
    fewest: int = 10
    warm_seconds: float = 0.05
    most: int = 2000


BRIEF = Effort()
LONG_CALLS = Effort(rounds=3, seconds=3.0, fewest=3, warm_seconds=0.0)  # of whole steps, of seconds each


@dataclass(frozen=True)
class Contestant:
    """An implementation that takes turns.

    calls: the same on different inputs, which take turns too
    around: what each of its turns is inside of, as a choice of kernels
    holds: bytes that it keeps between calls, inputs and weights, which count in its peak
    """

    name: str
    calls: Sequence[Callable[[], Any]]
    around: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    holds: int = 0


@dataclass
class Timing:
    """What was measured of a contestant.

    turns: milliseconds of its runs, by turn; peak_mib: allocated at most during a call, with what it holds, None on a
    CPU; sm_mhz, watts: medians behind its turns, None where they cannot be read
    """

    turns: list[list[float]] = field(default_factory=list)
    peak_mib: float | None = None
    sensors: list[dict[str, Any]] = field(default_factory=list)

    def _quantile(self, part: float) -> float:
        runs = sorted(itertools.chain(*self.turns))
        return float(torch.tensor(runs, dtype=torch.float64).quantile(part))

    def _sensor(self, name: str) -> float | None:
        read = [one[name] for one in self.sensors if name in one]
        return statistics.median(read) if read else None

    def fields(self) -> dict[str, float | None]:
        """What a `Row` has of it."""
        times = {"ms": self._quantile(0.5), "ms_p20": self._quantile(0.2), "ms_p80": self._quantile(0.8)}
        return {
            **times,
            "peak_mib": self.peak_mib,
            "sm_mhz": self._sensor("sm_clock_mhz"),
            "watts": self._sensor("power_w"),
        }


# Contestants -> name -> its timing, or why it has none. Tests have one with a clock of their own.
Timer = Callable[..., dict[str, Timing | Exception]]


def time_in_turns(
    contestants: Sequence[Contestant], device: torch.device, effort: Effort = BRIEF
) -> dict[str, Timing | Exception]:
    """Time calls against each other. What one of them raises ends its turns alone, and stands in place of a timing."""
    clock = _CudaClock(device) if device.type == "cuda" else _CpuClock()
    timings: dict[str, Timing | Exception] = {}
    runs: dict[str, int] = {}
    turns = {one.name: itertools.cycle(one.calls) for one in contestants}

    def attempt(one: Contestant, action: Callable[[], None]) -> None:
        try:
            with one.around():
                action()
        except Exception as error:  # whatever a library raises is the reason why it was not measured
            timings[one.name] = error

    def warm(one: Contestant) -> None:
        for call in one.calls:
            call()
        once = min(clock.run(one.calls[:1] * 2)) / 1e3
        warming, wanted = (math.ceil(seconds / max(once, 1e-6)) for seconds in (effort.warm_seconds, effort.seconds))
        clock.run([next(turns[one.name]) for _ in range(min(warming, effort.most))])
        wanted = min(max(effort.fewest, wanted), effort.most)
        runs[one.name] = max(1, math.ceil(wanted / effort.rounds))
        timings[one.name] = Timing()

    def take_turn(one: Contestant, timing: Timing) -> None:
        before = clock.begin_peak()
        timing.turns.append(clock.run([next(turns[one.name]) for _ in range(runs[one.name])]))
        peak = clock.peak()
        if peak is not None:
            timing.peak_mib = max(timing.peak_mib or 0.0, (peak - before + one.holds) / MIB)
        timing.sensors.append(clock.sensors())

    with contextlib.closing(clock):
        for one in contestants:
            attempt(one, functools.partial(warm, one))
        for turn in range(effort.rounds):
            for one in contestants if turn % 2 == 0 else reversed(contestants):
                timing = timings[one.name]
                if isinstance(timing, Timing):
                    attempt(one, functools.partial(take_turn, one, timing))
    return timings


class _CpuClock:
    def run(self, calls: Sequence[Callable[[], Any]]) -> list[float]:
        """Milliseconds of each call."""
        found = []
        for call in calls:
            start = time.perf_counter()
            call()
            found.append(1e3 * (time.perf_counter() - start))
        return found

    def begin_peak(self) -> int:
        return 0

    def peak(self) -> int | None:
        return None

    def sensors(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        pass


class _CudaClock:
    def __init__(self, device: torch.device):
        self._device = device
        size = max(2 * torch.cuda.get_device_properties(device).L2_cache_size, 64 * MIB)
        self._flush = torch.empty(size, dtype=torch.int8, device=device)
        self._telemetry = Telemetry(device)

    def run(self, calls: Sequence[Callable[[], Any]]) -> list[float]:
        """Milliseconds of each call on the device, which is not waited for between them."""
        events = []
        for call in calls:
            self._flush.zero_()
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            call()
            end.record()
            events.append((begin, end))
        torch.cuda.synchronize(self._device)
        return [begin.elapsed_time(end) for begin, end in events]

    def begin_peak(self) -> int:
        torch.cuda.reset_peak_memory_stats(self._device)
        return torch.cuda.memory_allocated(self._device)

    def peak(self) -> int | None:
        return torch.cuda.max_memory_allocated(self._device)

    def sensors(self) -> dict[str, Any]:
        return self._telemetry.read()

    def close(self) -> None:
        self._telemetry.close()
        del self._flush


def ceilings(device: torch.device, timer: Timer = time_in_turns) -> Ceilings:
    """The device's own limits, on random data: a copy (bytes read plus written) and a matrix product.

    The product is of bf16 on a GPU and of float32 on a CPU.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    size, copied = MATMUL_SIZE[device.type], COPY_BYTES[device.type]
    source = torch.randn(copied // dtype.itemsize, device=device, dtype=dtype)
    target = torch.empty_like(source)
    pairs = [tuple(torch.randn(size, size, device=device, dtype=dtype) for _ in range(2)) for _ in range(2)]
    calls = {
        "copy": [functools.partial(target.copy_, source)],
        "product": [functools.partial(torch.matmul, *pair) for pair in pairs],
    }
    found = timer([Contestant(name, bound) for name, bound in calls.items()], device)
    for timing in found.values():
        if isinstance(timing, Exception):
            raise timing
    milliseconds = {name: timing.fields()["ms"] for name, timing in found.items()}
    return Ceilings(2 * size**3 / (milliseconds["product"] * 1e-3), 2 * copied / (milliseconds["copy"] * 1e-3))


def environment(device: torch.device, limits: Ceilings) -> dict[str, Any]:
    """What the figures depend on, by `results.ENV_KEYS` and `results.SAME`."""
    on_gpu = device.type == "cuda"
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else device.type,
        "capability": "sm_{}{}".format(*torch.cuda.get_device_capability(device)) if on_gpu else None,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "driver": _driver() if on_gpu else None,
        "git": _revision(),
        "date": date,
        "matmul_tflops": limits.matmul_flops / 1e12,
        "copy_tbps": limits.copy_bytes / 1e12,
        "cpu": _cpu_name(),
        "threads": None if on_gpu else torch.get_num_threads(),
    }


def require_cuda(command: str) -> torch.device:
    """The GPU to measure on. Raises UserError where there is none, or where the references would serve it."""
    if not torch.cuda.is_available():
        raise UserError(
            f"bench {command} needs an NVIDIA GPU and PyTorch sees none, so nothing was measured: "
            "--device cpu has what a CPU can do, bench list, static and predict work without one"
        )
    device = torch.device("cuda", torch.cuda.current_device())
    if interpreting():
        raise UserError(f"TRITON_INTERPRET=1 interprets the kernels, which bench {command} does not measure: unset it")
    try:
        path = selected_path(device)
    except ValueError as error:
        raise UserError(str(error)) from None
    if path != "triton":
        raise UserError(f"OSP_FAST_KERNELS chooses the references, which bench {command} does not measure: unset it")
    return device


def input_set_count(inputs: dict[str, Any], device: torch.device) -> int:
    """How many sets of inputs like this one exceed twice the L2 cache; at least 2, at most `MOST_INPUT_SETS`."""
    size = sum(x.numel() * x.element_size() for x in inputs.values() if isinstance(x, Tensor))
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    return min(max(2, math.ceil(2 * cache / size)), MOST_INPUT_SETS)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Within it memory that PyTorch hands out uninitialised is full of NaN, or of the largest integer.

    What an operation forgets to write is then seen. It is for calls that are checked, not for those that are timed, and
    reaches tensors that Python code makes: all that our launchers do.
    """
    makers = [(torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (Tensor, "new_empty")]
    originals = [getattr(owner, name) for owner, name in makers]

    def poisoning(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*arguments: Any, **options: Any) -> Tensor:
            x = make(*arguments, **options)
            if x.is_floating_point():
                return x.fill_(math.nan)
            return x.fill_(torch.iinfo(x.dtype).max) if x.dtype in _INTEGERS else x

        return made

    for (owner, name), original in zip(makers, originals, strict=True):
        setattr(owner, name, poisoning(original))
    try:
        yield
    finally:
        for (owner, name), original in zip(makers, originals, strict=True):
            setattr(owner, name, original)


_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _revision() -> str | None:
    """The commit that is measured, "-dirty" behind it where files differ; None outside of a git checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None


def _driver() -> str | None:
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    found = re.search(r"Module\s+(?:for \S+\s+)?(\d+\.[\d.]+)", text)
    return found and found.group(1)


def _cpu_name() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.processor() or platform.machine()
