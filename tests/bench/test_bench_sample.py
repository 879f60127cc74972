"""A denoising step of the whole DiT beside others, small and on the CPU in a GPU's place."""

import json
from dataclasses import replace

import pytest
import torch

from bench import sample as bench_sample
from bench import sample_steps
from bench.__main__ import SAMPLE_CASES, main
from bench.compare import run_compare
from bench.results import OURS, latest_runs, read_result
from bench.sample import complete, errors, measure_in_turns, measure_row, run_sample, sample_table, shares
from bench.sample_steps import ON_CPU, ON_GPU, guided_flops
from bench.train_steps import Case
from osp_fast.data.buckets import Bucket
from osp_fast.engine.compile import compile_blocks
from osp_fast.errors import UserError
from osp_fast.models.dit import DIT_CONFIGS, DiTConfig

CPU = torch.device("cpu")
SMALL = DiTConfig(
    num_layers=2, num_attention_heads=1, attention_head_dim=24, caption_channels=8, cross_attention_dim=24, sparse_n=2
)
CASE = Case(Bucket(1, 32, 48), text_tokens=8)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Few steps, a small clip for the check, and graphs as they are traced."""
    monkeypatch.setattr(bench_sample, "PIECES", 1)
    monkeypatch.setattr(bench_sample, "PIECE_S", 0.0)
    monkeypatch.setattr(bench_sample, "WARM_STEPS", 0)
    monkeypatch.setattr(bench_sample, "TURNS", 2)
    monkeypatch.setattr(bench_sample, "CHECKED", Bucket(1, 32, 48))
    as_traced = lambda dit, buckets: compile_blocks(dit, buckets, lambda graph, inputs: graph.forward)  # noqa: E731
    monkeypatch.setattr(sample_steps, "compile_blocks", as_traced)


def test_all_implementations_compute_the_same():
    wrong = errors(ON_GPU, SMALL, CPU, torch.float32)
    assert list(wrong) == [OURS, "plain loop", "torch.compile, best SDPA", "reference path"]
    assert all(error < 1e-5 for error in wrong.values())
    rows = [measure_row(one, SMALL, CASE, CPU, wrong[one.name], torch.float32) for one in ON_GPU]
    assert all(row["ok"] and row["seconds"] > 0 for row in rows)
    complete(rows, SMALL, CASE, CPU, {"matmul_flops_per_second": 1e12}, 2.0)
    assert rows[0]["flops_per_second"] == guided_flops(SMALL, CASE) / rows[0]["seconds"]
    assert rows[1]["of_matmul"] == rows[1]["flops_per_second"] / 1e12
    table = sample_table(rows)
    assert "times ours" in table and "reference path" in table
    assert f"{100 * rows[0]['seconds'] + 2:.1f}" in table


def test_what_is_wrong_is_not_timed(monkeypatch):
    attention = sample_steps.masked_attention
    monkeypatch.setattr(sample_steps, "masked_attention", lambda *a, **k: 1e3 * attention(*a, **k))
    wrong = errors(ON_GPU, SMALL, CPU, torch.float32)
    assert wrong["reference path"] > 1e-3 > wrong[OURS]
    row = measure_row(ON_GPU[3], SMALL, CASE, CPU, wrong["reference path"], torch.float32)
    assert row["seconds"] is None and not row["ok"] and "not timed" in row["note"]
    assert not measure_row(ON_GPU[0], SMALL, CASE, CPU, float("nan"), torch.float32)["ok"]


def test_what_does_not_fit_is_a_row_that_says_so(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(bench_sample, "seconds_of", full)
    row = measure_row(ON_GPU[0], SMALL, CASE, CPU, 0.0, torch.float32)
    assert row["note"] == "out of memory" and row["seconds"] is None
    complete([row], SMALL, CASE, CPU, None, None)
    assert "out of memory" in sample_table([row])


def test_each_part_has_its_share():
    rows = measure_in_turns(SMALL, CASE)
    assert [row["implementation"] for row in rows] == [one.name for one in ON_CPU]
    assert all(row["ok"] for row in rows)
    for row, seconds in zip(rows, (0.8, 0.9, 0.85, 1.0), strict=True):
        row["seconds"] = seconds
    assert shares(rows) == ("of a plain loop's step, text keys once save 10.0%, time vectors once 15.0%, both 20.0%")


def test_flops_are_two_forwards_of_the_table():
    """93x640x640: 338 TFLOP (linear, cross and self-attention) for one forward."""
    case = Case(Bucket(93, 640, 640))
    flops = guided_flops(DIT_CONFIGS["OpenSoraT2V_v1_3-2B/122"], case)
    assert flops == pytest.approx(2 * 338e12, rel=0.02)
    assert guided_flops(SMALL, replace(case, size=Bucket(1, 32, 32))) < flops


def test_run_writes_its_rows(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(bench_sample.DIT_CONFIGS, "tiny", SMALL)
    monkeypatch.setattr(bench_sample, "tiny_case", lambda: CASE)
    assert run_sample([], True, tmp_path) == 0
    printed = capsys.readouterr().out
    assert "text keys once save" in printed and "written to" in printed
    path = next(tmp_path.rglob("sample-001.json"))
    result = read_result(path)
    assert result["kind"] == "sample" and result["model"] == "tiny" and len(result["rows"]) == 4
    assert result["environment"]["threads"] >= 1 and latest_runs(tmp_path) == {}
    other = json.loads(path.read_text())
    other["rows"][0]["seconds"] *= 2
    (tmp_path / "b.json").write_text(json.dumps(other))
    assert run_compare(path, tmp_path / "b.json", 0.05) == 1
    assert run_compare(path, path, 0.05) == 0


def test_command_line():
    with pytest.raises(UserError, match="needs an NVIDIA GPU"):
        main(["sample"])
    with pytest.raises(UserError, match="--tiny measures"):
        main(["sample", "--tiny", "--case", SAMPLE_CASES[0]])
    with pytest.raises(UserError, match="'93x1'"):
        main(["sample", "--case", "93x1"])
