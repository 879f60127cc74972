"""`bench run train`: one optimizer step of the whole DiT beside how it is usually trained, in time, memory and numbers.

A step is forward, backward, clipping and AdamW on random latents and text states: no data, VAE or text encoder. On a
GPU it is the released 2.7 B model in bfloat16:

| | blocks | attention | weights | recomputed |
|---|---|---|---|---|
| osp_fast | compiled, Triton operations | our kernel | float32, autocast | what does not fit |
| reference | as the original's: `upstream_blocks.py` | memory-efficient SDPA with a mask | bfloat16 | everything |
| strong | compiled, plain PyTorch | PyTorch's fused kernels | float32, autocast | what does not fit |

Several of them do not fit into a GPU at once, weights and moments alone being 32 GB: there they are built, checked and
timed one after the other, ours first, each with the GPU to itself. Ratios are still of one run. On a CPU it is the tiny
preset's step, beside a plain loop too, nothing compiled, and all take turns.

Loss and gradient norm of an implementation's first step are held against float32, of plain operations at the same size:
where that takes too much memory, at a shorter clip, and the note says so. What is wrong is not timed.
"""

import functools
import math
from collections.abc import Iterator, Sequence

import torch

from bench.measure import LONG_CALLS, Contestant, Effort, Timing
from bench.results import OURS, Row
from bench.suites import Job, Options, Setting
from bench.suites.dits import (
    BUILD_S,
    COMPILE_TRAINING_S,
    DTYPES,
    MODELS,
    TIMES_OURS,
    Case,
    add_note,
    allocated,
    checked_note,
    exact_seconds,
    exactly,
    fault,
    let_go,
    make_dit,
    rates_of,
    sizes_of,
    step_bytes,
    take_timing,
    tiny_training,
)
from bench.suites.train_steps import ON_CPU, ON_GPU, SETTINGS, Ready, Trainer, exact_step, prepare_step
from osp_fast.engine.cost import Sharding
from osp_fast.engine.devices import H100, DeviceModel, peak_flops
from osp_fast.engine.exchange_cost import SharedWork, predict_step
from osp_fast.engine.forward_peak import dit_on_meta
from osp_fast.engine.levels import Level
from osp_fast.models.dit import DIT_CONFIGS, DiTConfig
from osp_fast.training.footprint import optimizer_bytes

SUITE = "train"
SIZES = ("93x640x640", "93x480x640", "93x352x640", "29x352x640", "93x720x1280", "1x640x640")
TOLERANCE = {"cuda": 0.03, "cpu": 1e-4}  # of the first loss and norm, in bfloat16 and in float32
EFFORT = {"cuda": LONG_CALLS, "cpu": Effort(rounds=7, seconds=0.5, fewest=7)}
CPU_SECONDS = 12.0
WARM_RUNS, GRAPH_RUNS = 4, 12  # predicted, beside those that count: check and timer; ours, to choose a graph or not
FLOAT32_TOKENS = 60_000  # of a clip whose step in float32 an H100 has memory for

Checked = tuple[Case, torch.Tensor]


def jobs(options: Options) -> list[Job]:
    """A job for each size. Raises `UserError` for sizes that the DiT does not take."""
    config = DIT_CONFIGS[MODELS[options.device]]
    if options.device == "cpu":
        own = tiny_training()
        cases = [Case(size, own.clips, own.text_tokens) for size in sizes_of(options, [str(own.size)])]
        per_token = CPU_SECONDS / own.video_tokens(config)
        seconds = [max(CPU_SECONDS / 2, per_token * case.video_tokens(config)) for case in cases]
    else:
        cases = [Case(size) for size in sizes_of(options, SIZES)]
        seconds = [_job_seconds(config, case) for case in cases]
    measure = functools.partial(measure_case, config)
    return [
        Job(SUITE, str(case), expected, functools.partial(measure, case))
        for case, expected in zip(cases, seconds, strict=True)
    ]


def measure_case(config: DiTConfig, case: Case, setting: Setting) -> Iterator[Row]:
    """Rows as they come, ours first; see the module's docstring."""
    checked: Checked = exactly(case, lambda smaller: exact_step(config, smaller, setting.device), setting.device)
    trainers = ON_GPU if setting.device.type == "cuda" else ON_CPU
    groups = [[one] for one in trainers] if setting.device.type == "cuda" else [trainers]
    for group in groups:
        yield from _measure_group(config, case, group, checked, setting)
        let_go(setting.device)


def _measure_group(
    config: DiTConfig, case: Case, group: Sequence[Trainer], checked: Checked, setting: Setting
) -> list[Row]:
    """Rows of what takes turns. What they have is let go with this function."""
    let_go(setting.device)
    batch = case.make_batch(config, setting.device)
    rows, contestants = {}, []
    for one in group:
        row = rows[one.name] = _row(config, case, one, setting.device)
        try:
            with one.around():
                ready = _start(one, config, case, row, checked, setting)
                if row.ok:
                    holds = allocated(setting.device) + ready.step.graph_size
                    call = functools.partial(ready.step, batch)
                    contestants.append(Contestant(one.name, [call], one.around, holds))
        except Exception as error:  # whatever a library raises is the reason why it is not measured
            fault(row, error)
    timings = setting.timer(contestants, setting.device, EFFORT[setting.device.type])
    for name, timing in timings.items():
        _complete(rows[name], timing, config, case, setting.device)
    return list(rows.values())


def _row(config: DiTConfig, case: Case, one: Trainer, device: torch.device) -> Row:
    weights = weights_of(config)
    dtype = str(DTYPES[device.type]).removeprefix("torch.")
    row = Row(SUITE, str(case), one.name, one.role, dtype, case.shape)
    row.flops, row.moved = case.model_flops(config), step_bytes(config, case.workload(), weights, SETTINGS)
    return row


def _start(one: Trainer, config: DiTConfig, case: Case, row: Row, checked: Checked, setting: Setting) -> Ready:
    """An implementation that has taken its first step, which is held against float32's."""
    on_gpu = setting.device.type == "cuda"

    def say(line: str) -> None:
        add_note(row, line)
        setting.say(f"{case}, {one.name}: {line}")

    ready = prepare_step(one, make_dit(config, setting.device), case, on_gpu, say)
    at, expected = checked
    found = ready.step(at.make_batch(config, setting.device))
    row.figures = dict(zip(("loss", "grad_norm"), found.tolist(), strict=True))
    row.rel_err = float(((found - expected) / expected).abs().max())  # NaN is the worst
    row.ok = row.rel_err <= TOLERANCE[setting.device.type]
    if not row.ok:
        (loss, norm), (true_loss, true_norm) = found.tolist(), expected.tolist()
        words = f"first loss {loss:.4g} for {true_loss:.4g}, gradient norm {norm:.4g} for {true_norm:.4g}"
        fault(row, f"WRONG, not timed: {words}")
    add_note(row, checked_note(case, at))
    if one.name == OURS and on_gpu:
        row.predicted_ms = 1e3 * _step_seconds(config, case, ready, rates_of(setting.device))
    return ready


def _complete(row: Row, timing: Timing | Exception, config: DiTConfig, case: Case, device: torch.device) -> None:
    take_timing(row, timing)
    if not row.timed:
        return
    seconds = row.ms * 1e-3
    row.figures |= {"steps_per_s": 1 / seconds, "tokens_per_second": case.video_tokens(config) / seconds}
    most = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if most is not None:
        row.figures["mfu"] = row.flops / seconds / most


def _step_seconds(config: DiTConfig, case: Case, ready: Ready | None, rates: DeviceModel) -> float:
    """Predicted of the engine's step, with what its plan recomputes; without one a tenth more than with nothing."""
    weights = weights_of(config)
    sharding = Sharding(1, 1, weights, weights, weights, optimizer_bytes(SETTINGS)[1])
    recompute = 0.1 * SharedWork(config, case.workload(), rates).forward().total
    again = ()
    if ready is not None and ready.plan is not None:
        recompute = ready.plan.recompute_seconds
        again = [index for index, level in enumerate(ready.plan.levels) if level < Level.EVERYTHING]
    return predict_step(config, case.workload(), sharding, recompute, rates, again).total


def _job_seconds(config: DiTConfig, case: Case) -> float:
    """On an H100: float32, building, compiling, the engine's choice of a graph, and everyone's steps."""
    step = _step_seconds(config, case, None, H100)
    runs = WARM_RUNS + max(LONG_CALLS.fewest, math.ceil(LONG_CALLS.seconds / step))
    sizes = 1 if case.video_tokens(config) <= FLOAT32_TOKENS else 2  # the one that is timed, and that of the check
    compiling = COMPILE_TRAINING_S * sizes * sum(one.compiled for one in ON_GPU)
    running = step * (runs * sum(TIMES_OURS.get(one.name, 1.0) for one in ON_GPU) + GRAPH_RUNS)
    return exact_seconds(config, case.workload(), training=True) + len(ON_GPU) * BUILD_S + compiling + running


@functools.lru_cache(maxsize=4)
def weights_of(config: DiTConfig) -> int:
    """How many numbers the DiT's weights are."""
    return sum(parameter.numel() for parameter in dit_on_meta(config, torch.float32).parameters())
