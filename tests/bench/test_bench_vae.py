"""The VAE beside stock operations, small and on the CPU in a GPU's place."""

import json

import pytest
import torch

from bench import vae as bench_vae
from bench.__main__ import main
from bench.compare import run_compare
from bench.results import latest_runs, read_result
from bench.vae import Case, errors, make_vae, measure_case, run_vae, vae_table
from osp_fast.errors import UserError
from osp_fast.models.wfvae import WFVAE

CPU = torch.device("cpu")


@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_all_implementations_compute_the_same(direction):
    found = errors("tiny", direction, CPU, torch.float32)
    assert list(found) == ["osp_fast", "stock, channels-last", "stock, planar"]
    assert max(found.values()) < 1e-5
    rounded = errors("tiny", direction, CPU, torch.bfloat16)
    assert min(rounded.values()) > 1e-4 and max(rounded.values()) < bench_vae.TOLERANCE


def test_a_row_for_each_implementation(monkeypatch):
    monkeypatch.setattr(bench_vae, "RUNS", 1)
    rows = list(measure_case("tiny", Case.parse("decode 5x32x48"), CPU, 1 << 40, torch.float32))
    assert [row["ok"] and row["seconds"] > 0 for row in rows] == [True] * 3
    table = vae_table(rows)
    assert "decode 5x32x48" in table and "times ours" in table


def test_what_is_wrong_is_not_timed(monkeypatch):
    monkeypatch.setattr(bench_vae, "RUNS", 1)
    decode = WFVAE.decode
    monkeypatch.setattr(WFVAE, "decode", lambda vae, *given: 1.1 * decode(vae, *given))
    ours, *stock = measure_case("tiny", Case.parse("decode 5x32x48"), CPU, 1 << 40, torch.float32)
    assert not ours["ok"] and ours["seconds"] is None and "not timed" in ours["note"]
    assert all(row["seconds"] for row in stock)
    assert "-" in vae_table([ours, *stock])


def test_out_of_memory_is_a_result(monkeypatch):
    monkeypatch.setattr(bench_vae, "RUNS", 1)

    def full(*given):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(bench_vae, "time_and_peak", full)
    rows = list(measure_case("tiny", Case.parse("encode 5x32x48"), CPU, 1 << 40, torch.float32))
    assert [row["note"] for row in rows] == ["out of memory"] * 3


def test_results_are_written_beside_those_of_operations(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_vae, "RUNS", 1)
    monkeypatch.setattr(bench_vae, "require_cuda", lambda command: CPU)
    measure = bench_vae.measure_case
    monkeypatch.setattr(bench_vae, "measure_case", lambda size, *given: measure("tiny", *given, torch.float32))
    assert run_vae(["decode 5x32x48"], tmp_path, 1 << 40) == 0
    (path,) = tmp_path.rglob("*.json")
    assert path.name == "vae-001.json" and read_result(path)["rows"][0]["case"] == "decode 5x32x48"
    assert run_compare(path, path, 0.05) == 0
    assert latest_runs(tmp_path) == {} and "written to" in capsys.readouterr().out
    assert json.loads(path.read_text())["environment"]["torch"] == torch.__version__


def test_bad_cases_and_no_gpu_end_in_a_sentence():
    for text in ("decode", "decode 4x32x32", "paint 5x32x32", "encode 5x30x32"):
        with pytest.raises(UserError, match="--case"):
            main(["vae", "--case", text])
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="bench vae needs an NVIDIA GPU"):
            main(["vae", "--memory", "4GiB", "--json", "nowhere"])


def test_weights_are_the_same_in_every_type():
    one, other = (make_vae("tiny", CPU, dtype) for dtype in (torch.float32, torch.bfloat16))
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a.bfloat16(), b)
