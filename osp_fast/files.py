"""Files that must survive a crash of the machine, or be whole for those who find them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def sync(path: Path) -> None:
    """fsync a file or a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A name beside `path`, of this process alone; what is written there becomes `path` at once, or not at all."""
    writing = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield writing
        os.replace(writing, path)
    finally:
        writing.unlink(missing_ok=True)
