"""The list of files that could not be decoded."""

import json
import threading
import time
from pathlib import Path

from osp_fast.errors import UserError

NAMED = 3  # files named in the error


class RejectLog:
    """Appends each broken file once to `file`, a line of JSON each: path, file, reason, time, substitute.

    More than `limit` broken files end in a UserError. May be used by many threads.
    """

    def __init__(self, file: str | Path, limit: int) -> None:
        self._file = Path(file)
        self._limit = limit
        self._lock = threading.Lock()
        self._broken: dict[str, str] = {}  # file -> path as the annotation has it

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
            try:
                self._file.parent.mkdir(parents=True, exist_ok=True)
                with open(self._file, "a") as log:
                    log.write(line + "\n")
            except OSError as error:
                raise UserError(f"{self._file} cannot be written ({error.strerror}): correct --output_dir") from error
            if len(self._broken) > self._limit:
                raise UserError(self._too_many())

    def _too_many(self) -> str:
        names = ", ".join(list(self._broken.values())[:NAMED])
        more = ", ..." if len(self._broken) > NAMED else ""
        count = f"{len(self._broken)} file{'s are' if len(self._broken) > 1 else ' is'} broken"
        return f"{count}, more than --max_bad_samples {self._limit}: {names}{more} (see {self._file})"
