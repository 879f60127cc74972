"""What a checkpoint's files must be: `SHA256SUMS`, in the format of the program sha256sum (`sha256sum -c`)."""

import hashlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from osp_fast.errors import UserError
from osp_fast.files import sync

FILE_NAME = "SHA256SUMS"
READ_BYTES = 4 << 20
THREADS = 8


def hash_files(folder: Path, files: Iterable[Path]) -> dict[str, str]:
    """The SHA-256 of files, in hexadecimal, by their path in `folder`. Raises OSError."""
    with ThreadPoolExecutor(THREADS) as pool:
        files = sorted(files)
        return dict(zip((str(file.relative_to(folder)) for file in files), pool.map(_digest, files), strict=True))


def write_manifest(folder: Path, digests: Mapping[str, str]) -> None:
    """Write a folder's manifest and bring it to the disk. Raises OSError."""
    lines = [f"{digest}  {name}\n" for name, digest in sorted(digests.items())]
    (folder / FILE_NAME).write_text("".join(lines), encoding="utf-8")
    sync(folder / FILE_NAME)


def verify_manifest(folder: Path) -> set[str]:
    """Compare a folder with its manifest: every file is there and has the bytes that were written. Others may be there.

    Returns the files that the manifest names.

    Raises:
        UserError: a file differs, is missing or cannot be read; or there is no manifest.
    """
    manifest, fix = folder / FILE_NAME, "resume from another checkpoint"
    try:
        lines = manifest.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"{manifest} cannot be read ({error}): {fix}") from None
    wanted = {}
    for number, line in enumerate(lines, 1):
        digest, separator, name = line.partition("  ")
        if not separator or len(digest) != 64 or Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(f"{manifest}: line {number} is not a checksum and a file's name: {fix}")
        wanted[name] = digest
    if not wanted:
        raise UserError(f"{manifest} names no file: {fix}")
    for name in wanted:
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing: {fix}")
    try:
        found = hash_files(folder, [folder / name for name in wanted])
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}): {fix}") from None
    for name, digest in wanted.items():
        if found[str(Path(name))] != digest:
            raise UserError(f"{folder / name} is not what was written (its SHA-256 differs from {FILE_NAME}): {fix}")
    return set(wanted)


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()
