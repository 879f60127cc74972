"""Steps as `--memory_budget` plans them, for the suite `sample`: blocks streamed from CPU memory, guidance in turns."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from bench.measure import Contestant, Effort, Timing
from bench.results import MIB, Row
from bench.suites import Job, Setting
from bench.suites.dits import (
    BUILD_S,
    COMPILE_S,
    DTYPES,
    Case,
    add_note,
    allocated,
    checked_note,
    fault,
    fresh_dit,
    let_go,
    rates_of,
    take_timing,
)
from bench.suites.sample_check import (
    STEPS,
    SUITE,
    exact_step_seconds,
    expected_prediction,
    judge,
    predicted_seconds,
    step_row,
)
from bench.suites.sample_steps import ON_GPU, checked_noise, engine_sampler, make_noise, prepare
from osp_fast.diffusion.denoise import Halves
from osp_fast.engine.devices import H100
from osp_fast.engine.sampling_plan import SamplingFacts, SamplingPlan
from osp_fast.engine.stages import DENOISING, plan_sampling
from osp_fast.engine.stream_blocks import BlockStreamer
from osp_fast.models.dit import DiT, DiTConfig
from osp_fast.models.wfvae import WFVAE, WFVAE_CONFIGS
from osp_fast.models.wfvae_plan import Task, gib

# Bytes, and the case that is measured within them where nothing else is asked for: all weights fit into the first.
BUDGETS, BUDGETED = (10 << 30, 6 << 30), "93x480x640"
WITHIN = "within"
TIMES_UNBOUNDED = 1.4  # that a step is predicted to take which streams weights, and computes a half at a time
CALL_STEPS = 2  # the second one's first weights come while the first one's last blocks compute
EFFORT = Effort(rounds=3, seconds=0.0, fewest=3, warm_seconds=0.0)
RUNS = CALL_STEPS * (3 + EFFORT.fewest) + 1  # steps of a budget, with the one that is checked


def budget_job(config: DiTConfig, case: Case, budgets: Sequence[int]) -> Job:
    """A case within each budget of bytes. They are measured one after the other, each beside nothing."""
    step = TIMES_UNBOUNDED * predicted_seconds(config, case, H100)
    seconds = exact_step_seconds(config, case) + len(budgets) * (BUILD_S + COMPILE_S + RUNS * step)
    measure = functools.partial(measure_budgets, config, case, tuple(budgets))
    return Job(SUITE, f"{case} {WITHIN}", seconds, measure, parts=tuple(map(gib, budgets)))


def plan_for(config: DiTConfig, case: Case, budget: int, device: torch.device) -> SamplingPlan:
    """Of a clip with the released VAE, in bfloat16. Raises `UserError` if nothing fits."""
    with torch.device("meta"):
        vae = WFVAE(WFVAE_CONFIGS["WFVAEModel_D8_4x8x8"]).to(torch.bfloat16)
    facts = SamplingFacts(
        dit=config,
        dtype=torch.bfloat16,
        latent_size=case.latent_size,
        guided=True,
        text_tokens=case.text_tokens,
        calls=STEPS,
        clips=1,
        vae=vae,
        decode=Task("decode", *case.size, collected=False, pixels=torch.float16),
    )
    return plan_sampling(facts, budget, device, rates_of(device))


@torch.no_grad()
def measure_budgets(config: DiTConfig, case: Case, budgets: Sequence[int], setting: Setting) -> Iterator[Row]:
    """A row of ours for each budget, or why there is none; its note has the plan."""
    checked = expected_prediction(config, case, setting.device)
    for budget in budgets:
        let_go(setting.device)
        yield _measure_budget(config, case, budget, checked, setting)


def _measure_budget(config: DiTConfig, case: Case, budget: int, checked: tuple[Case, Tensor], setting: Setting) -> Row:
    one, device, dtype = ON_GPU[0], setting.device, DTYPES[setting.device.type]
    row = step_row(config, case, one, dtype, f"{case} {WITHIN} {gib(budget)}")
    try:
        plan = plan_for(config, case, budget, device)
        row.predicted_ms = 1e3 * plan.step_seconds
        row.figures = {"budget_mib": budget / MIB, "planned_mib": plan.peaks[DENOISING] / MIB}
        add_note(row, f"{len(plan.dit_streamed)} blocks streamed", *plan.lines())
        with one.around():
            dit = prepare(one, fresh_dit(config, device, dtype).to("cpu"), device)
            streamer = put_in_place(dit, plan, device)
            try:
                _measure(row, dit, case, plan, checked, setting)
            finally:
                if streamer is not None:
                    streamer.release()
    except Exception as error:  # the next budget is measured whatever happens to this one
        fault(row, error)
    return row


def put_in_place(dit: DiT, plan: SamplingPlan, device: torch.device) -> BlockStreamer | None:
    """Bring a DiT that is on the CPU to the device, as far as the plan says."""
    streamer = None
    if plan.dit_streamed:
        blocks = list(dit.transformer_blocks)
        streamer = BlockStreamer(blocks, plan.dit_streamed, device, plan.slots, ("forward", "text_keys"))
    dit.to(device)
    return streamer


def _measure(
    row: Row, dit: DiT, case: Case, plan: SamplingPlan, checked: tuple[Case, Tensor], setting: Setting
) -> None:
    halves = Halves.IN_TURNS if plan.guidance_in_turns else Halves.TOGETHER
    at, expected = checked
    judge(row, engine_sampler(dit, at, STEPS, halves=halves), checked_noise(dit, at), expected)
    add_note(row, checked_note(case, at))
    if not row.ok:
        return
    sampler = engine_sampler(dit, case, STEPS, halves=halves)
    call = functools.partial(sampler.run, make_noise(dit.config, case, setting.device), range(CALL_STEPS))
    contestant = Contestant(row.impl, [call], ON_GPU[0].around, allocated(setting.device))
    timing = setting.timer([contestant], setting.device, EFFORT)[row.impl]
    if not isinstance(timing, Timing):
        raise timing
    steps = replace(timing, turns=[[ms / CALL_STEPS for ms in turn] for turn in timing.turns])
    take_timing(row, steps)
    row.figures["steps_per_s"] = 1e3 / row.ms
