"""Comparing result files: what is slower, wrong or lost; and what does not compare."""

import json

import pytest

from bench.__main__ import main
from bench.results import Result, Row, write_result
from osp_fast.errors import UserError

ENV = {"device": "NVIDIA H100", "torch": "2.13", "triton": "3.7", "cuda": "13", "cudnn": 9, "driver": "580", "git": "a"}
ENV |= {"date": "2026-11-23", "matmul_tflops": 798.0, "copy_tbps": 3.0}


def run_file(path, env=(), **milliseconds):
    rows = []
    for case, ms in milliseconds.items():
        row = Row("kernels", case, "osp_fast", "ours", "bfloat16", ok=ms is not None, ms=ms, note="WRONG, not timed")
        row.ms_p20, row.ms_p80 = (None, None) if ms is None else (0.99 * ms, 1.01 * ms)
        rows.append(row)
    write_result(path, Result(ENV | dict(env), rows))
    return path


def static_file(path, **figures):
    rows = [
        {"op": "toy", "kernel": "k", "arch": "sm_90", "config": name, "registers": registers, "spills": spills}
        | {"shared": 1024, "instructions": {}}
        for name, (registers, spills) in figures.items()
    ]
    path.write_text(json.dumps(rows))
    return path


@pytest.mark.parametrize(
    "before, after, code, said",
    [
        ({"a": 1.0}, {"a": 1.04}, 0, "1.040"),
        ({"a": 1.0, "b": 1.0}, {"a": 0.5, "b": 1.06}, 1, "WORSE kernels b osp_fast: 6.0 % slower"),
        ({"a": 1.0}, {"a": None}, 1, "WORSE kernels a osp_fast: measured before, WRONG, not timed"),
        ({"a": 1.0}, {}, 1, "measured before, not in the second file"),
        ({"a": None}, {"a": 1.0, "b": 1.0}, 0, "kernels  b"),
        ({"a": 1.0}, {"a": 1.015}, 0, "within spread"),
    ],
)
def test_times(tmp_path, capsys, before, after, code, said):
    files = [run_file(tmp_path / "a.json", **before), run_file(tmp_path / "b.json", **after)]
    assert main(["compare", *map(str, files)]) == code
    printed = capsys.readouterr().out
    assert said in printed and "bf16 matrix product 798 TFLOP/s" in printed


def test_a_difference_within_both_spreads_is_none(tmp_path, capsys):
    files = [run_file(tmp_path / "a.json", a=1.0), run_file(tmp_path / "b.json", a=1.015)]
    assert main(["compare", *map(str, files), "--threshold", "1"]) == 0
    files[1] = run_file(tmp_path / "b.json", a=1.03)
    assert main(["compare", *map(str, files), "--threshold", "1"]) == 1


def test_the_threshold(tmp_path):
    files = [run_file(tmp_path / "a.json", a=1.0), run_file(tmp_path / "b.json", a=1.5)]
    assert main(["compare", *map(str, files), "--threshold", "60"]) == 0
    assert main(["compare", *map(str, files), "--threshold", "40"]) == 1


def test_results_of_another_environment_are_refused(tmp_path, capsys):
    first = run_file(tmp_path / "a.json", a=1.0)
    other = run_file(tmp_path / "b.json", {"torch": "2.14", "driver": "590"}, a=1.0)
    with pytest.raises(UserError, match=r"different environments, torch \(2.13 and 2.14\), driver \(580 and 590\)"):
        main(["compare", str(first), str(other)])
    assert capsys.readouterr().out == ""
    later = run_file(tmp_path / "c.json", {"git": "b", "date": "2027-01-01", "matmul_tflops": 790.0}, a=1.0)
    assert main(["compare", str(first), str(later)]) == 0


def test_ratios_alone_on_a_cpu(tmp_path, capsys):
    files = [run_file(tmp_path / name, {"device": "cpu", "cpu": "Z80", "threads": 1}, a=1.5) for name in ("a", "b")]
    assert main(["compare", *map(str, files)]) == 0
    printed = capsys.readouterr().out
    assert "1.000" in printed and " ms" not in printed and "1.5" not in printed


@pytest.mark.parametrize(
    "before, after, code, said",
    [
        ({"x": (168, 0)}, {"x": (170, 0)}, 0, "168 -> 170"),
        ({"x": (168, 0)}, {"x": (200, 0)}, 1, "WORSE toy k sm_90 x: 168 -> 200 registers"),
        ({"x": (168, 0)}, {"x": (100, 2)}, 1, "WORSE toy k sm_90 x: 0 -> 2 spills"),
        ({"x": (168, 0), "y": (1, 0)}, {"y": (1, 0)}, 1, "x: compiled before, not in the second file"),
        ({}, {"x": (168, 4)}, 0, "- -> 4"),
    ],
)
def test_static(tmp_path, capsys, before, after, code, said):
    files = [static_file(tmp_path / "a.json", **before), static_file(tmp_path / "b.json", **after)]
    assert main(["compare", *map(str, files)]) == code
    assert said in capsys.readouterr().out


def test_two_files_of_one_kind(tmp_path):
    run, static = run_file(tmp_path / "a.json", a=1.0), static_file(tmp_path / "b.json", x=(1, 0))
    with pytest.raises(UserError, match=r"b.json: is of bench static, .*a.json of bench run"):
        main(["compare", str(run), str(static)])
