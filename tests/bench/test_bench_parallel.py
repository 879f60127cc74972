"""The suite `parallel`: two processes that share a clip, two of them wrong ways, and ranks that end or hang."""

import os
import time
from pathlib import Path

import pytest
import torch

from bench.results import Ceilings, complete_case
from bench.suites import Options, Setting, parallel
from bench.suites.parallel_ranks import CONFIGS
from osp_fast.data.buckets import Bucket
from osp_fast.errors import UserError

HERE = Path(__file__).parent
SIZE = Bucket(5, 128, 128)
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def _ranks_find_their_module():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")])))
        yield


@pytest.fixture(scope="module")
def rows() -> dict:
    """Of all schemes, and of three more that `sharing_ranks.py` adds."""
    setting = Setting(CPU, Ceilings(1e12, 1e10), say=[].append)
    found = parallel.measure_sharing("cpu", SIZE, setting, module="sharing_ranks")
    complete_case(found, Ceilings(1e12, 1e10))
    return {row.impl: row for row in found}


def test_jobs():
    (job,) = parallel.jobs(Options("cpu"))
    assert (job.suite, job.case) == ("parallel", "17x256x256 shared")
    assert [job.case for job in parallel.jobs(Options("cuda", (SIZE,)))] == ["5x128x128 shared"]
    with pytest.raises(UserError, match="--size 5x128x136"):
        parallel.jobs(Options("cuda", (Bucket(5, 128, 136),)))


def test_ways_to_share(rows):
    assert next(iter(rows)) == "osp_fast"
    for name in ("osp_fast", "reference", "strong"):
        row = rows[name]
        assert row.ok and row.ms > 0 and row.rel_err < 1e-5 and row.role == parallel.ROLES[name], row.note
        assert row.figures["ranks"] == 2 and 0 <= row.figures["exposed_share"] < 1
        assert row.flops == rows["osp_fast"].flops
    assert set(rows["osp_fast"].vs) == {"reference", "strong"}


def test_bytes_are_counted(rows):
    """Ulysses sends what upstream does; skip sets send less. By hand: 4 N d s / 4 in a block, and as much back."""
    tokens, config = 2 * 8 * 8, CONFIGS["cpu"]
    gathered = tokens // 2 * 4 * 8 * 4
    by_hand = (2 * 3 * 4 * tokens * config.width * 4 // 4 + gathered) / 3
    sent = {name: rows[name].figures["bytes_sent_per_block"] for name in ("osp_fast", "reference", "strong")}
    assert sent["reference"] == sent["strong"] == by_hand and sent["osp_fast"] < 0.6 * by_hand


def test_what_is_wrong_is_not_timed(rows):
    wrong, chatty, narrow = (rows[name] for name in ("wrong", "chatty", "narrow"))
    assert not wrong.ok and wrong.ms is None and wrong.note.startswith("WRONG, not timed: off by")
    assert not chatty.ok and chatty.ms is None and "not the predicted" in chatty.note and chatty.rel_err < 1e-5
    assert not narrow.ok and narrow.ms is None and "do not divide among" in narrow.note


@pytest.mark.parametrize(("trouble", "words"), [("killed", "rank 1 of 2 ended: SIGKILL"), ("hangs", "did not end")])
def test_ranks_that_end_or_hang_are_a_row(trouble, words, monkeypatch):
    monkeypatch.setenv("SHARING_TROUBLE", trouble)
    monkeypatch.setitem(parallel.LIMIT_S, "cpu", 20.0 if trouble == "killed" else 1.0)
    start = time.monotonic()
    (row,) = parallel.measure_sharing("cpu", SIZE, Setting(CPU, Ceilings(1e12, 1e10)), module="troubled_rank")
    assert not row.ok and row.ms is None and row.note.startswith("FAILED: rank") and words in row.note
    assert time.monotonic() - start < 15


def test_one_gpu_is_not_enough(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    (row,) = parallel.measure_sharing("cuda", SIZE, Setting(torch.device("cuda"), Ceilings(1e12, 1e10)))
    assert row.note == "not measured: it needs two GPUs, and this machine has one" and row.dtype == "bfloat16"
