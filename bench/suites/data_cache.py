"""What the suite `data` caches with: a tiny text encoder, and a latent cache as `osp_fast.encode` writes it."""

from pathlib import Path

import torch
from torch import Tensor

from bench.suites.data_readers import Task
from osp_fast.config import EMBEDDED_MODEL
from osp_fast.data.cache_shards import ShardWriter
from osp_fast.data.identity import Identities
from osp_fast.data.latent_cache import SHARDS, LatentCache, caption_key, clip_key, clip_record, text_record
from osp_fast.models.text_encoder import TextEncoder

NEIGHBOURS = 63  # other clips and captions of the same shard, as in a data set


def embedded_encoder(tokens: int, device: torch.device) -> TextEncoder:
    """The tiny text encoder, in float32; texts are padded to so many tokens."""
    return TextEncoder.from_pretrained(EMBEDDED_MODEL / "text_encoder", torch.float32, device, tokens)


def filled_cache(folder: Path, task: Task, moments: Tensor, text: Tensor) -> LatentCache:
    """A cache that holds the task's clip and caption among others, opened as training opens it."""
    (folder / SHARDS).mkdir(parents=True)
    writer, clip, identity = ShardWriter(folder / SHARDS, rank=0), task.clip, Identities().of(task.file)
    for shift in range(NEIGHBOURS + 1):
        indices = [index + shift for index in task.indices]
        key, caption = clip_key(clip, indices), task.caption + f", {shift}" * (shift > 0)
        writer.add(f"clip.{key}", moments + shift, clip_record(clip, key, indices, identity))
        writer.add(f"text.{caption_key(caption)}", text + shift, text_record(caption))
    writer.flush()
    return LatentCache(folder)
