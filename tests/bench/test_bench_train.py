"""The suite `train`: a training step of a small DiT on the CPU, in the place of the released one's on a GPU."""

from dataclasses import replace

import pytest
import torch

from bench.measure import Effort, Timing
from bench.results import Ceilings, complete_case
from bench.suites import Options, Setting, train, train_steps
from bench.suites import dits as bench_dits
from bench.suites.dits import Case, make_dit
from bench.suites.train import jobs, measure_case
from bench.suites.train_steps import ON_CPU, ON_GPU, UpstreamStep, exact_step, prepare_step
from osp_fast.data.buckets import Bucket
from osp_fast.engine.compile import compile_blocks
from osp_fast.errors import UserError
from osp_fast.models.dit import DIT_CONFIGS, DiTConfig

CPU = torch.device("cpu")
SMALL = DiTConfig(
    num_layers=1, num_attention_heads=1, attention_head_dim=24, caption_channels=8, cross_attention_dim=24, sparse_n=2
)
CASE = Case(Bucket(1, 32, 48), clips=2, text_tokens=4)
RELEASED = DIT_CONFIGS["OpenSoraT2V_v1_3-2B/122"]
LIMITS = Ceilings(1e12, 1e10)
NAMES = ["osp_fast", "reference", "strong"]


def one_millisecond(contestants, device, effort):
    """A timer that runs each once, and says that the first took a millisecond, the second two, and so on."""
    for one in contestants:
        with one.around():
            one.calls[0]()
    return {one.name: Timing([[float(place)]]) for place, one in enumerate(contestants, 1)}


def measured(timer=one_millisecond, lines=None, config=SMALL):
    given = {} if timer is None else {"timer": timer}
    say = (lines if lines is not None else []).append
    rows = list(measure_case(config, CASE, Setting(CPU, LIMITS, say, **given)))
    complete_case(rows, LIMITS)
    return rows


def test_the_implementations_of_a_gpu_take_the_same_step(monkeypatch):
    """Ours interpreted, blocks as they are traced, and each with its own plan of what is recomputed."""
    plan, budgets = train_steps.plan_activations, []

    def without_limit(config, workload, budget, *more):
        budgets.append((workload.attention, budget))
        return plan(config, workload, None, *more)

    as_traced = lambda dit, buckets: compile_blocks(dit, buckets, lambda graph, inputs: graph.forward)  # noqa: E731
    monkeypatch.setattr(bench_dits, "compile_blocks", as_traced)
    monkeypatch.setattr(train_steps, "plan_activations", without_limit)
    monkeypatch.setattr(train, "ON_CPU", ON_GPU)
    lines = []
    rows = measured(lines=lines)
    assert [(row.impl, row.role) for row in rows] == [(name, name.replace("osp_fast", "ours")) for name in NAMES]
    assert all(row.ok and 0 < row.rel_err < 1e-5 for row in rows) and [row.ms for row in rows] == [1, 2, 3]
    assert rows[0].vs == {"reference": 2, "strong": 3} and rows[0].dtype == "float32"
    assert [name for name, _ in budgets] == ["triton", "sdpa"] and budgets[0][1] > 0
    assert rows[0].note.startswith("activations: ") and rows[0].note in lines[0] and rows[1].note == ""
    figures = rows[0].figures
    assert figures["tokens_per_second"] == 2 * 2 * 3 / 1e-3 and figures["steps_per_s"] == 1e3 and "mfu" not in figures
    assert figures["loss"] == pytest.approx(rows[1].figures["loss"], rel=1e-5) and figures["grad_norm"] > 0
    assert len({(row.flops, row.moved) for row in rows}) == 1 and rows[0].flops == CASE.model_flops(SMALL)


def test_turns_on_a_cpu(monkeypatch):
    """With the real clock: a slow one is slower."""
    monkeypatch.setitem(train.EFFORT, "cpu", Effort(2, 0.0, 2, 0.0))
    step = UpstreamStep.__call__

    def slow(self, batch):
        results = [step(self, batch) for _ in range(8)]
        return results[0]

    monkeypatch.setattr(UpstreamStep, "__call__", slow)
    rows = measured(timer=None)
    assert [row.impl for row in rows] == [*NAMES, "plain loop"] and rows[3].role == "peer"
    assert all(row.ok and row.ms > 0 for row in rows) and rows[0].vs["reference"] > 2


def test_the_original_trains_in_bfloat16_with_float32_masters():
    """The first step as exact as bfloat16 is; steps too small for a bfloat16 weight are not lost."""
    expected = exact_step(SMALL, CASE, CPU)
    reference = ON_CPU[1]
    assert reference.step is UpstreamStep and reference.recomputed == "everything"
    dit = make_dit(SMALL, CPU)
    before = dit.proj_out.weight.detach().clone()
    with reference.around():
        step = prepare_step(reference, dit, CASE, True, print).step
        found = step(CASE.make_batch(SMALL, CPU))
        assert {parameter.dtype for parameter in dit.parameters()} == {torch.bfloat16}
        assert 1e-5 < float(((found - expected) / expected).abs().max()) < train.TOLERANCE["cuda"]
        step(CASE.make_batch(SMALL, CPU))
    master = next(x for x in step._masters if x.shape == before.shape)
    assert 0 < (master - before).abs().max() < 3e-4  # of two steps
    assert torch.equal(dit.proj_out.weight, master.bfloat16()) and dit.proj_out.weight.grad is None


def test_another_first_step_is_told_and_not_timed(monkeypatch):
    loss = train_steps.DenoisingLoss.__call__
    monkeypatch.setattr(train_steps.DenoisingLoss, "__call__", lambda self, batch: 1.01 * loss(self, batch))
    ours, *others = measured()
    assert not ours.ok and ours.ms is None and ours.vs == {} and ours.rel_err == pytest.approx(0.01, rel=1e-3)
    assert ours.note.startswith("WRONG, not timed: first loss ") and [row.ms for row in others] == [1, 2, 3]


@pytest.mark.parametrize(
    "fault, words",
    [(torch.OutOfMemoryError("CUDA"), "out of memory"), (UserError("no"), "no"), (RuntimeError("x"), "FAILED: x")],
)
def test_what_does_not_run_says_why(monkeypatch, fault, words):
    def full(*given):
        raise fault

    monkeypatch.setattr(train_steps, "build_optimizer", full)
    ours, *others = measured()
    assert ours.note == words and not ours.ok and ours.ms is None and all(row.ok for row in others)

    def timer(contestants, device, effort):
        return {one.name: fault for one in contestants}

    others = measured(timer)[1:]
    assert [row.note for row in others] == [words.removeprefix("FAILED: ")] * 3 and not any(row.ok for row in others)


def test_what_does_not_fit_in_float32_is_checked_shorter(monkeypatch):
    def exact(config, case, device):
        if case.size.frames > 1:
            raise torch.OutOfMemoryError("no")
        return exact_step(config, case, device)

    monkeypatch.setattr(train, "exact_step", exact)
    rows = list(
        measure_case(SMALL, replace(CASE, size=Bucket(5, 32, 48)), Setting(CPU, LIMITS, print, one_millisecond))
    )
    assert all(row.ok and row.note == "checked at 2 x 1x32x48, as float32 takes too much memory here" for row in rows)
    assert rows[0].shape["frames"] == 5


def test_jobs_without_a_gpu():
    found = {job.case: job.seconds for job in jobs(Options("cuda"))}
    assert next(iter(found)) == "93x640x640" and {"93x352x640", "93x720x1280", "1x640x640"} < set(found)
    assert 60 < found["1x640x640"] < found["29x352x640"] < found["93x352x640"] < found["93x640x640"] < 300
    (tiny,) = jobs(Options("cpu"))
    assert tiny.case == "16 x 17x64x64" and tiny.seconds < 30
    for device, name in (("cuda", "5x32x48"), ("cpu", "16 x 5x32x48")):
        assert [job.case for job in jobs(Options(device, sizes=(Bucket(5, 32, 48),)))] == [name]
        with pytest.raises(UserError, match="--size 5x30x32"):
            jobs(Options(device, sizes=(Bucket(5, 30, 32),)))


def test_flops_and_prediction():
    """338 TFLOP forward of 93x640x640, times three; a step at 40 to 55 % of an H100's peak."""
    case = Case(Bucket(93, 640, 640))
    assert case.video_tokens(RELEASED) == 38_400 and case.latent_size == (24, 80, 80)
    assert abs(case.model_flops(RELEASED) / 1e12 - 3 * 338) < 10
    assert 1e15 / 989e12 / 0.55 < train._step_seconds(RELEASED, case, None, bench_dits.H100) < 1e15 / 989e12 / 0.4
    assert train.weights_of(RELEASED) == pytest.approx(2.8e9, rel=0.05)
