"""Which chunks and tiles the WF-VAE works in, for a budget of bytes.

A budget is for all that a call holds on its device: the VAE's weights, what it is given, what it returns and everything
in between. No tiles are preferred to tiles, then time outside to tiles outside, then long chunks to short ones.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import nn

from osp_fast.errors import UserError
from osp_fast.kernels.launch import forced_path, selected_path
from osp_fast.models.wfvae_decoder import COLOURS
from osp_fast.models.wfvae_stream import (
    SPACE_STRIDE,
    TIME_STRIDE,
    Plan,
    Window,
    decoder_windows,
    encoder_windows,
)
from osp_fast.models.wfvae_trace import StageCost, stage_cost

LEAST_TILE = 4  # latent cells; smaller tiles would be nearly all halo


@dataclass(frozen=True)
class Task:
    """What is to be done: frames (4n+1) x height x width pixels, B clips at once.

    collected: the whole result is held, as `encode` and `decode` return it, and not only the piece at hand; source and
    pixels: types of the encoder's input and of the decoder's output.
    """

    direction: str  # "encode" or "decode"
    frames: int
    height: int
    width: int
    batch: int = 1
    collected: bool = True
    source: torch.dtype = torch.uint8
    pixels: torch.dtype | None = None

    def __str__(self) -> str:
        clips = f"{self.batch} clips of " if self.batch > 1 else ""
        return f"VAE {self.direction} of {clips}{self.frames}x{self.height}x{self.width}"

    @property
    def latent_frames(self) -> int:
        return (self.frames - 1) // TIME_STRIDE + 1

    @property
    def cells(self) -> tuple[int, int]:
        """Latent rows and columns."""
        return self.height // SPACE_STRIDE, self.width // SPACE_STRIDE


def make_plan(vae: nn.Module, task: Task, budget: int, device: torch.device, most_frames: int | None = None) -> Plan:
    """The preferred plan whose predicted peak is at most `budget` bytes; most_frames: of a chunk, latent frames.

    Raises `UserError` with the least budget if no plan fits.
    """
    model = Predictor(vae, task, device)
    longest = min(most_frames or task.latent_frames, task.latent_frames)
    # Chunks of equal length: as few as possible, and so on.
    lengths = sorted({-(-task.latent_frames // count) for count in range(1, task.latent_frames + 1)}, reverse=True)
    lengths = [length for length in lengths if length <= longest]
    least = None
    for tile in _tiles(task.cells):
        for tiles_outside in (False, True) if tile else (False,):

            def plan(length: int, tile=tile, tiles_outside=tiles_outside) -> Plan:
                return model.predicted(Plan(length, tile, tiles_outside))

            shortest = plan(lengths[-1])
            least = shortest.peak_bytes if least is None else min(least, shortest.peak_bytes)
            if shortest.peak_bytes <= budget:
                return _longest_that_fits(lengths, plan, budget)
    raise UserError(
        f"{task} needs at least {gib(least)}, and {gib(budget)} are allowed: give it more by --vae_memory, or use a "
        "smaller size"
    )


class Planner:
    """Plans for one VAE on one device, made when a task is first met; `report` gets a line about each.

    allowance: bytes of the budget, called with those of the weights when a plan is made; most_frames: of a chunk.
    """

    def __init__(
        self,
        vae: nn.Module,
        device: torch.device,
        allowance: Callable[[int], int],
        most_frames: int | None = None,
        report: Callable[[str], None] | None = None,
    ):
        self._vae, self._device, self._allowance = vae, device, allowance
        self._most_frames, self._report = most_frames, report
        self._plans: dict[Task, Plan] = {}

    def __call__(self, task: Task) -> Plan:
        """The task's plan. Raises `UserError` if none fits."""
        if task not in self._plans:
            budget = self._allowance(sum(weight.numel() * weight.element_size() for weight in self._vae.parameters()))
            self._plans[task] = make_plan(self._vae, task, budget, self._device, self._most_frames)
            if self._report is not None:
                self._report(describe(task, self._plans[task], budget))
        return self._plans[task]


def describe(task: Task, plan: Plan, budget: int) -> str:
    """One line about a plan."""
    rows, columns = plan.tile or task.cells
    tiles = -(-task.cells[0] // rows) * -(-task.cells[1] // columns)
    where = f", {tiles} tiles of {rows} x {columns} cells" if plan.tile else ", whole frames"
    order = ", one tile after the other through the whole clip" if plan.tiles_outside else ""
    return (
        f"{task}: {plan.chunk} of {task.latent_frames} latent frames at once{where}{order}; "
        f"{gib(plan.peak_bytes)} of {gib(budget)}"
    )


def gib(size: int) -> str:
    """Bytes for a reader: GiB from a half on, MiB below."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**29 else f"{size / 2**20:.1f} MiB"


def _longest_that_fits(lengths: list[int], plan: Callable[[int], Plan], budget: int) -> Plan:
    """lengths are descending and the last one fits: the memory of a plan grows with the length of its chunks."""
    low, high = 0, len(lengths) - 1
    while low < high:
        middle = (low + high) // 2
        if plan(lengths[middle]).peak_bytes <= budget:
            high = middle
        else:
            low = middle + 1
    return plan(lengths[high])


def _tiles(cells: tuple[int, int]) -> Iterator[tuple[int, int] | None]:
    """None, then tiles of ever smaller size, each step cutting the side that is the longer one into more."""
    yield None
    counts = [1, 1]
    while True:
        sizes = [-(-side // count) for side, count in zip(cells, counts, strict=True)]
        longer = int(sizes[1] > sizes[0])
        if sizes[longer] <= LEAST_TILE:
            return
        counts[longer] = max(counts[longer] + 1, counts[longer] * 4 // 3)
        yield -(-cells[0] // counts[0]), -(-cells[1] // counts[1])


class Predictor:
    """Predicts the peak bytes of plans for one task, from the network's layers run on the meta device."""

    def __init__(self, vae: nn.Module, task: Task, device: torch.device):
        self.task = task
        weights = list(vae.parameters())
        self.dtype = weights[0].dtype
        with torch.device("meta"):
            network = type(vae)(vae.config).to(self.dtype)
        self.encoder, self.decoder = network.encoder, network.decoder
        self.weight_bytes = sum(weight.numel() * weight.element_size() for weight in weights)
        self._path = selected_path(device)
        self._cost = lru_cache(maxsize=None)(self._run_stage)

    def predicted(self, plan: Plan) -> Plan:
        """The plan with its `peak_bytes`."""
        peak = self._encode(plan) if self.task.direction == "encode" else self._decode(plan)
        return replace(plan, peak_bytes=peak)

    def _lengths(self, plan: Plan) -> list[int]:
        """Latent frames of the clip's chunks: the first, one that stands for all in the middle, the last.

        Of chunks of one frame the second is the first to hold a frame back: the third is like those that follow.
        """
        total, chunk = self.task.latent_frames, min(plan.chunk or self.task.latent_frames, self.task.latent_frames)
        count = -(-total // chunk)
        last = total - chunk * (count - 1)
        return [chunk] * min(count - 1, 3 if chunk == 1 else 2) + [last]

    def _run_stage(self, name: str, lengths: tuple[int, ...], rows: int, columns: int) -> StageCost:
        batch, dtype = self.task.batch, self.dtype
        if name == "encoder.early":
            frames = [TIME_STRIDE * length - (3 if number == 0 else 0) for number, length in enumerate(lengths)]
            stage, channels, dtype = self.encoder.early, COLOURS, self.task.source
            lengths, rows, columns = tuple(frames), rows * SPACE_STRIDE, columns * SPACE_STRIDE
        elif name == "encoder.late":
            stage, channels = self.encoder.late, self.encoder.width
        elif name == "decoder.early":
            stage, channels = self.decoder.early, self.decoder.conv_in.conv.in_channels
        else:
            channels = self.decoder.mid[-1].conv2.conv.out_channels

            def stage(x, state):
                return self.decoder.late(x, state, self.task.pixels)

        with forced_path(self._path):
            return stage_cost(stage, [(batch, channels, length, rows, columns) for length in lengths], dtype)

    def _tiled(
        self, name: str, lengths: list[int], axes: list[list[Window]], tiles_outside: bool
    ) -> tuple[StageCost, float]:
        """The largest tile's cost, and how many times its carried bytes all live tiles carry."""
        areas = [
            (rows.padded[1] - rows.padded[0]) * (columns.padded[1] - columns.padded[0])
            for rows in axes[0]
            for columns in axes[1]
        ]
        sides = [max(window.padded[1] - window.padded[0] for window in axis) for axis in axes]
        live = 1.0 if tiles_outside else sum(areas) / (sides[0] * sides[1])
        return self._cost(name, tuple(lengths), *sides), live

    def _encode(self, plan: Plan) -> int:
        task, lengths = self.task, self._lengths(plan)
        axes = [
            encoder_windows(self.encoder, *axis) for axis in zip(task.cells, plan.tile or (None, None), strict=True)
        ]
        early, live = self._tiled("encoder.early", lengths, axes, plan.tiles_outside)
        late = self._cost("encoder.late", tuple(lengths), *task.cells)
        whole = task.batch * task.cells[0] * task.cells[1] * self.dtype.itemsize  # bytes of a latent frame's channel
        moments = self.encoder.conv_out.conv.out_channels * whole * task.latent_frames
        held_frames = task.frames if task.collected or plan.tiles_outside else TIME_STRIDE * lengths[0]
        given = task.batch * COLOURS * held_frames * task.height * task.width * task.source.itemsize
        held = self.weight_bytes + given
        held += moments if task.collected and len(lengths) > 1 else 0
        peak = 0
        kept_early = kept_late = 0.0
        all_features = self.encoder.width * whole * task.latent_frames if plan.tiles_outside else 0
        for number, length in enumerate(lengths):
            features = self.encoder.width * whole * length if plan.tile and not plan.tiles_outside else 0
            others = kept_early * (live - 1)
            first_kept = kept_late if not plan.tiles_outside else 0
            peak = max(peak, held + all_features + features + others + first_kept + early.peak[number])
            kept_early = early.kept[number]
            carried = 0 if plan.tiles_outside else kept_early * live
            out = 0 if plan.tiles_outside else max(features, early.out[number])
            peak = max(peak, held + all_features + out + carried + late.peak[number])
            kept_late = late.kept[number]
        return round(peak)

    def _decode(self, plan: Plan) -> int:
        task, lengths = self.task, self._lengths(plan)
        axes = [
            decoder_windows(self.decoder, *axis) for axis in zip(task.cells, plan.tile or (None, None), strict=True)
        ]
        early = self._cost("decoder.early", tuple(lengths), *task.cells)
        late, live = self._tiled("decoder.late", lengths, axes, plan.tiles_outside)
        cells = task.batch * task.cells[0] * task.cells[1]
        given = self.decoder.conv_in.conv.in_channels * cells * task.latent_frames * self.dtype.itemsize
        frame = COLOURS * task.batch * task.height * task.width * (task.pixels or self.dtype).itemsize
        held = self.weight_bytes + given
        video = frame * task.frames
        if plan.tiles_outside:
            width = self.decoder.mid[-1].conv2.conv.out_channels
            between = width * cells * self.dtype.itemsize * task.latent_frames
            return round(held + between + max(max(early.peak), video + max(late.peak)))
        peak, kept_early, kept_late = 0.0, 0.0, 0.0
        for number, length in enumerate(lengths):
            returned = video if task.collected and number > 0 else 0
            peak = max(peak, held + returned + kept_late * live + early.peak[number])
            piece = frame * TIME_STRIDE * length if plan.tile else 0
            kept_early = early.kept[number]
            busy = early.out[number] + kept_early + piece + kept_late * (live - 1) + late.peak[number]
            peak = max(peak, held + returned + busy)
            kept_late = late.kept[number]
            if task.collected and len(lengths) > 1:  # the piece is written into the whole
                peak = max(peak, held + video + max(piece, late.out[number]) + kept_early + kept_late * live)
        return round(peak)
