"""The plan: which entries are trained on, in which bucket, and why the others are not.

A bucket is one shape of clips, so that every batch of it has one shape. Entries are judged in the spec's order: the
annotation itself, size, frames, size of the bucket; each drop is counted by the first reason that applies.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from osp_fast.config import DataConfig
from osp_fast.data import annotations, frames, geometry
from osp_fast.data.annotations import Dropped, Entry, read_entries
from osp_fast.data.geometry import Geometry
from osp_fast.errors import UserError
from osp_fast.seeding import python_random

SMALL_BUCKET = "small bucket"

_FIXES = {
    annotations.NO_CAPTION: 'give the entries a "cap"',
    annotations.NO_RESOLUTION: 'give the entries a "resolution" with height and width',
    annotations.NON_POSITIVE_RESOLUTION: 'correct the "resolution" of the entries',
    annotations.NO_NUM_FRAMES: 'give the videos a "num_frames"',
    geometry.ASPECT_RATIO: "choose --max_height and --max_width closer to the data's shape, or crop the clips",
    geometry.TOO_SMALL: "lower --min_hxw (or --min_height and --min_width) or --hw_stride",
    frames.TOO_MANY_FRAMES: "raise --num_frames",
    frames.SHORTER_THAN_NUM_FRAMES: "lower --drop_short_ratio or --num_frames",
    frames.TOO_FEW_FRAMES: "lower --num_frames or --sp_frame_multiple",
    SMALL_BUCKET: "lower --min_bucket_size",
}


class Bucket(NamedTuple):
    """The shape of a clip: frames, height and width in pixels. A tuple, because millions of them are hashed."""

    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"

    @classmethod
    def parse(cls, text: str) -> "Bucket":
        """The bucket that `str` wrote as "TxHxW"; raises `ValueError` for any other text."""
        if re.fullmatch(r"[1-9][0-9]*(x[1-9][0-9]*){2}", text) is None:
            raise ValueError(f"a bucket is written TxHxW, such as 93x480x640, got {text!r}")
        return cls(*map(int, text.split("x")))


@dataclass(frozen=True, slots=True)
class Clip:
    """An entry that is trained on: its bucket, and what is done to its frames to fit the bucket."""

    entry: Entry
    bucket: Bucket
    geometry: Geometry


@dataclass
class Plan:
    """What a run trains on."""

    clips: list[Clip] = field(default_factory=list)  # in annotation order
    dropped: dict[str, int] = field(default_factory=dict)  # reason -> number of entries
    first_dropped: dict[str, str] = field(default_factory=dict)  # reason -> the first entry dropped for it
    buckets: dict[Bucket, list[int]] = field(default_factory=dict)  # bucket -> indices into `clips`, ascending


def load_plan(config: DataConfig, seed: int, report: Callable[[str], None] | None = None) -> Plan:
    """Read `config.data` and plan it; `report` gets a line of progress per annotation file.

    `config` has passed `osp_fast.checks`: it names a data.txt and a size. Raises `UserError` for broken files, and when
    no clip is left.
    """
    return plan_clips(read_entries(config.data, report), config, seed)


def plan_clips(entries: Iterable[Entry | Dropped], config: DataConfig, seed: int) -> Plan:
    """Judge entries in annotation order; what the annotation's reader dropped is counted along.

    The same entries, flags and seed give the same plan: the coin of `--drop_short_ratio` depends on the seed and the
    entry's number only. Raises `UserError` when no clip is left.
    """
    planner = _Planner(config, seed)
    for number, entry in enumerate(entries):
        planner.add(entry, number)
    plan = planner.finish()
    if not plan.clips:
        raise UserError(_nothing_left(plan, config))
    return plan


class _Planner:
    """A plan in the making. Buckets and geometries are shared by the clips that have the same: memory for millions."""

    def __init__(self, config: DataConfig, seed: int):
        self.config = config
        self.seed = seed
        self.plan = Plan()
        self.places: dict[tuple, tuple[Geometry, int, int]] = {}
        self.shapes: dict[Bucket, Bucket] = {}

    def add(self, entry: Entry | Dropped, number: int) -> None:
        if isinstance(entry, Dropped):
            self.drop(entry.reason, entry.where)
            return
        try:
            self.plan.clips.append(self.judge(entry, number))
        except Dropped as drop:
            self.drop(drop.reason, entry.path)

    def judge(self, entry: Entry, number: int) -> Clip:
        key = (entry.height, entry.width, entry.crop)
        place = self.places.get(key)
        if place is None:
            place = self.places[key] = geometry.place(*key, self.config)
        fitted, height, width = place
        length = frames.clip_length(entry, self.config, lambda: self.coin(number))
        bucket = Bucket(length, height, width)
        return Clip(entry, self.shapes.setdefault(bucket, bucket), fitted)

    def coin(self, number: int) -> float:
        return python_random("drop_short", self.seed, number).random()

    def drop(self, reason: str, where: str) -> None:
        self.plan.dropped[reason] = self.plan.dropped.get(reason, 0) + 1
        self.plan.first_dropped.setdefault(reason, where)

    def finish(self) -> Plan:
        """Drop small buckets, and list each bucket's clips."""
        sizes: dict[Bucket, int] = {}
        for clip in self.plan.clips:
            sizes[clip.bucket] = sizes.get(clip.bucket, 0) + 1
        kept = []
        for clip in self.plan.clips:
            if sizes[clip.bucket] < self.config.min_bucket_size:
                self.drop(SMALL_BUCKET, clip.entry.path)
                continue
            self.plan.buckets.setdefault(clip.bucket, []).append(len(kept))
            kept.append(clip)
        self.plan.clips = kept
        return self.plan


def _nothing_left(plan: Plan, config: DataConfig) -> str:
    if not plan.dropped:
        return f"{config.data}: the annotations hold no entries; add some"
    counts = ", ".join(f"{reason}: {count}" for reason, count in by_count(plan.dropped))
    reason = by_count(plan.dropped)[0][0]
    fix = _FIXES.get(reason, "correct that field in the annotation")
    return (
        f"{config.data}: no entry is left to train on ({counts}; the first with {reason!r} is "
        f"{plan.first_dropped[reason]}); most likely fix: {fix}"
    )


def by_count(dropped: dict[str, int]) -> list[tuple[str, int]]:
    """Reasons with their counts, most frequent first, equal ones by name."""
    return sorted(dropped.items(), key=lambda item: (-item[1], item[0]))
