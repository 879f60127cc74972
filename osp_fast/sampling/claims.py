"""Work that any number of processes share through a folder: who holds the lock of an item works on it.

The kernel frees the locks of a process that dies, however it dies, so another one takes over what it had begun. No
process waits for another one at the start, and there may be more or fewer of them when an interrupted run goes on. The
folder must be on a disk that all of them share. Where a disk has no locks between machines, two of them may do the same
item; files are replaced as a whole, so nothing but time is lost.
"""

import fcntl
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, TypeVar

POLL_SECONDS = 0.5
ItemT = TypeVar("ItemT")


class Claims:
    """Locks by name in `folder`, which is made when it is first needed."""

    def __init__(self, folder: Path):
        self._folder = folder

    def take(self, name: str) -> "Claim | None":
        """The lock of an item, or None if another process has it. Raises OSError if the folder cannot be used."""
        while True:
            self._folder.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):  # another one is tidying up
                file = (self._folder / f"{name}.lock").open("ab")
                break
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        except OSError:  # a disk without locks: each process is alone
            pass
        return Claim(file)

    def share(
        self,
        items: Sequence[ItemT],
        name: Callable[[ItemT], str],
        is_done: Callable[[ItemT], bool],
        waiting: Callable[[list[ItemT]], None] = lambda items: None,
    ) -> "Iterator[tuple[ItemT, Claim]]":
        """Those items that fall to this process, one after the other, until all are done, by whomever.

        An item must be done when its claim is released, which may be later than the next item is asked for; an item
        that is released and not done is not offered to this process again.

        is_done: asked again and again; waiting: gets what other processes work on, when nothing else is left
        """
        mine: set[int] = set()
        told = False
        while True:
            others = []
            for number, item in enumerate(items):
                if number in mine or is_done(item):
                    continue
                claim = self.take(name(item))
                if claim is None:
                    others.append(item)
                elif is_done(item):  # since it was asked
                    claim.release()
                else:
                    mine.add(number)
                    yield item, claim
            if not others:
                return
            if not told:
                waiting(others)
                told = True
            time.sleep(POLL_SECONDS)

    def tidy(self) -> None:
        """Remove the folder, when all is done; others may be there still and find that all is done."""
        shutil.rmtree(self._folder, ignore_errors=True)


class Claim:
    """An item of this process, until it is released or the process ends."""

    def __init__(self, file: IO[bytes]):
        self._file = file

    def release(self) -> None:
        """Let others see whether it is done."""
        self._file.close()
