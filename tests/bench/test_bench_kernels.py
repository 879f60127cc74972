"""The suites of operations, with a clock that stands still and the CPU in a GPU's place."""

import dataclasses
import functools
import itertools

import pytest
import torch
from osp_fast.kernels import channel_norm_spec
from osp_fast.kernels import skiparse_attention_spec as attention
from osp_fast.kernels.spec import Shape, Tunable

from bench.baselines import Baseline, Unavailable, eager_reference
from bench.measure import Effort, Timing, time_in_turns
from bench.results import Ceilings, complete_case
from bench.suites import Options, Setting, kernels, tune
from bench.suites.kernels import direction_calls
from osp_fast.errors import UserError

CPU = torch.device("cpu")
GPU_OPTIONS = Options("cuda")


def clock(contestants, device, effort=None):
    """Run each call once; one millisecond each, whatever they are."""
    for one in contestants:
        with one.around():
            [call() for call in one.calls]
    return {one.name: Timing([[1.0]]) for one in contestants}


SETTING = Setting(CPU, Ceilings(8e14, 3e12), lambda line: None, clock)


def refuse(inputs):
    raise Unavailable("this device has no such unit")


def wrong(inputs):
    return lambda: inputs["a"] @ inputs["b"] * 1.5, [inputs["a"], inputs["b"]]


def right(inputs):
    a, b = (inputs[name].detach().clone().requires_grad_() for name in "ab")
    return lambda: b.T @ a.T, [a, b]


BASELINES = (
    Baseline("other, laid out before", "peer", right, lambda out, inputs: out.T),
    Baseline("wrong", "peer", wrong),
    Baseline("absent", "peer", refuse),
)


def measure(spec, monkeypatch, baselines=BASELINES, shape=0, setting=SETTING):
    monkeypatch.setattr(kernels, "baselines_of", lambda op: baselines)
    rows = list(kernels.measure_op(spec, spec.shapes[shape], setting))
    for direction in ("forward", "backward"):
        complete_case([row for row in rows if row.case.endswith(direction)], setting.ceilings)
    return rows


def test_a_job_gives_rows_for_both_directions_and_every_implementation(toy, monkeypatch):
    monkeypatch.setattr(kernels, "baselines_of", lambda op: BASELINES)
    (job, _) = kernels.jobs(GPU_OPTIONS, [toy.SPEC])
    rows = list(job.measure(SETTING))
    assert job.cases == ("toy square forward", "toy square backward") and 1 < job.seconds < 30
    names = ["osp_fast", "other, laid out before", "wrong", "absent"]
    assert [(row.case, row.impl) for row in rows] == list(itertools.product(job.cases, names))
    assert all(row.suite == "kernels" and row.shape == toy.SPEC.shapes[0].sizes for row in rows)


def test_figures_and_ratios_follow_from_the_time(toy, monkeypatch):
    rows = measure(toy.SPEC, monkeypatch)
    ours, other = [row for row in rows if row.case == "toy square backward"][:2]
    flops, moved = (cost("backward", **toy.SPEC.shapes[0].sizes) for cost in (toy.SPEC.flops, toy.SPEC.bytes))
    assert ours.ms == 1.0 and ours.tflops == flops / 1e-3 / 1e12 and ours.tbps == moved / 1e-3 / 1e12
    assert ours.of_peak == max(flops / 8e14, moved / 3e12) / 1e-3
    assert ours.predicted_ms == 1e3 * flops / 5e11 and other.predicted_ms is None
    assert ours.vs == {"other, laid out before": 1.0} and other.vs == {}
    assert 0 < ours.rel_err < 1e-2 and other.rel_err is None  # its leaves are its own


def test_baselines_that_fail_or_differ_say_why_and_have_no_time(toy, monkeypatch):
    for row in measure(toy.SPEC, monkeypatch):
        if row.impl == "absent":
            assert not row.ok and row.ms is None and row.note == "this device has no such unit"
        elif row.impl == "wrong":
            assert not row.ok and row.ms is None and row.note.startswith("WRONG, not timed: off by 5.0e-01")
        else:
            assert row.ok and row.ms == 1.0 and row.note == ""


@pytest.mark.parametrize(
    "spoil, says",
    [
        (lambda out: out * 1.03, "out 3.0e-02 > 1e-02"),
        (lambda out: out.detach() + 1.03 * (out - out.detach()), "da 3.0e-02 > 1e-02"),
    ],
)
def test_an_operation_that_is_wrong_gets_no_speedup(toy, monkeypatch, spoil, says):
    """By a few percent, in its result or in its gradients alone: nothing of it is timed, and nothing beside it."""
    spec = dataclasses.replace(toy.SPEC, operation=lambda a, b: spoil(a @ b))
    rows = measure(spec, monkeypatch)
    assert says in rows[0].note and rows[0].note.startswith("WRONG, not timed:")
    assert all(not row.ok and row.ms is None and row.vs == {} for row in rows)
    assert "which it is held against, is wrong" in rows[1].note


def test_an_operation_that_breaks_has_a_reason(toy, monkeypatch):
    def operation(a, b):
        raise RuntimeError("illegal address\nin a kernel")

    rows = measure(dataclasses.replace(toy.SPEC, operation=operation), monkeypatch)
    assert rows[0].note == "WRONG, not timed: error: illegal address" and not any(row.ok for row in rows)


def test_a_slow_variant_shows_as_slower(toy, monkeypatch):
    """With the real clock: three times the work."""
    slow = dataclasses.replace(toy.SPEC, variants={"slow": lambda a, b: (a @ b + a @ b + a @ b) / 3})
    slow = dataclasses.replace(slow, shapes=(Shape("large", {"rows": 300, "columns": 300, "inner": 300}),))
    brief = functools.partial(time_in_turns, effort=Effort(rounds=3, seconds=0.02, fewest=9, warm_seconds=0.01))
    setting = Setting(CPU, SETTING.ceilings, lambda line: None, brief)
    rows = measure(slow, monkeypatch, baselines=(eager_reference(toy.SPEC.reference),), setting=setting)
    forward = {row.impl: row for row in rows if row.case.endswith("forward")}
    assert list(forward) == ["osp_fast", "reference", "osp_fast slow"] and all(row.ok for row in rows)
    assert forward["osp_fast"].vs["osp_fast slow"] > 1.5 > forward["osp_fast"].vs["reference"] > 0.5
    assert forward["osp_fast slow"].vs["osp_fast"] < 1 / 1.5


def test_a_variant_is_held_against_ours_and_comes_last(toy, monkeypatch):
    variants = {"wrong": lambda a, b: a @ b * 1.2, "right": lambda a, b: a @ b}
    rows = measure(dataclasses.replace(toy.SPEC, variants=variants), monkeypatch)
    found = {(row.impl, row.case.split()[-1]): row.ok for row in rows[-4:]}
    assert found == {(f"osp_fast {name}", way): name == "right" for name in variants for way in ("forward", "backward")}
    assert len(rows) == 12 and {row.role for row in rows[-4:]} == {"variant"}


def test_memory_that_a_variant_does_not_write_is_seen(toy, monkeypatch):
    def unwritten(a, b):
        out = torch.empty(a.shape[0], b.shape[1], dtype=a.dtype)
        out[:-1] = (a @ b)[:-1]
        return out

    rows = measure(dataclasses.replace(toy.SPEC, variants={"unwritten": unwritten}), monkeypatch, baselines=())
    assert rows[-1].role == "variant" and rows[-1].note.startswith("WRONG, not timed: off by nan")


def test_all_results_of_a_baseline_are_held_against_ours(toy, monkeypatch):
    def many(a, b):
        product = a @ b
        return product, a[:, 1:], (product > 0).to(torch.uint8), product.detach().square()

    def baseline(name, spoil):
        return Baseline(name, "peer", lambda inputs: (lambda: spoil(many(**inputs)), [inputs["a"], inputs["b"]]))

    others = (
        baseline("same", lambda outs: outs),
        baseline("differs", lambda outs: (*outs[:3], outs[3] * 1.1)),
        baseline("lacks one", lambda outs: outs[:3]),
        baseline("is wider", lambda outs: (*outs[:3], outs[3].float())),
    )
    spec = dataclasses.replace(toy.SPEC, operation=many, reference=many)
    found = {row.impl: row.note for row in measure(spec, monkeypatch, others) if row.case.endswith("forward")}
    assert found["osp_fast"] == found["same"] == ""
    assert found["differs"].startswith("WRONG, not timed: off by 1.0e-01")
    assert found["lacks one"].startswith("its results have shapes")
    assert found["is wider"].startswith("its results have types ['torch.bfloat16'")


def test_gradients_of_a_baseline_are_held_against_ours(toy, monkeypatch):
    def zero_gradients(inputs):
        a, b = inputs["a"], inputs["b"]
        return lambda: (a @ b).detach() + 0 * (a @ b), [a, b]

    def none(inputs):
        return lambda: (inputs["a"] @ inputs["b"]).detach(), [inputs["a"], inputs["b"]]

    others = [Baseline(bind.__name__, "peer", bind) for bind in (zero_gradients, none)]
    rows = {row.case.split()[-1] + " " + row.impl: row for row in measure(toy.SPEC, monkeypatch, others)}
    assert rows["forward zero_gradients"].timed and rows["forward none"].timed
    assert rows["backward zero_gradients"].note.startswith("WRONG, not timed: off by 1.0e+00")
    assert not rows["backward none"].ok and rows["backward none"].note == "it has no backward"


def test_an_operation_without_leaves_is_timed_forward_alone(toy, monkeypatch):
    def make_inputs(**sizes):
        return {name: x.detach() for name, x in toy.make_inputs(**sizes).items()}

    (row,) = measure(dataclasses.replace(toy.SPEC, make_inputs=make_inputs), monkeypatch, baselines=())
    assert row.case == "toy square forward" and row.timed


def test_inputs_are_random_bfloat16_and_differ_between_sets(toy):
    first, second = kernels.make_input_sets(toy.SPEC, toy.SPEC.shapes[0], CPU)
    assert first["a"].dtype == torch.bfloat16 and not torch.equal(first["a"], second["a"])


def test_forward_keeps_no_graph_and_backward_gives_gradients():
    x = torch.ones(3, requires_grad=True)
    (forward,) = direction_calls([(lambda: x * 2, [x])], "forward")
    assert not forward().requires_grad
    (backward,) = direction_calls([(lambda: x * 2, [x])], "backward")
    assert torch.equal(backward()[0], backward()[0]) and x.grad is None


def test_backward_of_several_results_is_what_is_timed():
    a, b = (torch.randn(3, 3, requires_grad=True) for _ in range(2))
    (backward,) = direction_calls([(lambda: (a @ b, a[:, 1:], (a > 0)), [a, b])], "backward")
    assert [gradient.shape for gradient in backward()] == [a.shape, b.shape]


def test_operations_are_for_a_gpu_and_have_their_own_shapes(toy):
    for make, options, says in (
        (kernels.jobs, Options("cpu"), "kernels need a GPU"),
        (tune.jobs, Options("cpu"), "on the GPU"),
        (kernels.jobs, Options("cuda", sizes=("x",)), "instead of --size"),
    ):
        with pytest.raises(UserError, match=says):
            make(options, [toy.SPEC])


def test_every_operation_and_shape_has_a_job():
    jobs = kernels.jobs(GPU_OPTIONS)
    assert len({job.case for job in jobs}) == len(jobs) > 100
    assert all(5 < job.seconds < 300 for job in jobs)


def test_tuning_compares_the_candidates_of_each_kernel(toy, monkeypatch):
    times = {("forward", "chosen"): 2.0, ("forward", "fast"): 1.0, ("keys", "chosen"): 3.0, ("keys", "too big"): None}
    now = []

    def call(kernel):
        def run():
            config = now[-1].config
            if times[kernel, config] is None:
                raise RuntimeError("out of shared memory")
            now[-1].used = True
            return torch.ones(96, 96) * (1.2 if config == "wrong" else 1)

        return run

    times["keys", "wrong"] = 0.5
    tunable = Tunable(lambda inputs, arch: iter(times), lambda inputs, kernel: call(kernel))

    class Forced:
        def __init__(self, kernel, config):
            self.config, self.used = config, False

        def __enter__(self):
            now.append(self)
            return self

        def __exit__(self, *error):
            now.pop()

    monkeypatch.setattr(tune.tuning, "forced", Forced)
    kernel_of = iter(("forward", "keys"))

    def timer(contestants, device, effort):
        kernel = next(kernel_of)
        return {one.name: Timing([[times[kernel, one.name]]]) for one in contestants}

    spec = dataclasses.replace(toy.SPEC, tunable=tunable)
    rows = list(tune.tune_shape(spec, spec.shapes[0], dataclasses.replace(SETTING, timer=timer)))
    assert [(row.case.split()[-1], row.impl, row.ms, row.role) for row in rows] == [
        ("forward", "chosen", 2.0, "ours"),
        ("forward", "fast", 1.0, "variant"),
        ("keys", "chosen", 3.0, "ours"),
        ("keys", "too big", None, "variant"),
        ("keys", "wrong", None, "variant"),
    ]
    assert rows[3].note == "out of shared memory" and rows[4].note.startswith("WRONG, not timed: off by 2.0e-01")


def test_attention_candidates_are_those_of_the_version_that_serves():
    inputs = {"q": torch.empty(1, 8, 2, 96, dtype=torch.bfloat16), "mode": "single", "sparse_n": 4}
    for arch, descriptors in ((90, True), (80, False)):
        found = list(attention.SPEC.tunable.candidates(inputs, arch))
        assert len(found) == len(set(found)) and {kernel for kernel, _ in found} == set(tune.tuning.KERNELS)
        call = tune.tuning.Call(arch, torch.bfloat16, 96, "single", False, descriptors)
        assert [config for kernel, config in found if kernel == "keys"] == tune.tuning.candidates("keys", call)


ATTENTION = {"batch": 1, "tokens": 21, "heads": 1, "head_dim": 16, "sparse_n": 4}
NORM = {"batch": 1, "frames": 2, "rows": 3, "columns": 4, "channels": 8}


@pytest.mark.parametrize(
    "spec, sizes", [(attention.SPEC, ATTENTION | {"mode": "group"}), (channel_norm_spec.SPEC, NORM)]
)
def test_tuning_times_the_kernel_that_it_changes(spec, sizes, monkeypatch):
    """In the interpreter: each call launches the kernel whose configuration is forced; one that does not is refused."""
    monkeypatch.setattr(kernels, "DTYPE", torch.float32)
    shape = Shape("small", sizes)
    rows = list(tune.tune_shape(spec, shape, SETTING))
    inputs = spec.make_inputs(device=CPU, dtype=torch.float32, seed=0, **sizes)
    assert [row.case.split(": ")[1] for row in rows] == [kernel for kernel, _ in spec.tunable.candidates(inputs, 0)]
    assert all(row.timed for row in rows), rows
    idle = dataclasses.replace(spec, tunable=dataclasses.replace(spec.tunable, bind=lambda inputs, kernel: list))
    with pytest.raises(RuntimeError, match="does not launch '.*forward'"):
        list(tune.tune_shape(idle, shape, SETTING))
