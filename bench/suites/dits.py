"""The DiTs that the suites `model`, `train` and `sample` measure: clips, weights, and who computes them how.

On a GPU it is the released 2.7 B model, on a CPU the tiny preset's, with random weights as large as they are after
training: products keep their input's size, queries and keys are 1.4 times as large. A fresh DiT's attention changes its
output by less than bfloat16 rounds it, so that a wrong one would pass every check.
"""

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from bench.accuracy import exact_float32
from bench.measure import Timing
from bench.results import OURS, REFERENCE, STRONG, Row
from bench.suites import Options, reason_of
from bench.suites.upstream_blocks import use_upstream_blocks
from osp_fast.config import SAMPLE_PRESETS, TRAIN_PRESETS, OptimizerConfig
from osp_fast.data.buckets import Bucket
from osp_fast.diffusion.schedule import TRAIN_STEPS
from osp_fast.engine.compile import compile_blocks
from osp_fast.engine.cost import (
    BACKWARD_PASSES,
    CAST_BYTES,
    FORWARD_PASSES,
    Workload,
    pass_bytes,
    step_flops,
    tokens_of,
)
from osp_fast.engine.devices import H100, DeviceModel, find_device
from osp_fast.errors import UserError
from osp_fast.models.attention_backends import FUSED
from osp_fast.models.dit import DiT, DiTConfig
from osp_fast.training.footprint import optimizer_bytes
from osp_fast.training.step import MicroBatch

MODELS = {"cuda": "OpenSoraT2V_v1_3-2B/122", "cpu": "tiny"}
DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}
EXACT_TYPES = {"cuda": torch.float32, "cpu": torch.float64}  # of what all others are held against
UPSTREAM = "upstream"  # in place of a name of `--attention`: the whole block as the original code has it
ROLES = {OURS: "ours", REFERENCE: "reference", STRONG: "strong"}
QUERY_KEY_GAIN = 1.4
# Of predictions, for one H100: building the model; Inductor for a block, and for the DiT's four kinds of blocks,
# without and with gradients; FLOP/s in float32, of products and of attention.
BUILD_S = 3.0
COMPILE_BLOCK_S, COMPILE_BLOCK_TRAINING_S = 8.0, 15.0
COMPILE_S, COMPILE_TRAINING_S = 12.0, 30.0
FLOAT32_PRODUCTS, FLOAT32_ATTENTION = 45e12, 20e12
TIMES_OURS = {REFERENCE: 2.0, STRONG: 1.4}  # that a whole step of others is taken to need

Found = TypeVar("Found")


@dataclass(frozen=True)
class Case:
    """A micro-batch: its clips, their size in pixels, and the tokens of their texts."""

    size: Bucket
    clips: int = 1
    text_tokens: int = 512

    def __str__(self) -> str:
        return str(self.size) if self.clips == 1 else f"{self.clips} x {self.size}"

    @property
    def latent_size(self) -> tuple[int, int, int]:
        """(T, H, W) of the latents."""
        return (self.size.frames - 1) // 4 + 1, self.size.height // 8, self.size.width // 8

    @property
    def shape(self) -> dict[str, int]:
        """Of a row."""
        return {"clips": self.clips, **self.size._asdict(), "text_tokens": self.text_tokens}

    def video_tokens(self, config: DiTConfig) -> int:
        """Of all clips."""
        return self.clips * tokens_of(config, self.latent_size)

    def workload(self, attention: str = "triton", path: str = "triton", compiled: bool = True) -> Workload:
        """Of training as the engine plans and counts it: bfloat16 by autocast, float32 weights."""
        chosen = dict(attention=attention, path=path, compiled=compiled)
        return Workload(self.clips, self.latent_size, self.text_tokens, **chosen)

    def model_flops(self, config: DiTConfig) -> int:
        """Of forward and backward, by the mathematics: 3 x forward."""
        return step_flops(config, self.workload()).model

    def make_batch(self, config: DiTConfig, device: torch.device) -> MicroBatch:
        """Random latents and text states, a quarter of the text padding."""
        generator = torch.Generator(device).manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        shape = (self.clips, config.in_channels, *self.latent_size)
        timesteps = torch.arange(self.clips, device=device) * (TRAIN_STEPS // self.clips) + TRAIN_STEPS // 3
        mask = (torch.arange(self.text_tokens, device=device) < self.text_tokens * 3 // 4).long()
        text = draw(self.clips, self.text_tokens, config.caption_channels)
        return MicroBatch(draw(*shape), draw(*shape), timesteps % TRAIN_STEPS, text, mask.expand(self.clips, -1))


@dataclass(frozen=True)
class Implementation:
    """One way to compute the DiT.

    attention: triton, sdpa, reference, or `UPSTREAM`; path: triton or reference, what serves all other operations
    compiled: whether blocks are
    """

    name: str
    attention: str
    path: str
    compiled: bool = False

    @property
    def role(self) -> str:
        """One of `results.ROLES`."""
        return ROLES.get(self.name, "peer")

    @contextmanager
    def around(self) -> Iterator[None]:
        """Within it this implementation is built, compiled and run: its operations serve, its SDPA is the best."""
        with kernels_path(self.path), best_sdpa() if self.attention == "sdpa" else nullcontext():
            yield

    def prepare(self, dit: DiT, device: torch.device | None = None, dtype: torch.dtype | None = None) -> DiT:
        """Give a DiT its attention. Returns the model.

        device, dtype: where and in what attention will be computed; None: as the weights are
        """
        if self.attention == UPSTREAM:
            return use_upstream_blocks(dit)
        return dit.use_attention(self.attention, device, dtype)

    def compile(self, dit: DiT, buckets: int) -> DiT:
        """Compile blocks, where they are; see `compile_blocks`."""
        return compile_blocks(dit, buckets) if self.compiled else dit


@contextmanager
def kernels_path(path: str) -> Iterator[None]:
    """Within it `path` serves all operations, also in the threads of backward, which know no context variables."""
    before = os.environ.get("OSP_FAST_KERNELS")
    os.environ["OSP_FAST_KERNELS"] = path
    try:
        yield
    finally:
        if before is None:
            del os.environ["OSP_FAST_KERNELS"]
        else:
            os.environ["OSP_FAST_KERNELS"] = before


@contextmanager
def best_sdpa() -> Iterator[None]:
    """Within it the first of cuDNN, flash and memory-efficient that takes a call serves it."""
    with sdpa_kernel(FUSED, set_priority=True):
        yield


@contextmanager
def plain_float32(device: torch.device) -> Iterator[Implementation]:
    """Within it the implementation that all others are held against: plain operations, exact products."""
    one = Implementation("float32", "sdpa" if device.type == "cuda" else "reference", "reference")
    with one.around(), exact_float32():
        yield one


def exactly(case: Case, compute: Callable[[Case], Found], device: torch.device) -> tuple[Case, Found]:
    """What `compute` makes of a case in `EXACT_TYPES`, or of the largest shorter one that fits into memory, and which.

    Raises UserError if not even an image fits.
    """
    checked = case
    while True:
        let_go(device)
        try:
            return checked, compute(checked)
        except torch.OutOfMemoryError:
            frames = (checked.size.frames - 1) // 4
            if frames == 0:
                raise UserError(
                    f"--size {case.size}: in float32, which all are held against, not even an image of it fits into"
                    f" the memory of {device}: give a smaller one"
                ) from None
            checked = replace(checked, size=checked.size._replace(frames=frames // 2 * 4 + 1))


def checked_note(case: Case, checked: Case) -> str:
    """What a row says of where it was checked: nothing if that is its own size."""
    return "" if checked == case else f"checked at {checked}, as float32 takes too much memory here"


def make_dit(config: DiTConfig, device: torch.device) -> DiT:
    """Random float32 weights, the same each time, with which the output depends on every part."""
    with torch.device("meta"):
        dit = DiT(config)
    dit.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in dit.named_parameters():
            std = 0.5 if name.endswith("table") else 0.1
            if parameter.dim() > 1 and not name.endswith("table"):
                std = parameter[0].numel() ** -0.5
                std *= QUERY_KEY_GAIN if name.endswith(("qkv.weight", "q.weight", "kv.weight")) else 1
            parameter.normal_(std=std, generator=generator)
    return dit


def fresh_dit(config: DiTConfig, device: torch.device, dtype: torch.dtype) -> DiT:
    """Without gradients, in this type; `.float()` of it has the same weights."""
    return make_dit(config, device).to(dtype).requires_grad_(False).eval()


def same_dit(dit: DiT, gradients: bool = False) -> DiT:
    """Another model with the same weights, in the same memory."""
    with torch.device("meta"):
        other = DiT(dit.config)
    other.load_state_dict(dit.state_dict(), assign=True)
    return other.requires_grad_(gradients).eval()


def sizes_of(options: Options, own: Sequence[str]) -> list[Bucket]:
    """The command's sizes in place of a suite's own. Raises UserError for those that the DiT does not take."""
    for size in options.sizes:
        if (size.frames - 1) % 4 or size.height % 16 or size.width % 16:
            raise UserError(f"--size {size} must be TxHxW with T = 4n+1, H and W multiples of 16")
    return list(options.sizes) or [Bucket.parse(text) for text in own]


def tiny_training() -> Case:
    """The tiny preset's micro-batch."""
    preset = TRAIN_PRESETS["tiny"]
    size = Bucket(preset["num_frames"], preset["max_height"], preset["max_width"])
    return Case(size, preset["train_batch_size"], preset["model_max_length"])


def tiny_sampling() -> Case:
    """The tiny preset's clip."""
    return Case(tiny_training().size, 1, SAMPLE_PRESETS["tiny"]["max_sequence_length"])


def forward_bytes(config: DiTConfig, workload: Workload, blocks: int | None = None) -> int:
    """That a forward must move: the blocks' passes over tokens, as fused as ours, and their weights once.

    blocks: how many; None: all
    """
    each = FORWARD_PASSES * pass_bytes(config, workload) + 16 * config.width**2 * workload.dtype.itemsize
    return (config.num_layers if blocks is None else blocks) * each


def training_bytes(config: DiTConfig, workload: Workload, blocks: int | None = None) -> int:
    """Of forward and backward, without updates: weights are read twice, and their gradients written."""
    count = config.num_layers if blocks is None else blocks
    passes = (FORWARD_PASSES + BACKWARD_PASSES) * pass_bytes(config, workload)
    return count * (passes + 3 * 16 * config.width**2 * workload.dtype.itemsize)


def step_bytes(config: DiTConfig, workload: Workload, weights: int, settings: OptimizerConfig) -> int:
    """Of a training step with its update, of so many weights in float32, by the optimizer's settings."""
    updated = CAST_BYTES * (workload.weight_dtype != workload.dtype) + optimizer_bytes(settings)[1]
    return training_bytes(config, workload) + round(updated * weights)


def exact_seconds(config: DiTConfig, workload: Workload, training: bool) -> float:
    """Predicted, of a forward in float32, or of one with a backward that recomputes every block."""
    flops = step_flops(config, workload)
    products, attention = (4, 4.5) if training else (1, 1)
    return products * flops.products / FLOAT32_PRODUCTS + attention * flops.attention / FLOAT32_ATTENTION


def rates_of(device: torch.device) -> DeviceModel:
    """The GPU's, or an H100's where they are not known."""
    return (find_device(torch.cuda.get_device_name(device)) if device.type == "cuda" else None) or H100


def allocated(device: torch.device) -> int:
    """Bytes in tensors; 0 on a CPU, where nobody counts."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def let_go(device: torch.device) -> None:
    """Of what was measured before."""
    torch._dynamo.reset()  # compiled graphs do not know which path they were made for
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def take_timing(row: Row, timing: Timing | Exception) -> None:
    """Fill in what was measured, or why nothing was."""
    if isinstance(timing, Timing):
        for name, value in timing.fields().items():
            setattr(row, name, value)
    else:
        fault(row, timing)


def fault(row: Row, reason: Exception | str) -> None:
    """Say first of all why a row is not right, or not timed.

    What does not fit, and what the engine refuses, are results; anything else that ours raises is a failure.
    """
    words = reason
    if isinstance(reason, torch.OutOfMemoryError):
        words = "out of memory"
    elif isinstance(reason, Exception):
        failed = row.role in ("ours", "variant") and not isinstance(reason, UserError)
        words = f"FAILED: {reason_of(reason)}" if failed else reason_of(reason)
    row.ok = False
    row.note = "; ".join(filter(None, [words, row.note]))


def add_note(row: Row, *parts: str) -> None:
    """Behind what the row says already."""
    row.note = "; ".join(filter(None, [row.note, *parts]))
