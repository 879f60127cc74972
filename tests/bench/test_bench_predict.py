"""Rooflines, whole steps by their parts, and what a prediction is written as."""

import json

import pytest
import torch

from bench import predict_steps
from bench.__main__ import main
from bench.predict import op_lines, op_rows
from bench.predict_steps import Step, attention_as_predicted, step_row, steps_table
from bench.results import H100, Ceilings, read_result
from osp_fast.engine import devices
from osp_fast.engine.cost import Workload, step_flops
from osp_fast.errors import UserError


def test_a_roofline_is_the_longer_of_two_times(toy):
    pairs = [(toy.SPEC, shape) for shape in toy.SPEC.shapes]
    limits = Ceilings(1e12, 1e11)
    rows = op_rows(pairs, limits)
    assert [row.case for row in rows[:2]] == ["toy square forward", "toy square backward"]
    flops, moved = 2 * 96**3, 2 * 3 * 96**2
    assert rows[0].ms == 1e3 * max(flops / 1e12, moved / 1e11) and rows[0].predicted_ms == 1e3 * flops / 5e11
    (first, *_) = op_lines(rows, limits, True)
    assert first[6] == "products" and first[5] == "32" and first[-1] == "50.0 %"
    assert op_lines(op_rows(pairs, Ceilings(1e13, 1e11)), Ceilings(1e13, 1e11), False)[0][6] == "memory"
    assert op_rows(pairs, limits, of_h100=False)[0].predicted_ms is None


def test_ceilings_of_a_result_file(toy, tmp_path, capsys):
    written = tmp_path / "predicted.json"
    assert main(["predict", "ops", "--op", "toy", "--json", str(written)], toy.load) == 0
    printed = capsys.readouterr().out
    assert (
        "one H100 SXM, as measured: a matrix product 798 TFLOP/s, a copy 3.00 TB/s" in printed and "expected" in printed
    )
    result = read_result(written)
    assert len(result.rows) == 4 and {row.impl for row in result.rows} == {"predicted"} and result.ceilings == H100
    value = json.loads(written.read_text())
    value["env"] |= {"device": "NVIDIA H200", "copy_tbps": 4.0}
    written.write_text(json.dumps(value))
    assert main(["predict", "--op", "toy", "--ceilings", str(written)], toy.load) == 0
    printed = capsys.readouterr().out
    assert "NVIDIA H200: a matrix product 798 TFLOP/s, a copy 4.00 TB/s" in printed
    assert "expected" not in printed and "steps are predicted for one H100 alone" in printed
    (tmp_path / "static.json").write_text("[]")
    with pytest.raises(UserError, match="is of bench static, which measures none"):
        main(["predict", "--ceilings", str(tmp_path / "static.json")], toy.load)
    with pytest.raises(UserError, match="name nothing beside it"):
        main(["predict", "parallel", "ops"], toy.load)


@pytest.fixture(scope="module")
def steps():
    return predict_steps.predict_steps("29x352x640")


def test_steps_are_the_sum_of_their_parts(steps):
    training, denoising, clip = steps
    assert [step.what for step in steps] == ["training step", "denoising step", "clip, 100 steps"]
    assert set(training.parts) == {"products", "attention", "memory-bound", "recomputed", "update"}
    assert clip.seconds == pytest.approx(100 * denoising.seconds + clip.parts["decoding"])
    for step in steps:
        assert 0 < step.roofline < step.at_targets < step.seconds
    workload = Workload(1, (8, 44, 80), 512)
    assert training.flops == step_flops(predict_steps.CONFIG, workload).model
    assert training.figures["mfu"] == pytest.approx(training.flops / training.seconds / 989e12)
    assert denoising.flops == pytest.approx(2 / 3 * training.flops, rel=1e-2)


def test_attention_is_as_fast_as_its_spec_says():
    gpu = attention_as_predicted("93x640x640")
    spec, sizes = predict_steps.ATTENTION, {}
    (sizes,) = [shape.sizes for shape in spec.shapes if shape.name == "93x640x640 group"]
    assert gpu.attention_forward == spec.flops("forward", **sizes) / spec.predicted("forward", **sizes)
    assert gpu.attention_backward < devices.H100.attention_backward == pytest.approx(500e12)


def test_tables_say_whether_targets_are_met(steps):
    met = Step("sample", "clip", "c", {"products": 1.0, "attention": 3.0}, 3.5, 2.0, 4e12, target="5 s: met")
    table = steps_table([met]).splitlines()
    assert table[-1].split() == "c clip 4 s 25.0 % 75.0 % 3.5 s 2 s 50.0 % 1 - 5 s: met".split()
    assert predict_steps._verdict("5 s", False, True) == "5 s: missed; met at attention's targets"
    row = step_row(steps[0])
    assert row.suite == "train" and row.predicted_ms == 1e3 * steps[0].seconds and not row.ok and row.ms is None
    assert row.figures["attention_seconds"] == steps[0].parts["attention"] and row.figures["roofline_seconds"] > 0
    assert torch.tensor([*row.figures.values()]).isfinite().all()
