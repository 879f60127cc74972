"""Traces of a few steps."""

import gzip
import json

import pytest
import torch

from osp_fast.training.profile import SKIPPED_STEPS, WARM_UP_STEPS, StepProfiler

CPU = torch.device("cpu")
PASSED = SKIPPED_STEPS + WARM_UP_STEPS


@pytest.fixture
def run(tmp_path):
    """Run `steps` steps after step `first`, each a product of another size; returns what was reported."""

    def go(wanted: int | None, steps: int, first: int = 0, folder=tmp_path) -> list[str]:
        lines: list[str] = []
        profiler = StepProfiler(wanted, folder, 3, CPU, lines.append)
        for number in range(first + 1, first + steps + 1):
            factor = torch.ones(number, number)
            assert not profiler.writes_next or number == first + PASSED + wanted
            factor @ factor
            profiler.step(number)
        profiler.close()
        profiler.close()
        return lines

    return go


def sizes(file) -> list[int]:
    """Of the products in a trace."""
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    return [event["args"]["Input Dims"][0][0] for event in events if event.get("name") == "aten::mm"]


def test_the_steps_after_the_first_ones_are_recorded(run, tmp_path):
    lines = run(wanted=2, steps=PASSED + 5, first=100)
    first = 100 + PASSED + 1
    trace = tmp_path / "profile" / f"rank-3-steps-{first}-{first + 1}.json.gz"
    assert sizes(trace) == [first, first + 1]
    assert "aten::mm" in trace.with_name(trace.name.replace(".json.gz", ".txt")).read_text()
    assert len(lines) == 1 and str(trace) in lines[0]


def test_a_run_that_ends_early_leaves_what_was_recorded(run, tmp_path):
    run(wanted=50, steps=PASSED + 3)
    assert sizes(tmp_path / "profile" / f"rank-3-steps-{PASSED + 1}-{PASSED + 3}.json.gz") == [
        PASSED + 1,
        PASSED + 2,
        PASSED + 3,
    ]


@pytest.mark.parametrize("steps", [2, PASSED])
def test_a_run_that_ends_before_says_so(run, tmp_path, steps):
    lines = run(wanted=2, steps=steps)
    assert len(lines) == 1 and f"first {PASSED} steps" in lines[0]
    assert not (tmp_path / "profile").exists()


def test_off_does_nothing(run, tmp_path, monkeypatch):
    monkeypatch.setattr("osp_fast.training.profile.profile", None)
    assert run(wanted=None, steps=PASSED + 3) == [] and not list(tmp_path.iterdir())


def test_a_trace_that_cannot_be_written_ends_no_run(run, tmp_path):
    (tmp_path / "profile").write_text("in the way")
    lines = run(wanted=1, steps=PASSED + 4)
    assert len(lines) == 1 and "training goes on" in lines[0]
