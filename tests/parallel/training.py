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
    honest = BatchMaker.read

    def make(self, clips, step):
        made = honest(self, clips, step)
        if step == int(at) and os.environ["RANK"] == rank:
            if purpose == "nan":
                made[0].latent.fill_(float("nan"))
            elif purpose == "fault":
                raise UserError("too many files are broken")
            elif purpose == "hang":
                signal.pause()
            else:
                os.kill(os.getpid(), getattr(signal, purpose))
        return made

    BatchMaker.read = make
    train(flags)


def train_counting(folder: str, flags: list[str]) -> None:
    """What each rank decodes and encodes goes to `folder/reads-RANK.txt`: step and slot of each clip, a line each."""
    from osp_fast.training.prepare import BatchMaker

    honest = BatchMaker.encode

    def encode(self, clips, step):
        with Path(folder, f"reads-{os.environ['RANK']}.txt").open("a") as lines:
            lines.writelines(f"{step} {clip.slot}\n" for clip in clips)
        return honest(self, clips, step)

    BatchMaker.encode = encode
    train(flags)


def share_by_hand() -> None:
    """Two ranks and their clips, without training: what they get, and how it ends."""
    import threading

    import torch

    from osp_fast.data.buckets import Bucket
    from osp_fast.data.dataset import LoadedClip, StepBatch
    from osp_fast.errors import UserError
    from osp_fast.parallel.mesh import SequenceGroup
    from osp_fast.parallel.world import open_world
    from osp_fast.training.shared_clips import ClipSharing, Contents

    def contents(slot: int) -> Contents:
        """Of a size and a text that tell the slot."""
        text = torch.full((3, 4), slot + 0.5, dtype=torch.bfloat16)
        return Contents(torch.full((8, 1, slot + 1, 2), float(slot)), text, torch.tensor([1, slot, 0]))

    def load(step: int) -> tuple[StepBatch, list[Contents]]:
        """Three clips, of which the first rank loads one in the first step, and two in the second."""
        mine = [slot for slot in range(3) if (slot + step) % 2 != world.rank]
        batch = StepBatch(0, step, 9, 3, [0, 1, 2], 2, [])
        pixels = torch.zeros(3, 1, 8, 8, dtype=torch.uint8)
        batch.clips = [LoadedClip(s, 7 + s, f"{s}", Bucket(1, 8, 8), pixels, "", rank=world.rank) for s in mine]
        return batch, [contents(slot) for slot in mine]

    def out_of_memory() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried")

    with open_world("cpu", 30, 30, print) as world:
        group, device = SequenceGroup.of(world, 2, 30), torch.device("cpu")
        sharing = ClipSharing(group, device)
        for step in range(2):
            batch, found = sharing.complete(lambda step=step: load(step))
            assert [(clip.slot, clip.clip_index) for clip in batch.clips] == [(0, 7), (1, 8), (2, 9)]
            assert [clip.rank for clip in batch.clips] == [(1 + step) % 2, step % 2, (1 + step) % 2]
            for slot, each in enumerate(found):
                assert all(torch.equal(one, other) for one, other in zip(each, contents(slot), strict=True))
        try:
            sharing.complete(out_of_memory if world.rank == 1 else lambda: load(2))
        except UserError as error:
            assert str(error) == (
                "rank 1 cannot prepare its clips (CUDA out of memory.): use --vae_memory, or a smaller"
                " --train_sp_batch_size"
            )
        else:
            raise AssertionError
        sharing.leave()  # of what has ended; nobody waits
        sharing = ClipSharing(group, device)
        if world.rank == 1:
            leaving = threading.Thread(target=sharing.leave)
            leaving.start()
            leaving.join(20)
            assert not leaving.is_alive()
        else:
            assert sharing.complete(lambda: load(0)) is None
        # Of images each rank has its own.
        sharing = ClipSharing(group, device)
        own = StepBatch(0, 0, 9, 2, [world.rank], 1, [])
        assert sharing.complete(lambda: (own, [contents(5)]))[0] is own


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
