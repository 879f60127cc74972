"""The plan of sampling's memory, for a budget of bytes on the device (`--memory_budget`), before anything is loaded.

The stages are the prompt refiner, the text encoder, denoising and decoding. Of the ways to denoise that fit, the one
that is predicted to be fastest is taken: with all weights on the device or as few blocks as need be streamed from CPU
memory (`stream_blocks.py`), and with the halves of guidance as one batch or in turns, which takes half the activations.
Decoding gets what the DiT leaves, cut as `wfvae_plan.py` says, and runs beside the denoising of the next clip where
there is memory for both.

A budget is for tensors: what CUDA's context takes, and what the allocator cannot use, comes on top of it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from osp_fast.engine.devices import H100, DeviceModel
from osp_fast.engine.forward_peak import vae_work
from osp_fast.engine.sampling_cost import decoding_seconds, step_seconds, text_seconds
from osp_fast.engine.sampling_needs import ENCODER, REFINER, SamplingNeeds, TextStage
from osp_fast.engine.sampling_plan import SamplingFacts, SamplingPlan, StagePlan, duration
from osp_fast.errors import UserError
from osp_fast.models.wfvae_plan import Task, gib, make_plan
from osp_fast.models.wfvae_stream import Plan

DENOISING, DECODING = "denoising", "decoding"
SLOTS = (2, 1)  # for streamed blocks; one hides copies only behind blocks that are not streamed
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
    return plan_within(SamplingNeeds(facts, device), budget, rates, source)


def plan_within(
    needs: SamplingNeeds, budget: int, rates: DeviceModel | None = None, source: str = "--memory_budget"
) -> SamplingPlan:
    """`plan_sampling` for several budgets, whose needs are measured once."""
    return _Planner(needs, budget, rates, source).plan()


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

    def __init__(self, needs: SamplingNeeds, budget: int, rates: DeviceModel | None, source: str):
        self._needs, self._budget, self._source = needs, budget, source
        self._facts = needs.facts
        self._known, self._rates = rates is not None, rates or H100

    def plan(self) -> SamplingPlan:
        """See `plan_sampling`."""
        self._check()
        ways = [way for slots in SLOTS if self._texts_fit(slots) for way in self._ways(slots)]
        fastest = min(way.step for way in ways)
        # Best is to stream nothing; else as little as can be with the slots that hide copies best, the first of SLOTS.
        chosen = min(
            (way for way in ways if way.step <= AS_FAST * fastest),
            key=lambda way: (len(way.streamed) > 0, SLOTS.index(way.slots), len(way.streamed)),
        )
        facts, needs = self._facts, self._needs
        room = self._room(chosen.resident, chosen.kept)
        beside = self._limited(self._budget - chosen.peak + needs.vae_weights)
        overlap = facts.clips > 1 and needs.on_gpu and not needs.leaves
        overlap = overlap and beside >= min(room, needs.frame_by_frame)  # it is not cut into tiles for that
        room = beside if overlap else room
        vae = make_plan(facts.vae, facts.decode, room, needs.device, facts.most_latent_frames)
        return self._described(chosen, vae, room, overlap)

    def _check(self) -> None:
        """Raise `UserError` if a stage does not fit however it is computed."""
        needs, facts, smaller = self._needs, self._facts, "use a smaller size or fewer frames"
        how = "even where all weights are streamed"
        if not needs.on_gpu:
            how = "as on a CPU all weights count and nothing can be streamed"
        works, dit = needs.denoising.values(), needs.smallest(needs.dit)
        least = [(needs.smallest(stage.network) + stage.work, stage.name, stage.advice) for stage in needs.texts]
        least.append((dit + min(work.peak for work in works) + needs.vae_weights, DENOISING, smaller))
        held = min(needs.kept(work) for work in works) + (0 if needs.leaves else dit)
        # What a whole frame at once takes is known soon; the least is worth looking for only where it may matter.
        if held + needs.frame_by_frame > max(self._budget - needs.overhead, *(size for size, _, _ in least)):
            advice = f"add --save_memory, or {smaller}" if needs.on_gpu and not needs.leaves else smaller
            least.append((held + needs.least_decoding, DECODING, advice))
        size, name, advice = max(least)
        size += needs.overhead
        if size > self._budget:
            shown = gib(size + (2**30 // 200 if size >= 2**29 else 2**20 // 20))  # which is rounded, and must suffice
            raise UserError(
                f"{self._source} {gib(self._budget)} is too little: {name} needs {shown} {how}: give it that much, or"
                f" {advice}"
            )
        if facts.vae_memory is not None and not needs.decodes(facts.vae_memory):
            make_plan(facts.vae, facts.decode, facts.vae_memory, needs.device)  # which says so

    def _texts_fit(self, slots: int) -> bool:
        return all(self._text_streamed(stage, slots) is not None for stage in self._needs.texts)

    def _text_streamed(self, stage: TextStage, slots: int) -> tuple[int, ...] | None:
        room = self._budget - stage.work - self._needs.overhead
        return stage.network.fewest(slots, self._needs.on_gpu, lambda resident: resident <= room)

    def _ways(self, slots: int) -> Iterator[_Denoising]:
        """Those that fit, with so many slots."""
        facts, needs = self._facts, self._needs
        for (clips, turns), work in needs.denoising.items():
            beside, kept = work.peak + needs.vae_weights + needs.overhead, needs.kept(work)

            def fits(resident: int, beside: int = beside, kept: int = kept) -> bool:
                return resident + beside <= self._budget and needs.decodes(self._room(resident, kept))

            streamed = needs.dit.fewest(slots, needs.on_gpu, fits)
            if streamed is not None:
                resident, streaming = needs.dit.resident(streamed, slots), needs.dit.streaming(streamed, slots)
                step = step_seconds(facts.dit, needs.workload(clips), turns, streaming, self._rates)
                yield _Denoising(clips, turns, streamed, slots, resident, resident + beside, kept, step)

    def _room(self, resident: int, kept: int) -> int:
        """Bytes for decoding after a clip's denoising."""
        return self._limited(self._budget - self._needs.overhead - kept - (0 if self._needs.leaves else resident))

    def _limited(self, room: int) -> int:
        return room if self._facts.vae_memory is None else min(room, self._facts.vae_memory)

    def _described(self, chosen: _Denoising, vae: Plan, room: int, overlap: bool) -> SamplingPlan:
        """The plan with its words."""
        facts, needs = self._facts, self._needs
        stages, streamed = [], {}
        for text in needs.texts:
            numbers = streamed[text.name] = self._text_streamed(text, chosen.slots)
            peak = text.network.resident(numbers, chosen.slots) + text.work + needs.overhead
            streaming = text.network.streaming(numbers, chosen.slots)
            seconds = text_seconds(text.network.blocks, text.tokens, text.new_tokens, streaming, self._rates)
            words = text.network.words(numbers, chosen.slots, "layers") + self._told(seconds, text.per)
            stages.append(StagePlan(text.name, peak, words))
        peak = chosen.peak + (vae.peak_bytes - needs.vae_weights if overlap else 0)
        words = needs.dit.words(chosen.streamed, chosen.slots, "blocks") + self._guidance(chosen)
        stages.append(StagePlan(DENOISING, peak, words + self._told(chosen.step, "a step")))
        peak = (0 if needs.leaves else chosen.resident) + chosen.kept + needs.overhead + vae.peak_bytes
        seconds = decoding_seconds(facts.vae, facts.decode, vae, vae_work(facts.vae, facts.decode), self._rates)
        words = _decoding_words(facts.decode, vae, overlap) + self._told(seconds, "a clip")
        stages.append(StagePlan(DECODING, peak, words))
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
