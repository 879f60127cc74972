"""`--output_dir` before the first step: made, tidied, and which checkpoint the run goes on from."""

import fcntl
import socket
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import IO

from osp_fast.config import TrainConfig, as_dict
from osp_fast.errors import UserError
from osp_fast.parallel.world import World
from osp_fast.training.checkpoint import find_checkpoint, list_checkpoints, remove_leftovers

OF_A_RANK = ("device",)  # flags that may differ from rank to rank


def lock_output(config: TrainConfig, notify: Callable[[str], None]) -> IO[bytes]:
    """Make `--output_dir` and take it for this run: the file that is returned holds the lock until it is closed.

    Raises:
        UserError: another run writes there, or the folder cannot be made.
    """
    output_dir = Path(config.run.output_dir)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        file = (output_dir / ".lock").open("wb")
    except OSError as error:
        raise UserError(f"--output_dir {output_dir} cannot be used ({error}): choose another folder") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another run writes to --output_dir {output_dir}: wait for it, or choose another") from None
    except OSError as error:  # some network disks have no locks
        notify(f"note: {output_dir} cannot be locked ({error.strerror}): see that no other run writes there")
    return file


def prepare_output(config: TrainConfig, notify: Callable[[str], None]) -> Path | None:
    """Make `--output_dir` ready and find the checkpoint that the run goes on from (None: a new run).

    Raises:
        UserError: the run would mix with another one's checkpoints, or the folder cannot be written.
    """
    output_dir = Path(config.run.output_dir)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        remove_leftovers(output_dir)
    except OSError as error:
        raise UserError(f"--output_dir {output_dir} cannot be used ({error}): choose another folder") from error
    present = list_checkpoints(output_dir)
    if config.run.resume_from_checkpoint is None:
        if present:
            raise UserError(
                f"--output_dir {output_dir} already holds {present[-1][1].name}: go on from it with"
                " --resume_from_checkpoint latest, or choose another --output_dir"
            )
        return None
    checkpoint = find_checkpoint(config.run.resume_from_checkpoint, output_dir, notify)
    if checkpoint is not None and config.run.resume_from_checkpoint != "latest":
        names = [path.name for _, path in present]
        elsewhere = checkpoint.resolve().parent != output_dir.resolve()
        if names and (elsewhere or checkpoint.name != names[-1]):
            raise UserError(
                f"--output_dir {output_dir} already holds {names[-1]}, which a run from {checkpoint} would mix with:"
                " move it away, or choose another --output_dir"
            )
    return checkpoint


def check_shared(output_dir: Path, world: World) -> None:
    """See that all ranks have the same `--output_dir`: each writes its part of a checkpoint there. All must call it.

    Raises:
        UserError: a rank does not see what the first one writes.
    """
    if world.alone:
        return
    token = output_dir / f".shared-{world.gather(uuid.uuid4().hex)[0]}"
    with world.together():
        if world.is_first:
            token.touch()
    try:
        with world.together():
            if not token.exists():
                raise UserError(
                    f"--output_dir {output_dir} on {socket.gethostname()} is not that of rank 0: name a folder"
                    " on a disk that all machines share"
                )
    finally:
        if world.is_first:
            token.unlink(missing_ok=True)


def check_same(config: TrainConfig, data_fingerprint: str, world: World) -> None:
    """See that all ranks were started with the same flags and found the same clips. All must call it.

    Raises:
        UserError: a rank differs from the first one.
    """
    mine = {
        f"--{name} {value}"
        for values in as_dict(config).values()
        for name, value in values.items()
        if name not in OF_A_RANK
    }
    all_flags = world.gather((sorted(mine), data_fingerprint))
    flags, fingerprint = all_flags[0]
    for rank, (others, clips) in enumerate(all_flags):
        for ours, theirs in zip(flags, others, strict=True):
            if ours != theirs:
                raise UserError(f"rank {rank} was started with {theirs}, rank 0 with {ours}: give all the same flags")
        if clips != fingerprint:
            raise UserError(f"--data selects other clips on rank {rank} than on rank 0: give all the same annotations")
