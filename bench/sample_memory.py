"""A step as `--memory_budget` plans it, for `bench sample`: blocks streamed from CPU memory, guidance in turns."""

import statistics
import time
from typing import Any

import torch
from torch import Tensor

from bench.accuracy import relative_error
from bench.sample_steps import ON_GPU, WITHIN, Sampler, engine_sampler, fresh_dit, let_go, make_noise, prepare
from bench.train_steps import Case, kernels_path
from osp_fast.diffusion.denoise import Halves
from osp_fast.engine.devices import find_device
from osp_fast.engine.sampling_plan import SamplingFacts, SamplingPlan
from osp_fast.engine.stages import DENOISING, plan_sampling
from osp_fast.engine.stream_blocks import BlockStreamer
from osp_fast.errors import UserError
from osp_fast.models.dit import DiT, DiTConfig
from osp_fast.models.wfvae import WFVAE, WFVAE_CONFIGS
from osp_fast.models.wfvae_plan import Task, gib

WARM_STEPS, TURNS = 3, 5


def plan_for(config: DiTConfig, case: Case, budget: int, device: torch.device, steps: int) -> SamplingPlan:
    """Of a clip with the released VAE, in bfloat16. Raises `UserError` if nothing fits."""
    with torch.device("meta"):
        vae = WFVAE(WFVAE_CONFIGS["WFVAEModel_D8_4x8x8"]).to(torch.bfloat16)
    facts = SamplingFacts(
        dit=config,
        dtype=torch.bfloat16,
        latent_size=case.latent_size,
        guided=True,
        text_tokens=case.text_tokens,
        calls=steps,
        clips=1,
        vae=vae,
        decode=Task("decode", *case.size, collected=False, pixels=torch.float16),
    )
    rates = find_device(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return plan_sampling(facts, budget, device, rates)


def measure_budget(
    config: DiTConfig,
    case: Case,
    budget: int,
    device: torch.device,
    dtype: torch.dtype,
    steps: int,
    expected: Tensor,
    checked: tuple[int, float],
) -> dict[str, Any]:
    """A row of steps within a budget of bytes, or why there is none; the plan is printed.

    expected: the prediction in float32 of step number checked[0], which may differ by checked[1]
    """
    row = {"case": str(case), "implementation": f"{WITHIN} {gib(budget)}", "seconds": None, "spread": None}
    row |= {"peak_bytes": None, "rel_err": None, "ok": False, "chosen": [], "note": "", "predicted_seconds": None}
    let_go(device)
    try:
        plan = plan_for(config, case, budget, device, steps)
    except UserError as error:
        return row | {"note": str(error)}
    row |= {"chosen": plan.lines(), "predicted_seconds": plan.step_seconds, "predicted_bytes": plan.peaks[DENOISING]}
    print("\n".join(plan.lines()), flush=True)
    try:
        with kernels_path(ON_GPU[0].path):
            dit = prepare(ON_GPU[0], fresh_dit(config, device, dtype).to("cpu"), device)
            streamer = put_in_place(dit, plan, device)
            row["note"] = f"{len(plan.dit_streamed)} blocks streamed, planned {gib(plan.peaks[DENOISING])}"
            try:
                return row | _measure(dit, case, plan, steps, expected, checked)
            finally:
                if streamer is not None:
                    streamer.release()
    except torch.OutOfMemoryError:
        return row | {"note": "out of memory"}


def put_in_place(dit: DiT, plan: SamplingPlan, device: torch.device) -> BlockStreamer | None:
    """Bring a DiT that is on the CPU to the device, as far as the plan says."""
    streamer = None
    if plan.dit_streamed:
        blocks = list(dit.transformer_blocks)
        streamer = BlockStreamer(blocks, plan.dit_streamed, device, plan.slots, ("forward", "text_keys"))
    dit.to(device)
    return streamer


@torch.no_grad()
def _measure(
    dit: DiT, case: Case, plan: SamplingPlan, steps: int, expected: Tensor, checked: tuple[int, float]
) -> dict[str, Any]:
    device = expected.device
    sampler = engine_sampler(dit, case, steps, halves=Halves.IN_TURNS if plan.guidance_in_turns else Halves.TOGETHER)
    latents = make_noise(dit.config, case, device)
    sampler.run(latents, range(WARM_STEPS))
    number, tolerance = checked
    error = relative_error(sampler.predict(make_noise(dit.config, case, device, 1), number), expected)
    if not error <= tolerance:
        return {"rel_err": error, "note": f"WRONG by {error:.1e}, not timed"}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times = sorted(_seconds_of(sampler, latents) for _ in range(TURNS))
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    median = statistics.median(times)
    return {"rel_err": error, "ok": True, "seconds": median, "spread": (times[-2] - times[1]) / median} | {
        "peak_bytes": peak
    }


def _seconds_of(sampler: Sampler, latents: Tensor) -> float:
    """Of one of two steps: the second one's first weights come while the first one's last blocks compute."""
    start = time.perf_counter()
    sampler.run(latents, range(2))
    if latents.is_cuda:
        torch.cuda.synchronize(latents.device)
    return (time.perf_counter() - start) / 2
