"""Shards: files of tensors that are only ever added to a folder, each whole or absent.

A shard is a safetensors file; the metadata of its header holds a JSON record for each of its items, so the headers are
the index. Items may have a record only. Ranks write shards of their own, NUMBER-rRANK.safetensors.
"""

import contextlib
import fcntl
import json
import os
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from osp_fast.errors import UserError
from osp_fast.files import sync

SHARD_BYTES = 256 << 20
SHARD_ITEMS, SHARD_RECORD_BYTES = 1024, 16 << 20  # readers take headers of up to 100 MB
MAPPED_SHARDS = 256  # headers of 100 MB in all, where items are small
SHARD_SECONDS = 60.0  # what a kill loses at most
_NAME = re.compile(r"(\d{6,})-r(\d{4,})\.safetensors")


class ShardWriter:
    """Collects items and writes them as shards of about `SHARD_BYTES`, or when the first is `SHARD_SECONDS` old."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder, self._rank = folder, rank
        self._remove_leftovers()
        numbers = [int(match[1]) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
        self._number = max(numbers, default=-1) + 1
        self._clear()

    def _remove_leftovers(self) -> None:
        """What a killed run of this rank has begun and not finished."""
        for path in self._folder.glob(f".*-r{self._rank:04d}.safetensors.part"):
            path.unlink()

    def _clear(self) -> None:
        self._tensors: dict[str, Tensor] = {}
        self._records: dict[str, str] = {}
        self._bytes, self._record_bytes, self._since = 0, 0, time.monotonic()

    def add(self, name: str, tensor: Tensor | None, record: dict[str, Any]) -> None:
        """Add an item, its tensor on the CPU; writes a shard if it is time. Raises `UserError`."""
        if not self._records:
            self._since = time.monotonic()
        if tensor is not None:
            self._tensors[name] = tensor.contiguous()
            self._bytes += tensor.nbytes
        self._records[name] = json.dumps(record)
        self._record_bytes += len(self._records[name])
        full = self._bytes >= SHARD_BYTES or len(self._records) >= SHARD_ITEMS
        full = full or self._record_bytes >= SHARD_RECORD_BYTES
        if full or time.monotonic() - self._since >= SHARD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what is collected, synced to disk. Raises `UserError`; shards that are there stay as they are."""
        if not self._records:
            return
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        target = self._folder / f"{self._number:06d}-r{self._rank:04d}.safetensors"
        unfinished = target.with_name(f".{target.name}.part")
        try:
            save_file(self._tensors, unfinished, metadata=self._records)
            unfinished.chmod(0o644)  # to be read by others too, as other files that are made
            sync(unfinished)
            os.replace(unfinished, target)
            sync(self._folder)
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                unfinished.unlink()
            raise UserError(
                f"{target} cannot be written ({error}): make room and run the command again, all before it is kept"
            ) from error
        self._number += 1
        self._clear()


def shards(folder: Path) -> list[Path]:
    """The shards of a folder, in the order of their names; none if there is no folder."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))


def read_records(shard: Path) -> dict[str, dict[str, Any]]:
    """Name of an item -> its record. Raises `UserError` for a file that is cut short or no shard."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(shard, framework="pt") as opened:
            return {name: json.loads(record) for name, record in (opened.metadata() or {}).items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{shard} is not a complete shard of a latent cache ({error}): delete it, and run python -m"
            " osp_fast.encode again"
        ) from None


class ShardReader:
    """Reads items' tensors; a shard's header, which takes milliseconds, is parsed once while its file is the same.

    The shards that were used last stay mapped. May be used by many threads.
    """

    def __init__(self) -> None:
        self._opened: OrderedDict[Path, tuple[tuple[int, ...], Any]] = OrderedDict()
        self._lock = threading.Lock()

    def tensor(self, shard: Path, name: str) -> Tensor:
        """An item's tensor, in memory of its own. Raises `UserError`."""
        from safetensors import SafetensorError

        try:
            return self._open(shard).get_tensor(name).clone()
        except (SafetensorError, OSError) as error:
            raise UserError(f"{shard}: {name} cannot be read ({error}): run python -m osp_fast.encode again") from None

    def _open(self, shard: Path) -> Any:
        from safetensors import safe_open

        status = shard.stat()  # a mapped file that was cut short would kill the process
        version = (status.st_ino, status.st_size, status.st_mtime_ns)
        with self._lock:
            known = self._opened.pop(shard, None)
            if known is None or known[0] != version:
                known = (version, safe_open(shard, framework="pt"))
            self._opened[shard] = known
            while len(self._opened) > MAPPED_SHARDS:
                self._opened.popitem(last=False)
            return known[1]


@contextmanager
def locked(folder: Path, rank: int) -> Iterator[None]:
    """Keep a second writer of this rank out of the folder. Raises `UserError` if there is one."""
    path = folder / f".rank-{rank:04d}.lock"
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"--latent_cache {folder} cannot be written ({error.strerror}): choose another") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        if isinstance(error, BlockingIOError):
            reason = f"another osp_fast.encode writes there (rank {rank}): wait until it ends"
        else:
            reason = f"{path.name} cannot be locked ({error.strerror}): choose a folder on a file system with locks"
        raise UserError(f"--latent_cache {folder}: {reason}") from None
    try:
        yield
    finally:
        os.close(handle)
