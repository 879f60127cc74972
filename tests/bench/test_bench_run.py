"""Measuring and verifying, with a clock that stands still and the CPU in a GPU's place."""

import contextlib
import dataclasses
import itertools
import json
from types import SimpleNamespace

import pytest
import torch
from osp_fast.kernels import causal_conv3d_launch, channel_norm_spec
from osp_fast.kernels import skiparse_attention_spec as attention
from osp_fast.kernels.spec import Shape, Tunable, UnsupportedCall

from bench import measure, run, tune, verify
from bench.accuracy import exact_float32, relative_error
from bench.baselines import Baseline, Unavailable
from bench.measure import direction_calls, input_set_count
from bench.report import report_text
from bench.results import AS_WRITTEN, GATHERED, latest_runs, result_path, write_result
from osp_fast.errors import UserError

CPU = torch.device("cpu")
LIMITS = {"copy_bytes_per_second": 3e12, "matmul_flops_per_second": 8e14}
ROW_KEYS = {"shape", "direction", "implementation", "layout", "seconds", "spread", "tflops", "matmul_fraction"}
ROW_KEYS |= {"gb_per_second", "copy_fraction", "predicted"}


def clock(calls):
    """Run each call once; one millisecond each, whatever they are."""
    for call in calls:
        call()
    return 1e-3, 0.02


def refuse(inputs):
    raise Unavailable("this device has no such unit")


def wrong(inputs):
    return lambda: inputs["a"] @ inputs["b"] * 1.5, [inputs["a"], inputs["b"]]


def right(inputs):
    a, b = (inputs[name].detach().clone().requires_grad_() for name in "ab")
    return lambda: b.T @ a.T, [a, b]


BASELINES = (
    Baseline("other", GATHERED, right, lambda out, inputs: out.T),
    Baseline("wrong", AS_WRITTEN, wrong, lambda out, inputs: out),
    Baseline("absent", AS_WRITTEN, refuse, lambda out, inputs: out),
)


@pytest.fixture
def result(toy, monkeypatch):
    monkeypatch.setattr(run, "baselines_of", lambda op: BASELINES)
    return run.measure_op(toy.SPEC, toy.SPEC.shapes, CPU, LIMITS, clock, lambda result: None)


def test_a_result_has_a_row_per_shape_direction_and_implementation(result, toy):
    assert result["kind"] == "run" and result["op"] == "toy" and result["ceilings"] == LIMITS
    assert set(result["environment"]) == {"device", "capability", "torch", "triton", "cuda", "cudnn"}
    found = [(row["shape"], row["implementation"], row["direction"]) for row in result["rows"]]
    names = ["osp_fast", "other", "wrong", "absent"]
    assert found == list(itertools.product(["square", "tall"], names, ["forward", "backward"]))
    assert all(set(row) >= ROW_KEYS for row in result["rows"])
    json.dumps(result)


def test_a_run_that_is_cut_off_keeps_the_shapes_it_measured(toy, monkeypatch):
    monkeypatch.setattr(run, "baselines_of", lambda op: ())
    kept = []
    run.measure_op(toy.SPEC, toy.SPEC.shapes, CPU, LIMITS, clock, lambda result: kept.append(len(result["rows"])))
    assert kept == [2, 4]


def test_figures_follow_from_the_time(result, toy):
    row = next(row for row in result["rows"] if row["direction"] == "backward" and row["seconds"])
    flops, moved = (cost("backward", **toy.SPEC.shapes[0].sizes) for cost in (toy.SPEC.flops, toy.SPEC.bytes))
    assert row["seconds"] == 1e-3 and row["tflops"] == flops / 1e-3 / 1e12
    assert row["matmul_fraction"] == flops / 1e-3 / 8e14
    assert row["gb_per_second"] == moved / 1e-3 / 1e9 and row["copy_fraction"] == moved / 1e-3 / 3e12
    assert row["predicted"] == flops / 5e11 and row["bound_by"] == "memory"
    assert row["predicted_rate"] == f"{moved / (flops / 5e11) / 1e9:.0f} GB/s"


def test_baselines_that_fail_or_differ_say_why(result):
    for row in result["rows"]:
        if row["implementation"] == "absent":
            assert row["seconds"] is None and row["unavailable"] == "this device has no such unit"
        elif row["implementation"] == "wrong":
            assert row["seconds"] is None and "differs from ours by 5.0e-01" in row["unavailable"]
        else:
            assert row["seconds"] and "unavailable" not in row
    assert "not available: this device has no such unit" in run.result_table(result)
    (line,) = [line for line in run.ratio_table(result).splitlines() if line.startswith("tall    backward")]
    assert line.split() == ["tall", "backward", "1.000", "ms", "-", "-", "other", "1.00"]


def test_an_operation_that_fails_has_a_reason_too(toy, monkeypatch):
    monkeypatch.setattr(run, "baselines_of", lambda op: BASELINES[:1])

    def operation(a, b):
        raise RuntimeError("illegal address\nin a kernel")

    spec = dataclasses.replace(toy.SPEC, operation=operation)
    rows = list(run.measure_shape(spec, spec.shapes[0], CPU, LIMITS, clock))
    assert [row.get("unavailable") for row in rows] == ["illegal address"] * 2 + [None] * 2


def test_baselines_are_held_against_ours_and_not_against_each_other(toy, monkeypatch):
    near = Baseline(
        "near", AS_WRITTEN, lambda inputs: (lambda: inputs["a"] @ inputs["b"] * 1.04, []), BASELINES[1].restore
    )
    far = Baseline("far", AS_WRITTEN, lambda inputs: (lambda: inputs["a"] @ inputs["b"] * 1.08, []), near.restore)
    monkeypatch.setattr(run, "baselines_of", lambda op: (near, far))
    rows = list(run.measure_shape(toy.SPEC, toy.SPEC.shapes[0], CPU, LIMITS, lambda calls: (1e-3, 0.0)))
    assert [row["seconds"] is None for row in rows] == [False] * 4 + [True] * 2


def test_inputs_are_random_bfloat16_and_differ_between_sets(toy):
    first, second = run.make_input_sets(toy.SPEC, toy.SPEC.shapes[0], CPU)
    assert first["a"].dtype == torch.bfloat16 and not torch.equal(first["a"], second["a"])


def test_input_sets_exceed_the_cache_twice(monkeypatch):
    properties = SimpleNamespace(L2_cache_size=50 << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    for size, count in ((40 << 20, 3), (1 << 30, 2), (1 << 10, 16)):
        assert input_set_count({"x": torch.empty(size, dtype=torch.int8, device="meta")}, torch.device("cuda")) == count


def test_forward_keeps_no_graph_and_backward_gives_gradients():
    x = torch.ones(3, requires_grad=True)
    (forward,) = direction_calls([(lambda: x * 2, [x])], "forward")
    assert not forward().requires_grad
    (backward,) = direction_calls([(lambda: x * 2, [x])], "backward")
    assert torch.equal(backward()[0], backward()[0]) and x.grad is None


def test_ceilings_count_both_ways_of_a_copy(monkeypatch):
    monkeypatch.setattr(measure, "COPY_BYTES", 1 << 10)
    monkeypatch.setattr(measure, "MATMUL_SIZE", 8)
    limits = measure.ceilings(CPU, clock)
    assert limits["copy_bytes_per_second"] == pytest.approx(2 * 2**10 / 1e-3)
    assert limits["matmul_flops_per_second"] == pytest.approx(2 * 8**3 / 1e-3)


def test_results_are_numbered_and_the_report_shows_the_latest(result, toy, tmp_path):
    result["environment"]["device"] = "NVIDIA H100 80GB HBM3"
    path = result_path(tmp_path, "NVIDIA H100 80GB HBM3", "toy")
    assert path == tmp_path / "nvidia-h100-80gb-hbm3" / "toy-001.json"
    write_result(path, result)
    later = {**result, "rows": [dict(row, seconds=row["seconds"] and 2e-3) for row in result["rows"]]}
    path = result_path(tmp_path, "NVIDIA H100 80GB HBM3", "toy")
    assert path.name == "toy-002.json"
    write_result(path, later)
    write_result(path.with_name("toy-tune-001.json"), {**later, "kind": "tune"})
    pairs = [(toy.SPEC, shape) for shape in toy.SPEC.shapes] + [(toy.FAULTY, toy.FAULTY.shapes[0])]
    text = report_text(pairs, latest_runs(tmp_path))
    (line,) = [line for line in text.splitlines() if line.startswith("| toy | square | forward")]
    assert "NVIDIA H100 80GB HBM3 | 2.000 ms" in line and "other | 1.00 |" in line
    lines = [line for line in text.splitlines() if "not yet measured on a GPU" in line]
    assert len(lines) == 2 and all(line.startswith("| faulty") for line in lines)
    assert "copy 3000 GB/s, bf16 matrix product 800 TFLOP/s" in text


def check(spec, dtype=torch.float32):
    return verify.check_case(spec, spec.shapes[1], dtype, 0, CPU)


def test_a_right_operation_verifies(toy):
    for dtype in toy.SPEC.tolerances:
        row = check(toy.SPEC, dtype)
        assert row["verdict"] == "ok" and row["repeat"] == 0 and set(row["errors"]) == {"out", "da", "db"}
    assert "equal" in verify.verify_table([row])


def test_verify_can_be_asked_for_one_type(toy, monkeypatch, capsys):
    monkeypatch.setattr(verify, "require_cuda", lambda command: CPU)
    pairs = [(toy.SPEC, shape) for shape in toy.SPEC.shapes]
    assert verify.run_verify(pairs, seeds=2) == 0 and "8 checks, 0 failed" in capsys.readouterr().out
    assert verify.run_verify(pairs, seeds=1, types=["bfloat16"]) == 0 and "2 checks, 0" in capsys.readouterr().out
    assert verify.run_verify(pairs, seeds=1, types=["float16"]) == 1 and "0 checks" in capsys.readouterr().out


@pytest.mark.parametrize(
    "spoil, verdict",
    [
        (lambda out: out * 1.001, "out 1.0e-03 > 1e-05"),
        (lambda out: out * float("nan"), "out nan > 1e-05"),
        (lambda out: out + (out * 0.01).detach() - out.detach() * 0.01 + 0.001 * (out - out.detach()), "da 1.0e-03"),
    ],
)
def test_a_wrong_operation_does_not(toy, spoil, verdict):
    row = check(dataclasses.replace(toy.SPEC, operation=lambda a, b: spoil(a @ b)))
    assert verdict in row["verdict"]
    verify.verify_table([row])


def test_a_result_that_changes_between_runs_is_a_race(toy):
    turns = itertools.count()

    def operation(a, b):
        return a @ b + 1e-6 * next(turns)

    row = check(dataclasses.replace(toy.SPEC, operation=operation))
    assert row["verdict"].startswith("out of two equal calls differs by") and row["repeat"] > 0


def test_an_operation_that_breaks_does_not_hide_the_others(toy):
    def operation(a, b):
        raise RuntimeError("illegal address\nin a kernel")

    row = check(dataclasses.replace(toy.SPEC, operation=operation))
    assert row["verdict"] == "error: illegal address"
    assert "illegal address" in verify.verify_table([row])


def test_the_error_of_zero_is_zero_and_of_nan_is_nan():
    zero, one = torch.zeros(2), torch.ones(2)
    assert relative_error(zero, zero) == 0 and relative_error(one, zero) == float("inf")
    for found in (one * float("nan"), torch.tensor([1.0, float("nan")])):
        assert relative_error(found, one) != relative_error(found, one)
        assert relative_error(found, zero) != relative_error(found, zero)


def test_tuning_finds_the_best_candidate_of_each_kernel(toy, monkeypatch):
    times = {("forward", "slow"): 2e-3, ("forward", "fast"): 1e-3, ("keys", "slow"): 3e-3, ("keys", "too big"): None}
    tunable = Tunable(lambda inputs, arch: iter(times), lambda inputs, kernel: lambda: None)
    spec = dataclasses.replace(toy.SPEC, tunable=tunable)
    now = []

    def timer(calls):
        if times[now[-1]] is None:
            raise RuntimeError("out of shared memory")
        return times[now[-1]], 0.0

    @contextlib.contextmanager
    def forced(kernel, config):
        now.append((kernel, config))
        yield tune.tuning.Forced(config, used=True)

    monkeypatch.setattr(tune.tuning, "forced", forced)
    rows = list(tune.tune_shape(spec, spec.shapes[0], CPU, timer))
    assert [(row["kernel"], row["config"], row["seconds"]) for row in rows] == [(*key, times[key]) for key in times]
    assert rows[-1]["unavailable"] == "out of shared memory"
    assert [row["config"] for row in tune.best_rows(rows).values()] == ["fast", "slow"]
    assert "toy  square  forward  1.000 ms  fast" in tune.tune_table(rows)
    rows[2]["seconds"] = None
    assert "no candidate ran" in tune.tune_table(rows)


def test_attention_candidates_are_those_of_the_version_that_serves():
    inputs = {"q": torch.empty(1, 8, 2, 96, dtype=torch.bfloat16), "mode": "single", "sparse_n": 4}
    for arch, descriptors in ((90, True), (80, False)):
        found = list(attention.SPEC.tunable.candidates(inputs, arch))
        assert len(found) == len(set(found)) and {kernel for kernel, _ in found} == set(tune.tuning.KERNELS)
        call = tune.tuning.Call(arch, torch.bfloat16, 96, "single", False, descriptors)
        assert [config for kernel, config in found if kernel == "keys"] == tune.tuning.candidates("keys", call)


def test_shapes_measured_in_runs_of_their_own_are_all_reported(tmp_path):
    environment = {"device": "X"}
    for date, shape, seconds in (("1", "a", 1.0), ("2", "b", 2.0), ("3", "a", 3.0)):
        row = {"shape": shape, "direction": "forward", "implementation": "osp_fast", "seconds": seconds}
        result = {"kind": "run", "op": "o", "date": date, "environment": environment, "ceilings": {}, "rows": [row]}
        write_result(result_path(tmp_path, "X", "o"), result)
    (latest,) = latest_runs(tmp_path).values()
    assert {row["shape"]: row["seconds"] for row in latest["rows"]} == {"b": 2.0, "a": 3.0}


def test_a_variant_may_refuse_a_call_and_may_not_break(toy):
    def refuse(**inputs):
        raise UnsupportedCall("not mine")

    def breaks(**inputs):
        raise ValueError("too many values to unpack")

    spec = dataclasses.replace(toy.SPEC, variants={"choosy": refuse, "broken": breaks})
    verdicts = [
        verify.check_case(spec, spec.shapes[1], torch.float32, 0, CPU, name)["verdict"] for name in spec.variants
    ]
    assert verdicts == ["refused: not mine", "error: too many values to unpack"]


ATTENTION = {"batch": 1, "tokens": 21, "heads": 1, "head_dim": 16, "sparse_n": 4}
NORM = {"batch": 1, "frames": 2, "rows": 3, "columns": 4, "channels": 8}


@pytest.mark.parametrize(
    "spec, sizes",
    [
        (attention.SPEC, ATTENTION | {"mode": "full"}),
        (attention.SPEC, ATTENTION | {"mode": "group"}),
        (channel_norm_spec.SPEC, NORM),
    ],
)
def test_tuning_times_the_kernel_that_it_changes(spec, sizes, monkeypatch):
    """In the interpreter: each call launches the kernel whose configuration is forced; one that does not is refused."""
    monkeypatch.setattr(run, "DTYPE", torch.float32)
    shape = Shape("small", sizes)

    def timer(calls):
        calls[0]()
        return 1e-3, 0.0

    rows = list(tune.tune_shape(spec, shape, CPU, timer))
    inputs = spec.make_inputs(device=CPU, dtype=torch.float32, seed=0, **sizes)
    assert [row["kernel"] for row in rows] == [kernel for kernel, _ in spec.tunable.candidates(inputs, 0)]
    assert all(row["seconds"] == 1e-3 for row in rows), rows
    with pytest.raises(RuntimeError, match="does not launch '.*forward'"):
        list(tune.tune_shape(spec, shape, CPU, lambda calls: (1e-3, 0.0)))


def test_tuning_needs_candidates(toy):
    with pytest.raises(UserError, match="--tune: toy has no candidates"):
        tune.check_tunable([(toy.SPEC, toy.SPEC.shapes[0])])


def test_verify_multiplies_float32_exactly():
    with torch.backends.cudnn.flags(allow_tf32=True):
        with exact_float32():
            assert causal_conv3d_launch.precision() == "ieee"
        assert causal_conv3d_launch.precision() == "tf32"
