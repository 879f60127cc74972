"""`bench vae`: the whole encoder and decoder of the WF-VAE beside stock PyTorch, in time, memory and numbers.

Random weights of the released size, random pixels and latents, bfloat16. Ours works as `--vae_memory auto` plans it for
the memory given here; stock operations take the clip at once, as they are usually called, and may run out of memory,
which is a result. First every implementation is held against float32 on a small clip: what is wrong is not timed.
"""

import datetime
import functools
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.accuracy import exact_float32, relative_error
from bench.measure import environment, require_cuda
from bench.results import OURS, result_path, write_result
from bench.stock_vae import StockDecoder, StockEncoder
from bench.table import format_table
from osp_fast.data.buckets import Bucket
from osp_fast.errors import UserError
from osp_fast.models.wfvae_plan import Task, describe, gib, make_plan

CHECKED = Bucket(9, 64, 96)  # the clip of the check
TOLERANCE = 0.05  # of a bfloat16 network with random weights against float32
RUNS = 5


@dataclass(frozen=True)
class Case:
    """encode or decode, of a clip of this size in pixels."""

    direction: str
    size: Bucket

    @classmethod
    def parse(cls, text: str) -> "Case":
        """ "encode 93x768x768" -> a case. Raises `UserError`."""
        direction, _, size = text.partition(" ")
        try:
            found = Bucket.parse(size)
        except ValueError as error:
            raise UserError(f"--case {text!r}: {error}") from None
        if direction not in ("encode", "decode") or (found.frames - 1) % 4 or found.height % 8 or found.width % 8:
            raise UserError(f"--case {text!r} must be encode or decode, then TxHxW with T = 4n+1, H and W in eights")
        return cls(direction, found)

    def __str__(self) -> str:
        return f"{self.direction} {self.size}"

    @property
    def task(self) -> Task:
        """What is planned: pixels and results in bfloat16, as the stock networks take and give them."""
        return Task(self.direction, *self.size, source=torch.bfloat16)

    def make_input(self, like: Tensor) -> Tensor:
        """Random pixels or latents, of `like`'s type and on its device."""
        frames, height, width = self.size
        shape = (
            (1, 3, *self.size) if self.direction == "encode" else (1, 8, (frames - 1) // 4 + 1, height // 8, width // 8)
        )
        generator = torch.Generator(like.device).manual_seed(0)
        return torch.randn(shape, generator=generator, device=like.device, dtype=like.dtype)


Implementation = Callable[[Tensor], Tensor]


def implementations(vae: nn.Module, case: Case, budget: int) -> Iterator[tuple[str, Callable[[], Implementation]]]:
    """(name, what makes it), ours first; one at a time is made, as each has weights of its own."""
    device = next(vae.parameters()).device

    def ours() -> Implementation:
        plan = make_plan(vae, case.task, budget, device)
        print(describe(case.task, plan, budget), flush=True)
        if case.direction == "decode":
            return lambda x: vae.decode(x, plan)
        return lambda x: _moments(vae, x, plan)

    yield OURS, ours
    stock = StockEncoder if case.direction == "encode" else StockDecoder
    yield "stock, channels-last", lambda: stock(vae, channels_last=True)
    yield "stock, planar", lambda: stock(vae, channels_last=False)


def _moments(vae: nn.Module, video: Tensor, plan: Any) -> Tensor:
    posterior = vae.encode(video, plan)
    return torch.cat((posterior.mean, posterior.logvar), dim=1)


def make_vae(size: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Random weights, the same for every type."""
    from osp_fast.models.wfvae import WFVAE, WFVAE_CONFIGS

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = WFVAE(WFVAE_CONFIGS[size])
    return vae.to(device, dtype).requires_grad_(False)


@torch.no_grad()
def errors(size: str, direction: str, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Implementation -> relative error of a small clip against stock operations in float32."""
    case = Case(direction, CHECKED)
    exact = make_vae(size, device, torch.float32)
    x = case.make_input(next(exact.parameters()))
    with exact_float32():
        expected = (StockEncoder if direction == "encode" else StockDecoder)(exact, channels_last=False)(x)
    vae = make_vae(size, device, dtype)
    found = {}
    for name, make in implementations(vae, case, 1 << 40):
        found[name] = relative_error(make()(x.to(dtype)), expected)
    return found


@torch.no_grad()
def measure_case(
    size: str, case: Case, device: torch.device, budget: int, dtype: torch.dtype = torch.bfloat16
) -> Iterator[dict[str, Any]]:
    """A row for each implementation: median seconds, peak bytes, error, or why it has none."""
    wrong = errors(size, case.direction, device, dtype)
    vae = make_vae(size, device, dtype)
    x = case.make_input(next(vae.parameters()))
    for name, make in implementations(vae, case, budget):
        row = {"case": str(case), "implementation": name, "rel_err": wrong[name], "seconds": None, "peak_bytes": None}
        row |= {"ok": wrong[name] <= TOLERANCE, "note": ""}
        if not row["ok"]:
            yield row | {"note": f"off by {wrong[name]:.1e}, not timed"}
            continue
        try:
            seconds, peak = time_and_peak(make(), x, device)
            row |= {"seconds": seconds, "peak_bytes": peak}
        except torch.OutOfMemoryError:
            row["note"] = "out of memory"
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        yield row


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


def vae_table(rows: Sequence[dict[str, Any]]) -> str:
    """Each case with its implementations, and their times over ours."""
    lines = []
    for row in rows:
        ours = next(one for one in rows if one["case"] == row["case"] and one["implementation"] == OURS)
        ratio = row["seconds"] / ours["seconds"] if row["seconds"] and ours["seconds"] else None
        lines.append(
            [
                row["case"],
                row["implementation"],
                f"{row['rel_err']:.1e}",
                f"{1e3 * row['seconds']:.1f}" if row["seconds"] else "-",
                f"{ratio:.2f}" if ratio else "-",
                gib(row["peak_bytes"]) if row["peak_bytes"] else "-",
                row["note"],
            ]
        )
    return format_table(["case", "implementation", "error", "ms", "times ours", "peak memory", ""], lines)


def run_vae(texts: Sequence[str], folder: Path, budget: int | None) -> int:
    """Measure the cases on the GPU and write them; 1 if ours was wrong or did not run. Raises UserError."""
    cases = [Case.parse(text) for text in texts]
    device = require_cuda("vae")
    torch.backends.cudnn.benchmark = True  # stock's best
    env = environment(device)
    print(env["device"], flush=True)
    allowed = budget or torch.cuda.mem_get_info(device)[0] * 9 // 10
    rows: list[dict[str, Any]] = []
    path = result_path(folder, env["device"], "vae")
    for case in cases:
        rows += measure_case("WFVAEModel_D8_4x8x8", case, device, allowed)
        date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        write_result(path, {"kind": "vae", "date": date, "environment": env, "budget": allowed, "rows": rows})
    print(vae_table(rows))
    print(f"written to {path}")
    return 1 if any(row["implementation"] == OURS and not row["seconds"] for row in rows) else 0
