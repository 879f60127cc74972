"""Latents and text states of a data set, computed once by `python -m osp_fast.encode` and read in training.

What is stored of a clip: the VAE's mean and log-variance, channel behind channel, as training draws its own latent from
them; of a caption: the text encoder's states of its real tokens. Both in the dtype that they were computed in.

A clip's item is found by a key of all that its pixels depend on but the file: its name in the annotation, source
frames, crop and size; the file is then compared with the record of the one that was encoded, by size and time, or
contents. What all items depend on, the two networks and their dtypes, is in `cache.json`. So one folder may hold clips
of several sizes and lengths, data may move, and nothing that has changed is ever read.

In an epoch a clip is used in its *variant* number epoch mod `--cache_variants`: a window of frames and a caption, drawn
by the entry's name and that number, whatever the seed, the epoch and the place in the plan.
"""

import dataclasses
import hashlib
import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from osp_fast.config import DataConfig
from osp_fast.data.annotations import Entry
from osp_fast.data.buckets import Clip, Plan
from osp_fast.data.cache_shards import ShardReader, read_records, shards
from osp_fast.data.captions import training_caption
from osp_fast.data.clip_request import DecodeError
from osp_fast.data.frames import frame_indices
from osp_fast.data.identity import FileIdentity, Identities, model_files
from osp_fast.errors import UserError
from osp_fast.seeding import python_random

VERSION = 1
SHARDS = "shards"
MANIFEST = "cache.json"
ENCODE = "run python -m osp_fast.encode with the same flags"


class Missing(LookupError):
    """The cache does not hold what is asked for; its text says why."""


@dataclass(frozen=True)
class Networks:
    """What all items depend on.

    vae, text_encoder: the folders; vae_dtype, text_dtype: names like "bfloat16"; max_length: text tokens; chinese:
    whether captions keep their Chinese
    """

    vae: Path
    text_encoder: Path
    vae_dtype: str
    text_dtype: str
    max_length: int
    chinese: bool


FLAGS = {
    "vae": "--ae_path",
    "text_encoder": "--text_encoder_name_1",
    "vae_dtype": "--mixed_precision or --vae_fp32",
    "text_dtype": "--mixed_precision",
    "max_length": "--model_max_length",
    "chinese": "--text_encoder_name_1",
}


def make_manifest(networks: Networks, identities: Identities) -> dict[str, Any]:
    """The contents of `cache.json`."""
    values: dict[str, Any] = {"version": VERSION}
    for name, value in vars(networks).items():
        if isinstance(value, Path):
            found = {file: identities.of(path) for file, path in model_files(value).items()}
            value = {file: dataclasses.asdict(identity) for file, identity in found.items()}
        values[name] = value
    return values


def check_manifest(folder: Path, networks: Networks, identities: Identities) -> None:
    """Raise `UserError` unless the cache was made with these networks, naming the first difference."""
    file = folder / MANIFEST
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if values["version"] != VERSION:
            raise UserError(f"{file}: version is {values['version']}, not {VERSION}: encode into another folder")
        for name, value in vars(networks).items():
            difference = _difference(values[name], value, identities)
            if difference:
                raise UserError(
                    f"{file}: {name} is not what the clips were encoded with ({difference}): change {FLAGS[name]}, or"
                    " encode into another --latent_cache"
                )
    except FileNotFoundError:
        raise UserError(f"--latent_cache {folder}: there is no {MANIFEST}: {ENCODE}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} cannot be read ({error!r}): restore it, or encode into another folder") from None


def _difference(stored: Any, wanted: Any, identities: Identities) -> str | None:
    if not isinstance(wanted, Path):
        return None if stored == wanted else f"{stored}, now {wanted}"
    files = model_files(wanted)
    for name in sorted(files.keys() ^ stored.keys()):
        return f"{name} is {'new' if name in files else 'missing'} in {wanted}"
    for name, path in files.items():
        if not identities.is_still(FileIdentity(**stored[name]), path):
            return f"{path} has changed"
    return None


def clip_key(clip: Clip, indices: list[int]) -> str:
    """A name for these source frames of an entry, cropped and resized as the plan says."""
    parts = [clip.entry.name, indices, dataclasses.astuple(clip.geometry), tuple(clip.bucket)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def caption_key(caption: str) -> str:
    """A name for a caption."""
    return hashlib.sha256(caption.encode()).hexdigest()[:32]


def variant_frames(clip: Clip, variant: int, config: DataConfig) -> list[int]:
    """The source frames of a clip's variant."""
    draw = python_random("cached frames", clip.entry.name, variant)
    return frame_indices(clip.entry, clip.bucket.frames, config, draw)


def variant_caption(entry: Entry, variant: int, chinese: bool) -> str:
    """The cleaned caption of an entry's variant."""
    return training_caption(entry, python_random("cached caption", entry.name, variant), 0.0, chinese)


@dataclass(frozen=True)
class _Item:
    shard: Path
    name: str
    identity: FileIdentity
    reject: str | None  # why the clip cannot be decoded
    whole_file: bool


class LatentCache:
    """What a folder holds; its shards' headers are read once. May be used by many threads.

    shared_names: of entries, `shared_names` of the plan; their files are told apart by contents.
    """

    def __init__(
        self, folder: str | Path, identities: Identities | None = None, shared_names: Collection[str] = ()
    ) -> None:
        self.folder = Path(folder)
        self._shared_names = shared_names
        self.identities = identities or Identities()
        self._clips: dict[str, list[_Item]] = {}
        self._texts: dict[str, tuple[Path, str]] = {}
        self._names: set[str] = set()
        self._reader = ShardReader()
        for shard in shards(self.folder / SHARDS):
            for name, record in read_records(shard).items():
                try:
                    self._add(shard, name, record)
                except (KeyError, TypeError) as error:
                    raise UserError(f"{shard}: the record of {name} is broken ({error!r}): delete the shard") from None

    def _add(self, shard: Path, name: str, record: dict[str, Any]) -> None:
        if record["kind"] == "text":
            self._texts[record["key"]] = (shard, name)
            return
        identity = FileIdentity(record["size"], record["mtime_ns"], record["sha256"])
        item = _Item(shard, name, identity, record.get("reject"), record.get("whole_file", True))
        self._clips.setdefault(record["key"], []).append(item)
        self._names.add(record["name"])

    def holds_text(self, caption: str) -> bool:
        return caption_key(caption) in self._texts

    def text(self, caption: str) -> Tensor:
        """States (tokens, width) of a caption's real tokens. Raises `Missing`."""
        place = self._texts.get(caption_key(caption))
        if place is None:
            raise Missing(f"the caption {caption[:60]!r} is not encoded")
        return self._reader.tensor(*place)

    def find(self, clip: Clip, indices: list[int]) -> _Item:
        """The item of a clip as its file is now. Raises `Missing`."""
        items = self._clips.get(clip_key(clip, indices))
        if items is None:
            known = clip.entry.name in self._names
            raise Missing(
                "it was encoded with other frames, another crop or another size" if known else "it is not encoded"
            )
        exact = clip.entry.name in self._shared_names
        for item in reversed(items):
            if self.identities.is_still(item.identity, clip.entry.file, exact):
                return item
        raise Missing(f"{clip.entry.file} has changed since it was encoded")

    def moments(self, clip: Clip, indices: list[int]) -> Tensor:
        """Mean and log-variance of a clip, (2 * latent_dim, T, H / 8, W / 8).

        Raises `Missing`, and `DecodeError` for a clip whose file was broken when it was to be encoded.
        """
        item = self.find(clip, indices)
        if item.reject is not None:
            raise DecodeError(item.reject, item.whole_file)
        return self._reader.tensor(item.shard, item.name)


def captions(plan: Plan, config: DataConfig, chinese: bool) -> list[str]:
    """Every caption that training reads, each once, "" among them; sorted."""
    found = {variant_caption(clip.entry, n, chinese) for clip in plan.clips for n in range(config.cache_variants)}
    return sorted(found | {""})


def shared_names(plan: Plan) -> set[str]:
    """Names that entries of several files have, as below two DATA_ROOTs."""
    files: dict[str, str] = {}
    return {
        clip.entry.name for clip in plan.clips if files.setdefault(clip.entry.name, clip.entry.file) != clip.entry.file
    }


def windows(plan: Plan, config: DataConfig) -> Iterator[tuple[Clip, list[int], str]]:
    """Every clip with the frames of its variants and their key, equal ones once; clips of a bucket together."""
    for members in plan.buckets.values():
        seen = set()
        for index in members:
            clip = plan.clips[index]
            for variant in range(config.cache_variants):
                indices = variant_frames(clip, variant, config)
                key = clip_key(clip, indices)
                if (key, clip.entry.file) not in seen:
                    seen.add((key, clip.entry.file))
                    yield clip, indices, key


def clip_record(clip: Clip, key: str, indices: list[int], identity: FileIdentity) -> dict[str, Any]:
    """The record of a clip's item; frames and crop stand in it for a reader, the key has them."""
    record = {"kind": "clip", "key": key, "name": clip.entry.name, "bucket": str(clip.bucket)}
    record |= {"frames": indices, "geometry": dataclasses.astuple(clip.geometry)}
    return record | dataclasses.asdict(identity)


def text_record(caption: str) -> dict[str, Any]:
    """The record of a caption's item."""
    return {"kind": "text", "key": caption_key(caption), "caption": caption}


def padded_states(states: list[Tensor], max_length: int) -> tuple[Tensor, Tensor]:
    """States (tokens, width) of some captions -> (B, max_length, width) with zeros behind, mask (B, max_length)."""
    out = states[0].new_zeros((len(states), max_length, states[0].shape[-1]))
    mask = torch.zeros((len(states), max_length), dtype=torch.int64)
    for row, (one, real) in enumerate(zip(states, mask, strict=True)):
        out[row, : len(one)] = one
        real[: len(one)] = 1
    return out, mask
