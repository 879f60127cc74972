"""Batches of decoded clips: the same for any number of workers and ranks, and after any resume.

Everything that is drawn for a clip depends on the seed, the epoch and the clip alone. Worker threads each own a
decoder process (`video.py`); the order of results is the order of the epoch, whoever is faster.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError, Future, wait
from dataclasses import dataclass

from torch import Tensor

from osp_fast.config import DataConfig
from osp_fast.data.buckets import Bucket, Clip, Plan
from osp_fast.data.captions import is_dropped, training_caption
from osp_fast.data.clip_request import ClipRequest, DecodeError
from osp_fast.data.crew import PREFETCH, Crew
from osp_fast.data.frames import frame_indices
from osp_fast.data.latent_cache import ENCODE, LatentCache, Missing, variant_caption, variant_frames
from osp_fast.data.order import epoch_batches, load_in_turns, rank_share, ranks_per_clip
from osp_fast.data.rejects import RejectLog
from osp_fast.data.resize import resize_and_crop
from osp_fast.data.rgb import usable_cores
from osp_fast.data.video import Decoder
from osp_fast.errors import UserError
from osp_fast.seeding import python_random

DECODER_THREADS = 16  # at most, for one clip
STOP_POLL_S = 0.2
NAMED = 3  # files named in an error


@dataclass
class LoadedClip:
    """A clip ready for the VAE. `slot` is its place in the global batch, `clip_index` its place in the plan.

    `pixels` is uint8 (3, T, H, W), RGB, of the bucket's size; `caption` is cleaned, and "" where it was dropped. From a
    latent cache come in the place of pixels the VAE's `moments`, mean and log-variance (2 * latent_dim, T', H/8, W/8),
    and the caption's states, `text` (tokens, width). `rank` is the one that loaded it.
    """

    slot: int
    clip_index: int
    path: str
    bucket: Bucket
    pixels: Tensor | None
    caption: str
    moments: Tensor | None = None
    text: Tensor | None = None
    rank: int = 0


@dataclass
class StepBatch:
    """One rank's clips of one optimizer step.

    `size` counts the clips of all ranks, `slots` are those that this rank computes, `ranks_per_clip` - 1 others with
    it. `clips` are those of them that it has loaded: all, or its turn where others load the rest. `wait_s` is how long
    the caller waited for them, seconds.
    """

    epoch: int
    index: int
    batches_in_epoch: int
    size: int
    slots: list[int]
    ranks_per_clip: int
    clips: list[LoadedClip]
    wait_s: float = 0.0


class ClipLoader:
    """Iterates over epochs without end, from batch `first_batch` of `epoch` on, yielding this rank's `StepBatch`es.

    With `group_data` the batch size may be given for each bucket. A clip that cannot be decoded is replaced by another
    of its bucket (of another bucket if its own has no sound one), the same one whenever it happens, and noted in
    `rejects`. Iterating raises UserError when too many files are broken or none is sound; it ends when `stopped` turns
    true, also while it waits for a clip. Call `close` (or use the loader as a context manager) to end threads and
    decoder processes. With a `cache`, which holds every clip of the plan, nothing is decoded: moments and text states
    are read from it.

    Of `sp_size` consecutive ranks, which share clips, each loads a part of these, in turns (`order.py`): every rank
    gets every batch, though perhaps without a clip.
    """

    def __init__(
        self,
        plan: Plan,
        config: DataConfig,
        *,
        seed: int,
        global_batch_size: int | Mapping[Bucket, int],
        drop_caption: float,
        chinese: bool,
        rejects: RejectLog,
        cache: LatentCache | None = None,
        rank: int = 0,
        world_size: int = 1,
        sp_size: int = 1,
        epoch: int = 0,
        first_batch: int = 0,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        if not plan.clips:
            raise ValueError("the plan has no clips")
        self._plan = plan
        self._config = config
        self._seed = seed
        self._global_batch_size = global_batch_size
        self._drop_caption = drop_caption
        self._chinese = chinese
        self._rejects = rejects
        self._cache = cache
        self._rank, self._world_size, self._sp_size = rank, world_size, sp_size
        self._epoch, self._first_batch = epoch, first_batch
        self._stopped = stopped
        workers = config.dataloader_num_workers
        self._threads = max(1, min(DECODER_THREADS, usable_cores() // (workers * world_size)))
        self._broken: dict[str, str] = {}  # file -> why no clip of it can be decoded
        self._crews: list[Crew] = []
        self._loading: dict[int, tuple[str, float]] = {}  # thread -> what it loads, since when

    def __enter__(self) -> "ClipLoader":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End threads and decoder processes, also those that hang."""
        while self._crews:
            self._crews.pop().close()

    def describe(self) -> dict[str, list[str]]:
        """What the workers load at this moment, and for how long: for the report on a hang."""
        now = time.monotonic()
        return {"clips being loaded": [f"{path}, for {now - since:.0f} s" for path, since in [*self._loading.values()]]}

    def __iter__(self) -> Iterator[StepBatch]:
        crew = Crew(self._config.dataloader_num_workers, self._config.decode_timeout, self._load)
        self._crews.append(crew)
        sizes = self._global_batch_size
        largest = sizes if isinstance(sizes, int) else max(sizes.values())
        ahead = max(PREFETCH * self._config.dataloader_num_workers, largest // self._world_size)
        waiting: deque[tuple[StepBatch, int, Future | None]] = deque()
        loading = 0
        try:
            for batch, due, place in self._order():
                waiting.append((batch, due, None if place is None else crew.submit(batch.epoch, *place)))
                loading += place is not None
                while loading > ahead:
                    filled, due, clip = waiting.popleft()
                    if clip is not None:
                        self._collect(filled, clip)
                        loading -= 1
                    if len(filled.clips) == due:
                        yield filled
        except (CancelledError, DecodeError):
            return  # stopped, or closed by another thread
        finally:
            crew.close()

    def _order(self) -> Iterator[tuple[StepBatch, int, tuple[int, int] | None]]:
        """The clips that this rank loads, in order: the batch they go into, how many it loads for that, the clip's slot
        and number in the plan. A batch that it loads none for comes once, without a clip."""
        buckets = [clip.bucket for clip in self._plan.clips]
        epoch, first = self._epoch, self._first_batch
        while True:
            batches = epoch_batches(
                buckets,
                seed=self._seed,
                epoch=epoch,
                global_batch_size=self._global_batch_size,
                group_data=self._config.group_data,
            )
            before = epoch  # so that turns go on where an epoch has a single clip
            for index, clips in enumerate(batches):
                together = ranks_per_clip(buckets[clips[0]], self._sp_size, self._config.group_data)
                slots = rank_share(clips, self._rank // together, self._world_size // together)
                mine = load_in_turns(slots, before, self._rank % together, together)
                before += len(slots) if together > 1 else 0
                if index >= first:
                    batch = StepBatch(epoch, index, len(batches), len(clips), slots, together, [])
                    for place in [(slot, clips[slot]) for slot in mine] or [None]:
                        yield batch, len(mine), place
            epoch, first = epoch + 1, 0

    def _collect(self, batch: StepBatch, clip: "Future[LoadedClip]") -> None:
        start = time.monotonic()
        while not clip.done() and not self._stopped():
            wait([clip], timeout=STOP_POLL_S)
        if not clip.done():
            raise CancelledError
        batch.clips.append(clip.result())
        batch.wait_s += time.monotonic() - start

    def _load(self, decoder: Decoder, epoch: int, slot: int, clip_index: int) -> LoadedClip:
        """Load a clip, or the first sound one of the others in its bucket. Runs in the workers."""
        candidates = self._candidates(epoch, clip_index)
        index: int | None = clip_index
        while index is not None:
            clip = self._plan.clips[index]
            try:
                if clip.entry.file in self._broken:
                    raise DecodeError(self._broken[clip.entry.file])
                self._loading[threading.get_ident()] = (clip.entry.path, time.monotonic())
                return self._clip(decoder, clip, epoch, slot, index)
            except DecodeError as error:
                if decoder.closed:
                    raise
                if error.whole_file:
                    self._broken[clip.entry.file] = error.reason
                index = next(candidates, None)
                substitute = None if index is None else self._plan.clips[index].entry.path
                self._rejects.add(clip.entry.path, clip.entry.file, error.reason, substitute)
            finally:
                self._loading.pop(threading.get_ident(), None)
        raise UserError(self._nothing_sound())

    def _candidates(self, epoch: int, clip_index: int) -> Iterator[int]:
        """The clips that may take the clip's place, in order; clips of files that are known to be bad are left out.

        The other clips of its bucket come first. Should none of them be sound, other buckets follow, in an order that
        is the same for all clips of the bucket, so that a grouped batch still has one shape.
        """
        own = self._plan.clips[clip_index].bucket
        others = [bucket for bucket in sorted(self._plan.buckets) if bucket != own]
        python_random("substitute bucket", self._seed, epoch, str(own)).shuffle(others)
        for bucket in (own, *others):
            members = self._plan.buckets[bucket]
            draw = python_random("substitute", self._seed, epoch, clip_index, str(bucket))
            for index in draw.sample(members, len(members)):
                if index != clip_index and self._plan.clips[index].entry.file not in self._broken:
                    yield index

    def _clip(self, decoder: Decoder, clip: Clip, epoch: int, slot: int, index: int) -> LoadedClip:
        """A clip of the plan, decoded or from the cache; DecodeError if its file is broken."""
        entry, draw = clip.entry, python_random("caption", self._seed, epoch, index)
        if self._cache is None:
            frames = frame_indices(
                entry, clip.bucket.frames, self._config, python_random("frames", self._seed, epoch, index)
            )
            pixels = clip_pixels(decoder, clip, frames, self._threads)
            caption = training_caption(entry, draw, self._drop_caption, self._chinese)
            return LoadedClip(slot, index, entry.path, clip.bucket, pixels, caption, rank=self._rank)
        variant = epoch % self._config.cache_variants
        caption = "" if is_dropped(draw, self._drop_caption) else variant_caption(entry, variant, self._chinese)
        try:
            moments = self._cache.moments(clip, variant_frames(clip, variant, self._config))
            text = self._cache.text(caption)
        except Missing as error:
            raise UserError(f"--latent_cache {self._cache.folder}: {entry.path}: {error}: {ENCODE}") from None
        return LoadedClip(slot, index, entry.path, clip.bucket, None, caption, moments, text, self._rank)

    def _nothing_sound(self) -> str:
        entries = [clip.entry for clip in self._plan.clips[:NAMED]]
        names = [f"{entry.path}: {self._broken.get(entry.file, 'unusable')}" for entry in entries]
        more = ", ..." if len(self._plan.clips) > NAMED else ""
        return (
            f"no clip of the data set can be decoded ({', '.join(names)}{more}): repair them, or correct DATA_ROOT "
            "in data.txt (see rejects.jsonl)"
        )


def clip_pixels(decoder: Decoder, clip: Clip, indices: list[int], threads: int) -> Tensor:
    """These source frames of a clip, (3, T, H, W) uint8 of the bucket's size. Raises DecodeError."""
    entry = clip.entry
    request = ClipRequest(
        file=entry.file,
        indices=tuple(indices),
        rect=clip.geometry.source,
        height=entry.height,
        width=entry.width,
        num_frames=entry.num_frames,
        is_image=entry.is_image,
        threads=threads,
    )
    return resize_and_crop(decoder.decode(request), clip.geometry, clip.bucket)
