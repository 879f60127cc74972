"""Plots of results and predictions: a roofline, attention's rate over the number of tokens, what steps are made of.

Colours are Okabe and Ito's, which colour-blind people can tell apart; what is ours is filled, what is not is hollow.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.predict_steps import PARTS, Step
from bench.results import OURS, Ceilings, Row, best_of, cases_of
from osp_fast.errors import UserError

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999", "#F0E442")
MARKERS = "osD^vP*Xh"
SIZE, DPI = (10, 6), 120
ATTENTION, MODES = "skiparse_attention", ("single", "group", "full")
DIRECTIONS = ("forward", "backward")


@dataclass(frozen=True)
class Point:
    """One operation on one shape in one direction; ours, or the fastest of the others."""

    op: str
    intensity: float
    tflops: float
    ours: bool


@dataclass(frozen=True)
class Line:
    """TFLOP/s of attention by tokens of a clip."""

    name: str
    mode: str
    direction: str
    points: tuple[tuple[int, float], ...]


def roofline_points(rows: Sequence[Row], ours: str = OURS) -> list[Point]:
    """Of the rows of the suite `kernels`, ours by this name, and of each case the fastest of the others."""
    points = []
    for (suite, case), of_case in cases_of(rows).items():
        if suite != "kernels":
            continue
        mine = next((row for row in of_case if row.impl == ours and row.timed), None)
        for row in (mine, best_of(of_case)):
            if row is not None and row.flops and row.moved:
                op = case.split(" ", 1)[0]
                points.append(Point(op, row.flops / row.moved, row.flops / row.ms / 1e9, row is mine))
    return points


def attention_lines(rows: Sequence[Row], ours: str = OURS) -> list[Line]:
    """Of self-attention of one clip: a line for each implementation, mode and direction."""
    found: dict[tuple[str, str, str], list[tuple[int, float]]] = {}
    for row in rows:
        shape = row.shape
        if row.suite != "kernels" or not row.case.startswith(ATTENTION) or not row.timed:
            continue
        clip = shape.get("batch") == 1 and shape.get("keys") is None and shape.get("head_dim") == 96
        if clip and shape.get("mode") in MODES:
            key = (row.impl, shape["mode"], row.case.rsplit(" ", 1)[1])
            found.setdefault(key, []).append((shape["tokens"], row.flops / row.ms / 1e9))
    return [Line(*key, tuple(sorted(points))) for key, points in found.items()]


def roofline(points: Sequence[Point], limits: Ceilings, title: str) -> Any:
    """A figure: FLOP/s over FLOPs for each byte, below what the two ceilings allow."""
    figure, axes = _figure(1)
    low, high = (pick(point.intensity for point in points) for pick in (min, max))
    bend = limits.matmul_flops / limits.copy_bytes
    xs = [min(low, bend) / 2, bend, max(high, bend) * 2]
    ys = [min(x * limits.copy_bytes, limits.matmul_flops) / 1e12 for x in xs]
    axes.plot(xs, ys, color="#444444", linewidth=1.5, label="ceilings")
    half = (xs[0] * bend) ** 0.5, (ys[0] * ys[1]) ** 0.5
    copy = f"copy {limits.copy_bytes / 1e12:.2f} TB/s"
    axes.annotate(copy, half, (-10, 8), textcoords="offset points", ha="right")
    matmul = f"matrix product {limits.matmul_flops / 1e12:.0f} TFLOP/s"
    axes.annotate(matmul, (xs[-1], ys[-1]), (-4, 5), textcoords="offset points", ha="right")
    for place, op in enumerate(dict.fromkeys(point.op for point in points)):
        for ours in (True, False):
            chosen = [point for point in points if (point.op, point.ours) == (op, ours)]
            if chosen:
                colour = COLOURS[place % len(COLOURS)]
                axes.scatter(
                    [point.intensity for point in chosen],
                    [point.tflops for point in chosen],
                    s=34,
                    marker=MARKERS[place % len(MARKERS)],
                    edgecolors=colour,
                    facecolors=colour if ours else "none",
                    label=op if ours else f"{op}, best of the others",
                    zorder=3 if ours else 2,
                )
    axes.set(xscale="log", yscale="log", xlabel="FLOP for each byte that must move", ylabel="TFLOP/s", title=title)
    axes.legend(fontsize=8, loc="lower right")
    return figure


def attention(lines: Sequence[Line], limits: Ceilings, title: str, ours: str = OURS) -> Any:
    """A figure: TFLOP/s over tokens, forward and backward beside each other, ours solid."""
    figure, both = _figure(2)
    others = [name for name in dict.fromkeys(line.name for line in lines) if name != ours]
    for axes, direction in zip(both, DIRECTIONS, strict=True):
        for line in lines:
            if line.direction != direction:
                continue
            mine, mode = line.name == ours, MODES.index(line.mode)
            axes.plot(
                *zip(*line.points, strict=True),
                color=COLOURS[mode] if mine else COLOURS[3 + others.index(line.name) % (len(COLOURS) - 3)],
                linestyle="-" if mine else ("--", "-.", ":")[mode],
                # Single and group skip do the same work: the wider line is seen below the other.
                linewidth=(5.0, 2.0, 2.0)[mode] if mine else 1.0,
                marker=MARKERS[mode],
                markersize=(10, 6, 6)[mode] if mine else 4,
                markerfacecolor=None if mine else "none",
                label=f"{line.name}, {line.mode}",
            )
        top = limits.matmul_flops / 1e12
        axes.axhline(top, color="#444444", linewidth=1)
        axes.annotate(f"matrix product {top:.0f}", (0.02, top), (0, -12), ("axes fraction", "data"), "offset points")
        axes.set(title=direction, xlabel="thousand tokens of a clip", ylim=(0, top * 1.06))
        axes.xaxis.set_major_formatter(lambda value, place: f"{value / 1000:.0f}")
    both[0].set_ylabel("TFLOP/s")
    handles, labels = both[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=7, loc="outside lower center", ncols=4)
    figure.suptitle(title)
    return figure


def steps(every: Sequence[Step], measured: dict[tuple[str, str], float], title: str) -> Any:
    """A figure: shares of training and denoising steps, expected seconds above, and measured ones where there are some.

    measured: (suite, clip) -> seconds of ours
    """
    figure, both = _figure(2)
    for axes, what in zip(both, ("training step", "denoising step"), strict=True):
        chosen = [step for step in every if step.what == what]
        bottoms = [0.0] * len(chosen)
        for place, part in enumerate(PARTS):
            heights = [100 * step.parts.get(part, 0.0) / step.seconds for step in chosen]
            if any(heights):
                axes.bar([step.clip for step in chosen], heights, 0.7, bottoms, color=COLOURS[place], label=part)
                bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
        for place, step in enumerate(chosen):
            seconds = measured.get((step.suite, step.clip))
            words = f"{step.seconds:.3g} s" + ("" if seconds is None else f"\nmeasured\n{seconds:.3g} s")
            axes.annotate(words, (place, 100), (0, 3), textcoords="offset points", ha="center", fontsize=8)
        axes.set(title=f"{what}, expected", ylabel="% of the step", ylim=(0, 118 if measured else 108))
        axes.tick_params(axis="x", rotation=20)
    handles, labels = both[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="outside lower center", ncols=5)
    figure.suptitle(title)
    return figure


def save(figure: Any, path: Path) -> None:
    """Write a figure as PNG. Raises `UserError`."""
    try:
        figure.savefig(path, dpi=DPI)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}): name another folder") from None


def _figure(columns: int) -> tuple[Any, Any]:
    """A figure without a window, and its axes. Raises `UserError` without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError('bench report draws with matplotlib, which is missing: pip install "osp_fast[bench]"') from None
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots(1, columns)
    for one in [axes] if columns == 1 else axes:
        one.grid(True, which="major", color="#dddddd", linewidth=0.6)
        one.set_axisbelow(True)
    return figure, axes
