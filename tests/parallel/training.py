"""What the ranks of the tests run: the small training of `tests/training/small_run.py`, with trouble on request."""

import importlib.util
import os
import signal
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "training" / "small_run.py"
SPEC = importlib.util.spec_from_file_location("small_run", SCRIPT)
small = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(small)


def train(flags: list[str]) -> None:
    """The training command as a program ends."""
    from osp_fast.errors import run_entry_point
    from osp_fast.train import main

    small.use_small_model()
    run_entry_point(lambda: main(flags))


def train_with(trouble: str, flags: list[str]) -> None:
    """The same; trouble: "PURPOSE RANK STEP", what goes wrong on one rank when it makes the batch after that step."""
    from osp_fast.errors import UserError
    from osp_fast.training.prepare import BatchMaker

    purpose, rank, at = trouble.split()
    honest = BatchMaker.__call__

    def make(self, clips, step, slots):
        made = honest(self, clips, step, slots)
        if step == int(at) and os.environ["RANK"] == rank:
            if purpose == "nan":
                made.latents[0] = float("nan")
            elif purpose == "fault":
                raise UserError("too many files are broken")
            elif purpose == "hang":
                signal.pause()
            else:
                os.kill(os.getpid(), getattr(signal, purpose))
        return made

    BatchMaker.__call__ = make
    train(flags)


def train_apart(folder: str, flags: list[str]) -> None:
    """Each rank in a folder of its own, as machines have them that share no disk."""
    here = Path(folder, f"machine-{os.environ['RANK']}")
    here.mkdir()
    os.chdir(here)
    train(flags)


def train_with_a_fault_in_saving(flags: list[str]) -> None:
    """The first file of weights that rank 1 is to write is one too many; the error is none that is expected there."""
    from osp_fast.training import saver

    honest, calls = saver.hash_files, []

    def hash_files(*arguments):
        calls.append(arguments)
        if len(calls) == 1 and os.environ["RANK"] == "1":
            raise ValueError("this rank cannot count")
        return honest(*arguments)

    saver.hash_files = hash_files
    train(flags)


def train_each(flags: list[list[str]]) -> None:
    """Each rank with flags of its own."""
    train(flags[int(os.environ["RANK"])])
