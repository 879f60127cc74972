"""A rank that hangs: it is named, all ranks write down what they do, and all end."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from guarded import steps
from ranks import RankProcesses

from osp_fast.training.hang_report import EXIT_HANG


def test_the_rank_that_waits_for_data_is_named(tmp_path):
    ranks = RankProcesses(2, tmp_path / "logs", steps, (str(tmp_path), "data"))
    assert ranks.codes(40) == [EXIT_HANG] * 2, ranks.printed()
    words = "rank 1 (host node-1) is at step 6 in 'waiting for data' for"
    told = ranks.printed(0).splitlines()
    assert sum(words in line for line in told) == 1, told
    reports = [(tmp_path / f"hang-step-6-rank-{rank}.txt").read_text() for rank in range(2)]
    assert "all_reduce" in reports[0] and "wait_for_a_clip" in reports[1]
    for rank, report in enumerate(reports):
        assert words in report
        record = json.loads((tmp_path / f"hang-step-6-rank-{rank}-collectives.json").read_bytes())
        assert len(record["entries"]) >= 10


def test_the_rank_that_computes_for_ever_is_named_by_its_collectives(tmp_path):
    ranks = RankProcesses(2, tmp_path / "logs", steps, (str(tmp_path), "computing"))
    assert ranks.codes(40) == [EXIT_HANG] * 2, ranks.printed()
    assert "all 2 ranks are at step 6 in 'training'" in ranks.printed(0)
    assert "rank 1 (host node-1) has called 11 collectives, others up to 12" in ranks.printed(0)
    assert "clip-6-1.mp4" in (tmp_path / "hang-step-6-rank-1.txt").read_text()


def test_a_rank_that_cannot_run_python_is_named_and_ends(tmp_path):
    """Its stacks are on stderr, as faulthandler's timer writes them; nothing else of it runs."""
    ranks = RankProcesses(2, tmp_path / "logs", steps, (str(tmp_path), "no Python"))
    assert ranks.codes(40) == [EXIT_HANG, 1], ranks.printed()
    assert "rank 1 (host node-1) does not answer" in ranks.printed(0)
    assert "hold_python" in ranks.printed(1) and "Timeout" in ranks.printed(1)
