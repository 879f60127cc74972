"""The command line: what it lists, what it needs, and one sentence where a command cannot work."""

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
        (["run", "speed", "--dry_run"], "'speed' is not a suite: choose from kernels"),
        (["run", "gpu-day", "vae", "--dry_run"], "name no suites beside it"),
        (["run", "train", "--size", "93x640", "--dry_run"], "--size: a bucket is written TxHxW"),
        (["run", "sample", "--step_cache", "2"], "2.0 must be between 0 and 1"),
        (["predict", "everything"], "'everything' is none of ops, steps, parallel"),
        (["verify"], "bench verify needs an NVIDIA GPU"),
        (["compare", "missing.json", "missing.json"], "missing.json: cannot be read"),
        (["run", "--dtype", "float32"], "--dtype is not a flag of bench"),
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
    of_clips = [name for name in modules if name.startswith(("bench.test_", "bench.suites.data"))]
    blocked = ["av", "diffusers", "transformers", "PIL", "tensorboard", "matplotlib", "pytest"]
    code = f"import sys, importlib; sys.modules.update(dict.fromkeys({blocked})); "
    code += f"[importlib.import_module(name) for name in {[name for name in modules if name not in of_clips]}]"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_tables():
    assert format_table(["name", "n"], [["a", 10], ["long", None]]) == "name   n\n----  --\na     10\nlong   -"
    assert markdown_table(["a"], [[None], ["x|y"]]) == "| a |\n| --- |\n| - |\n| x\\|y |"
    assert [milliseconds(value) for value in (None, 12.34567, 1.5e-3, 2e-6)] == [
        None,
        "12345.67 ms",
        "1.500 ms",
        "0.0020 ms",
    ]
