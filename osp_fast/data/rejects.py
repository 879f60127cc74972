"""The list of files that could not be decoded."""

import contextlib
import json
import threading
import time
from pathlib import Path

from osp_fast.errors import UserError

NAMED = 3  # files named in the error


class RejectLog:
    """Appends each broken file once to `file`, a line of JSON each: path, file, reason, time, substitute.

    A resumed run does not repeat the lines that are there. More than `limit` broken files in this run end in a
    UserError. May be used by many threads. folder_flag: the flag that names the file's folder, for errors.
    """

    def __init__(self, file: str | Path, limit: int, folder_flag: str = "--output_dir") -> None:
        self._file = Path(file)
        self._folder_flag = folder_flag
        self._limit = limit
        self._lock = threading.Lock()
        self._broken: dict[str, str] = {}  # file -> path as the annotation has it
        self._listed = _listed_files(self._file)

    def add(self, path: str, file: str, reason: str, substitute: str | None) -> None:
        """Note that `file`, named `path` in the annotation, is broken; `substitute` is the path tried in its place.

        Raises UserError when more files are broken than allowed, or the list cannot be written.
        """
        with self._lock:
            if file in self._broken:
                return
            self._broken[file] = path
            now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
            line = json.dumps(dict(path=path, file=file, reason=reason, time=now, substitute=substitute))
            if file not in self._listed:
                self._append(line)
            if len(self._broken) > self._limit:
                raise UserError(self._too_many())

    def _append(self, line: str) -> None:
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with open(self._file, "a") as log:
                log.write(line + "\n")
        except OSError as error:
            raise UserError(
                f"{self._file} cannot be written ({error.strerror}): correct {self._folder_flag}"
            ) from error

    def _too_many(self) -> str:
        names = ", ".join(list(self._broken.values())[:NAMED])
        more = ", ..." if len(self._broken) > NAMED else ""
        count = f"{len(self._broken)} file{'s are' if len(self._broken) > 1 else ' is'} broken"
        return f"{count}, more than --max_bad_samples {self._limit}: {names}{more} (see {self._file})"


def _listed_files(log: Path) -> set[str]:
    """The files that an earlier part of the run has listed; a line that a kill cut short counts for nothing."""
    files = set()
    if log.is_file():
        for line in log.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError, TypeError, KeyError):
                files.add(json.loads(line)["file"])
    return files
