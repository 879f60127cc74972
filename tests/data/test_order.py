"""Epoch order: every clip, one bucket per batch, the same for any number of ranks."""

import hashlib
import itertools
import json
import time
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from osp_fast.data.buckets import Bucket
from osp_fast.data.order import epoch_batches, load_in_turns, rank_share, ranks_per_clip

LONG, SHORT, IMAGE = Bucket(93, 480, 640), Bucket(29, 480, 640), Bucket(1, 480, 640)
MIXED = [LONG, IMAGE, SHORT, LONG, LONG, IMAGE, LONG] * 13 + [SHORT]


def batches(buckets=MIXED, *, seed=0, epoch=0, size=8, group=True):
    return epoch_batches(buckets, seed=seed, epoch=epoch, global_batch_size=size, group_data=group)


@settings(max_examples=200)
@given(
    buckets=st.lists(st.sampled_from([LONG, SHORT, IMAGE]), max_size=60),
    size=st.integers(1, 9),
    group=st.booleans(),
    seed=st.integers(0, 2**40),
)
def test_every_clip_occurs_and_batches_are_full(buckets, size, group, seed):
    result = batches(buckets, seed=seed, size=size, group=group)
    assert all(len(batch) == size for batch in result)
    used = Counter(clip for batch in result for clip in batch)
    assert set(used) == set(range(len(buckets)))
    pools = Counter(buckets) if group else {None: len(buckets)}
    pools = {pool: count for pool, count in pools.items() if count}
    assert len(result) == sum(-(-count // size) for count in pools.values())
    for batch in result:
        pool = len(buckets)
        if group:
            (bucket,) = {buckets[clip] for clip in batch}
            pool = pools[bucket]
        assert len(set(batch)) == min(size, pool)  # clips repeat in a batch only where there are too few of them


def test_a_short_bucket_fills_its_batch_evenly():
    (batch,) = batches([LONG, LONG, LONG], size=8)
    assert sorted(Counter(batch).values()) == [2, 3, 3]


def test_batches_of_buckets_are_mixed():
    buckets = MIXED * 20
    kinds = [buckets[batch[0]] for batch in batches(buckets)]
    assert kinds != sorted(kinds)
    assert sum(before != after for before, after in itertools.pairwise(kinds)) > len(kinds) / 4


@pytest.mark.parametrize("group", [True, False])
def test_order_depends_on_seed_epoch_and_batch_size(group):
    reference = batches(group=group)
    assert batches(group=group) == reference
    assert batches(group=group, seed=1) != reference
    assert batches(group=group, epoch=1) != reference
    flat = [clip for batch in reference for clip in batch]
    assert [clip for batch in batches(group=group, size=4) for clip in batch][: len(flat)] != flat


def test_a_bucket_is_ordered_without_regard_to_the_others():
    few = [LONG] * 5 + [IMAGE] * 3
    many = [LONG] * 5 + [SHORT] * 7 + [IMAGE] * 3
    pick = [sorted(batch for batch in batches(b, size=4) if b[batch[0]] == LONG) for b in (few, many)]
    assert pick[0] == pick[1]


def test_order_is_the_same_on_every_machine():
    text = json.dumps([batches(group=group, seed=42, epoch=3) for group in (True, False)])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "a3bc2ed228648f19"


@pytest.mark.parametrize("group", [True, False])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_together_load_the_global_batch(group, world_size):
    for batch in batches(group=group):
        shares = [rank_share(batch, rank, world_size) for rank in range(world_size)]
        assert {len(share) for share in shares} == {len(batch) // world_size}
        assert [batch[slot] for share in shares for slot in share] == batch


@pytest.mark.parametrize(("clips", "rank", "world_size"), [(8, 0, 3), (8, 2, 2), (8, -1, 2)])
def test_unequal_shares_are_refused(clips, rank, world_size):
    with pytest.raises(ValueError, match="has no equal share"):
        rank_share(range(clips), rank, world_size)


@pytest.mark.parametrize(("clips", "ranks"), [(1, 2), (2, 2), (3, 2), (2, 4), (5, 4)])
def test_ranks_load_shared_clips_in_turns(clips, ranks):
    steps = [range(clips * step, clips * (step + 1)) for step in range(ranks)]
    turns = [[load_in_turns(slots, slots[0], rank, ranks) for slots in steps] for rank in range(ranks)]
    for step, slots in enumerate(steps):
        assert sorted(slot for turn in turns for slot in turn[step]) == list(slots)
    assert {sum(map(len, turn)) for turn in turns} == {clips}  # after so many steps all have loaded as many


def test_images_are_shared_only_where_they_are_mixed_with_videos():
    assert [ranks_per_clip(bucket, 4, True) for bucket in (IMAGE, SHORT)] == [1, 4]
    assert [ranks_per_clip(bucket, 4, False) for bucket in (IMAGE, SHORT)] == [4, 4]


def test_no_clips_no_batches():
    assert batches([]) == batches([], group=False) == []


def test_plain_numbers_come_out():
    assert {type(clip) for group in (True, False) for batch in batches(group=group) for clip in batch} == {int}


def test_half_a_million_clips_take_little_time():
    buckets = [LONG, SHORT, IMAGE, LONG, LONG] * 100_000
    begin = time.process_time()
    assert len(batches(buckets, size=64)) == 4688 + 2 * 1563
    assert time.process_time() - begin < 5  # about 0.4 s; seconds of room for a loaded machine
