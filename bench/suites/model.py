"""`bench run model`: one block of each kind, and the whole DiT, forward and with backward, beside others' ways.

Random inputs and weights of the released width in bfloat16, on a CPU of the tiny preset's in float32:

| | operations | attention |
|---|---|---|
| osp_fast | Triton, blocks compiled | our kernel |
| reference | as the original's: `upstream_blocks.py` | memory-efficient SDPA with a mask |
| strong | plain PyTorch, blocks compiled | PyTorch's fused kernels |

On a CPU nothing is compiled. All have the same weights in the same memory, and take turns. Backward is that of all
weights and inputs: of a block with all that it keeps, of the whole DiT with every block computed once more, for all
alike. A block has its last sum inside, which in the DiT the next block's norm takes along. Text keys are not computed
before; the suite `sample` has that.

Results, and the gradients of all leaves, are first held against float32 of plain operations at the same size; where
that takes too much memory, of a shorter clip, and the note says so. What is wrong is not timed.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from osp_fast.kernels.rope3d import make_rope3d
from torch import Tensor
from torch.utils.checkpoint import noop_context_fn

from bench.accuracy import largest_error, relative_error
from bench.measure import BRIEF, LONG_CALLS, Contestant, Effort
from bench.results import OURS, REFERENCE, STRONG, Row
from bench.suites import Job, Options, Setting
from bench.suites.dits import (
    BUILD_S,
    COMPILE_BLOCK_S,
    COMPILE_BLOCK_TRAINING_S,
    COMPILE_S,
    COMPILE_TRAINING_S,
    DTYPES,
    EXACT_TYPES,
    FLOAT32_ATTENTION,
    FLOAT32_PRODUCTS,
    MODELS,
    TIMES_OURS,
    UPSTREAM,
    Case,
    Implementation,
    add_note,
    checked_note,
    exact_seconds,
    exactly,
    fault,
    forward_bytes,
    fresh_dit,
    let_go,
    plain_float32,
    rates_of,
    same_dit,
    sizes_of,
    take_timing,
    tiny_sampling,
    training_bytes,
)
from osp_fast.data.buckets import Bucket
from osp_fast.engine.cost import Workload, block_flops, step_flops, tokens_of
from osp_fast.engine.devices import H100, DeviceModel
from osp_fast.engine.exchange_cost import SharedWork
from osp_fast.engine.forward_peak import weight_bytes
from osp_fast.models.attention import VisibleKeys
from osp_fast.models.dit import DIT_CONFIGS, DiT, DiTConfig
from osp_fast.models.dit_block import Block, settled

SUITE = "model"
SIZES = ("93x640x640", "93x480x640", "93x352x640", "29x352x640", "93x720x1280")
IMAGES = Case(Bucket(1, 640, 640), clips=16)  # of blocks alone
DIT = "DiT"  # in place of a kind of block
KINDS = {"group": 3, "single": 2, "full": 1}  # of blocks: the number of one
DIRECTIONS = ("forward", "forward + backward")
ON_GPU = (
    Implementation(OURS, "triton", "triton", compiled=True),
    Implementation(REFERENCE, UPSTREAM, "reference"),
    Implementation(STRONG, "sdpa", "reference", compiled=True),
)
ON_CPU = (
    Implementation(OURS, "reference", "reference"),
    Implementation(REFERENCE, UPSTREAM, "reference"),
    Implementation(STRONG, "sdpa", "reference"),
)
EFFORT = {
    ("cuda", False): BRIEF,
    ("cuda", True): LONG_CALLS,
    ("cpu", False): Effort(rounds=5, seconds=0.2),
    ("cpu", True): Effort(rounds=5, seconds=0.4),
}
# Of the worst result, of bfloat16, of a block and of the whole DiT, in whose backward all weights' gradients count as
# one result; and of float32. Reckoned on a CPU, a quarter as wide: 1.4 and 4.9 % of blocks, 2.0 and 11.5 % of 32.
BF16_TOLERANCE = {
    (False, "forward"): 0.03,
    (False, "forward + backward"): 0.1,
    (True, "forward"): 0.05,
    (True, "forward + backward"): 0.2,
}
FLOAT32_TOLERANCE = 1e-4
CPU_SECONDS = {False: 3.0, True: 5.0}
WARM_RUNS = 4  # of each beside those that count


@dataclass(frozen=True)
class Subject:
    """What is measured: a block of a kind, or the whole DiT, of one clip."""

    kind: str
    config: DiTConfig
    case: Case

    def __str__(self) -> str:
        return f"{DIT if self.whole else f'block {self.kind}'} {self.case}"

    @property
    def whole(self) -> bool:
        """Whether it is the DiT."""
        return self.kind == DIT

    def model(self, device: torch.device, dtype: torch.dtype) -> DiT:
        """With weights; as few blocks as have the one that is measured."""
        config = self.config if self.whole else replace(self.config, num_layers=KINDS[self.kind] + 1)
        return fresh_dit(config, device, dtype)

    def workload(self, dtype: torch.dtype) -> Workload:
        return Workload(self.case.clips, self.case.latent_size, self.case.text_tokens, dtype, dtype)

    def tolerance(self, direction: str, dtype: torch.dtype) -> float:
        return BF16_TOLERANCE[self.whole, direction] if dtype == torch.bfloat16 else FLOAT32_TOLERANCE

    def flops(self, direction: str) -> int:
        """That the mathematics needs: what is computed once more does not count."""
        workload, times = self.workload(torch.bfloat16), 1 if direction == DIRECTIONS[0] else 3
        if self.whole:
            return times * step_flops(self.config, workload).model // 3
        return times * block_flops(self.config, self.kind, workload).total

    def moved(self, direction: str, dtype: torch.dtype) -> int:
        """Bytes that must move at least."""
        count = forward_bytes if direction == DIRECTIONS[0] else training_bytes
        return count(self.config, self.workload(dtype), None if self.whole else 1)

    def predicted(self, direction: str, rates: DeviceModel) -> float:
        """Seconds of ours in bfloat16."""
        work, training = SharedWork(self.config, self.workload(torch.bfloat16), rates), direction != DIRECTIONS[0]
        if self.whole:
            return (work.training(recompute_all=True) if training else work.forward()).total
        place = KINDS[self.kind]
        backward = list(work.blocks(backward=True))[place].total if training else 0.0
        return list(work.blocks())[place].total + backward


@dataclass(frozen=True)
class Bound:
    """An implementation with its inputs. call: the result; leaves: name -> what gradients are taken of."""

    call: Callable[[], Tensor]
    leaves: Mapping[str, Tensor]
    cotangent: Tensor

    def run(self, direction: str) -> dict[str, Tensor]:
        """ "out" and, with backward, "d" + name for each leaf."""
        if direction == DIRECTIONS[0]:
            with torch.no_grad():
                return {"out": self.call()}
        out = self.call()
        gradients = torch.autograd.grad(out, list(self.leaves.values()), self.cotangent)
        return {"out": out.detach()} | {f"d{name}": x for name, x in zip(self.leaves, gradients, strict=True)}


def jobs(options: Options) -> list[Job]:
    """Each size's DiT and blocks. Raises `UserError` for sizes that the DiT does not take."""
    config = DIT_CONFIGS[MODELS[options.device]]
    if options.device == "cpu":
        own = tiny_sampling()
        cases = [Case(size, 1, own.text_tokens) for size in sizes_of(options, [str(own.size)])]
    else:
        cases = [Case(size) for size in sizes_of(options, SIZES)]
    subjects = [Subject(kind, config, case) for case in cases for kind in (DIT, *KINDS)]
    if options.device == "cuda" and not options.sizes:
        subjects += [Subject(kind, config, IMAGES) for kind in KINDS]
    return [
        Job(
            SUITE,
            str(one),
            _job_seconds(one, options.device),
            functools.partial(measure_subject, one),
            parts=DIRECTIONS,
        )
        for one in subjects
    ]


def measure_subject(subject: Subject, setting: Setting) -> Iterator[Row]:
    """Rows of both directions, as they come."""
    for direction in DIRECTIONS:
        yield from _measure_direction(subject, direction, setting)
        let_go(setting.device)


def _measure_direction(subject: Subject, direction: str, setting: Setting) -> list[Row]:
    device, dtype = setting.device, DTYPES[setting.device.type]
    checked, expected = exactly(
        subject.case, lambda smaller: _exact(replace(subject, case=smaller), direction, device, dtype), device
    )
    let_go(device)
    base = subject.model(device, dtype)
    rows, bound = {}, {}
    for one in ON_GPU if device.type == "cuda" else ON_CPU:
        row = rows[one.name] = _row(subject, direction, one, dtype)
        add_note(row, checked_note(subject.case, checked))
        try:
            with one.around():
                make = _maker(subject, direction, one, base)
                row.rel_err = _error(subject, make(checked, 0).run(direction), expected)
                row.ok = row.rel_err <= subject.tolerance(direction, dtype)  # not if it is NaN
                if row.ok:
                    bound[one] = [make(subject.case, seed) for seed in range(2)]
                else:
                    fault(row, f"WRONG, not timed: off by {row.rel_err:.1e}")
        except Exception as error:  # whatever a library raises is the reason why it is not measured
            fault(row, error)
    del expected
    holds = weight_bytes(base)
    contestants = [
        Contestant(one.name, [functools.partial(each.run, direction) for each in sets], one.around, holds)
        for one, sets in bound.items()
    ]
    timings = setting.timer(contestants, device, EFFORT[device.type, subject.whole])
    for name, timing in timings.items():
        take_timing(rows[name], timing)
    if device.type == "cuda":
        rows[OURS].predicted_ms = 1e3 * subject.predicted(direction, rates_of(device))
    return list(rows.values())


def _row(subject: Subject, direction: str, one: Implementation, dtype: torch.dtype) -> Row:
    words = str(dtype).removeprefix("torch.")
    row = Row(SUITE, f"{subject} {direction}", one.name, one.role, words, subject.case.shape)
    row.flops, row.moved = subject.flops(direction), subject.moved(direction, dtype)
    return row


def _exact(subject: Subject, direction: str, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Of plain operations in `EXACT_TYPES`, of weights and inputs as they are in the type that is measured."""
    with plain_float32(device) as one:
        make = _maker(subject, direction, one, subject.model(device, dtype).to(EXACT_TYPES[device.type]))
        return make(subject.case, 0, dtype).run(direction)


def _maker(subject: Subject, direction: str, one: Implementation, base: DiT) -> Callable[..., Bound]:
    """(case, seed, type that inputs are rounded to) -> an implementation with inputs, of the weights of `base`."""
    training = direction != DIRECTIONS[0]
    dit = one.prepare(same_dit(base, gradients=training))
    if not subject.whole:
        call = torch.compile(_finished, fullgraph=True, dynamic=False) if one.compiled else _finished
        return functools.partial(_bind_block, dit, KINDS[subject.kind], call)
    if training:
        dit.recompute_blocks(noop_context_fn)
    return functools.partial(_bind_dit, one.compile(dit, buckets=2))


def _bind_dit(dit: DiT, case: Case, seed: int, rounded: torch.dtype | None = None) -> Bound:
    weight = dit.proj_out.weight
    draw = _drawing(weight, seed, rounded)
    size, training = case.latent_size, weight.requires_grad
    latents = draw(case.clips, dit.config.in_channels, *size).requires_grad_(training)
    text = draw(case.clips, case.text_tokens, dit.config.caption_channels).requires_grad_(training)
    timestep = torch.arange(case.clips, device=weight.device) * 50 + 333 + 20 * seed
    cotangent = draw(case.clips, dit.config.out_channels, *size)
    leaves = {"latents": latents, "text": text, **dict(dit.named_parameters())}
    return Bound(functools.partial(dit, latents, timestep, text, _text_mask(case, weight.device)), leaves, cotangent)


def _finished(block: Block, *inputs: Any) -> Tensor:
    """A block with its last sum."""
    return settled(*block(*inputs))


def _bind_block(
    dit: DiT, place: int, call: Callable[..., Tensor], case: Case, seed: int, rounded: torch.dtype | None = None
) -> Bound:
    block, config, weight = dit.transformer_blocks[place], dit.config, dit.proj_out.weight
    draw = _drawing(weight, seed, rounded)
    size = tuple(length // patch for length, patch in zip(case.latent_size, config.patch, strict=True))
    shape = case.clips, tokens_of(config, case.latent_size), config.width
    leaves = {"x": draw(*shape), "time": draw(case.clips, 6, config.width)}
    leaves["text"] = draw(case.clips, case.text_tokens, config.width)
    for leaf in leaves.values():
        leaf.requires_grad_(weight.requires_grad)
    rope = make_rope3d(size, config.attention_head_dim, device=weight.device)
    text_tokens = VisibleKeys.from_mask(_text_mask(case, weight.device))
    inputs = leaves["x"], None, leaves["time"], rope, VisibleKeys(), leaves["text"], text_tokens
    return Bound(functools.partial(call, block, *inputs), leaves | dict(block.named_parameters()), draw(*shape))


def _drawing(weight: Tensor, seed: int, rounded: torch.dtype | None) -> Callable[..., Tensor]:
    """Random numbers of the weight's type and device, the same in every type that they are rounded to."""
    generator = torch.Generator(weight.device).manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        drawn = torch.randn(shape, generator=generator, device=weight.device)
        return drawn.to(rounded or weight.dtype).to(weight.dtype)

    return draw


def _text_mask(case: Case, device: torch.device) -> Tensor:
    """A quarter is padding."""
    real = torch.arange(case.text_tokens, device=device) < case.text_tokens * 3 // 4
    return real.expand(case.clips, -1)


def _error(subject: Subject, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The worst; of the whole DiT's weights all gradients are one result."""
    if not subject.whole:
        return largest_error(found, expected)
    apart = {name: found[name] for name in ("out", "dlatents", "dtext") if name in found}
    errors = [largest_error(apart, expected)]
    if weights := [name for name in found if name not in apart]:
        norms = [float(expected[name].double().norm()) for name in weights]
        parts = [relative_error(found[name], expected[name]) * norm for name, norm in zip(weights, norms, strict=True)]
        errors.append(math.hypot(*parts) / math.hypot(*norms))
    return max(errors, key=lambda error: (error != error, error))


def _job_seconds(subject: Subject, device_type: str) -> float:
    """Of both directions: float32, building, compiling, everyone's runs."""
    if device_type == "cpu":
        scale = subject.case.video_tokens(subject.config) / tiny_sampling().video_tokens(subject.config)
        return CPU_SECONDS[subject.whole] * max(0.5, scale)
    compiling = COMPILE_S + COMPILE_TRAINING_S if subject.whole else COMPILE_BLOCK_S + COMPILE_BLOCK_TRAINING_S
    seconds = compiling * sum(one.compiled for one in ON_GPU)
    everyone = sum(TIMES_OURS.get(one.name, 1.0) for one in ON_GPU)
    effort = EFFORT["cuda", subject.whole]
    for direction in DIRECTIONS:
        training = direction != DIRECTIONS[0]
        once = subject.predicted(direction, H100)
        seconds += everyone * once * (WARM_RUNS + max(effort.fewest, math.ceil(effort.seconds / once)))
        if subject.whole:
            seconds += 2 * BUILD_S + exact_seconds(subject.config, subject.workload(torch.float32), training)
        else:
            flops = block_flops(subject.config, subject.kind, subject.workload(torch.float32))
            products, attention = (3, 3.5) if training else (1, 1)
            seconds += products * flops.products / FLOAT32_PRODUCTS + attention * flops.attention / FLOAT32_ATTENTION
    return seconds
