"""`bench run vae`: the whole encoder and decoder of the WF-VAE beside stock PyTorch, in time, memory and numbers.

Random weights of the released size, random pixels and latents, bfloat16; on a CPU the tiny preset in float32. Ours
works as `--vae_memory` plans it, stock operations take the clip at once, as upstream does unless it is told to tile:

- reference: upstream's path, planar memory, one operation after the other; it encodes in float32 (with the TF32 that
  PyTorch's convolutions use) and decodes in bfloat16.
- strong: the network in channels-last bfloat16 through torch.compile, one graph of all of it; on a CPU, which would
  compile it for minutes, eager.
- peers: stock operations in bfloat16 in either layout, where they are not the reference.

Every implementation but the compiled one is first held against float32 on a small clip, then all of them against a
stock one on the clip that is timed, where a kernel's indices are as large as they get.
"""

import contextlib
import functools
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bench.accuracy import exact_float32, relative_error
from bench.measure import Contestant, Effort, Timing
from bench.results import OURS, REFERENCE, STRONG, Row
from bench.suites import Job, Options, Setting, reason_of
from bench.suites.stock_vae import StockDecoder, StockEncoder
from osp_fast.data.buckets import Bucket
from osp_fast.engine.devices import H100
from osp_fast.engine.forward_peak import VaeWork, vae_work, weight_bytes
from osp_fast.errors import UserError
from osp_fast.models.wfvae import WFVAE, WFVAE_CONFIGS
from osp_fast.models.wfvae_plan import Task, describe, make_plan

MODEL = {"cuda": "WFVAEModel_D8_4x8x8", "cpu": "tiny"}
DTYPE = {"cuda": torch.bfloat16, "cpu": torch.float32}
CASES = {
    "cuda": (
        "encode 93x768x768", "decode 93x640x640", "decode 93x720x1280", "encode 93x640x640", "decode 93x480x640",
        "encode 93x480x640", "decode 93x352x640", "encode 93x352x640", "encode 29x352x640", "encode 1x640x640",
    ),
    "cpu": ("encode 9x64x96", "decode 9x64x96", "encode 1x64x96"),
}  # fmt: skip
CHECKED = Bucket(9, 64, 96)  # the clip of the check in float32
TOLERANCE = {torch.bfloat16: 0.05, torch.float32: 1e-4}  # of a network with random weights
EFFORT = {"cuda": Effort(rounds=3, seconds=0.5, fewest=3, warm_seconds=0.0), "cpu": Effort(rounds=5, seconds=0.2)}
RUNS = 5
PLANAR, CHANNELS_LAST = "stock, planar", "stock, channels-last"
ROLES = {OURS: "ours", REFERENCE: "reference", STRONG: "strong"}
# Of a job on an H100: the model and its check, compiling, and all runs in times of ours, stock ones being 2 to 5 times
# as slow. A CPU's cases take as long as their timer.
CHECK_SECONDS, COMPILE_SECONDS, TIMES_OURS, CPU_SECONDS = 15.0, 60.0, 90.0, 4.0

Implementation = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """encode or decode, of a clip of this size in pixels. Raises `UserError` for a size that no VAE takes."""

    direction: str
    size: Bucket

    def __post_init__(self) -> None:
        if (self.size.frames - 1) % 4 or self.size.height % 8 or self.size.width % 8:
            raise UserError(
                f"--size {self.size}: the VAE takes TxHxW with T = 4n+1, H and W in eights: name such a one"
            )

    def __str__(self) -> str:
        return f"{self.direction} {self.size}"

    def task(self, dtype: torch.dtype = torch.bfloat16) -> Task:
        """What is planned: pixels and results of the network's type, as stock networks take and give them."""
        return Task(self.direction, *self.size, source=dtype)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of pixels or latents."""
        task = self.task()
        return (1, 3, *self.size) if self.direction == "encode" else (1, 8, task.latent_frames, *task.cells)

    def make_input(self, like: Tensor) -> Tensor:
        """Random pixels or latents, of `like`'s type and on its device."""
        generator = torch.Generator(like.device).manual_seed(0)
        return torch.randn(self.input_shape, generator=generator, device=like.device, dtype=like.dtype)


def jobs(options: Options) -> list[Job]:
    """Each clip encoded and decoded. Raises `UserError` for sizes that the VAE does not take."""
    texts = [text.split() for text in CASES[options.device]]
    cases = [Case(direction, Bucket.parse(size)) for direction, size in texts]
    if options.sizes:
        cases = [Case(direction, size) for size in options.sizes for direction in ("encode", "decode")]
    found = []
    for case in cases:
        seconds = CPU_SECONDS
        if options.device == "cuda":
            seconds = CHECK_SECONDS + COMPILE_SECONDS + TIMES_OURS * _predicted_seconds(case)
        measure = functools.partial(measure_case, case, MODEL[options.device], options.vae_memory)
        found.append(Job("vae", str(case), seconds, measure))
    return found


def make_vae(size: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Random weights, the same for every type."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = WFVAE(WFVAE_CONFIGS[size])
    return vae.to(device, dtype).requires_grad_(False)


def implementations(
    vae: nn.Module, case: Case, budget: int, say: Callable[[str], None] = print
) -> Iterator[tuple[str, Callable[[], Implementation]]]:
    """(name, what makes it), ours first. Each takes a clip of the VAE's type and has weights of its own but ours.

    budget: bytes that ours may hold; say: gets its plan in words
    """
    weight = next(vae.parameters())
    device, dtype = weight.device, weight.dtype

    def ours() -> Implementation:
        task = case.task(dtype)
        plan = make_plan(vae, task, budget, device)
        say(describe(task, plan, budget))
        if case.direction == "decode":
            return lambda x: vae.decode(x, plan)
        return lambda x: _moments(vae, x, plan)

    def reference() -> Implementation:
        if case.direction == "decode":
            return stock(vae, channels_last=False)
        exact = stock(vae, channels_last=False, dtype=torch.float32)
        return lambda x: exact(x.float())

    def strong() -> Implementation:
        network = stock(vae, channels_last=True)
        return torch.compile(network.__call__, fullgraph=True, dynamic=False) if device.type == "cuda" else network

    stock = StockEncoder if case.direction == "encode" else StockDecoder
    yield OURS, ours
    yield REFERENCE, reference
    yield STRONG, strong
    if device.type == "cuda":
        yield CHANNELS_LAST, lambda: stock(vae, channels_last=True)
        if case.direction == "encode":
            yield PLANAR, lambda: stock(vae, channels_last=False)


def _moments(vae: nn.Module, video: Tensor, plan: Any) -> Tensor:
    posterior = vae.encode(video, plan)
    return torch.cat((posterior.mean, posterior.logvar), dim=1)


@torch.no_grad()
def errors(size: str, direction: str, device: torch.device, dtype: torch.dtype) -> dict[str, float | Exception]:
    """Implementation -> relative error of a small clip against stock operations in float32, or what it raised.

    Without what is compiled for the shape of its clip.
    """
    case = Case(direction, CHECKED)
    exact = make_vae(size, device, torch.float32)
    x = case.make_input(next(exact.parameters()))
    with exact_float32():
        expected = (StockEncoder if direction == "encode" else StockDecoder)(exact, channels_last=False)(x)
    vae = make_vae(size, device, dtype)
    found: dict[str, float | Exception] = {}
    for name, make in implementations(vae, case, 1 << 40, say=lambda line: None):
        if name == STRONG and device.type == "cuda":
            continue
        try:
            found[name] = relative_error(make()(x.to(dtype)), expected)
        except Exception as error:  # whatever a library raises is the reason why it is not measured
            found[name] = error
    return found


@torch.no_grad()
def measure_case(case: Case, size: str, budget: int | None, setting: Setting) -> list[Row]:
    """A row for each implementation. budget: bytes that ours may hold; None: nine tenths of what is free."""
    device, dtype = setting.device, DTYPE[setting.device.type]
    with _cudnn_benchmark():
        try:
            small = errors(size, case.direction, device, dtype)
            let_go(device)
            vae = make_vae(size, device, dtype)
            x = case.make_input(next(vae.parameters()))
            allowed = budget or _free_bytes(device)
            rows, calls = _checked(case, vae, x, allowed, small, setting)
            holds = {row.impl: _held(row.impl, case, vae) + x.nbytes for row in rows}
            entrants = [
                Contestant(name, [functools.partial(call, x)], holds=holds[name]) for name, call in calls.items()
            ]
            timings = setting.timer(entrants, device, EFFORT[device.type])
        finally:
            torch.compiler.reset()  # what is compiled refers to weights
    for row in rows:
        _complete(row, timings.get(row.impl), size, case)
    return rows


def _checked(
    case: Case, vae: nn.Module, x: Tensor, budget: int, small: dict[str, float | Exception], setting: Setting
) -> tuple[list[Row], dict[str, Implementation]]:
    """Rows, and the calls of what is right here and on the small clip. Stock ones run first, as they are the rule."""
    dtype, shape = x.dtype, dict(zip(("frames", "height", "width"), case.size, strict=True))
    rows, calls, expected, rule, notes = {}, {}, None, None, []
    makers = dict(implementations(vae, case, budget, notes.append))
    for name in sorted(makers, key=lambda name: (name == OURS, name == STRONG)):
        row = Row("vae", str(case), name, ROLES.get(name, "peer"), str(dtype).removeprefix("torch."), shape)
        rows[name] = row
        try:
            if expected is None and name not in small:
                raise UserError("not measured: no stock network that was checked takes this clip")
            row.rel_err = _or_raise(small.get(name, 0.0))
            if row.rel_err <= TOLERANCE[dtype]:
                call = makers[name]()
                found = call(x)
                if expected is None:
                    expected, rule = found, name
                else:
                    row.rel_err = max(row.rel_err, relative_error(found, expected), key=lambda e: (e != e, e))
                del found
        except Exception as error:  # whatever a library raises is the reason why it is not measured
            row.note = _reason(error, row)
            let_go(setting.device)
            continue
        row.ok = row.rel_err <= TOLERANCE[dtype]
        if row.ok:
            calls[name] = call
        else:
            row.note = f"WRONG, not timed: off by {row.rel_err:.1e}"
    ours = rows[OURS]
    ours.note = "; ".join([*filter(None, [ours.note]), *notes])
    if rule in (None, OURS) and ours.ok:
        ours.note += "; checked on a small clip only, as no stock network takes this one"
    del expected
    let_go(setting.device)
    setting.say(f"vae {case}: {ours.note}")
    return [rows[name] for name in makers], {name: calls[name] for name in makers if name in calls}


def _complete(row: Row, timing: Timing | Exception | None, size: str, case: Case) -> None:
    work = _work(size, case, getattr(torch, row.dtype))
    row.flops, row.moved = work.flops, work.moved
    if row.role == "ours" and size == MODEL["cuda"]:
        row.predicted_ms = 1e3 * _predicted_seconds(case)
    if isinstance(timing, Timing):
        for name, value in timing.fields().items():
            setattr(row, name, value)
    elif timing is not None:
        row.note = "; ".join(filter(None, [row.note, _reason(timing, row)]))


@functools.lru_cache(maxsize=64)
def _work(size: str, case: Case, dtype: torch.dtype) -> VaeWork:
    """FLOPs of the stock network, which are the mathematics; bytes that layers fused as ours read and write."""
    stock = StockEncoder if case.direction == "encode" else StockDecoder
    counter = FlopCounterMode(display=False)
    with torch.device("meta"), torch.no_grad():
        vae = _without_weights(size, dtype)
        network, x = stock(vae, channels_last=True), torch.empty(case.input_shape, dtype=dtype)
        with counter:
            network(x)
    return replace(vae_work(vae, case.task(dtype)), flops=counter.get_total_flops())


@functools.lru_cache(maxsize=2)
def _without_weights(size: str, dtype: torch.dtype) -> nn.Module:
    with torch.device("meta"):
        return WFVAE(WFVAE_CONFIGS[size]).to(dtype)


def _predicted_seconds(case: Case) -> float:
    """Of ours on one H100: products, then passes over memory, at the rates of `osp_fast/engine/devices.py`."""
    work = _work(MODEL["cuda"], case, DTYPE["cuda"])
    return work.flops / H100.matmul_flops + work.moved / H100.copy_bytes


def _held(name: str, case: Case, vae: nn.Module) -> int:
    """Bytes of weights: ours has the whole VAE, as programs do, stock ones a half, in the type they compute in."""
    if name == OURS:
        return weight_bytes(vae)
    half = vae.encoder if case.direction == "encode" else vae.decoder
    in_float32 = name == REFERENCE and case.direction == "encode"
    return sum(x.numel() * (4 if in_float32 else x.element_size()) for x in half.parameters())


def time_and_peak(call: Implementation, x: Tensor, device: torch.device) -> tuple[float, int | None]:
    """Median wall seconds of whole calls, which last tenths of seconds, and the most bytes allocated meanwhile."""
    on_gpu = device.type == "cuda"
    wait = functools.partial(torch.cuda.synchronize, device) if on_gpu else lambda: None
    call(x)  # compiles, and chooses algorithms
    wait()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    for _ in range(RUNS):
        start = time.perf_counter()
        call(x)
        wait()
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[RUNS // 2], torch.cuda.max_memory_allocated(device) if on_gpu else None


def let_go(device: torch.device) -> None:
    """Give back the memory of what nothing refers to."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextlib.contextmanager
def _cudnn_benchmark() -> Iterator[None]:
    """Within it cuDNN tries its algorithms, which is stock's best."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _free_bytes(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] * 9 // 10 if device.type == "cuda" else 1 << 40


def _or_raise(found: float | Exception) -> float:
    if isinstance(found, Exception):
        raise found
    return found


def _reason(error: Exception, row: Row) -> str:
    """What does not fit is a result; anything else that ours raises is a failure."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    expected = row.role != "ours" or isinstance(error, UserError)
    return reason_of(error) if expected else f"FAILED: {reason_of(error)}"
