"""The suite `sample`: a denoising step of a small DiT on the CPU, in the place of the released one's on a GPU."""

import sys
from dataclasses import replace

import pytest
import torch

from bench.measure import Effort, Timing
from bench.results import MIB, Ceilings, Row, complete_case
from bench.suites import Options, Setting, sample, sample_cache, sample_check, sample_memory, sample_steps, vae
from bench.suites import dits as bench_dits
from bench.suites.dits import Case, fresh_dit, same_dit
from bench.suites.sample import complete, decode_seconds, jobs, measure_case, median_of_ratios
from bench.suites.sample_cache import measure_caches
from bench.suites.sample_check import predicted_seconds
from bench.suites.sample_memory import budget_job, measure_budgets
from bench.suites.sample_steps import ON_CPU, ON_GPU, Ddim, guided_flops
from osp_fast.data.buckets import Bucket
from osp_fast.diffusion.samplers import make_scheduler
from osp_fast.engine import stream_blocks
from osp_fast.engine.compile import compile_blocks
from osp_fast.engine.devices import H100
from osp_fast.engine.sampling_plan import SamplingPlan
from osp_fast.errors import UserError
from osp_fast.models.dit import DIT_CONFIGS, DiTConfig

CPU = torch.device("cpu")
SMALL = DiTConfig(
    num_layers=3, num_attention_heads=1, attention_head_dim=24, caption_channels=8, cross_attention_dim=24, sparse_n=2
)
CASE = Case(Bucket(1, 32, 48), text_tokens=8)
RELEASED = DIT_CONFIGS["OpenSoraT2V_v1_3-2B/122"]
LIMITS = Ceilings(1e12, 1e10)
# Without Triton's interpreter, which takes seconds for each step.
QUICK = tuple(
    one if one.path == "reference" else replace(one, attention="reference", path="reference") for one in ON_GPU
)


def one_millisecond(contestants, device, effort):
    """A timer that runs each once, and says that the first took a millisecond, the second two, and so on."""
    for one in contestants:
        with one.around():
            one.calls[0]()
    return {one.name: Timing([[float(place)]] * 10) for place, one in enumerate(contestants, 1)}


def setting(timer=one_millisecond):
    return Setting(CPU, LIMITS, print, **({} if timer is None else {"timer": timer}))


def measured(timer=one_millisecond, config=SMALL):
    rows = measure_case(config, CASE, setting(timer))
    complete_case(rows, LIMITS)
    return rows


@pytest.fixture
def compiled(monkeypatch):
    """Graphs as they are traced: the list gets what calls each of them has."""
    graphs: list[set[str]] = []

    def as_traced(graph, inputs):
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return graph.forward

    monkeypatch.setattr(bench_dits, "compile_blocks", lambda dit, buckets: compile_blocks(dit, buckets, as_traced))
    return graphs


def test_another_model_with_the_same_weights_takes_no_memory():
    dit = fresh_dit(SMALL, CPU, torch.bfloat16)
    for mine, other in zip(dit.parameters(), same_dit(dit).parameters(), strict=True):
        assert mine.data_ptr() == other.data_ptr() and not other.requires_grad


def test_no_graph_of_one_implementation_serves_another_one(compiled, monkeypatch):
    """In ours, interpreted, all operations are ours; in strong none is."""
    monkeypatch.setattr(sample, "ON_CPU", (replace(ON_GPU[2], name="first"), ON_GPU[0]))
    rows = measured(lambda contestants, *given: {}, replace(SMALL, num_layers=1))
    assert all(row.ok for row in rows)
    fused, ours = ({name for name in calls if "scaled_dot_product" in name or "osp_fast" in name} for calls in compiled)
    assert not any("osp_fast" in name for name in fused) and fused
    assert not any("scaled_dot_product" in name for name in ours) and ours


def test_the_implementations_of_a_gpu_compute_the_same(compiled, monkeypatch):
    monkeypatch.setattr(sample, "ON_CPU", QUICK)
    rows = measured(config=replace(SMALL, num_layers=1))
    names = ["osp_fast", "reference", "strong", "plain loop"]
    assert [row.impl for row in rows] == names and [row.role for row in rows] == ["ours", *names[1:3], "peer"]
    assert all(row.ok and 0 < row.rel_err < 1e-5 for row in rows) and [row.ms for row in rows] == [1, 2, 3, 4]
    assert rows[0].vs == {"reference": 2, "strong": 3, "plain loop": 4} and rows[1].vs == {}
    assert len(compiled) == 3  # none of the implementations takes another one's graph
    assert rows[0].flops > 0 and len({(row.flops, row.moved) for row in rows}) == 1
    assert rows[0].figures["steps_per_s"] == 1000 and rows[0].shape["text_tokens"] == 8


def test_each_part_has_its_share_on_a_cpu(monkeypatch):
    """With the real clock: what is planted to be slow is slower, by all that is told of it."""
    monkeypatch.setitem(sample.EFFORT, "cpu", Effort(8, 0.0, 8, 0.0))
    forward = bench_dits.use_upstream_blocks

    def slow(dit):
        forward(dit)
        block = dit.transformer_blocks[0]
        once = block.forward
        block.forward = lambda *given: max((once(*given) for _ in range(40)), key=len)
        return dit

    monkeypatch.setattr(bench_dits, "use_upstream_blocks", slow)
    rows = {row.impl: row for row in measured(None)}
    assert list(rows) == [one.name for one in ON_CPU] and all(row.ok and row.ms > 0 for row in rows.values())
    assert [rows[name].role for name in ("text keys once", "time vectors once")] == ["variant"] * 2
    assert rows["osp_fast"].vs["reference"] > 2 and rows["reference"].figures["of_plain_loop_low"] > 2
    ours = rows["osp_fast"].figures
    assert ours["of_plain_loop_low"] <= ours["of_plain_loop"] <= ours["of_plain_loop_high"]
    assert rows["osp_fast"].note == "{:.3f} ({:.3f} to {:.3f}) of a plain loop's step".format(
        *(ours[f"of_plain_loop{end}"] for end in ("", "_low", "_high"))
    )
    assert "of_plain_loop" not in rows["plain loop"].figures


def test_medians_of_ratios():
    """Turns that are ten times as slow change nothing."""
    slow = [[1.0], [10.0]] * 50
    assert median_of_ratios([[0.9 * turn[0]] for turn in slow], slow) == pytest.approx([0.9] * 3)
    assert median_of_ratios([[n] for n in range(1, 101)], [[1]] * 100) == (50.5, 41, 60)
    assert median_of_ratios([[1, 2, 9]] * 6, [[4, 1, 2]] * 6) == (1, 1, 1)


def test_what_is_wrong_is_not_timed(monkeypatch):
    predict = sample_steps.GuidedModel.__call__
    monkeypatch.setattr(sample_steps.GuidedModel, "__call__", lambda *given: 1.01 * predict(*given))
    ours, *others = measured()
    assert not ours.ok and ours.ms is None and ours.vs == {} and ours.figures == {}
    assert ours.note == "WRONG, not timed: off by 1.0e-02" and all(row.ok and row.ms for row in others)


def test_what_does_not_fit_is_a_row_that_says_so(monkeypatch):
    def full(contestants, *given):
        found = one_millisecond(contestants, *given)
        return found | {"reference": torch.OutOfMemoryError("no"), "osp_fast": RuntimeError("no")}

    rows = measured(full)
    assert [row.note for row in rows[:2]] == ["FAILED: no", "out of memory"] and not any(row.timed for row in rows[:2])
    assert rows[2].ms and rows[2].note.endswith("of a plain loop's step")

    def no_memory(*given):
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(sample, "same_dit", no_memory)
    assert all(row.note == "out of memory" and row.ms is None for row in measured())
    monkeypatch.setattr(sample_check, "exact_prediction", no_memory)
    with pytest.raises(UserError, match="--size 1x32x48: in float32, .* not even an image of it fits into .* of cpu"):
        measured()


def test_what_does_not_fit_in_float32_is_checked_shorter(monkeypatch):
    exact = sample_check.exact_prediction

    def of_images(dit, case, *given):
        if case.size.frames > 1:
            raise torch.OutOfMemoryError("no")
        return exact(dit, case, *given)

    monkeypatch.setattr(sample_check, "exact_prediction", of_images)
    rows = measure_case(SMALL, replace(CASE, size=Bucket(5, 32, 48)), setting())
    assert all(row.ok and row.ms and row.note.startswith("checked at 1x32x48") for row in rows)


@pytest.mark.parametrize("steps", [8, 100])
def test_ddim_is_diffusers(steps):
    scheduler, ddim = make_scheduler("DDIM", "v_prediction", True), Ddim(steps)
    assert torch.equal(scheduler.set_steps(steps).float(), ddim.timesteps)
    draw = torch.Generator().manual_seed(0)
    ours = theirs = torch.randn(1, 8, 2, 4, 4, generator=draw)
    for number, timestep in enumerate(scheduler.set_steps(steps)):
        velocity = torch.randn(ours.shape, generator=draw)
        theirs = scheduler.step(velocity, timestep, theirs, None)
        ours = ddim.step(ours, velocity, number)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_step_caches(monkeypatch):
    monkeypatch.setattr(sample_cache, "RUN_STEPS", 6)
    off, never, always = rows = measure_caches(SMALL, CASE, (1e-9, 0.999), setting())
    complete_case(rows, LIMITS)
    assert off.case == "1x32x48 step cache" and off.role == "ours" and off.rel_err < 1e-5
    assert never.impl == "step cache 1e-09" and never.role == always.role == "variant"
    assert never.figures["skipped_share"] == 0 and never.figures["latents_change"] < 1e-5
    assert always.figures["skipped_share"] > 0.5 and always.figures["latents_change"] > 1e-5
    assert off.vs == {"step cache 1e-09": 2, "step cache 0.999": 3} and off.figures["skipped_share"] == 0
    assert always.note.startswith("83% of the steps skipped, latents changed by ")

    def stray(run):
        def poisoned(dit, case, threshold, name, ended):
            run(dit, case, threshold, name, ended)
            if threshold:
                ended[name] = torch.tensor(torch.nan), 0.0

        return poisoned

    monkeypatch.setattr(sample_cache, "_run", stray(sample_cache._run))
    _, bad = measure_caches(SMALL, CASE, (0.5,), setting())
    assert bad.note == "WRONG, not timed: its latents are not finite" and bad.ms is None
    predict = sample_steps.GuidedModel.__call__
    monkeypatch.setattr(sample_steps.GuidedModel, "__call__", lambda *given: 1.01 * predict(*given))
    off, never = measure_caches(SMALL, CASE, (0.5,), setting())
    assert off.note.startswith("WRONG, not timed") and never.note.startswith("not timed: ") and never.ms is None


class OnCpu:
    """In the place of a GPU's streams: all is done at once."""

    def __init__(self, device):
        self.copied = 0

    def pin(self, size):
        return torch.empty(size, dtype=torch.uint8)

    slot = pin

    def unpin(self, buffer):
        pass

    def copy(self, source, slot, after):
        slot[: len(source)].copy_(source)

    def wait(self, ticket):
        pass

    mark = lambda self: None  # noqa: E731


@pytest.mark.parametrize("plan", [SamplingPlan(), SamplingPlan(guidance_in_turns=True, dit_streamed=(0, 1, 2))])
def test_steps_within_a_budget(monkeypatch, plan):
    monkeypatch.setattr(stream_blocks, "CudaMover", OnCpu)
    monkeypatch.setattr(sample_memory, "ON_GPU", ON_CPU)
    plan = replace(plan, peaks={"denoising": 5 << 20}, step_seconds=0.5, clip_seconds=50.0)
    monkeypatch.setattr(sample_memory, "plan_for", lambda *given: plan)
    (row,) = measure_budgets(SMALL, CASE, (6 << 20,), setting())
    assert row.case == "1x32x48 within 6.0 MiB" == budget_job(SMALL, CASE, (6 << 20,)).cases[0]
    assert row.impl == "osp_fast" and row.ok and row.rel_err < 1e-5 and row.ms == 0.5  # a call is two steps
    assert row.note.startswith(f"{len(plan.dit_streamed)} blocks streamed; ") and row.predicted_ms == 500
    assert row.figures == {"budget_mib": 6, "planned_mib": 5, "steps_per_s": 2000}
    expected = sample_memory.expected_prediction
    monkeypatch.setattr(sample_memory, "expected_prediction", lambda *given: (CASE, 2 * expected(*given)[1]))
    (row,) = measure_budgets(SMALL, CASE, (6 << 20,), setting())
    assert row.ms is None and row.note.startswith("WRONG, not timed") and not row.ok


def test_a_budget_is_planned_or_is_too_little():
    plan = sample_memory.plan_for(SMALL, CASE, 10 << 30, CPU)
    assert 0 < plan.peaks["denoising"] <= plan.peak <= 10 << 30
    (row,) = measure_budgets(SMALL, CASE, (1,), setting())
    assert row.ms is None and "--memory_budget" in row.note and not row.note.startswith("FAILED")


def test_clips_of_100_steps_with_their_decoding(monkeypatch):
    """On a GPU of each row that is timed; what cannot be decoded has no clip, and says so."""
    rows = [Row("sample", "93x640x640", "osp_fast", "ours", "bfloat16", ok=True, ms=1200.0) for _ in range(2)]
    complete(rows[0], Case(Bucket(93, 640, 640)), 3.0)
    complete(rows[1], Case(Bucket(93, 640, 640)), None)
    assert rows[0].figures == {
        "target_clip_seconds": 115, "steps_per_s": 1 / 1.2, "decode_seconds": 3, "clip_seconds": 123
    }  # fmt: skip
    assert "clip_seconds" not in rows[1].figures
    small = vae.make_vae("tiny", CPU, torch.bfloat16)
    monkeypatch.setattr(vae, "make_vae", lambda size, *given: small)
    seconds, note = decode_seconds(Case(Bucket(5, 16, 16)), setting())
    assert seconds > 0 and "latent frames" in note
    monkeypatch.setattr(sample, "memory_allowance", lambda device: 1000)
    seconds, note = decode_seconds(Case(Bucket(5, 16, 16)), setting())
    assert seconds is None and note.startswith("decoding: VAE decode") and "needs at least" in note


def test_jobs_without_a_gpu_and_without_video_and_diffusion_libraries(monkeypatch):
    for name in ("av", "diffusers", "matplotlib"):
        monkeypatch.setitem(sys.modules, name, None)
    found = {job.case: job for job in jobs(Options("cuda", step_cache=(0.1,)))}
    seconds = {case: job.seconds for case, job in found.items()}
    assert next(iter(found)) == "93x640x640" and 40 < seconds["29x352x640"] < seconds["93x352x640"]
    assert seconds["93x352x640"] < seconds["93x480x640"] < seconds["93x640x640"] < 240
    assert found["93x480x640 within"].cases == ("93x480x640 within 10.00 GiB", "93x480x640 within 6.00 GiB")
    assert [case for case in found if case.endswith("step cache")] == [f"{size} step cache" for size in sample.SIZES]
    size = Bucket(5, 32, 48)
    chosen = jobs(Options("cuda", sizes=(size,), memory_budget=(MIB,)))
    assert [case for job in chosen for case in job.cases] == ["5x32x48", "5x32x48 within 1.0 MiB"]
    chosen = jobs(Options("cpu", sizes=(size,), step_cache=(0.1,)))
    assert [job.case for job in chosen] == ["5x32x48", "5x32x48 step cache"]
    assert [job.case for job in jobs(Options("cpu"))] == ["17x64x64"]
    with pytest.raises(UserError, match="--memory_budget is measured on a GPU"):
        jobs(Options("cpu", memory_budget=(MIB,)))
    with pytest.raises(UserError, match="--size 4x32x48"):
        jobs(Options("cuda", sizes=(Bucket(4, 32, 48),)))


def test_flops_are_two_forwards_of_the_table():
    """93x640x640: 338 TFLOP (linear, cross and self-attention) for one forward."""
    case = Case(Bucket(93, 640, 640))
    assert guided_flops(RELEASED, case) == pytest.approx(2 * 338e12, rel=0.02)
    assert 2 * 338e12 / 989e12 < predicted_seconds(RELEASED, case, H100) < 2 * 338e12 / 400e12
