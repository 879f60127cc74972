"""How long clips take that ranks share, and which plan is the fastest: FLOPs, bytes, and the rates of `devices.py`.

Every exchange waits for the slowest rank, so a block takes as long as the rank with the most tokens does for norms,
products, cross-attention and feed-forward, and as the one with the most heads, units or sets for self-attention. What
has no tokens of the clip, the text's projections and the time's, every rank computes for itself. Bytes are those of
`parallel/exchange_bytes.py`. Passes over memory that sharing adds are counted as in `cost.py`: packing and unpacking,
and a sum of its own in front of tokens that move. A rate does not fall where a rank's part is small.

A collective takes `LATENCY_S` and its bytes' time on the links: NVLink to GPUs of the same machine, and at the same
time the GPU's own port to those of others. Rank r is GPU r of its group's machines, `NODE` on each. What computing
waits for is exposed. Heads in two rounds travel while attention computes the other round. Of tokens that move the first
part travels while the feed-forward computes the last one. Backward mirrors both. Units travel in one round, exposed; so
does the prediction.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property

import torch

from osp_fast.engine.cost import (
    ATTENTION_BACKWARD,
    BACKWARD_PASSES,
    CAST_BYTES,
    FINISH_PASSES,
    FORWARD_PASSES,
    Sharding,
    StepSeconds,
    Workload,
    block_flops,
    exposed_communication,
    outer_flops,
    pass_bytes,
    tokens_of,
)
from osp_fast.engine.devices import H100, LINK_SHARE, NODE, DeviceModel, find_device
from osp_fast.models.dit import DiTConfig
from osp_fast.parallel.exchange_bytes import ClipExchange, Sent
from osp_fast.parallel.sequence_plan import SequencePlan, sequence_plans

LATENCY_S = 20e-6  # assumed: of a collective, beside its bytes
# Assumed: what an all-to-all reaches of a link's datasheet. Of an H100's, 370 GB/s of NVLink and 45 of InfiniBand.
NVLINK_SHARE, NETWORK_SHARE = 370 / 450, 45 / 50
FEED_FORWARD = 16 / 28  # of a block's products
# Passes over a rank's tokens: what packing takes beyond the rotation that it does; the gradient of what attention read
# in place; attention's output by tokens, where clips are several; units put in order; tokens that have moved, too.
PACK_PASSES, RECEIVED_PASSES, OUTPUT_PASSES, UNIT_PASSES, MOVE_PASSES = 2, 6, 2, 2, 4
TEXT_TOKENS = 512


@dataclass(frozen=True)
class Seconds:
    """products, attention, memory_bound: of computing, on the slowest rank; exchange: of all that travels; exposed: of
    that, what computing waits for."""

    products: float = 0.0
    attention: float = 0.0
    memory_bound: float = 0.0
    exchange: float = 0.0
    exposed: float = 0.0

    @property
    def computing(self) -> float:
        return self.products + self.attention + self.memory_bound

    @property
    def total(self) -> float:
        return self.computing + self.exposed

    @property
    def exposed_share(self) -> float:
        """Of the whole."""
        return self.exposed / self.total

    @classmethod
    def sum(cls, every: Iterable["Seconds"]) -> "Seconds":
        """Of what is done one after the other."""
        every = list(every)
        return cls(*(sum(getattr(each, field.name) for each in every) for field in fields(cls)))


@dataclass(frozen=True)
class SharedWork:
    """A micro-batch that the ranks of `workload.sequence` compute together; one rank, where that is None.

    prepared: whether text keys and time vectors are there already, as in sampling
    """

    config: DiTConfig
    workload: Workload
    device: DeviceModel = H100
    prepared: bool = False

    @property
    def plan(self) -> SequencePlan:
        return self.workload.sequence or SequencePlan(1)

    @cached_property
    def exchange(self) -> ClipExchange:
        workload = self.workload
        tokens = tokens_of(self.config, workload.latent_size)
        return ClipExchange(self.config, self.plan, tokens, workload.clips, workload.dtype.itemsize)

    def forward(self) -> Seconds:
        """Of one call of the DiT."""
        return Seconds.sum([*self.blocks(), self.outside()])

    def training(self, recompute_all: bool = False) -> Seconds:
        """Of forward and backward; recompute_all: with every block computed once more."""
        backward = Seconds(self._backward_products * self.outside().products)
        seconds = [*self.blocks(), *self.blocks(backward=True), self.outside(), backward]
        if recompute_all:
            finish = Seconds(memory_bound=self._passes(FINISH_PASSES))
            seconds += [*self.blocks(), *(finish for _, moves in self._kinds if not moves)]
        return Seconds.sum(seconds)

    def exposed_again(self, blocks: Iterable[int]) -> float:
        """Seconds that backward waits for the exchange of blocks of these numbers which it recomputes.

        Whatever else a block keeps, what it received is not kept, and tokens move again.
        """
        exposed = [each.exposed for each in self.blocks()]
        return sum(exposed[index] for index in blocks)

    def blocks(self, backward: bool = False) -> Iterator[Seconds]:
        """Of each block, with the tokens that move behind it."""
        attended = {mode: self._block(mode, backward) for mode in {mode for mode, _ in self._kinds}}
        moved = self._moved(backward) if self.plan.scope > 1 else None
        for mode, moves in self._kinds:
            yield Seconds.sum([attended[mode], moved]) if moves else attended[mode]

    @cached_property
    def _kinds(self) -> list[tuple[str, bool]]:
        """For each block how it attends, and whether tokens move behind it."""
        modes = (self.config.attention_mode(index) for index in range(self.config.num_layers))
        return list(zip(modes, self.exchange.moves(), strict=True))

    @cached_property
    def _token_share(self) -> float:
        """The greatest share of a rank in the clip's tokens, with added ones."""
        return self.exchange.layout.count(0) / self.exchange.tokens

    def _attention_share(self, mode: str) -> float:
        """The greatest share of a rank in self-attention."""
        units, ranks, _ = self.exchange.units(mode)
        return -(-units // ranks) / units * ranks / self.plan.ranks

    def outside(self) -> Seconds:
        """Of the forward outside of the blocks, with the prediction on its way to all ranks."""
        every, of_each = (outer_flops(self.config, part) for part in (self.workload, self._of_each))
        travelling = 0.0
        if self.plan.ranks > 1:
            travelling = collective_seconds(self.exchange.gather(0), range(self.plan.ranks), self.device)
        return Seconds(self._product_seconds(every, of_each), exchange=travelling, exposed=travelling)

    @cached_property
    def _of_each(self) -> Workload:
        """What every rank computes for itself, or is prepared."""
        return replace(self.workload, latent_size=(0, 0, 0))

    def _product_seconds(self, every: int, of_each: int) -> float:
        """Of products of so many FLOPs, those of `_of_each` among them."""
        own = 0 if self.prepared else of_each
        return (own + (every - of_each) * self._token_share) / self.device.matmul_flops

    @property
    def _backward_products(self) -> int:
        """For each of forward's: the gradient of what went in, and that of weights which train."""
        return 2 if self.workload.lora_rank is None else 1

    def _passes(self, count: float) -> float:
        return count * self._token_share * pass_bytes(self.config, self.workload) / self.device.copy_bytes

    def _block(self, mode: str, backward: bool = False) -> Seconds:
        flops, of_each = (block_flops(self.config, mode, part) for part in (self.workload, self._of_each))
        products, passes = self._product_seconds(flops.products, of_each.products), FORWARD_PASSES
        rate, exchange = self.device.attention_forward, self.exchange
        if backward:
            products, passes = self._backward_products * products, BACKWARD_PASSES
            rate = self.device.attention_backward / ATTENTION_BACKWARD
        cross = flops.cross_attention * self._token_share / rate
        attention = flops.self_attention * self._attention_share(mode) / rate
        travel = (0.0, 0.0)
        if exchange.units(mode)[1] > 1:
            passes += RECEIVED_PASSES if backward else PACK_PASSES + OUTPUT_PASSES * (self.workload.clips > 1)
            passes += UNIT_PASSES * (exchange.units(mode)[2] > 1)
            travel = self._travel(mode, attention, backward)
        return Seconds(products, cross + attention, self._passes(passes), *travel)

    def _travel(self, mode: str, computing: float, backward: bool) -> tuple[float, float]:
        """Seconds that all travels before and behind attention, and of these exposed; computing: attention's."""
        sent = [self.exchange.attention(mode, rank) for rank in range(self.plan.ranks)]
        there, home = (Sent(*map(max, zip(*each, strict=True))) for each in zip(*sent, strict=True))
        heads = self.exchange.rounds(mode)
        shares, group = [each / sum(heads) for each in heads], range(self.exchange.units(mode)[1])
        before, behind = (home.backward, there.backward) if backward else (there.forward, home.forward)
        arriving = [collective_seconds(before * share, group, self.device) for share in shares]
        leaving = [collective_seconds(behind * share, group, self.device) for share in shares]
        link, now, ready = 0.0, 0.0, []
        for seconds, share in zip(arriving, shares, strict=True):
            link += seconds
            now = max(now, link) + share * computing
            ready.append(now)
        for begun, seconds in zip(ready, leaving, strict=True):
            link = max(link, begun) + seconds
        return sum(arriving) + sum(leaving), link - computing

    def _moved(self, backward: bool = False) -> Seconds:
        """Of tokens that move behind a block, and of the passes over them."""
        parts, group = self.exchange.layout.parts, range(0, self.plan.ranks, self.plan.heads)
        moving = [collective_seconds(self.exchange.move(part), group, self.device) for part in parts]
        products = block_flops(self.config, "full", replace(self.workload, text_tokens=0)).products
        seconds = (self._backward_products if backward else 1) * self._product_seconds(FEED_FORWARD * products, 0)
        computing = [seconds * part / sum(parts) for part in parts]
        link = now = 0.0
        if backward:  # all parts set off at once, and the last one is used first
            for each, travelling in zip(reversed(computing), reversed(moving), strict=True):
                link += travelling
                now = max(now, link) + each
        else:
            for each, travelling in zip(computing, moving, strict=True):
                now += each
                link = max(now, link) + travelling
        exposed = max(now, link) - seconds
        passes = self._passes(FINISH_PASSES + MOVE_PASSES)
        return Seconds(memory_bound=passes, exchange=sum(moving), exposed=exposed)


def collective_seconds(sent: float, group: Sequence[int], device: DeviceModel = H100) -> float:
    """Of a collective of GPUs of these numbers, in which each sends so many bytes in all, to each other as many."""
    near = [sum(other // NODE == one // NODE for other in group) - 1 for one in group]
    most, fewest, others = max(near), min(near), len(group) - 1
    nvlink = device.nvlink_bytes / LINK_SHARE * NVLINK_SHARE
    network = device.network_bytes / LINK_SHARE * NETWORK_SHARE
    return LATENCY_S + max(sent * most / others / nvlink, sent * (others - fewest) / others / network)


def predict_step(
    config: DiTConfig,
    workload: Workload,
    sharding: Sharding,
    recompute: float,
    device: DeviceModel,
    recomputed: Iterable[int] = (),
) -> StepSeconds:
    """Seconds of a step of `sharding.accumulation` micro-batches; what exchanges expose is in `communication`.

    The weights' exchange hides behind computing, one block ahead; that clips' takes the same links is not counted.

    recompute: of each micro-batch, `ActivationPlan` has them; recomputed: numbers of the blocks that do not keep all
    """
    work = SharedWork(config, workload, device)
    forward, both, times = work.forward(), work.training(), sharding.accumulation
    casts = 0.0
    if workload.weight_dtype != workload.dtype:
        casts = CAST_BYTES * sharding.trained / device.copy_bytes
    update = sharding.local_trained * sharding.optimizer_bytes / device.copy_bytes
    update += sharding.local_trained * sharding.offloaded_bytes / device.host_bytes
    backward = both.computing - forward.computing + casts + recompute
    weights = exposed_communication(config, sharding, workload.weight_dtype, forward.computing, backward, device)
    return StepSeconds(
        products=times * both.products,
        attention=times * both.attention,
        memory_bound=times * (both.memory_bound + casts),
        recompute=times * recompute,
        update=update,
        communication=weights + times * (both.exposed + work.exposed_again(recomputed)),
    )


def this_device() -> DeviceModel:
    """The rates of the GPU that is here; an H100's where there is none, or they are not known."""
    found = find_device(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    return found or H100


def predict_plans(
    config: DiTConfig,
    ranks: int,
    tokens: int,
    batch: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    training: bool = False,
    device: DeviceModel | None = None,
) -> dict[SequencePlan, Seconds]:
    """Of a micro-batch of `batch` clips of so many tokens, by plan.

    training: of forward and backward, not of one call of the DiT; device: whose rates, by default `this_device()`'s
    """
    rates = device or this_device()
    size = (tokens * config.patch_size_t, config.patch_size, config.patch_size)
    predicted = {}
    for plan in sequence_plans(ranks, config.sparse_n if config.sparse1d else 1):
        workload = Workload(batch, size, TEXT_TOKENS, dtype, dtype, sequence=plan)
        work = SharedWork(config, workload, rates, prepared=not training)
        predicted[plan] = work.training() if training else work.forward()
    return predicted


def choose_plan(
    config: DiTConfig,
    ranks: int,
    tokens: int,
    batch: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    training: bool = False,
    device: DeviceModel | None = None,
) -> SequencePlan:
    """The fastest of `predict_plans`, on GPUs of one kind the same on all ranks."""
    predicted = predict_plans(config, ranks, tokens, batch, dtype, training, device)
    return min(predicted, key=lambda plan: predicted[plan].total)


def describe_choice(
    config: DiTConfig,
    plan: SequencePlan,
    tokens: int,
    batch: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    training: bool = False,
    device: DeviceModel | None = None,
) -> list[str]:
    """For the user: the plan, and how it and the others are predicted to do. Arguments as `choose_plan` takes them."""
    rates = device or this_device()
    predicted = predict_plans(config, plan.ranks, tokens, batch, dtype, training, rates)
    best = min(predicted, key=lambda other: predicted[other].total)
    candidates = []
    for other, seconds in predicted.items():
        total = ClipExchange(config, other, tokens, batch, dtype.itemsize).total(0)
        sent = total.forward + (total.backward if training else 0)
        candidates.append(
            f"{other.scope}x{other.heads} {seconds.total:.3g} s, of which {seconds.exposed_share:.1%} wait for"
            f" {sent / 1e6:,.0f} MB from each GPU"
        )
    what = "forward and backward" if training else "a call of the DiT"
    verdict = "the fastest by prediction" if len(predicted) > 1 else "the only way"
    if plan != best:
        slower = predicted[plan].total / predicted[best].total - 1
        verdict = f"predicted to take {slower:.1%} longer than {best.scope}x{best.heads}"
    return [
        f"{plan.describe()} ({verdict})",
        f"groups x GPUs, {what} at the rates of {rates.name}: {'; '.join(candidates)}",
    ]
