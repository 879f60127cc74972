"""Clips that ranks compute together: each is loaded and encoded by one of them, and given to the others.

Latents and texts go over the group's CPU side, so that a GPU's feed can send them from its own thread while the GPUs
train: NCCL's calls come from the main thread alone, in one order. Before each batch ranks tell each other whether they
have it, also before one of images, which each has for itself: so none waits for a rank that has ended.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from osp_fast.data.dataset import LoadedClip, StepBatch
from osp_fast.errors import UserError
from osp_fast.parallel.collectives import RankLost, all_answering
from osp_fast.parallel.mesh import SequenceGroup


class Contents(NamedTuple):
    """What the networks, or a cache, make of a clip: latent (C, T, H, W), float32; text (L, width); text_mask (L,)."""

    latent: Tensor
    text: Tensor
    text_mask: Tensor


@dataclass(frozen=True)
class Note:
    """What a rank tells the others of a batch: the clips that it has loaded for them, without their pixels, and the
    shape and type of each tensor of their `Contents`; or that there is none, or why."""

    clips: Sequence[LoadedClip] = ()
    tensors: Sequence[Sequence[tuple[tuple[int, ...], torch.dtype]]] = ()
    ended: bool = False
    fault: str | None = None


class ClipSharing:
    """A rank's side of the exchange. To be used by one thread; all ranks of the group must ask for as many batches.

    `waiting` says, to any thread, whether this rank has done its part and waits for the others.
    """

    def __init__(self, group: SequenceGroup, device: torch.device):
        self._group, self._device = group, device
        self._over = False
        self.waiting = False

    def complete(
        self, load: Callable[[], tuple[StepBatch, list[Contents]] | None]
    ) -> tuple[StepBatch, list[Contents]] | None:
        """`load()`, with the clips that other ranks have loaded, in the order of slots; None if any rank has none.

        Raises what `load` raises, and `UserError` where another rank's does, or where memory does not suffice;
        `RankLost`.
        """
        loaded, error = None, None
        try:
            loaded = load()
        except Exception as raised:  # raised again, once the others have heard of it
            error = raised
        note, began = self._note(loaded, error), time.monotonic()
        self._over = True  # unless all answer, and have a batch
        notes = self._tell(note)
        faults = [note.fault for note in notes if note.fault is not None]
        self._over = bool(faults) or any(note.ended for note in notes)
        if error is not None and not isinstance(error, torch.OutOfMemoryError):
            raise error
        if faults:
            raise UserError(faults[0]) from error
        if self._over:
            return None
        batch, contents = loaded
        if batch.ranks_per_clip > 1:
            contents = self._gather(batch, contents, notes)
        batch.wait_s += time.monotonic() - began
        return batch, contents

    def leave(self) -> None:
        """Ask for no more batches: the others get no more either."""
        if not self._over:
            self._over = True
            try:
                self._tell(Note(ended=True))
            except RankLost:
                return  # nobody is left to be told

    def _note(self, loaded: tuple[StepBatch, list[Contents]] | None, error: Exception | None) -> Note:
        if error is not None:
            return Note(fault=str(error) if isinstance(error, UserError) else self._in_a_sentence(error))
        if loaded is None:
            return Note(ended=True)
        batch, contents = loaded
        if batch.ranks_per_clip == 1:
            return Note()
        clips = [replace(clip, pixels=None, moments=None, text=None) for clip in batch.clips]
        return Note(clips, [[(tuple(tensor.shape), tensor.dtype) for tensor in each] for each in contents])

    def _in_a_sentence(self, error: Exception) -> str:
        words = f"rank {self._group.world.rank} cannot prepare its clips ({str(error).strip().split(chr(10))[0]})"
        if isinstance(error, torch.OutOfMemoryError):
            return f"{words}: use --vae_memory, or a smaller --train_sp_batch_size"
        return f"{words}: see what it prints"

    def _tell(self, note: Note) -> list[Note]:
        """The notes of all ranks of the group, the same on each."""
        notes: list[Note] = [note] * self._group.size
        self.waiting = True
        with all_answering():
            dist.all_gather_object(notes, note, group=self._group.files)
        self.waiting = False
        return notes

    def _gather(self, batch: StepBatch, mine: Sequence[Contents], notes: Sequence[Note]) -> list[Contents]:
        """The contents of all of the group's clips of a batch, which gets the clips, both in the order of slots."""
        clips, contents, sent = [], [], []
        with all_answering():
            for owner, note in enumerate(notes):
                for number, (clip, tensors) in enumerate(zip(note.clips, note.tensors, strict=True)):
                    if owner == self._group.rank:
                        on_cpu = [tensor.cpu().contiguous() for tensor in mine[number]]
                    else:
                        pinned = self._device.type == "cuda"
                        on_cpu = [torch.empty(shape, dtype=dtype, pin_memory=pinned) for shape, dtype in tensors]
                    sent += [self._send(tensor, owner) for tensor in on_cpu]
                    clips.append(clip)
                    contents.append(mine[number] if owner == self._group.rank else on_cpu)
            for work in sent:
                work.wait()
        order = sorted(range(len(clips)), key=lambda place: clips[place].slot)
        batch.clips = [clips[place] for place in order]
        return [Contents(*map(self._to_device, contents[place])) for place in order]

    def _send(self, tensor: Tensor, owner: int) -> dist.Work:
        """Bytes, as gloo has not every type."""
        return dist.broadcast(tensor.view(torch.uint8), group=self._group.files, group_src=owner, async_op=True)

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, non_blocking=True)


def describe_groups(group: SequenceGroup, images_apart: bool) -> str:
    """Who does what, for the user; images_apart: whether each rank has images of its own."""
    if group.data_size == 1:
        words = f"{group.size} GPUs share the tokens of each clip"
    else:
        words = (
            f"{group.world.size} GPUs: {group.data_size} groups of {group.size}, each shares the tokens of its clips"
        )
    return f"{words}; images are not shared" if images_apart else words
