"""Which clip is trained on when: each epoch's order, and each rank's part of it.

An epoch's order depends on the seed, the epoch and the global batch size, never on the number of ranks, so a run can
be resumed on another number of GPUs. Permutations come from sorting raw PCG64 output, whose stream NumPy guarantees,
unlike that of its shuffles: the order survives an upgrade of NumPy in the middle of a run.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from osp_fast.data.buckets import Bucket
from osp_fast.seeding import stable_seed


def epoch_batches(
    buckets_of_clips: Sequence[Bucket],
    *,
    seed: int,
    epoch: int,
    global_batch_size: int | Mapping[Bucket, int],
    group_data: bool,
) -> list[list[int]]:
    """The clips of each optimizer step of one epoch, as indices into `buckets_of_clips`.

    Every batch has `global_batch_size` clips. With `group_data` a batch holds clips of one bucket, whose size may be
    given for each bucket, and the batches of all buckets are shuffled; otherwise all clips are shuffled together.
    A remainder is filled by repeating clips (of its bucket), so every clip occurs at least once, and twice in one batch
    only if there are too few to fill it. An empty sequence gives no batches.
    """
    if not buckets_of_clips:
        return []
    if not group_data:
        clips = np.arange(len(buckets_of_clips))
        return _fill_batches(clips, global_batch_size, "clips", seed, epoch, global_batch_size).tolist()
    members: dict[Bucket, list[int]] = {}
    for clip, bucket in enumerate(buckets_of_clips):
        members.setdefault(bucket, []).append(clip)
    batches: list[list[int]] = []
    for bucket in sorted(members):
        size = global_batch_size if isinstance(global_batch_size, int) else global_batch_size[bucket]
        batches += _fill_batches(np.asarray(members[bucket]), size, "clips", seed, epoch, size, str(bucket)).tolist()
    sizes = global_batch_size if isinstance(global_batch_size, int) else "by bucket"
    return [batches[place] for place in _permutation(len(batches), "batches", seed, epoch, sizes)]


def rank_share(batch: Sequence[int], rank: int, world_size: int) -> list[int]:
    """The slots (positions in `batch`) that a rank loads: the rank-th of `world_size` equal, contiguous parts.

    Raises `ValueError` if the batch does not divide evenly, as ranks with unequal parts would not average alike.
    """
    if not 0 <= rank < world_size or len(batch) % world_size:
        raise ValueError(f"rank {rank} of {world_size} has no equal share of a batch of {len(batch)} clips")
    share = len(batch) // world_size
    return list(range(rank * share, (rank + 1) * share))


def ranks_per_clip(bucket: Bucket, sp_size: int, group_data: bool) -> int:
    """How many ranks compute a clip together: `sp_size`, but one where a batch has nothing but images, which are short.

    bucket: of the batch, with `group_data`; without it batches are mixed
    """
    return 1 if group_data and bucket.frames == 1 else sp_size


def load_in_turns(slots: Sequence[int], before: int, rank: int, ranks: int) -> list[int]:
    """Those of `slots`, which `ranks` ranks compute together, whose clips the rank-th of them loads.

    before: clips that they have loaded since their turns began; each takes every `ranks`-th
    """
    return [slot for number, slot in enumerate(slots, before) if number % ranks == rank]


def _fill_batches(clips: np.ndarray, batch_size: int, *names: str | int) -> np.ndarray:
    """`clips` (n,) shuffled into (ceil(n / batch_size), batch_size), started over to fill the last batch."""
    shuffled = clips[_permutation(len(clips), *names)]
    batches = -(-len(clips) // batch_size)
    return np.resize(shuffled, (batches, batch_size))  # repeats from the start of `shuffled`


def _permutation(length: int, *names: str | int) -> np.ndarray:
    """A random order of 0 .. length - 1, int64, that depends on `names` only."""
    keys = np.random.PCG64(stable_seed("order", *names)).random_raw(length)
    return np.argsort(keys, kind="stable")
