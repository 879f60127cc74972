"""What is said of ranks that wait for each other."""

import json
import threading

import pytest
import torch.distributed as dist

from osp_fast.parallel.deadline import in_time
from osp_fast.parallel.heartbeats import WAITING_FOR_RANKS, Beat, Heartbeats, fewest_calls, ranges, who_is_behind


def beats(*places: tuple[int, str], seconds: float = 95.0, **more) -> list[Beat]:
    return [Beat(rank, f"node-{rank // 4}", step, place, seconds, **more) for rank, (step, place) in enumerate(places)]


WAITS = (813, WAITING_FOR_RANKS)


@pytest.mark.parametrize(
    "found, silent, words, sure",
    [
        (
            beats(WAITS, WAITS, (813, "waiting for data"), WAITS),
            set(),
            "rank 2 (host node-0) is at step 813 in 'waiting for data' for 95 s; of the others 3 at step 813 in"
            f" '{WAITING_FOR_RANKS}'",
            True,
        ),
        (
            beats(WAITS, (812, "training"), (813, "training"), (812, "training")),
            set(),
            "rank 1 (host node-0), rank 3 (host node-0) are at step 812 in 'training' for 95 s; of the others 1 at step"
            f" 813 in 'training', 1 at step 813 in '{WAITING_FOR_RANKS}'",
            True,
        ),
        (beats((9, "training"), (9, "training")), set(), "all 2 ranks are at step 9 in 'training' for 95 s", False),
        (
            beats((9, "training"), (9, "training")),
            {1},
            "rank 1 (host node-0) does not answer: its process ended, stopped, or cannot run Python code (rank 1: last"
            " seen at step 9 in 'training')",
            True,
        ),
        ([*beats((9, "training")), None], {1}, "rank 1 does not answer", True),
        (
            [*beats((9, "training")), Beat(1, "b", 9, "left with UserError", 0.0, left=True, failed=True)],
            set(),
            "rank 1 (host b) is at step 9 in 'left with UserError' for 0 s",
            True,
        ),
    ],
    ids=["data", "two in an earlier step", "all alike", "silent", "never there", "failed"],
)
def test_who_is_behind(found, silent, words, sure):
    verdict = who_is_behind(found, silent)
    assert verdict.words.startswith(words) and verdict.sure == sure
    left = {rank for rank, beat in enumerate(found) if beat is None or beat.left}
    assert verdict.answering == len(found) - len(silent | left)


def test_a_sentence_stays_a_sentence_with_many_ranks():
    verdict = who_is_behind(beats(*[(rank % 2, "training") for rank in range(512)]), set())
    assert "and 248 more are at step 0" in verdict.words and len(verdict.words) < 500


def test_who_called_fewer_collectives():
    known = beats(*[(1, "training")] * 4)
    words = fewest_calls({0: 121, 1: 121, 2: 120, 3: 121}, known)
    assert words == "rank 2 (host node-0) has called 120 collectives, others up to 121"
    assert "all called 7 collectives" in fewest_calls({rank: 7 for rank in range(4)}, known)


def test_ranges():
    assert ranges([7, 0, 1, 2, 3]) == "0 to 3, 7" and ranges({5}) == "5" and ranges([]) == ""


def test_beats_go_through_the_store():
    store = dist.HashStore()
    here, there = Heartbeats(store, 0, 3, "a"), Heartbeats(store, 1, 3, "b")
    assert here.beat(5, "training", 1.0) is None
    there.beat(4, "saving", 2.0, excused=True)
    assert there.read() == [
        Beat(0, "a", 5, "training", 1.0, count=1),
        Beat(1, "b", 4, "saving", 2.0, excused=True, count=1),
        None,
    ]
    first = here.alarm(dict(rank=0, words="one"))
    assert there.alarm(dict(rank=1, words="two")) == first == there.beat(4, "saving", 3.0) == dict(rank=0, words="one")


def test_a_rank_that_beats_no_more_is_found_and_one_that_left_is_not():
    store = dist.HashStore()
    ranks = [Heartbeats(store, rank, 4, "a") for rank in range(4)]
    for rank in ranks:
        rank.beat(5, "training", 1.0)
    ranks[3].leave_training(6, "done", failed=False)
    ended = threading.Event()

    def live() -> None:
        while not ended.wait(0.01):
            for rank in ranks[:2]:
                rank.beat(5, "training", 1.0)

    thread = threading.Thread(target=live)
    thread.start()
    verdict = ranks[0].find_behind(beat_s=0.05)
    ended.set()
    thread.join()
    assert verdict.words.startswith("rank 2 (host a) does not answer")


def test_calls_and_reports_are_waited_for_but_not_for_ever():
    store = dist.HashStore()
    here, there = Heartbeats(store, 0, 2, "a"), Heartbeats(store, 1, 2, "b")
    here.beat(1, "training", 0.0)
    there.beat(1, "training", 0.0)
    assert "ranks 0 have all" in here.find_fewest_calls(5, 2, 0.05) and here.wait_for_reports(2, 0.05) == 1
    assert "rank 1 (host b) has called 4" in there.find_fewest_calls(4, 2, 5.0) and there.wait_for_reports(2, 5.0) == 2


def test_in_time():
    assert in_time(lambda: 7, 5.0) == 7
    with pytest.raises(json.JSONDecodeError):
        in_time(lambda: json.loads("{"), 5.0)
    never = threading.Event()
    with pytest.raises(TimeoutError):
        in_time(never.wait, 0.05)
    never.set()
