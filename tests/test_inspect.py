"""The dry run: its JSON equals the golden plans, its table can be read, its errors are sentences."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from osp_fast import inspect
from osp_fast.config import DataConfig
from osp_fast.data.buckets import load_plan
from osp_fast.errors import UserError

GOLDEN = Path(__file__).parent / "golden" / "data"
FIXED = ["--data", str(GOLDEN / "data.txt"), *"--force_resolution --max_height 480 --max_width 640".split()]
AREA = ["--data", str(GOLDEN / "data.txt"), *"--max_hxw 262144 --min_hxw 65536 --drop_short_ratio 0.0".split()]


@pytest.mark.parametrize(("name", "flags"), [("plan_fixed", FIXED), ("plan_area", AREA)])
def test_json_is_the_golden_plan(name, flags, tmp_path, capsys):
    out = tmp_path / "plan.json"
    inspect.main([*flags, "--min_bucket_size", "4", "--json", str(out)])
    written = json.loads(out.read_text())
    assert set(written) == {"kept", "dropped"}
    assert written["kept"] == json.loads((GOLDEN / f"{name}.json").read_text())["plan"]
    assert len(written["kept"]) + sum(written["dropped"].values()) == 800
    assert os.listdir(tmp_path) == ["plan.json"]  # nothing unfinished is left behind
    output = capsys.readouterr()
    assert f"800 entries: {len(written['kept'])} kept" in output.out
    assert output.err.count("\n") == 3  # one line of progress per annotation file


def test_table_lists_every_reason_and_every_bucket():
    plan = load_plan(DataConfig(data=str(GOLDEN / "data.txt"), max_hxw=262144, drop_short_ratio=0.0), 0)
    rows = [line.split() for line in inspect.format_plan(plan).splitlines()]
    for bucket, members in plan.buckets.items():
        assert [str(bucket), str(len(members)), f"{len(members) / len(plan.clips):.1%}"] in rows
    for reason, count in plan.dropped.items():
        assert any(row[: len(reason.split()) + 1] == [*reason.split(), str(count)] for row in rows)


def test_a_json_file_is_replaced_whole_or_not_at_all(tmp_path):
    out = tmp_path / "plan.json"
    out.write_text("old")
    with pytest.raises(TypeError):
        inspect.write_json({"kept": object()}, str(out))
    assert out.read_text() == "old"
    assert os.listdir(tmp_path) == ["plan.json"]
    inspect.write_json({"kept": []}, str(out))
    assert json.loads(out.read_text()) == {"kept": []}


def test_a_json_file_that_cannot_be_written(tmp_path):
    with pytest.raises(UserError, match=r"--json .*gone/plan\.json cannot be written \(No such file"):
        inspect.write_json({}, str(tmp_path / "gone" / "plan.json"))
    with pytest.raises(UserError, match="cannot be written .*directory"):
        inspect.write_json({}, str(tmp_path / "."))
    assert os.listdir(tmp_path) == []


def test_an_empty_plan_is_an_error():
    with pytest.raises(UserError, match="no entry is left to train on .* lower --min_bucket_size"):
        inspect.main([*FIXED, "--min_bucket_size", "999"])


def test_as_a_program(tmp_path):
    def run(*flags):
        command = [sys.executable, "-m", "osp_fast.inspect", *flags]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    good = run(*FIXED)
    assert (good.returncode, good.stdout.count("93x480x640")) == (0, 1)
    bad = run("--data", str(tmp_path / "gone.txt"), *FIXED[2:])
    assert bad.returncode == 2
    assert bad.stderr.startswith("error: ") and bad.stderr.count("\n") == 1 and "gone.txt" in bad.stderr
