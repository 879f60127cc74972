"""A denoising step of the whole DiT beside others, small and on the CPU in a GPU's place."""

import json
import sys
from dataclasses import replace

import pytest
import torch

from bench import sample as bench_sample
from bench import sample_cache, sample_memory, sample_steps
from bench.__main__ import SAMPLE_CASES, main
from bench.compare import run_compare
from bench.results import OURS, latest_runs, read_result
from bench.sample import exact_prediction, measure_case, median_of_ratios, run_sample
from bench.sample_cache import measure_caches
from bench.sample_memory import measure_budget
from bench.sample_report import complete, predicted_seconds, sample_table, shares
from bench.sample_steps import ON_CPU, ON_GPU, Ddim, guided_flops
from bench.train_steps import Case
from osp_fast.data.buckets import Bucket
from osp_fast.diffusion.samplers import make_scheduler
from osp_fast.engine import stream_blocks
from osp_fast.engine.compile import compile_blocks
from osp_fast.engine.sampling_plan import SamplingPlan
from osp_fast.errors import UserError
from osp_fast.models.dit import DIT_CONFIGS, DiTConfig

CPU = torch.device("cpu")
SMALL = DiTConfig(
    num_layers=3, num_attention_heads=1, attention_head_dim=24, caption_channels=8, cross_attention_dim=24, sparse_n=2
)
CASE = Case(Bucket(1, 32, 48), text_tokens=8)
RELEASED = DIT_CONFIGS["OpenSoraT2V_v1_3-2B/122"]
NAMES = [OURS, "plain loop", "torch.compile, best SDPA", "reference path"]
ON_CPU_NAMES = [one.name for one in ON_CPU]
# Without Triton's interpreter, which takes seconds for each step.
QUICK = tuple(
    one if one.path == "reference" else replace(one, attention="reference", path="reference") for one in ON_GPU
)


@pytest.fixture(autouse=True)
def compiled(monkeypatch):
    """Few turns, and graphs as they are traced: the list gets what calls each of them has."""
    monkeypatch.setattr(bench_sample, "TURNS", {"cpu": 2})
    monkeypatch.setattr(bench_sample, "STEPS", 40)
    monkeypatch.setattr(sample_cache, "TURNS", {"cpu": 1})
    for module in (bench_sample, sample_memory):
        monkeypatch.setattr(module, "ON_GPU", QUICK)
    graphs: list[set[str]] = []

    def as_traced(graph, inputs):
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return graph.forward

    monkeypatch.setattr(sample_steps, "compile_blocks", lambda dit, buckets: compile_blocks(dit, buckets, as_traced))
    return graphs


def measure(implementations=QUICK, config=SMALL):
    expected = exact_prediction(config, CASE, CPU)
    return measure_case(config, CASE, implementations, CPU, torch.float32, expected)


def test_another_model_with_the_same_weights_takes_no_memory():
    dit = sample_steps.fresh_dit(SMALL, CPU, torch.bfloat16)
    for mine, other in zip(dit.parameters(), sample_steps.same_dit(dit).parameters(), strict=True):
        assert mine.data_ptr() == other.data_ptr() and not other.requires_grad


def test_no_graph_of_one_implementation_serves_another_one(compiled, monkeypatch):
    """In ours all operations are ours, in the third row none is."""
    monkeypatch.setattr(bench_sample, "TURNS", {"cpu": 1})
    monkeypatch.setattr(bench_sample, "WARM_STEPS", 1)
    rows = measure([ON_GPU[2], ON_GPU[0]], replace(SMALL, num_layers=1))
    assert all(row["ok"] for row in rows)
    fused, ours = ({name for name in calls if "scaled_dot_product" in name or "osp_fast" in name} for calls in compiled)
    assert not any("osp_fast" in name for name in fused) and fused
    assert not any("scaled_dot_product" in name for name in ours) and ours


def test_all_implementations_compute_the_same_and_take_turns(compiled):
    rows = measure()
    assert [row["implementation"] for row in rows] == NAMES
    assert all(row["ok"] and row["rel_err"] < 1e-5 and row["seconds"] > 0 and row["spread"] >= 0 for row in rows)
    assert rows[3]["of_last"] == [1, 1, 1] and rows[0]["of_last"][0] > 0
    assert len(compiled) == 3 * 3  # kinds of blocks, and implementations, none of which takes another one's
    complete(rows, SMALL, CASE, CPU, {"matmul_flops_per_second": 1e12}, 40, 2.0)
    assert rows[0]["flops_per_second"] == guided_flops(SMALL, CASE) / rows[0]["seconds"]
    assert rows[1]["of_matmul"] == rows[1]["flops_per_second"] / 1e12
    table = sample_table(rows, 40)
    assert "times ours" in table and "reference path" in table and "40 steps" in table
    assert f"{40 * rows[0]['seconds'] + 2:.1f}" in table


def test_what_is_wrong_is_not_timed(monkeypatch):
    attention = sample_steps.masked_attention
    expected = exact_prediction(SMALL, CASE, CPU)
    monkeypatch.setattr(sample_steps, "masked_attention", lambda *a, **k: 3 * attention(*a, **k))
    rows = measure_case(SMALL, CASE, (ON_CPU[0], ON_GPU[3]), CPU, torch.float32, expected)
    assert [row["ok"] for row in rows] == [True, False] and rows[0]["seconds"] > 0
    assert rows[1]["seconds"] is None and rows[1]["note"].startswith("WRONG by ")
    rows = measure_case(SMALL, CASE, ON_CPU, CPU, torch.float32, expected * torch.nan)
    assert not any(row["ok"] for row in rows)
    complete(rows, SMALL, CASE, CPU, None, 40, None)
    assert "not timed" in sample_table(rows, 40) and "was not compared" in shares(rows)


def test_what_does_not_fit_is_a_row_that_says_so(monkeypatch):
    def full(*given):
        raise torch.OutOfMemoryError("no")

    seconds_of = bench_sample.seconds_of
    one_by_one = iter([seconds_of, full, full] + [seconds_of] * 100)
    monkeypatch.setattr(bench_sample, "seconds_of", lambda *given: next(one_by_one)(*given))
    notes = [row["note"] for row in measure(ON_CPU)]
    assert notes == ["", "out of memory beside the others", "out of memory beside the others", ""]
    monkeypatch.setattr(bench_sample, "same_dit", full)
    rows = measure(ON_CPU)
    assert all(row["note"] == "out of memory" and row["seconds"] is None for row in rows)
    complete(rows, SMALL, CASE, CPU, None, 40, 2.0)
    assert "out of memory" in sample_table(rows, 40)
    monkeypatch.setattr(sample_steps, "make_texts", full)
    with pytest.raises(UserError, match="--case 1x32x48: in float32, .* does not fit into the memory of cpu"):
        measure()


def test_each_part_has_its_share():
    rows = measure(ON_CPU)
    assert [row["implementation"] for row in rows] == ON_CPU_NAMES and all(row["ok"] for row in rows)
    for row, ratio in zip(rows, (0.8, 0.9, 0.85, 1.0), strict=True):
        row["of_last"] = [ratio, ratio - 0.01, ratio + 0.02]
    assert shares(rows) == (
        "of a plain loop's step, text keys once save 10.0 % (8.0 to 11.0), time vectors once 15.0 % (13.0 to 16.0), "
        "both 20.0 % (18.0 to 21.0)"
    )
    # Turns that are ten times as slow change nothing.
    slow = [1.0, 10.0] * 50
    assert median_of_ratios([0.9 * seconds for seconds in slow], slow) == pytest.approx([0.9] * 3)
    assert median_of_ratios(range(1, 101), [1] * 100) == [50.5, 41, 60]


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


def test_step_caches():
    off, never, always = measure_caches(SMALL, CASE, (1e-9, 0.999), CPU, torch.float32, 6)
    assert off["implementation"] == "step cache off" and off["skipped"] == off["change"] == 0
    assert never["implementation"] == "step cache 1e-09" and never["skipped"] == 0 and never["change"] < 1e-5
    assert always["skipped"] > 0.5 and always["seconds"] > 0
    assert "times as fast" in sample_cache.cache_table([off, never, always])


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
    if not plan.dit_streamed:
        monkeypatch.setattr(sample_memory, "ON_GPU", ON_CPU)  # not compiled
    plan = replace(plan, peaks={"denoising": 5 << 20}, step_seconds=0.5, clip_seconds=50.0)
    monkeypatch.setattr(sample_memory, "plan_for", lambda *given: plan)
    expected = exact_prediction(SMALL, CASE, CPU)
    given = SMALL, CASE, 6 << 20, CPU, torch.float32, 40
    row = measure_budget(*given, expected, (37, 1e-4))
    assert row["implementation"] == "within 6.0 MiB" and row["ok"] and row["seconds"] > 0
    assert (
        row["note"] == f"{len(plan.dit_streamed)} blocks streamed, planned 5.0 MiB" and row["predicted_seconds"] == 0.5
    )
    row = measure_budget(*given, 2 * expected, (37, 1e-4))
    assert row["seconds"] is None and row["note"].startswith("WRONG by ") and not row["ok"]


def test_a_budget_is_planned_or_is_too_little():
    plan = sample_memory.plan_for(SMALL, CASE, 10 << 30, CPU, 100)
    assert 0 < plan.peaks["denoising"] <= plan.peak <= 10 << 30
    row = measure_budget(SMALL, CASE, 1, CPU, torch.float32, 100, torch.ones(1), (37, 1e-4))
    assert row["seconds"] is None and "--memory_budget" in row["note"]


def test_flops_are_two_forwards_of_the_table():
    """93x640x640: 338 TFLOP (linear, cross and self-attention) for one forward."""
    case = Case(Bucket(93, 640, 640))
    assert guided_flops(RELEASED, case) == pytest.approx(2 * 338e12, rel=0.02)
    assert 2 * 338e12 / 989e12 < predicted_seconds(RELEASED, case, "NVIDIA H100 80GB HBM3") < 2 * 338e12 / 400e12


def test_run_writes_its_rows_without_video_and_diffusion_libraries(monkeypatch, tmp_path, capsys):
    for name in ("av", "diffusers"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(bench_sample.DIT_CONFIGS, "tiny", SMALL)
    monkeypatch.setattr(bench_sample, "tiny_case", lambda: CASE)
    assert main(["sample", "--tiny", "--step_cache", "0.1", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "text keys once save" in printed and "step cache 0.1" in printed and "written to" in printed
    path = next(tmp_path.rglob("sample-001.json"))
    result = read_result(path)
    assert result["kind"] == "sample" and result["model"] == "tiny" and len(result["rows"]) == 6
    assert result["environment"]["threads"] >= 1 and latest_runs(tmp_path) == {}
    other = json.loads(path.read_text())
    other["rows"][0]["seconds"] *= 2
    (tmp_path / "b.json").write_text(json.dumps(other))
    assert run_compare(path, tmp_path / "b.json", 0.05) == 1
    assert run_compare(path, path, 0.05) == 0


def test_a_run_on_a_gpu_has_clips_and_budgets(monkeypatch, tmp_path, capsys):
    budgets = []

    def within(config, case, budget, *given):
        budgets.append((str(case), budget))
        row = {"case": str(case), "implementation": "within it", "seconds": 1.0, "spread": 0.0, "peak_bytes": 1 << 30}
        return row | {"rel_err": 0.0, "ok": budget > 1, "note": "", "predicted_seconds": 0.9}

    monkeypatch.setattr(bench_sample, "require_cuda", lambda command: CPU)
    monkeypatch.setitem(bench_sample.DIT_CONFIGS, bench_sample.MODEL, SMALL)
    monkeypatch.setattr(bench_sample, "ON_GPU", ON_CPU)
    monkeypatch.setattr(bench_sample, "decode_seconds", lambda case, device: 3.0)
    monkeypatch.setattr(bench_sample, "measure_budget", within)
    monkeypatch.setattr(bench_sample, "BUDGETED", "1x32x32")
    assert run_sample(["1x32x32", "1x32x48"], False, tmp_path) == 0
    assert budgets == [("1x32x32", 10 << 30), ("1x32x32", 6 << 30)]
    rows = read_result(next(tmp_path.rglob("sample-001.json")))["rows"]
    assert [row["implementation"] for row in rows][3:] == ["plain loop", "within it", "within it", *ON_CPU_NAMES]
    assert rows[3]["clip_seconds"] == 40 * rows[3]["seconds"] + 3 and rows[4]["clip_seconds"] is None
    assert "with decoding" in capsys.readouterr().out
    assert run_sample(["1x32x48"], False, tmp_path, budgets=[1]) == 1  # its budget's row is wrong


def test_bad_usage_ends_in_a_sentence():
    with pytest.raises(UserError, match="needs an NVIDIA GPU"):
        main(["sample"])
    with pytest.raises(UserError, match="--tiny measures"):
        main(["sample", "--tiny", "--case", SAMPLE_CASES[0]])
    with pytest.raises(UserError, match="--memory_budget is measured on a GPU"):
        main(["sample", "--tiny", "--memory_budget", "10GiB"])
    with pytest.raises(UserError, match="auto is no amount of memory"):
        main(["sample", "--memory_budget", "auto"])
    with pytest.raises(UserError, match="2.0 must be between 0 and 1"):
        main(["sample", "--step_cache", "2"])
    with pytest.raises(UserError, match="'93x1'"):
        main(["sample", "--case", "93x1"])
