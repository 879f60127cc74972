"""Which blocks keep how much for backward, for a budget of bytes (`--activation_memory`).

A budget is for all that forward and backward hold beside weights, gradients and inputs: what is kept from one to the
other, and what the block at work needs besides. First comes what saves the most recomputation for each byte.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from osp_fast.engine.activation_trace import Measured, measure
from osp_fast.engine.cost import (
    FINISH_PASSES,
    FORWARD_PASSES,
    ROTATION_PASSES,
    Workload,
    block_flops,
    recompute_seconds,
    tokens_of,
)
from osp_fast.engine.devices import H100, DeviceModel
from osp_fast.engine.levels import Level
from osp_fast.errors import UserError
from osp_fast.models.dit import DiT, DiTConfig
from osp_fast.models.lora import has_lora
from osp_fast.models.wfvae_plan import gib


@dataclass(frozen=True)
class BlockPlan:
    """kept: bytes; flops: recomputed in backward; seconds: that this takes, predicted."""

    mode: str
    level: Level
    kept: int
    flops: int
    seconds: float


@dataclass(frozen=True)
class ActivationPlan:
    """What every block keeps.

    kept: bytes between forward and backward, also those outside of the blocks; peak: at most, at any time of the two
    budget: bytes, None without a limit
    """

    blocks: tuple[BlockPlan, ...]
    kept: int
    peak: int
    budget: int | None

    @property
    def levels(self) -> list[Level]:
        """Of each block."""
        return [block.level for block in self.blocks]

    @property
    def recompute_flops(self) -> int:
        """FLOPs of a micro-batch that backward runs once more."""
        return sum(block.flops for block in self.blocks)

    @property
    def recompute_seconds(self) -> float:
        """Predicted seconds of a micro-batch for them."""
        return sum(block.seconds for block in self.blocks)

    def apply(self, dit: DiT) -> DiT:
        """Let a DiT's blocks keep what is planned. Returns the model.

        To be called when it has its adapters, if any, and before it is compiled and sharded.
        """
        return dit.recompute_blocks([level.recompute(has_lora(dit)) for level in self.levels])

    def __str__(self) -> str:
        """One line for the log."""
        parts: list[str] = []
        for level in sorted(set(self.levels), reverse=True):
            count = self.levels.count(level)
            noun = "" if parts else "block " if count == 1 else "blocks "
            parts.append(f"{count} {noun}keep{'s' if count == 1 else ''} {level.words}")
        of_budget = "" if self.budget is None else f" of {gib(self.budget)}"
        line = f"activations: {gib(self.peak)}{of_budget}, {gib(self.kept)} kept for backward: {', '.join(parts)}"
        if self.recompute_flops:
            line += f"; {self.recompute_flops / 1e12:.3g} TFLOP of each micro-batch are recomputed"
        return line


def plan_activations(
    config: DiTConfig,
    workload: Workload,
    budget: int | None,
    device: DeviceModel = H100,
    source: str = "--activation_memory",
) -> ActivationPlan:
    """The plan for a run whose most demanding micro-batch is `workload` (`most_demanding`).

    One plan serves all of a run's buckets: what a block keeps is compiled into it.

    budget: bytes; None: everything is kept
    device: whose times are weighed, an H100's where they are not known
    source: where the budget comes from, for the error

    Raises:
        UserError: the budget does not even suffice where every block is recomputed.
    """
    cost = PlanCost(config, workload, device)
    if budget is None:
        return cost.plan([Level.EVERYTHING] * config.num_layers, None)
    levels = [Level.NOTHING] * config.num_layers
    least = cost.plan(levels, budget)
    if least.peak > budget:
        raise UserError(
            f"{source} {gib(budget)} is too little for {workload.clips} x "
            f"{'x'.join(map(str, workload.latent_size))} latent cells: {gib(least.peak)} are needed even where every"
            " block is recomputed; give it more memory, or train with fewer clips at once or smaller ones"
        )
    stuck = set()
    for _, index, level in sorted(cost.upgrades(), key=lambda upgrade: -upgrade[0]):
        changed = [*levels[:index], level, *levels[index + 1 :]]
        if index not in stuck and cost.peak(changed) <= budget:
            levels = changed
        else:
            stuck.add(index)
    return cost.plan(levels, budget)


def recompute_everything(config: DiTConfig, workload: Workload, device: DeviceModel = H100) -> ActivationPlan:
    """The plan that takes the least memory (`--gradient_checkpointing`)."""
    return PlanCost(config, workload, device).plan([Level.NOTHING] * config.num_layers, None)


def most_demanding(config: DiTConfig, workloads: Sequence[Workload]) -> Workload:
    """The micro-batch that keeps the most: the one with the most tokens on a GPU, those of the text included."""
    return max(
        workloads,
        key=lambda one: one.clips * (tokens_of(config, one.latent_size) / sharing_gpus(one) + one.text_tokens),
    )


def sharing_gpus(workload: Workload) -> int:
    """How many share its clips."""
    return 1 if workload.sequence is None else workload.sequence.ranks


class PlanCost:
    """Bytes and seconds of any choice of levels, for one micro-batch."""

    def __init__(self, config: DiTConfig, workload: Workload, device: DeviceModel = H100):
        self.config, self.workload, self.device = config, workload, device
        self.modes = [config.attention_mode(index) for index in range(config.num_layers)]
        self.measured: Callable[[Level], Measured] = partial(measure, config, workload)

    def plan(self, levels: Sequence[Level], budget: int | None) -> ActivationPlan:
        """These levels as a plan."""
        blocks = [
            BlockPlan(mode, level, self.measured(level).blocks[mode].kept, *self.recompute(mode, level))
            for mode, level in zip(self.modes, levels, strict=True)
        ]
        return ActivationPlan(tuple(blocks), sum(self._kept(levels)), self.peak(levels), budget)

    def recompute(self, mode: str, level: Level) -> tuple[int, float]:
        """FLOPs that backward of such a block runs once more on a GPU; seconds of these and of the passes beside them.

        Where GPUs share clips each has its part, also of what the text alone decides, which all compute in full.
        """
        if level == Level.EVERYTHING:
            return 0, 0.0
        flops = block_flops(self.config, mode, self.workload)
        products, attention = flops.products, flops.attention
        passes = FORWARD_PASSES + FINISH_PASSES
        if level >= Level.ATTENTION:
            attention = flops.cross_attention
        if level == Level.NARROW:
            products = flops.products - flops.narrow
        if level == Level.PRODUCTS:
            products, attention = flops.widening, 0
            passes -= ROTATION_PASSES
        seconds = recompute_seconds(self.config, self.workload, self.device, products, attention, passes)
        return (products + attention) // sharing_gpus(self.workload), seconds / sharing_gpus(self.workload)

    def upgrades(self) -> Iterator[tuple[float, int, Level]]:
        """(seconds saved for each byte, block, new level): for each block the steps worth taking, the best first."""
        for mode in dict.fromkeys(self.modes):
            for worth, level in self._steps(mode):
                yield from ((worth, index, level) for index, one in enumerate(self.modes) if one == mode)

    def _steps(self, mode: str) -> Iterator[tuple[float, Level]]:
        """From level to level, each time the one that saves the most for each byte: worth falls from step to step."""
        level = Level.NOTHING
        while level < Level.EVERYTHING:
            kept, seconds = self.measured(level).blocks[mode].kept, self.recompute(mode, level)[1]
            worths = []
            for higher in list(Level)[level + 1 :]:
                more = self.measured(higher).blocks[mode].kept - kept
                worths.append(((seconds - self.recompute(mode, higher)[1]) / max(more, 1), higher))
            worth, level = max(worths)
            yield worth, level

    def _kept(self, levels: Sequence[Level]) -> list[int]:
        """Bytes kept: before the first block, of each block, after the last."""
        first, last = self.measured(levels[0]), self.measured(levels[-1])
        blocks = [self.measured(level).blocks[mode].kept for mode, level in zip(self.modes, levels, strict=True)]
        return [first.before, *blocks, last.after]

    def peak(self, levels: Sequence[Level]) -> int:
        """The most bytes at any time of forward and backward."""
        before, *kept, after = self._kept(levels)
        peak = live = before
        casts = 0
        for mode, level, more in zip(self.modes, levels, kept, strict=True):
            live += more
            block = self.measured(level).blocks[mode]
            casts += self._cast_bytes if level < Level.EVERYTHING else 0
            peak = max(peak, live + casts + block.forward, live + block.backward)
        return max(peak, live + after + max(casts, self.measured(levels[-1]).ends))

    @property
    def _cast_bytes(self) -> int:
        """Of a block's weights in the products' type, which autocast holds on to until forward ends.

        Where a block keeps everything they are part of that; where it is compiled they are its own affair.
        """
        frozen = self.workload.lora_rank is not None  # then autocast does not
        if self.workload.compiled or frozen or self.workload.weight_dtype == self.workload.dtype:
            return 0
        return 16 * self.config.width**2 * self.workload.dtype.itemsize
