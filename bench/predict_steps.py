"""What whole steps and clips of the released model should take on one H100: `osp_fast/engine`'s cost model, by parts.

`expected` takes attention's rates from what its spec predicts of the kernels as they are; `at targets` those that they
are to reach, 600 TFLOP/s forward and 500 backward, with which the engine plans. The roofline has all products and
attention at the rate of a matrix product, recomputes nothing, and every pass over memory at the rate of a copy.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import torch
from osp_fast.kernels.skiparse_attention_spec import SPEC as ATTENTION

from bench.results import H100, Row
from bench.table import format_table, percent
from osp_fast.config import OptimizerConfig
from osp_fast.data.buckets import Bucket
from osp_fast.engine import devices
from osp_fast.engine.activations import plan_activations
from osp_fast.engine.cost import Sharding, Workload, step_flops
from osp_fast.engine.devices import DeviceModel
from osp_fast.engine.exchange_cost import SharedWork, predict_step
from osp_fast.engine.forward_peak import dit_on_meta, vae_work
from osp_fast.engine.sampling_cost import decoding_seconds
from osp_fast.models.dit import DIT_CONFIGS
from osp_fast.models.wfvae_plan import Task, make_plan
from osp_fast.training.footprint import optimizer_bytes

MODEL, VAE = "OpenSoraT2V_v1_3-2B/122", "WFVAEModel_D8_4x8x8"
CONFIG = DIT_CONFIGS[MODEL]
CLIPS = ("29x352x640", "93x352x640", "93x480x640", "93x640x640", "93x720x1280")
TEXT_TOKENS, STEPS = 512, 100
TRAINING_BYTES = 16  # for each weight: float32, its gradient, two moments
RESERVED = 2 << 30  # of the GPU's memory, for CUDA and what is not counted
PARTS = ("products", "attention", "memory-bound", "recomputed", "update", "decoding")
# What is to be reached: a training step's MFU, seconds of a clip of 100 steps.
MFU_TARGETS, CLIP_TARGETS = {"93x640x640": 0.40}, {"93x352x640": 50.0, "93x640x640": 115.0}


@dataclass(frozen=True)
class Step:
    """A training step, a step of denoising, or a clip.

    parts: seconds by `PARTS`; at_targets: of all, with attention at its targets; roofline: that the ceilings allow
    flops: that the mathematics needs; figures: further numbers; target: what is to be reached and is, or is not
    """

    suite: str
    what: str
    clip: str
    parts: dict[str, float]
    at_targets: float
    roofline: float
    flops: float
    figures: dict[str, float] = field(default_factory=dict)
    target: str = ""

    @property
    def seconds(self) -> float:
        """Of all parts, one after the other."""
        return sum(self.parts.values())


def predict_steps(clip: str) -> list[Step]:
    """A training step, a step of denoising with guidance and a whole clip, "93x640x640"."""
    training, denoising = _training(clip), _denoising(clip)
    decoding, least = _decoding(Bucket.parse(clip))
    whole = replace(
        denoising,
        what=f"clip, {STEPS} steps",
        parts={**{name: STEPS * seconds for name, seconds in denoising.parts.items()}, "decoding": decoding},
        at_targets=STEPS * denoising.at_targets + decoding,
        roofline=STEPS * denoising.roofline + least,
        flops=STEPS * denoising.flops,
    )
    if clip in CLIP_TARGETS:
        wanted = CLIP_TARGETS[clip]
        whole = replace(whole, target=_verdict(f"{wanted:.0f} s", whole.seconds <= wanted, whole.at_targets <= wanted))
    return [training, denoising, whole]


def steps_table(steps: Sequence[Step], table: Callable[[Sequence, Sequence], str] = format_table) -> str:
    """A line for each step: seconds, what they go to, and what the ceilings allow."""
    used = [name for name in PARTS if any(name in step.parts for step in steps)]
    headers = ["clip", "", "expected", *used, "at targets", "roofline", "of roofline", "TFLOP/s", "MFU", "target"]
    lines = []
    for step in steps:
        shares = [percent(step.parts[name] / step.seconds) if name in step.parts else None for name in used]
        figures = [f"{step.at_targets:.4g} s", f"{step.roofline:.4g} s", percent(step.roofline / step.seconds)]
        figures += [f"{step.flops / step.seconds / 1e12:.0f}", percent(step.figures.get("mfu")), step.target or None]
        lines.append([step.clip, step.what, f"{step.seconds:.4g} s", *shares, *figures])
    return table(headers, lines)


def step_row(step: Step) -> Row:
    """The step as a row: `predicted_ms` is what is expected, figures have its parts in seconds."""
    row = Row(step.suite, f"{step.clip} {step.what}", "predicted", "variant", "bfloat16", flops=step.flops)
    row.predicted_ms = 1e3 * step.seconds
    row.figures = {f"{name}_seconds": seconds for name, seconds in step.parts.items()} | step.figures
    row.figures |= {"at_targets_seconds": step.at_targets, "roofline_seconds": step.roofline}
    return row


def attention_as_predicted(clip: str) -> DeviceModel:
    """An H100 on which attention reaches what its spec says of the clip's group skip."""
    sizes = next(shape.sizes for shape in ATTENTION.shapes if shape.name == f"{clip} group")
    rates = {
        f"attention_{way}": ATTENTION.flops(way, **sizes) / ATTENTION.predicted(way, **sizes)
        for way in ("forward", "backward")
    }
    return replace(devices.H100, **rates)


def _training(clip: str) -> Step:
    """One clip on one GPU, float32 weights; what does not fit beside them is recomputed."""
    workload = Workload(1, _latents(clip), TEXT_TOKENS)
    weights = _weights()
    sharding = Sharding(1, 1, weights, weights, weights, optimizer_bytes(OptimizerConfig())[1])
    budget = devices.H100.memory - RESERVED - TRAINING_BYTES * weights
    found = []
    for gpu in (attention_as_predicted(clip), devices.H100):
        plan = plan_activations(CONFIG, workload, budget, gpu)
        found.append(predict_step(CONFIG, workload, sharding, plan.recompute_seconds, gpu))
    step, at_targets = found
    seconds = (step.products, step.attention, step.memory_bound, step.recompute, step.update)
    flops = step_flops(CONFIG, workload).model
    mfu, mfu_at_targets = (flops / one.total / devices.H100.peak_flops for one in found)
    wanted = MFU_TARGETS.get(clip)
    return Step(
        "train",
        "training step",
        clip,
        dict(zip(PARTS, seconds, strict=False)),
        at_targets.total,
        flops / H100.matmul_flops + _at_copy_rate(step.memory_bound + step.update),
        flops,
        {"mfu": mfu},
        "" if wanted is None else _verdict(f"MFU {wanted:.0%}", mfu >= wanted, mfu_at_targets >= wanted),
    )


def _denoising(clip: str) -> Step:
    """Both halves of guidance as one batch, bf16 weights, text keys and time vectors computed before."""
    workload = Workload(2, _latents(clip), TEXT_TOKENS, weight_dtype=torch.bfloat16)
    reading = 2 * _weights() / devices.H100.copy_bytes
    step, at_targets = (
        SharedWork(CONFIG, workload, gpu, prepared=True).forward()
        for gpu in (attention_as_predicted(clip), devices.H100)
    )
    counted = step_flops(CONFIG, workload)
    flops = counted.products + counted.attention
    passes = step.memory_bound + reading
    parts = {"products": step.products, "attention": step.attention, "memory-bound": passes}
    least = flops / H100.matmul_flops + _at_copy_rate(passes)
    return Step("sample", "denoising step", clip, parts, at_targets.total + reading, least, flops)


def _decoding(size: Bucket) -> tuple[float, float]:
    """Seconds of our VAE for a clip, as planned for all of an H100's memory, and of its roofline."""
    from osp_fast.models.wfvae import WFVAE, WFVAE_CONFIGS

    with torch.device("meta"):
        vae = WFVAE(WFVAE_CONFIGS[VAE]).to(torch.bfloat16)
    task = Task("decode", *size, source=torch.bfloat16)
    plan = make_plan(vae, task, devices.H100.memory - RESERVED, torch.device("cuda"))
    work = vae_work(vae, task)
    return decoding_seconds(vae, task, plan, work, devices.H100), H100.seconds(work.flops, work.moved)


@cache
def _weights() -> int:
    return sum(parameter.numel() for parameter in dit_on_meta(CONFIG, torch.float32).parameters())


def _latents(clip: str) -> tuple[int, int, int]:
    size = Bucket.parse(clip)
    return (size.frames - 1) // 4 + 1, size.height // 8, size.width // 8


def _at_copy_rate(seconds: float) -> float:
    """Of passes that the engine counts, at the ceiling in place of the engine's own rate."""
    return seconds * devices.H100.copy_bytes / H100.copy_bytes


def _verdict(target: str, expected: bool, at_targets: bool) -> str:
    words = "met" if expected else "missed; met at attention's targets" if at_targets else "missed"
    return f"{target}: {words}"
