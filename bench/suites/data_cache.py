"""What the suite `data` caches with: a tiny text encoder, and a latent cache as `osp_fast.encode` writes it."""

from pathlib import Path

import torch
from torch import Tensor

from bench.suites.data_readers import Task
from osp_fast.assets.build import save_text_encoder
from osp_fast.data.cache_shards import ShardWriter
from osp_fast.data.identity import Identities
from osp_fast.data.latent_cache import SHARDS, LatentCache, caption_key, clip_key, clip_record, text_record
from osp_fast.models.text_encoder import TextEncoder
from osp_fast.models.transformers_folder import quiet_transformers

NEIGHBOURS = 63  # other clips and captions of the same shard, as in a data set


def encoder_of(folder: Path, caption: str, tokens: int, device: torch.device) -> TextEncoder:
    """A random T5 whose tokenizer knows the caption's words."""
    with quiet_transformers():
        save_text_encoder(folder / "text_encoder", [caption])
    return TextEncoder.from_pretrained(folder / "text_encoder", torch.float32, device, tokens)


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
