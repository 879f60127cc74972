"""The plan of sampling's memory, for a budget of bytes on the device (`--memory_budget`), before anything is loaded.

The stages are the prompt refiner, the text encoder, denoising and decoding. Of the ways to denoise that fit, the one
that is predicted to be fastest is taken: with all weights on the device or as few blocks as need be streamed from CPU
memory (`stream_blocks.py`), and with the halves of guidance as one batch or in turns, which takes half the activations.
Decoding gets what the DiT leaves, cut as `wfvae_plan.py` says, and runs beside the denoising of the next clip where
there is memory for both.

A budget is for tensors: what CUDA's context takes, and what the allocator cannot use, comes on top of it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from osp_fast.engine.cost import Workload
from osp_fast.engine.devices import H100, DeviceModel
from osp_fast.engine.forward_peak import (
    DenoisingBytes,
    decoding_work,
    denoising_bytes,
    dit_on_meta,
    refiner_bytes,
    text_encoder_bytes,
    weight_bytes,
)
from osp_fast.engine.sampling_cost import Streaming, decoding_seconds, step_seconds, text_seconds
from osp_fast.engine.sampling_plan import SamplingFacts, SamplingPlan, StagePlan, duration
from osp_fast.engine.stream_blocks import bytes_when_streamed
from osp_fast.errors import UserError
from osp_fast.models.prompt_refiner import decoder_layers
from osp_fast.models.quantize import Int8Linear
from osp_fast.models.text_encoder import encoder_layers
from osp_fast.models.wfvae_plan import LEAST_TILE, Predictor, Task, gib, make_plan
from osp_fast.models.wfvae_stream import Plan

REFINER, ENCODER, DENOISING, DECODING = "prompt refiner", "text encoder", "denoising", "decoding"
SLOTS = (2, 1)  # for streamed blocks; one hides copies only behind blocks that are not streamed
LIBRARIES = 64 * 2**20  # bytes of a GPU that cuBLAS keeps to work in: 32 MiB on Hopper for each of two streams
AS_FAST = 1.01  # times a clip's predicted seconds: less is no difference, and the simpler way is taken


def plan_sampling(
    facts: SamplingFacts,
    budget: int,
    device: torch.device,
    rates: DeviceModel | None = None,
    source: str = "--memory_budget",
) -> SamplingPlan:
    """The fastest plan whose every stage holds at most `budget` bytes on the device.

    rates: of the GPU, None where they are not known: plans are then compared by an H100's, and no seconds are told
    source: where the budget comes from, for the error

    Raises:
        UserError: nothing fits, with the least budget that would do.
    """
    return _Planner(facts, budget, device, rates, source).plan()


def spread(count: int, blocks: int) -> tuple[int, ...]:
    """Numbers of `count` blocks of so many, evenly over them.

    The first one is among them only where all are: with a step cache it runs in every step, the others do not.
    """
    return tuple(-(-(index + 1) * blocks // count) - 1 for index in range(count))


@dataclass(frozen=True)
class _Network:
    """A network's weights: blocks that may be streamed, and bytes outside of them that stay."""

    blocks: Sequence[nn.Module]
    outside: int

    def resident(self, streamed: Sequence[int], slots: int) -> int:
        """Bytes of weights on the device."""
        return self.outside + bytes_when_streamed(self.blocks, streamed, slots)

    @property
    def least(self) -> int:
        """`resident` where all is streamed."""
        return min(self.resident((), 1), self.resident(range(len(self.blocks)), 1))

    def streaming(self, streamed: tuple[int, ...], slots: int) -> Streaming:
        """For predictions of seconds."""
        return Streaming(streamed, slots, bytes_when_streamed(self.blocks[-1:], (), 1))

    def fewest(self, slots: int, may_stream: bool, fits: Callable[[int], bool]) -> tuple[int, ...] | None:
        """The fewest blocks to stream so that what is resident fits; None if it never does."""
        most = len(self.blocks) if may_stream else 0
        for count in (0, *range(slots + 1, most + 1)):  # as many as there are slots would save nothing
            streamed = spread(count, len(self.blocks))
            if fits(self.resident(streamed, slots)):
                return streamed
        return None

    def words(self, streamed: Sequence[int], slots: int, kind: str) -> str:
        """Where the weights are."""
        resident = f"weights {gib(self.resident(streamed, slots))}"
        if not streamed:
            return resident
        pinned = bytes_when_streamed([self.blocks[number] for number in streamed], (), slots)
        through = f"{slots} slot{'s' * (slots > 1)}"
        return (
            f"{resident}, {len(streamed)} of {len(self.blocks)} {kind} streamed through {through} from {gib(pinned)} of"
            " CPU memory"
        )


@dataclass(frozen=True)
class _TextStage:
    """The refiner or the text encoder. work: bytes beside weights; a text's tokens, and those of its answer."""

    name: str
    network: _Network
    work: int
    tokens: int
    new_tokens: int
    per: str
    advice: str


@dataclass(frozen=True)
class _Denoising:
    """A way to denoise.

    clips: in a call of the DiT; turns: such calls in a step; step: its seconds
    resident: bytes of the DiT's weights; peak: of all, the VAE's weights included; kept: while the clip is decoded
    """

    clips: int
    turns: int
    streamed: tuple[int, ...]
    slots: int
    resident: int
    peak: int
    kept: int
    step: float


class _Planner:
    """Makes one plan."""

    def __init__(self, facts: SamplingFacts, budget: int, device: torch.device, rates: DeviceModel | None, source: str):
        self._facts, self._budget, self._device, self._source = facts, budget, device, source
        self._known, self._rates = rates is not None, rates or H100
        self._on_gpu = device.type == "cuda"
        self._overhead = LIBRARIES if self._on_gpu else 0
        self._leaves = facts.save_memory and self._on_gpu  # on a CPU there is nowhere to go
        self._vae_weights = 0 if self._leaves else weight_bytes(facts.vae)
        dit = dit_on_meta(facts.dit, facts.dtype)
        self._dit = _Network(dit.transformer_blocks, weight_bytes(dit) - weight_bytes(dit.transformer_blocks))
        self._decoder = Predictor(facts.vae, facts.decode, device)
        self._work = {batch: self._denoising_bytes(*batch) for batch in facts.batches}
        self._texts = [
            *([] if facts.refiner is None else [self._refiner(facts.refiner)]),
            *([] if facts.text_encoder is None else [self._encoder(facts.text_encoder)]),
        ]

    def plan(self) -> SamplingPlan:
        """See `plan_sampling`."""
        self._check()
        ways = [way for slots in SLOTS if self._texts_fit(slots) for way in self._ways(slots)]
        fastest = min(way.step for way in ways)
        # The best one streams nothing; else as little as it can with the slots that hide copies best, the first of SLOTS.
        chosen = min(
            (way for way in ways if way.step <= AS_FAST * fastest),
            key=lambda way: (len(way.streamed) > 0, SLOTS.index(way.slots), len(way.streamed)),
        )
        room = self._room(chosen.resident, chosen.kept)
        beside = self._limited(self._budget - chosen.peak + self._vae_weights)
        overlap = self._facts.clips > 1 and self._on_gpu and not self._leaves
        overlap &= beside >= min(room, self._frame_by_frame)  # it is not cut into tiles for that
        room = beside if overlap else room
        vae = make_plan(self._facts.vae, self._facts.decode, room, self._device, self._facts.most_latent_frames)
        return self._described(chosen, vae, room, overlap)

    def _denoising_bytes(self, clips: int, turns: int) -> DenoisingBytes:
        facts = self._facts
        workload = self._workload(clips)
        return denoising_bytes(facts.dit, workload, turns, facts.calls, facts.step_cache, facts.ranks_of_half)

    def _workload(self, clips: int) -> Workload:
        facts = self._facts
        tensors = (facts.dtype, facts.dtype, facts.attention, facts.path)
        return Workload(clips, facts.latent_size, facts.text_tokens, *tensors, compiled=False)

    def _refiner(self, network: nn.Module) -> _TextStage:
        facts, layers = self._facts, decoder_layers(network)
        work = refiner_bytes(network, facts.refiner_tokens, facts.refiner_new_tokens)
        held = _Network(layers, weight_bytes(network) - weight_bytes(layers))
        advice = "use a smaller --caption_refiner" if _in_8_bits(network) else "add --text_8bit"
        return _TextStage(REFINER, held, work, facts.refiner_tokens, facts.refiner_new_tokens, "a prompt", advice)

    def _encoder(self, network: nn.Module) -> _TextStage:
        facts, layers = self._facts, encoder_layers(network)
        outside = weight_bytes(network) - weight_bytes(layers)
        if not self._on_gpu:  # where the vocabulary is in any case
            config = network.config
            outside += config.vocab_size * config.d_model * facts.dtype.itemsize
        work = text_encoder_bytes(network, facts.text_tokens)
        advice = "use a smaller text encoder" if _in_8_bits(network) else "add --text_8bit"
        return _TextStage(ENCODER, _Network(layers, outside), work, facts.text_tokens, 0, "a text", advice)

    def _decodes(self, room: int) -> bool:
        """Whether a clip can be decoded in so many bytes."""
        return room >= self._frame_by_frame or room >= self._least_decoding

    @cached_property
    def _frame_by_frame(self) -> int:
        """Bytes that decoding takes with one whole latent frame at once."""
        return self._decoder.predicted(Plan(1)).peak_bytes

    @cached_property
    def _least_decoding(self) -> int:
        """Bytes with which decoding can do, if it is cut finely enough. It takes some seconds to find out."""
        facts = self._facts
        least, tile = self._frame_by_frame, facts.decode.cells
        while max(tile) > LEAST_TILE:
            tile = (max(LEAST_TILE, -(-tile[0] // 2)), max(LEAST_TILE, -(-tile[1] // 2)))
            cuts = (Plan(1, tile, outside) for outside in (False, True))
            least = min(least, *(self._decoder.predicted(cut).peak_bytes for cut in cuts))
        while True:
            try:
                make_plan(facts.vae, facts.decode, least, self._device)
                return least
            except UserError:  # its tiles are others
                least += least // 20

    def _check(self) -> None:
        """Raise `UserError` if a stage does not fit however it is computed."""
        how = "even where all weights are streamed"
        if not self._on_gpu:
            how = "as on a CPU all weights count and nothing can be streamed"
        smaller, works = "use a smaller size or fewer frames", self._work.values()
        needs = [(self._smallest(stage.network) + stage.work, stage.name, stage.advice) for stage in self._texts]
        dit = self._smallest(self._dit)
        needs.append((dit + min(work.peak for work in works) + self._vae_weights, DENOISING, smaller))
        held = min(self._kept(work) for work in works) + (0 if self._leaves else dit)
        frees = self._on_gpu and not self._leaves
        if not self._decodes(self._budget - self._overhead - held):
            advice = f"add --save_memory, or {smaller}" if frees else smaller
            needs.append((held + self._least_decoding, DECODING, advice))
        need, name, advice = max(needs)
        need += self._overhead
        if need > self._budget:
            least = need + (2**30 // 200 if need >= 2**29 else 2**20 // 20)  # what is shown is rounded
            raise UserError(
                f"{self._source} {gib(self._budget)} is too little: {name} needs {gib(least)} {how}: give it that much,"
                f" or {advice}"
            )
        if self._facts.vae_memory is not None and not self._decodes(self._facts.vae_memory):
            make_plan(self._facts.vae, self._facts.decode, self._facts.vae_memory, self._device)  # which says so

    def _smallest(self, network: _Network) -> int:
        return network.least if self._on_gpu else network.resident((), 1)

    def _texts_fit(self, slots: int) -> bool:
        return all(self._text_streamed(stage, slots) is not None for stage in self._texts)

    def _text_streamed(self, stage: _TextStage, slots: int) -> tuple[int, ...] | None:
        room = self._budget - stage.work - self._overhead
        return stage.network.fewest(slots, self._on_gpu, lambda resident: resident <= room)

    def _ways(self, slots: int) -> Iterator[_Denoising]:
        """Those that fit, with so many slots."""
        facts = self._facts
        for (clips, turns), work in self._work.items():
            beside, kept = work.peak + self._vae_weights + self._overhead, self._kept(work)

            def fits(resident: int, beside: int = beside, kept: int = kept) -> bool:
                return resident + beside <= self._budget and self._decodes(self._room(resident, kept))

            streamed = self._dit.fewest(slots, self._on_gpu, fits)
            if streamed is not None:
                resident, streaming = self._dit.resident(streamed, slots), self._dit.streaming(streamed, slots)
                ranks = facts.ranks_of_half
                step = step_seconds(facts.dit, self._workload(clips), turns, ranks, streaming, self._rates)
                yield _Denoising(clips, turns, streamed, slots, resident, resident + beside, kept, step)

    def _kept(self, work: DenoisingBytes) -> int:
        """Bytes that denoising leaves behind while its clip is decoded."""
        return work.cached + (0 if self._leaves else work.text_keys)

    def _room(self, resident: int, kept: int) -> int:
        """Bytes for decoding after a clip's denoising."""
        return self._limited(self._budget - self._overhead - kept - (0 if self._leaves else resident))

    def _limited(self, room: int) -> int:
        return room if self._facts.vae_memory is None else min(room, self._facts.vae_memory)

    def _described(self, chosen: _Denoising, vae: Plan, room: int, overlap: bool) -> SamplingPlan:
        """The plan with its words."""
        stages, streamed = [], {}
        for text in self._texts:
            numbers = self._text_streamed(text, chosen.slots)
            streamed[text.name] = numbers
            peak = text.network.resident(numbers, chosen.slots) + text.work + self._overhead
            streaming = text.network.streaming(numbers, chosen.slots)
            seconds = text_seconds(text.network.blocks, text.tokens, text.new_tokens, streaming, self._rates)
            words = text.network.words(numbers, chosen.slots, "layers") + self._told(seconds, text.per)
            stages.append(StagePlan(text.name, peak, words))
        decoding = (0 if self._leaves else chosen.resident) + chosen.kept + self._overhead + vae.peak_bytes
        peak = chosen.peak + (vae.peak_bytes - self._vae_weights if overlap else 0)
        words = self._dit.words(chosen.streamed, chosen.slots, "blocks") + self._guidance(chosen)
        stages.append(StagePlan(DENOISING, peak, words + self._told(chosen.step, "a step")))
        facts = self._facts
        seconds = decoding_seconds(facts.vae, facts.decode, vae, decoding_work(facts.vae, facts.decode), self._rates)
        words = _decoding_words(facts.decode, vae, overlap) + self._told(seconds, "a clip")
        stages.append(StagePlan(DECODING, decoding, words))
        return SamplingPlan(
            guidance_in_turns=chosen.turns > 1,
            overlap=overlap,
            dit_streamed=chosen.streamed,
            text_streamed=streamed.get(ENCODER, ()),
            refiner_streamed=streamed.get(REFINER, ()),
            slots=chosen.slots,
            vae=vae,
            vae_memory=room,
            peaks={stage.name: stage.peak for stage in stages},
            budget=self._budget,
            step_seconds=chosen.step if self._known else None,
            clip_seconds=facts.calls * chosen.step + seconds if self._known else None,
            stages=tuple(stages),
        )

    def _told(self, seconds: float, per: str) -> str:
        return f"; {duration(seconds)} {per}" if self._known else ""

    def _guidance(self, chosen: _Denoising) -> str:
        if len(self._facts.batches) == 1 and chosen.clips == 1:
            return ""
        return "; the halves of guidance in turns" if chosen.turns > 1 else "; both halves of guidance as one batch"


def _decoding_words(task: Task, plan: Plan, overlap: bool) -> str:
    chunk = min(plan.chunk or task.latent_frames, task.latent_frames)
    where = "in whole frames" if plan.tile is None else "in tiles of {} x {} cells".format(*plan.tile)
    when = "beside the denoising of the next clip" if overlap else "after the denoising"
    return f"{when}, {chunk} of {task.latent_frames} latent frames at once, {where}"


def _in_8_bits(network: nn.Module) -> bool:
    return any(isinstance(module, Int8Linear) for module in network.modules())
