"""A training step of the whole DiT beside others, small and on the CPU in a GPU's place."""

import json

import pytest
import torch
from osp_fast.kernels.skiparse_attention import skiparse_attention_ref

from bench import train as bench_train
from bench import train_steps
from bench.__main__ import TRAIN_CASES, main
from bench.compare import run_compare
from bench.results import OURS, latest_runs, read_result
from bench.train import (
    TOLERANCE,
    compare_first_steps,
    measure_in_turns,
    measure_row,
    parse_case,
    run_train,
    train_table,
)
from bench.train_steps import ON_CPU, ON_GPU, Case, masked_attention
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


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Few steps, and graphs as they are traced."""
    monkeypatch.setattr(bench_train, "PIECES", 1)
    monkeypatch.setattr(bench_train, "PIECE_S", 0.0)
    monkeypatch.setattr(bench_train, "WARM_STEPS", 0)
    monkeypatch.setattr(bench_train, "TURNS", 1)
    as_traced = lambda dit, buckets: compile_blocks(dit, buckets, lambda graph, inputs: graph.forward)  # noqa: E731
    monkeypatch.setattr(train_steps, "compile_blocks", as_traced)


def test_all_implementations_take_the_same_step(monkeypatch, capsys):
    plan, budgets = train_steps.plan_activations, []

    def without_limit(config, workload, budget, *more):
        budgets.append(budget)
        return plan(config, workload, None, *more)

    monkeypatch.setattr(train_steps, "plan_activations", without_limit)
    rows = [measure_row(one, SMALL, CASE, CPU, bf16=False) for one in ON_GPU]
    assert [row["implementation"] for row in rows] == [OURS, "torch.compile, best SDPA", "reference path"]
    assert all(row["seconds"] > 0 and row["grad_norm"] > 0 for row in rows)
    compare_first_steps(rows, TOLERANCE[False])
    assert all(row["ok"] for row in rows) and rows[2]["rel_err"] == 0 < rows[0]["rel_err"]
    assert len(budgets) == 2 and budgets[0] > 0  # of the two that recompute no more than they must
    assert "activations: " in rows[0]["chosen"][0] and rows[0]["chosen"][0] in capsys.readouterr().out
    assert rows[0]["tokens_per_second"] == 2 * 2 * 3 / rows[0]["seconds"]
    table = train_table(rows)
    assert "times ours" in table and "reference path" in table and "WRONG" not in table


@pytest.mark.parametrize("mode", ["full", "single", "group"])
def test_attention_with_a_mask(mode):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 13, 2, 8, generator=generator) for _ in range(3))
    mask = torch.arange(13).expand(2, -1) < 11
    for given in (None, mask):
        expected = skiparse_attention_ref(q, k, v, mode, 2, given)
        torch.testing.assert_close(masked_attention(q, k, v, mode, 2, given), expected)


def test_turns_on_the_cpu():
    rows = measure_in_turns(SMALL, CASE)
    compare_first_steps(rows, TOLERANCE[False])
    assert [row["implementation"] for row in rows] == [OURS, "plain loop"]
    assert all(row["ok"] and row["seconds"] > 0 and row["mfu"] is None for row in rows)


def test_another_first_step_is_told(monkeypatch):
    loss = train_steps.DenoisingLoss.__call__
    monkeypatch.setattr(train_steps.DenoisingLoss, "__call__", lambda self, batch: 1.01 * loss(self, batch))
    rows = measure_in_turns(SMALL, CASE)
    compare_first_steps(rows, TOLERANCE[False])
    assert not rows[0]["ok"] and rows[0]["note"].startswith("WRONG: first loss ") and rows[1]["ok"]


@pytest.mark.parametrize("fault, words", [(torch.OutOfMemoryError("CUDA"), "out of memory"), (UserError("no"), "no")])
def test_what_does_not_fit_is_a_row(monkeypatch, fault, words):
    def full(*given):
        raise fault

    monkeypatch.setattr(train_steps, "plan_activations", full)
    rows = [measure_row(one, SMALL, CASE, CPU, bf16=False) for one in ON_GPU]
    compare_first_steps(rows, TOLERANCE[False])
    assert [row["note"] for row in rows] == [words, words, ""] and [row["ok"] for row in rows] == [False, False, True]
    assert words in train_table(rows)


def test_results_are_written_beside_those_of_operations(tmp_path, monkeypatch, capsys):
    measure = bench_train.measure_row
    monkeypatch.setattr(bench_train, "require_cuda", lambda command: CPU)
    monkeypatch.setattr(bench_train, "ON_GPU", ON_CPU)
    monkeypatch.setattr(bench_train, "measure_row", lambda one, config, *given: measure(one, SMALL, *given, False))
    assert run_train(["1x32x32"], False, tmp_path) == 0
    (path,) = tmp_path.rglob("*.json")
    assert path.name == "train-001.json" and read_result(path)["rows"][0]["case"] == "1x32x32"
    assert run_compare(path, path, 0.05) == 0 and latest_runs(tmp_path) == {}
    assert "written to" in capsys.readouterr().out
    assert json.loads(path.read_text())["model"] == "OpenSoraT2V_v1_3-2B/122"
    monkeypatch.setattr(bench_train, "measure_in_turns", lambda config, case: [measure(ON_CPU[0], SMALL, CASE, CPU)])
    assert main(["train", "--tiny", "--json", str(tmp_path)]) == 0
    assert read_result(path.with_name("train-002.json"))["environment"]["threads"] == torch.get_num_threads()


def test_flops_and_sizes_of_cases():
    """338 TFLOP forward of 93x640x640, times three."""
    case = parse_case("93x640x640")
    assert case.video_tokens(RELEASED) == 38_400 and case.latent_size == (24, 80, 80)
    assert abs(case.model_flops(RELEASED) / 1e12 - 3 * 338) < 10
    assert [str(parse_case(text)) for text in TRAIN_CASES] == list(TRAIN_CASES)


def test_bad_cases_and_no_gpu_end_in_a_sentence():
    for text in ("93", "4x32x32", "5x30x32", "5x32x40"):
        with pytest.raises(UserError, match="--case"):
            main(["train", "--case", text])
    with pytest.raises(UserError, match="--tiny measures the tiny preset's own size: leave --case out"):
        main(["train", "--tiny", "--case", "1x32x32"])
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="bench train .*needs an NVIDIA GPU"):
            main(["train", "--json", "nowhere"])
