"""The command line: list, compare, report, and one sentence where a command cannot work."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.__main__ import main
from bench.table import format_table, markdown_table, milliseconds
from osp_fast.errors import UserError

ROOT = Path(__file__).parents[2]


def test_list_shows_what_each_call_costs(toy, capsys):
    assert main(["list", "--op", "toy", "--shape", "square"], toy.load) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[2].startswith("toy  square  forward")
    assert lines[2].endswith("rows=96 columns=96 inner=96") and "0.0035 ms" in lines[2]


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["list", "--op", "toi"], "--op 'toi' is not a known operation: did you mean 'toy'?"),
        (["list", "--shape", "nothing like it"], "--shape 'nothing like it' is not a known shape: see python -m bench"),
        (["list", "--shap", "square", "--what"], "--what is not a flag of bench"),
        (["static", "--arch", "70"], "--arch: invalid choice: 70"),
        (["verify", "--seeds", "0"], "0 must be at least 1"),
        (["verify", "--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
        (["run"], "bench run needs an NVIDIA GPU"),
        (["run", "--tune"], "bench run --tune needs an NVIDIA GPU"),
        (["verify"], "bench verify needs an NVIDIA GPU"),
        (["compare", "missing.json", "missing.json"], "missing.json: cannot be read"),
    ],
)
def test_bad_usage_is_one_sentence(toy, arguments, sentence, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError) as error:
        main(arguments, toy.load)
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_references_are_not_measured(toy, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    with pytest.raises(UserError, match="TRITON_INTERPRET=1 interprets the kernels"):
        main(["verify"], toy.load)
    monkeypatch.setattr("bench.measure.interpreting", lambda: False)
    for value, words in (("reference", "OSP_FAST_KERNELS chooses the references"), ("fast", "'fast' is unknown")):
        monkeypatch.setenv("OSP_FAST_KERNELS", value)
        with pytest.raises(UserError, match=words):
            main(["verify"], toy.load)


def test_bad_usage_exits_with_2_and_measures_nothing(bench):
    process = bench("run", CUDA_VISIBLE_DEVICES="")
    assert process.returncode == 2 and process.stdout == ""
    assert process.stderr.startswith("error: bench run needs an NVIDIA GPU") and process.stderr.count("\n") == 1


def test_the_bench_needs_neither_video_nor_diffusion_libraries():
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in (ROOT / "bench").rglob("*.py")
        if path.name != "__init__.py"
    ]
    assert "bench.baselines.skiparse_attention" in modules
    whole_model = [
        name for name in modules if name.startswith(("bench.train", "bench.sample", "bench.parallel"))
    ]  # these need safetensors
    others = [name for name in modules if name not in whole_model]
    assert whole_model
    blocked = ["av", "diffusers", "transformers", "PIL", "tensorboard", "safetensors"]
    code = f"import sys, importlib; sys.modules.update(dict.fromkeys({blocked})); "
    code += f"[importlib.import_module(name) for name in {others}]; del sys.modules['safetensors']; "
    code += f"[importlib.import_module(name) for name in {whole_model}]"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def run_file(path, **seconds):
    rows = [
        {"shape": shape, "direction": "forward", "implementation": "osp_fast", "seconds": value}
        for shape, value in seconds.items()
    ]
    environment = {"device": "H100", "torch": "2.13"}
    path.write_text(json.dumps({"kind": "run", "op": "toy", "environment": environment, "rows": rows}))
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
        ({"a": 1e-3}, {"a": 1.04e-3}, 0, "1.040"),
        ({"a": 1e-3, "b": 1e-3}, {"a": 0.5e-3, "b": 1.06e-3}, 1, "WORSE b forward osp_fast: 6.0 % slower"),
        ({"a": 1e-3}, {"a": None}, 1, "WORSE a forward osp_fast: measured before, not any more"),
        ({"a": 1e-3}, {}, 1, "measured before, not any more"),
        ({"a": None}, {"a": 1e-3, "b": 1e-3}, 0, "b      forward"),
    ],
)
def test_compare_times(tmp_path, capsys, before, after, code, said):
    files = [run_file(tmp_path / "a.json", **before), run_file(tmp_path / "b.json", **after)]
    assert main(["compare", *map(str, files)]) == code
    assert said in capsys.readouterr().out


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
def test_compare_static(tmp_path, capsys, before, after, code, said):
    files = [static_file(tmp_path / "a.json", **before), static_file(tmp_path / "b.json", **after)]
    assert main(["compare", *map(str, files)]) == code
    assert said in capsys.readouterr().out


def test_compare_threshold(tmp_path):
    files = [run_file(tmp_path / "a.json", a=1e-3), run_file(tmp_path / "b.json", a=1.5e-3)]
    assert main(["compare", *map(str, files), "--threshold", "60"]) == 0
    assert main(["compare", *map(str, files), "--threshold", "40"]) == 1


def test_compare_wants_two_files_of_one_kind(tmp_path):
    run, static = run_file(tmp_path / "a.json", a=1e-3), static_file(tmp_path / "b.json", x=(1, 0))
    with pytest.raises(UserError, match=r"b.json: is of bench static, .*a.json of bench run"):
        main(["compare", str(run), str(static)])
    for text, sentence in (("{", "is no JSON"), ("{}", "has no rows"), ("[1]", "has no rows")):
        (tmp_path / "c.json").write_text(text)
        with pytest.raises(UserError, match=sentence):
            main(["compare", str(run), str(tmp_path / "c.json")])


def test_report_without_results_has_the_predictions(toy, tmp_path, capsys):
    assert main(["report", "--results", str(tmp_path), "--op", "toy"], toy.load) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("not yet measured on a GPU" in line and "0.0035 ms" in line for line in lines) == 1
    assert sum("not yet measured on a GPU" in line for line in lines) == 4
    output = tmp_path / "report.md"
    assert main(["report", "--results", str(tmp_path), "--output", str(output)], toy.load) == 0
    assert output.read_text().startswith("| op | shape |")
    for arguments, words in (
        (["--results", str(tmp_path / "none")], "no such folder"),
        (["--results", str(tmp_path), "--output", str(tmp_path / "none/x.md")], "cannot be written"),
    ):
        with pytest.raises(UserError, match=words):
            main(["report", *arguments], toy.load)
    (tmp_path / "odd.json").write_text('{"kind": "run", "rows": []}')
    with pytest.raises(UserError, match="lacks ceilings, date, environment, op"):
        main(["report", "--results", str(tmp_path)], toy.load)


def test_tables():
    assert format_table(["name", "n"], [["a", 10], ["long", None]]) == "name   n\n----  --\na     10\nlong   -"
    assert markdown_table(["a"], [[None], ["x|y"]]) == "| a |\n| --- |\n| - |\n| x\\|y |"
    assert [milliseconds(value) for value in (None, 12.34567, 1.5e-3, 2e-6)] == [
        None,
        "12345.67 ms",
        "1.500 ms",
        "0.0020 ms",
    ]
