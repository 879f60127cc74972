"""What sharing a clip is predicted to cost: the page is what the bench prints, and says what was asked for."""

import json
from itertools import pairwise
from pathlib import Path

import pytest

from bench import predict_parallel as parallel
from osp_fast.errors import UserError
from osp_fast.parallel.sequence_plan import plan_of_mode

PAGE = Path(__file__).parents[2] / "docs/parallel.md"


@pytest.fixture(scope="module")
def rows() -> list[parallel.Row]:
    return parallel.predict()


def test_the_page_is_up_to_date(rows):
    """If it is not: `python -m bench predict parallel --markdown` prints what belongs there."""
    assert parallel.markdown(rows) in PAGE.read_text()


def test_every_clip_on_every_number_of_gpus(rows):
    assert [(row.clip, row.gpus) for row in rows] == [(clip, gpus) for clip in parallel.CLIPS for gpus in parallel.GPUS]
    for row in rows:
        assert plan_of_mode(row.plan, row.gpus, 4) is not None
        assert min(row.exposed, row.recomputing, row.weights) >= 0 and row.exposed + row.weights < 1
        assert (row.recomputing > row.exposed) or row.plan.endswith("x1")  # tokens that move are not waited for again
        if row.gpus in (2, 4):
            assert row.plan == f"{row.gpus}x1" and row.sent_skip <= 0.3 and row.exposed < 0.02
        if row.gpus == 1:
            assert row.sent_all is None and row.exposed == row.weights == row.sampling_exposed == 0


def test_more_gpus_of_a_machine_are_faster(rows):
    for clip in parallel.CLIPS:
        of_clip = [row for row in rows if row.clip == clip and row.gpus <= 8]
        for fewer, more in pairwise(of_clip):
            assert fewer.seconds > more.seconds and fewer.sampling_seconds > more.sampling_seconds
            assert more.seconds > 0.99 * of_clip[0].seconds / more.gpus


def test_verdicts_name_what_is_missed(rows):
    training, sampling = parallel.verdicts(rows)
    assert training.startswith("at most 3% exposed in a training step on 8 GPUs: ")
    for line, share in (
        (training, lambda row: row.exposed + row.weights),
        (sampling, lambda row: row.sampling_exposed),
    ):
        met, _, missed = line.partition("missed for")
        for row in rows:
            if row.gpus == 8:
                assert f"{row.clip} ({share(row) * 100:.1f} %)" in (met if share(row) <= 0.03 else missed)


def test_what_is_printed_and_written(monkeypatch, rows, tmp_path, capsys):
    monkeypatch.setattr(parallel, "predict", lambda: rows[:18])
    monkeypatch.setattr(parallel, "CLIPS", parallel.CLIPS[:2])
    assert parallel.run_predict_parallel(tmp_path / "rows.json") == 0
    printed = capsys.readouterr().out
    assert "not yet measured on a GPU" in printed and printed.count("train: plan") == 2
    written = json.loads((tmp_path / "rows.json").read_text())
    assert written["kind"] == "parallel" and written["rows"][3]["gpus"] == 4
    assert parallel.run_predict_parallel(None, as_markdown=True) == 0
    assert "### 93x352x640\n| GPUs |" in capsys.readouterr().out
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="rows.json: cannot be written"):
        parallel.run_predict_parallel(tmp_path / "file/rows.json")
