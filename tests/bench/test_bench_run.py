"""The runner: files that hold whatever was measured, resuming, and a process of its own that may break."""

import json
import sys
from pathlib import Path

import pytest

from bench import gpu_day, worker
from bench.results import Result, newest_cases, read_result, read_results, result_path, write_result
from bench.run import Plan, case_table, chosen_jobs, dry_run, run_bench
from bench.suites import Options, jobs_of
from bench.worker import Worker
from osp_fast.errors import UserError

sys.path.insert(0, str(Path(__file__).parent))  # which a worker's children have, too
from toy_jobs import good, in_process, row, toy_jobs


def run(folder, *names, **plan):
    return run_bench(Plan(names, Options("cpu"), **plan), folder, toy_jobs, in_process())


def test_every_case_is_printed_and_written(tmp_path, capsys):
    assert run(tmp_path, "good", "faster") == 0
    said = capsys.readouterr().out
    path = tmp_path / "cpu" / "good-faster-001.json"
    assert f"written to {path}" in said and "[1/2] toys good (about 0:00:52 left)" in said
    assert "SLOWER toys faster: other needs 0.50 of our time" in said and "2 cases measured" in said
    assert "only the ratios of a run mean something" in said and " ms" not in said
    found = json.loads(path.read_text())
    assert found["env"]["device"] == "cpu" and found["env"]["matmul_tflops"] == 1.0 and "packages" in found["env"]
    assert [one["vs"] for one in found["rows"]] == [{"other": 2.0}, {}, {"other": 0.5}, {}]
    assert found["rows"][0]["tflops"] == 0.5 and found["rows"][0]["of_peak"] == 0.5
    assert read_result(path).rows[0].case == "good"
    assert run(tmp_path, "good", "faster") == 0 and path.with_name("good-faster-002.json").exists()


def test_what_breaks_is_a_row_and_hides_nothing(tmp_path, capsys):
    assert run(tmp_path, "breaks", "impossible", "good") == 0  # a part of the first was measured
    said = capsys.readouterr().out
    assert "FAILED: no kernel image" in said and "not measured: two GPUs are needed" in said
    rows = read_result(tmp_path / "cpu/breaks-impossible-good-001.json").rows
    assert [(one.case, one.ok) for one in rows[:3]] == [("breaks part", True), ("impossible", False), ("good", True)]
    assert rows[1].note == "not measured: two GPUs are needed"


def test_what_is_wrong_ends_with_exit_code_1(tmp_path, capsys):
    assert run(tmp_path, "wrong") == 1
    assert "NOT MEASURED toys wrong: WRONG, not timed: off by 1.0e-02" in capsys.readouterr().out


def test_a_run_is_resumed_where_it_was_left(tmp_path, capsys, monkeypatch):
    assert run(tmp_path, "good", "faster", resume=True, seconds=30) == 0
    assert "left for the same command again, its time being up: 1 cases" in capsys.readouterr().out
    assert run(tmp_path, "good", "faster", resume=True) == 0
    said = capsys.readouterr().out
    assert "1 of 2 cases are there already" in said and "[1/1] toys faster" in said
    (path,) = (tmp_path / "cpu").glob("*.json")
    assert [one.case for one in read_result(path).rows] == ["good", "good", "faster", "faster"]
    environment = worker.environment
    monkeypatch.setattr(worker, "environment", lambda *a: environment(*a) | {"git": "another"})
    assert run(tmp_path, "good", "faster", resume=True) == 0
    assert len(list((tmp_path / "cpu").glob("*.json"))) == 2  # another commit's are not mixed with these


def test_cases_are_chosen_by_a_part_of_their_names():
    plan = Plan((), Options("cpu"), ("oo", "toys fas"))
    assert [job.case for job in chosen_jobs(plan, toy_jobs)] == ["good", "faster"]
    with pytest.raises(UserError, match="--case 'gold' is in the name of no case"):
        chosen_jobs(Plan((), Options("cpu"), ("gold",)), toy_jobs)


def test_a_dry_run_adds_up(capsys):
    assert dry_run(Plan(("good", "faster"), Options("cuda"), seconds=30), toy_jobs) == 0
    said = capsys.readouterr().out
    assert "2 cases, predicted 0:00:52 on one H100" in said and "more than the 0:00:30 of a run" in said


def test_a_process_that_dies_or_hangs_takes_no_other_case_with_it(tmp_path, capsys, monkeypatch):
    """With real children: one case kills its own, one never ends, the next ones are measured by new ones."""
    names = ("good", "dies", "hangs", "faster")
    measurer = Worker(names, Options("cpu"), toy_jobs, in_process)
    monkeypatch.setattr(worker, "LEAST_SECONDS", 1.0)
    monkeypatch.setattr(worker, "TIMES_PREDICTED", 0.0)
    assert run_bench(Plan(names, Options("cpu")), tmp_path, toy_jobs, measurer) == 1
    said = capsys.readouterr().out
    assert "FAILED: its process ended with signal 9" in said
    assert "FAILED: the case, ended after 1 s, did not come in time" in said
    rows = read_result(tmp_path / "cpu/good-dies-hangs-faster-001.json").rows
    assert [one.case for one in rows if one.ok] == ["good", "good", "dies part", "faster", "faster"]
    assert [one.note for one in rows if not one.ok] == ["FAILED: the case, ended after 1 s, did not come in time"]


def test_case_tables_have_ratios_and_on_gpus_times():
    found = good(None)
    found[0].vs = {"other": 2.0}
    table = case_table(found)
    assert table.splitlines()[0].split() == ["case", "implementation", "times", "ours", "time", "spread"]
    assert table.splitlines()[-1].split() == ["good", "other", "2.00", "2.000", "ms", "0.0", "%"]
    assert "ms" not in case_table(found, absolute=False)


def test_results_are_numbered_and_the_newest_case_counts(tmp_path):
    env = {"device": "NVIDIA H100 80GB HBM3", **dict.fromkeys(("torch", "triton", "cuda", "cudnn", "driver", "git"))}
    env |= {"matmul_tflops": 1.0, "copy_tbps": 1.0}
    for date, case, ms in (("1", "a", 1.0), ("3", "a", float("nan")), ("2", "b", 2.0)):
        path = result_path(tmp_path, env["device"], "toys")
        write_result(path, Result(env | {"date": date}, [row(case, ms=ms)]))
    assert path == tmp_path / "nvidia-h100-80gb-hbm3" / "toys-003.json"
    (cases,) = newest_cases(read_results(tmp_path)).values()
    found = {case: (result.env["date"], rows[0].ms) for (_, case), (result, rows) in cases.items()}
    assert found == {"a": ("3", None), "b": ("2", 2.0)}
    assert result_path(tmp_path, "NVIDIA H200", "toys").name == "toys-001.json"


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("{", "is no JSON"),
        ("[1]", "has no env and rows"),
        ('{"rows": []}', "has no env and rows"),
        ('{"env": {"device": "cpu"}, "rows": []}', "its env lacks torch, triton"),
    ],
)
def test_other_files_are_no_results(tmp_path, text, sentence):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=sentence):
        read_result(tmp_path / "x.json")
    env = dict.fromkeys(("device", "torch", "triton", "cuda", "cudnn", "driver", "git", "date", "matmul_tflops"), 1)
    (tmp_path / "x.json").write_text(json.dumps({"env": {**env, "copy_tbps": 1}, "rows": [{"suite": "a"}]}))
    with pytest.raises(UserError, match="a row has not the fields"):
        read_result(tmp_path / "x.json")


def test_the_day_of_a_gpu_fits_into_nine_minutes_and_asks_for_no_network(capsys):
    jobs = gpu_day.gpu_day_jobs(("gpu-day",), Options("cuda"))
    assert [(job.suite, job.case) for job in jobs] == list(gpu_day.CASES)
    assert 300 < sum(job.seconds for job in jobs) < 60 * gpu_day.MINUTES
    assert jobs[1].case == "skiparse_attention 93x640x640 group"
    for names, device, words in ((("gpu-day", "vae"), "cuda", "name no suites"), (("gpu-day",), "cpu", "for a GPU")):
        with pytest.raises(UserError, match=words):
            gpu_day.gpu_day_jobs(names, Options(device))


def test_every_suite_has_jobs_without_a_gpu():
    for device, suites in (("cuda", ("kernels", "model", "vae", "train", "sample")), ("cpu", ("model", "train"))):
        jobs = jobs_of(suites, Options(device))
        assert {job.suite for job in jobs} == set(suites)
        assert len({(job.suite, job.case) for job in jobs}) == len(jobs) and all(job.seconds > 0 for job in jobs)
    with pytest.raises(UserError, match="'speed' is not a suite: choose from kernels, model"):
        jobs_of(["speed"], Options("cpu"))
