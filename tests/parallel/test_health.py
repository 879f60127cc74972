"""Before the start: ranks that are missing, dead or slow are named."""

import sys
import threading
from pathlib import Path

import pytest
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))

from guarded import come_or_not, time_them
from ranks import RankProcesses, free_port

from osp_fast.errors import EXIT_USER_ERROR, UserError
from osp_fast.parallel.health import HealthReport, RankTimes, await_ranks, exchange, open_store


def in_threads(size: int, run) -> list:
    """What `run(rank)` returns or raises for each rank; None for ranks that do not come."""
    found = [None] * size

    def one(rank: int) -> None:
        try:
            found[rank] = run(rank)
        except UserError as error:
            found[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_all_ranks_know_all_hosts():
    store = dist.HashStore()
    found = in_threads(5, lambda rank: await_ranks(store, rank, 5, 10.0, f"node-{rank // 2}"))
    assert found == [["node-0", "node-0", "node-1", "node-1", "node-2"]] * 5


@pytest.mark.parametrize(
    "absent, named, seen",
    [
        ({3}, "rank 3 of 5", "0 to 2, 4 on node-0, node-1, node-2"),
        ({1, 2, 4}, "ranks 1 to 2, 4 of 5", "0, 3 on node-0, node-1"),
        ({0}, "rank 0 of 5", "the others wait for it"),
    ],
)
def test_missing_ranks_are_named_by_all_that_are_there(absent, named, seen):
    store = dist.HashStore()
    found = in_threads(
        5, lambda rank: None if rank in absent else await_ranks(store, rank, 5, 0.3, f"node-{rank // 2}")
    )
    for rank, error in enumerate(found):
        assert (rank in absent) == (error is None)
        if error is not None:
            assert str(error).startswith(f"{named} did not report within --start_timeout 0.3 s ({seen}")


def test_missing_ranks_whose_hosts_are_known_are_named_with_them():
    store, hosts = dist.HashStore(), ["a", "b", "c"]
    found = in_threads(3, lambda rank: exchange(store, "x", rank, 3, 1, 0.2, "work", hosts) if rank != 2 else None)
    assert "rank 2 on c of 3 did not work" in str(found[0]) and str(found[0]) == str(found[1])


def test_where_to_meet_must_be_said(monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match="start with torchrun"):
        open_store(0, 2, 1.0)


def test_a_store_that_nobody_hosts(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    with pytest.raises(UserError, match="rank 1 on .* cannot meet the others at MASTER_ADDR 127.0.0.1"):
        open_store(1, 2, 0.3)


def test_slow_and_late_ranks_are_named():
    times = [RankTimes(rank, f"node-{rank // 2}", 2e-3, 1e-3, 30.0) for rank in range(4)]
    report = HealthReport(times, 64 * 2**20)
    assert report.slow() == []
    assert report.bus_bandwidth == pytest.approx(1.5 * 64 * 2**20 / 1e-3)
    assert "all-reduce of 64 MiB over 4 ranks: 1.00 ms, bus bandwidth 100.66 GB/s" in report.lines()[0]
    times[3] = RankTimes(3, "node-1", 5e-3, 1.5e-3, 2.0)
    slow, late = HealthReport(times, 1).slow()
    assert slow.startswith("rank 3 (host node-1) is slow: a product takes it 5.00 ms, 2.5 times the median")
    assert late == "rank 3 (host node-1) came 28 s after the first rank"
    assert HealthReport(times, 1).all_reduce_s == 1.5e-3


def test_a_rank_that_never_starts(tmp_path):
    ranks = RankProcesses(3, tmp_path, come_or_not, (1,))
    assert ranks.codes(40) == [EXIT_USER_ERROR, 0, EXIT_USER_ERROR], ranks.printed()
    for rank in (0, 2):
        assert "error: rank 1 of 3 did not report within --start_timeout 2 s (0, 2 on node-0, node-2 did)" in (
            ranks.printed(rank)
        )


def test_a_slow_rank_is_measured(tmp_path):
    ranks = RankProcesses(2, tmp_path, time_them, ("slow",))
    assert ranks.codes(40) == [0, 0], ranks.printed()
    for rank in range(2):
        assert "all-reduce of 1 MiB over 2 ranks" in ranks.printed(rank)
        assert "rank 1 (host node-1) is slow" in ranks.printed(rank)


@pytest.mark.parametrize("trouble, code", [("stopped", None), ("killed", 9)])
def test_a_rank_that_does_not_get_through_is_named(tmp_path, trouble, code):
    ranks = RankProcesses(2, tmp_path, time_them, (trouble,))
    ranks.processes[0].join(40)
    ranks.processes[1].kill() if code is None else ranks.processes[1].join(40)
    assert ranks.codes(10)[0] == EXIT_USER_ERROR, ranks.printed()
    error = ranks.printed(0).splitlines()[-1]
    assert error.startswith("error: an all-reduce over 2 ranks does not get through (")
    assert "of rank 1 on node-1 nothing is heard" in error
