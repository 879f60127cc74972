"""Whether a file is still the one that it was: by its size and time, and where times differ by its contents."""

import hashlib
import os
import threading
from dataclasses import dataclass
from pathlib import Path

BLOCK = 1 << 22  # bytes hashed at once
MODEL_SUFFIXES = (".json", ".safetensors", ".bin", ".model", ".txt")


@dataclass(frozen=True)
class FileIdentity:
    """size in bytes, time of the last change in nanoseconds, SHA-256 of the contents; (-1, 0, "") for no file."""

    size: int
    mtime_ns: int
    sha256: str


MISSING = FileIdentity(-1, 0, "")


class Identities:
    """Identities of files, each hashed once as long as its size and time stay. May be used by many threads."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, int, int], str] = {}
        self._lock = threading.Lock()

    def of(self, file: str | Path) -> FileIdentity:
        """The file's identity now; `MISSING` for what cannot be read."""
        try:
            status = os.stat(file)
            key = (str(file), status.st_size, status.st_mtime_ns)
            with self._lock:
                found = self._known.get(key)
            if found is None:
                found = _sha256(file)
                with self._lock:
                    self._known[key] = found
        except OSError:
            return MISSING
        return FileIdentity(status.st_size, status.st_mtime_ns, found)

    def is_still(self, identity: FileIdentity, file: str | Path, exact: bool = False) -> bool:
        """Whether the file's contents are the identity's. They are read only where the file's time is another one.

        exact: read them in any case
        """
        if identity == MISSING:
            return self.of(file) == MISSING
        try:
            status = os.stat(file)
        except OSError:
            return False
        if status.st_size != identity.size:
            return False
        same_time = status.st_mtime_ns == identity.mtime_ns and not exact
        return same_time or self.of(file).sha256 == identity.sha256


def _sha256(file: str | Path) -> str:
    if not os.path.isfile(file):  # a device or a pipe may never end
        raise OSError(f"{file} is no regular file")
    found = hashlib.sha256()
    with open(file, "rb") as opened:
        while block := opened.read(BLOCK):
            found.update(block)
    return found.hexdigest()


def model_files(folder: Path) -> dict[str, Path]:
    """The files of a model folder that its results depend on, by name."""
    return {path.name: path for path in sorted(folder.iterdir()) if path.suffix in MODEL_SUFFIXES and path.is_file()}
