"""Fill a latent cache: captions first, with only the text encoder in memory, then clips, with only the VAE.

Every rank works by itself on the items that its number falls to by their keys, and writes shards of its own: ranks need
no word from one another, and any number of them may go on where others have stopped.
"""

import itertools
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from osp_fast.config import TrainConfig
from osp_fast.data.buckets import Clip, Plan
from osp_fast.data.cache_shards import ShardWriter
from osp_fast.data.clip_request import DecodeError
from osp_fast.data.crew import PREFETCH, Crew
from osp_fast.data.dataset import DECODER_THREADS, clip_pixels
from osp_fast.data.identity import FileIdentity, Identities
from osp_fast.data.latent_cache import (
    MANIFEST,
    SHARDS,
    LatentCache,
    Missing,
    Networks,
    caption_key,
    captions,
    check_manifest,
    clip_record,
    make_manifest,
    text_record,
    windows,
)
from osp_fast.data.rejects import RejectLog
from osp_fast.data.rgb import usable_cores
from osp_fast.data.video import Decoder
from osp_fast.errors import UserError
from osp_fast.models.text_encoder import TextEncoder
from osp_fast.models.wfvae import WFVAE
from osp_fast.models.wfvae_plan import Task
from osp_fast.progress import Progress
from osp_fast.training.build import vae_planner

CAPTIONS_AT_ONCE = 16
PIXELS_AT_ONCE = 1 << 24  # of a batch of small clips; a larger clip is a batch by itself
CLIPS_AT_ONCE = 64
POLL_S, MANIFEST_PATIENCE_S, MANIFEST_LIMIT_S = 0.2, 5.0, 1800.0


@dataclass(frozen=True)
class Share:
    """Which part of the work a process does: rank of world, of which `local` are on its machine."""

    rank: int = 0
    world: int = 1
    local: int = 1

    def has(self, key: str) -> bool:
        """Whether an item of this key falls to the rank; the same for everyone at all times."""
        return int(key[:8], 16) % self.world == self.rank


@dataclass
class Counts:
    """What a run has done: items encoded, there before, and clips that could not be decoded."""

    encoded: int = 0
    kept: int = 0
    rejected: int = 0


def prepare_folder(
    folder: Path, networks: Networks, identities: Identities, rank: int, report: Callable[[str], None]
) -> None:
    """Make the folder and its manifest, by rank 0; check that it was made with these networks. Raises `UserError`."""
    manifest = folder / MANIFEST
    try:
        (folder / SHARDS).mkdir(parents=True, exist_ok=True)
        if rank == 0 and not manifest.exists():
            unfinished = manifest.with_suffix(".part")
            unfinished.write_text(json.dumps(make_manifest(networks, identities), indent=2) + "\n", encoding="utf-8")
            os.replace(unfinished, manifest)
    except OSError as error:
        raise UserError(f"--latent_cache {folder} cannot be written ({error}): choose another folder") from error
    started, told = time.monotonic(), False
    while not manifest.exists():
        if time.monotonic() - started > MANIFEST_LIMIT_S:
            raise UserError(f"{manifest} was not written by rank 0: see what it says, and start all ranks again")
        if not told and time.monotonic() - started > MANIFEST_PATIENCE_S:
            report(f"rank {rank} waits for rank 0, which reads the weights for {manifest}")
            told = True
        time.sleep(POLL_S)
    check_manifest(folder, networks, identities)


def encode_captions(
    cache: LatentCache,
    plan: Plan,
    config: TrainConfig,
    networks: Networks,
    share: Share,
    load: Callable[[], TextEncoder],
    stopped: Callable[[], bool],
) -> Counts:
    """Encode this rank's captions that the cache lacks; the encoder is loaded only if there are any."""
    wanted = [text for text in captions(plan, config.data, networks.chinese) if share.has(caption_key(text))]
    todo = [text for text in wanted if not cache.holds_text(text)]
    counts = Counts(kept=len(wanted) - len(todo))
    if not todo or stopped():
        return counts
    encoder, writer, progress = load(), ShardWriter(cache.folder / SHARDS, share.rank), Progress(len(todo))
    try:
        for first in range(0, len(todo), CAPTIONS_AT_ONCE):
            if stopped():
                break
            texts = todo[first : first + CAPTIONS_AT_ONCE]
            states, mask = encoder(texts)
            for text, one, real in zip(texts, states.cpu(), mask.bool().cpu(), strict=True):
                writer.add(f"text.{caption_key(text)}", one[real], text_record(text))
            counts.encoded += len(texts)
            progress.show(counts.encoded, f"caption {counts.encoded}/{len(todo)}", f"rank {share.rank}")
    finally:
        progress.close()
        writer.flush()
    return counts


def encode_clips(
    cache: LatentCache,
    plan: Plan,
    config: TrainConfig,
    share: Share,
    load: Callable[[], WFVAE],
    device: torch.device,
    stopped: Callable[[], bool],
    report: Callable[[str], None],
) -> Counts:
    """Encode this rank's clips that the cache lacks, and try those again that could not be decoded before.

    Raises `UserError` when more files are broken than `--max_bad_samples`, or a shard cannot be written; what was
    encoded before is kept.
    """
    wanted = [item for item in windows(plan, config.data) if share.has(item[2])]
    todo = [item for item in wanted if not _holds(cache, item[0], item[1])]
    counts = Counts(kept=len(wanted) - len(todo))
    if not todo or stopped():
        return counts
    vae = load()
    planner = vae_planner(vae, config.model, device, report)
    log = cache.folder / f"rejects-r{share.rank:04d}.jsonl"
    rejects = RejectLog(log, config.data.max_bad_samples, "--latent_cache")
    writer, progress = ShardWriter(cache.folder / SHARDS, share.rank), Progress(len(todo))
    try:
        for batch in _batches(_decoded(todo, cache.identities, config, share, stopped)):
            if stopped():
                break
            sound = [item for item in batch if isinstance(item.pixels, Tensor)]
            for item, moments in zip(sound, _moments(vae, planner, sound, device), strict=True):
                writer.add(item.name, moments, item.record)
            for item in batch:
                if isinstance(item.pixels, DecodeError):
                    error = item.pixels
                    if _reject(cache, item.clip, item.record["frames"]) != error.reason:  # and not told before
                        rejected = {"reject": error.reason, "whole_file": error.whole_file}
                        writer.add(item.name, None, item.record | rejected)
                    rejects.add(item.clip.entry.path, item.clip.entry.file, error.reason, None)
            counts.encoded += len(sound)
            counts.rejected += len(batch) - len(sound)
            done = counts.encoded + counts.rejected
            facts = f"rank {share.rank}, {batch[0].clip.bucket}, {counts.rejected} broken"
            progress.show(done, f"clip {done}/{len(todo)}", facts)
    finally:
        progress.close()
        writer.flush()
    return counts


@dataclass
class _Decoded:
    clip: Clip
    name: str
    record: dict
    pixels: Tensor | DecodeError


def _holds(cache: LatentCache, clip: Clip, indices: list[int]) -> bool:
    """Whether the cache has a clip's moments."""
    return _reject(cache, clip, indices) is None


def _reject(cache: LatentCache, clip: Clip, indices: list[int]) -> str | None:
    """Why a clip could not be decoded, "" if the cache knows nothing of it, None if it has its moments."""
    try:
        return cache.find(clip, indices).reject
    except Missing:
        return ""


def _decoded(
    todo: list[tuple[Clip, list[int], str]],
    identities: Identities,
    config: TrainConfig,
    share: Share,
    stopped: Callable[[], bool],
) -> Iterator[_Decoded]:
    """The clips in order, decoded ahead by workers; ends when `stopped`, also while it waits for a clip."""
    workers = config.data.dataloader_num_workers
    threads = max(1, min(DECODER_THREADS, usable_cores() // (workers * share.local)))
    broken: dict[str, DecodeError] = {}  # files of which no clip can be decoded

    def load(decoder: Decoder, clip: Clip, indices: list[int], key: str) -> _Decoded:
        identity: FileIdentity = identities.of(clip.entry.file)  # before, so that a change meanwhile is found later
        pixels: Tensor | DecodeError
        try:
            if clip.entry.file in broken:
                raise broken[clip.entry.file]
            pixels = clip_pixels(decoder, clip, indices, threads)
        except DecodeError as error:
            if decoder.closed:
                raise
            pixels = error
            if error.whole_file:
                broken[clip.entry.file] = error
        name = f"clip.{key}.{identity.sha256[:16]}"
        return _Decoded(clip, name, clip_record(clip, key, indices, identity), pixels)

    crew = Crew(workers, config.data.decode_timeout, load)
    waiting: deque[Future] = deque()
    left = iter(todo)
    try:
        while True:
            for item in itertools.islice(left, PREFETCH * workers + 1 - len(waiting)):
                waiting.append(crew.submit(*item))
            if not waiting:
                return
            clip = waiting.popleft()
            while not clip.done():
                if stopped():
                    return
                wait([clip], timeout=POLL_S)
            yield clip.result()
    finally:
        crew.close()


def _batches(clips: Iterator[_Decoded]) -> Iterator[list[_Decoded]]:
    """Clips of one bucket, as many as make a good batch for the VAE."""
    batch: list[_Decoded] = []
    for item in clips:
        bucket = item.clip.bucket
        size = max(1, min(CLIPS_AT_ONCE, PIXELS_AT_ONCE // (bucket.frames * bucket.height * bucket.width)))
        if batch and (batch[0].clip.bucket != bucket or len(batch) >= size):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


@torch.no_grad()
def _moments(vae: WFVAE, planner: Callable, items: list[_Decoded], device: torch.device) -> Iterator[Tensor]:
    """Mean and log-variance of clips of one size, in one tensor for each clip, on the CPU."""
    if not items:
        return
    pixels = torch.stack([item.pixels for item in items]).to(device, non_blocking=True)
    batch, _, *size = pixels.shape
    try:
        plan = planner(Task("encode", *size, batch))
    except UserError:
        if batch == 1:
            raise
        del pixels  # so many do not fit into --vae_memory
        yield from _moments(vae, planner, items[: batch // 2], device)
        yield from _moments(vae, planner, items[batch // 2 :], device)
        return
    posterior = vae.encode(pixels, plan)
    yield from torch.cat((posterior.mean, posterior.logvar), dim=1).cpu().unbind(0)
