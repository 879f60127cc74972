"""What each rank last did, known to all ranks: by a store, so also while no collective gets through.

Each rank writes its beat about once a second. Beats carry durations and counts, never times of day: the clocks of two
machines need not agree.
"""

import json
import socket
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch.distributed as dist

BEAT_S = 1.0
SILENT_BEATS = 4  # a rank whose count stands still for so many beats does not answer
WAITING_FOR_RANKS = "waiting for the other ranks"
NAMED = 8  # ranks in a sentence
POLL_S = 0.1


@dataclass(frozen=True)
class Beat:
    """What a rank does.

    count: of its beats, which grows as long as the rank lives
    place: in words, since `seconds`
    excused: whether it may take long (a checkpoint, validation), so that waiting for it is no hang
    left: whether it is out of training, so that its count no longer grows; failed: with an error
    """

    rank: int
    host: str
    step: int
    place: str
    seconds: float
    excused: bool = False
    left: bool = False
    failed: bool = False
    count: int = 0

    @property
    def order(self) -> tuple[bool, int, bool]:
        """Sorts ranks by how far they are: who failed, then the earlier step, then who does not wait for others."""
        return (not self.failed, self.step, self.place == WAITING_FOR_RANKS)


class Heartbeats:
    """A rank's beats and those of the others, in a store.

    Calls may block while the store's host is away: `deadline.in_time` bounds them. All raise RuntimeError when it is
    gone.

    store: a connection of its own (`store.clone()`): a call that waits for an answer holds its connection
    """

    def __init__(self, store: dist.Store, rank: int, size: int, host: str | None = None):
        self._store = dist.PrefixStore("heartbeats", store)
        self.rank, self.size = rank, size
        self.host = host or socket.gethostname()
        self._count = 0

    def beat(self, step: int, place: str, seconds: float, excused: bool = False) -> dict[str, Any] | None:
        """Tell what this rank does. Returns the alarm that some rank has raised, None if none has."""
        self._tell(Beat(self.rank, self.host, step, place, round(seconds, 1), excused))
        return json.loads(self._store.get("alarm")) if self._store.check(["alarm"]) else None

    def leave_training(self, step: int, place: str, failed: bool) -> None:
        """Tell that this rank is out of training, and beats no more."""
        self._tell(Beat(self.rank, self.host, step, place, 0.0, left=True, failed=failed))

    def _tell(self, beat: Beat) -> None:
        self._count += 1
        self._store.set(f"beat/{self.rank}", json.dumps(asdict(replace(beat, count=self._count))))

    def read(self) -> list[Beat | None]:
        """The last beat of each rank, None for one that has never told any."""
        found = (self._value(f"beat/{rank}") for rank in range(self.size))
        return [None if value is None else Beat(**json.loads(value)) for value in found]

    def find_behind(self, beat_s: float = BEAT_S) -> "Verdict":
        """Which ranks the others wait for. Takes `SILENT_BEATS` beats if some do not answer."""
        before, deadline = self.read(), time.monotonic() + SILENT_BEATS * beat_s
        while True:
            time.sleep(min(POLL_S, beat_s))
            beats = self.read()
            silent = {
                rank
                for rank, (one, other) in enumerate(zip(before, beats, strict=True))
                if other is None or (one is not None and one.count == other.count and not other.left)
            }
            if not silent or time.monotonic() > deadline:
                return who_is_behind(beats, silent)

    def alarm(self, words: dict[str, Any]) -> dict[str, Any]:
        """Tell all ranks that this one has found a hang. Returns the alarm that was first, perhaps another's."""
        return json.loads(self._store.compare_set("alarm", "", json.dumps(words)))

    def find_fewest_calls(self, calls: int, answering: int, timeout_s: float) -> str:
        """Tell how many collectives this rank has called, and find out, in words, which rank has called fewer.

        answering: ranks that can be expected to tell theirs; those that do not in time are left out
        """
        self._store.set(f"calls/{self.rank}", str(calls))
        deadline, found = time.monotonic() + timeout_s, {self.rank: calls}
        while len(found) < answering and time.monotonic() < deadline:
            time.sleep(POLL_S)
            told = {rank: self._value(f"calls/{rank}") for rank in range(self.size) if rank not in found}
            found.update({rank: int(value) for rank, value in told.items() if value is not None})
        return fewest_calls(found, self.read())

    def wait_for_reports(self, answering: int, timeout_s: float) -> int:
        """Tell that this rank has reported and wait for the others: a launcher kills all when the first one ends.

        answering: ranks that can be expected to report. Returns how many have.
        """
        deadline = time.monotonic() + timeout_s
        reported = self._store.add("reported", 1)
        while reported < answering and time.monotonic() < deadline:
            time.sleep(POLL_S)
            reported = self._store.add("reported", 0)
        return reported

    def _value(self, key: str) -> bytes | None:
        return self._store.get(key) if self._store.check([key]) else None


@dataclass(frozen=True)
class Verdict:
    """Which ranks the others wait for, in words.

    sure: False where the beats do not tell, as all say the same
    answering: how many ranks are in training and beat
    """

    words: str
    sure: bool
    answering: int


def who_is_behind(beats: Sequence[Beat | None], silent: Collection[int]) -> Verdict:
    """Judge the beats of all ranks, by rank, of which the `silent` ones no longer count up."""
    gone = [rank for rank, beat in enumerate(beats) if rank in silent or beat is None]
    answering = sum(rank not in gone and not beat.left for rank, beat in enumerate(beats))
    if gone:
        places = "; ".join(_place(rank, beats[rank]) for rank in gone[:NAMED])
        what = "does not answer: its process" if len(gone) == 1 else "do not answer: their processes"
        return Verdict(
            f"{_names(gone, beats)} {what} ended, stopped, or cannot run Python code ({places})", True, answering
        )
    least = min(beat.order for beat in beats)
    behind = [beat for beat in beats if beat.order == least]
    others = [beat for beat in beats if beat.order != least]
    seconds = max(beat.seconds for beat in behind)
    at = f"step {behind[0].step} in '{behind[0].place}' for {seconds:.0f} s"
    if not others:
        return Verdict(f"all {len(beats)} ranks are at {at}", False, answering)
    verb = "is" if len(behind) == 1 else "are"
    return Verdict(f"{_names([beat.rank for beat in behind], beats)} {verb} at {at}; {_crowd(others)}", True, answering)


def fewest_calls(calls: Mapping[int, int], beats: Sequence[Beat | None]) -> str:
    """In words, which ranks have called fewer collectives than others, which wait for them."""
    least, most = min(calls.values()), max(calls.values())
    behind = sorted(rank for rank, count in calls.items() if count == least)
    if least == most:
        return f"ranks {ranges(calls)} have all called {most} collectives: the last one does not get through"
    verb = "has" if len(behind) == 1 else "have"
    return f"{_names(behind, beats)} {verb} called {least} collectives, others up to {most}"


def ranges(numbers: Collection[int]) -> str:
    """ "0 to 3, 7" for 0, 1, 2, 3, 7."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{first}" if first == last else f"{first} to {last}" for first, last in runs)


def _names(ranks: Sequence[int], beats: Sequence[Beat | None]) -> str:
    named = [f"rank {rank}" + ("" if beats[rank] is None else f" (host {beats[rank].host})") for rank in ranks[:NAMED]]
    more = len(ranks) - NAMED
    return ", ".join(named) + (f" and {more} more" if more > 0 else "")


def _place(rank: int, beat: Beat | None) -> str:
    return f"rank {rank}: " + ("never heard of" if beat is None else f"last seen at step {beat.step} in '{beat.place}'")


def _crowd(beats: Sequence[Beat]) -> str:
    """Where all others are."""
    places: dict[tuple[int, str], int] = {}
    for beat in beats:
        places[beat.step, beat.place] = places.get((beat.step, beat.place), 0) + 1
    if len(places) > NAMED:
        steps = [beat.step for beat in beats]
        return f"{len(beats)} others are at steps {min(steps)} to {max(steps)}"
    told = [f"{count} at step {step} in '{place}'" for (step, place), count in sorted(places.items())]
    return f"of the others {', '.join(told)}"
