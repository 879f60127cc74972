"""Ranks that share clips: what each draws, and how large their batches are."""

import pytest
import torch

from osp_fast.config import DataConfig, TrainConfig
from osp_fast.data.buckets import Bucket, Plan
from osp_fast.data.order import rank_share
from osp_fast.errors import UserError
from osp_fast.parallel.mesh import check_sp_size
from osp_fast.training.place import batch_sizes
from osp_fast.training.shared_clips import Contents

RANKS, DRAWS = 4, 4000
IMAGE, VIDEO = Bucket(1, 64, 64), Bucket(17, 64, 64)
NOTHING = Contents(torch.zeros(8, 1, 2, 2), torch.zeros(4, 8), torch.ones(4))


@pytest.mark.parametrize("sp_size", [1, 2, 4])
def test_timesteps_of_a_long_run_are_uniform_and_the_same_within_a_group(make_loss, make_clip, sp_size):
    maker, groups = make_loss().maker, RANKS // sp_size
    clips = [make_clip(slot, (1, 16, 16)) for slot in range(groups)]
    drawn = []
    for step in range(DRAWS // groups):
        # All ranks in the first steps, then the first one of each group.
        for rank in range(0, RANKS, 1 if step < 20 else sp_size):
            slots = rank_share(range(groups), rank // sp_size, groups)
            made = maker([clips[slot] for slot in slots], [NOTHING], step, groups, sp_size)
            if rank % sp_size == 0:
                first = made
                drawn.append(int(first.timesteps))
            assert torch.equal(made.noise, first.noise) and torch.equal(made.timesteps, first.timesteps)
    assert len(drawn) == DRAWS and min(drawn) < 5 and max(drawn) > 994
    counts = torch.histc(torch.tensor(drawn, dtype=torch.float), bins=20, min=0, max=1000)
    expected = DRAWS / 20
    assert ((counts - expected).square() / expected).sum() < 43.8  # chi-square of 19 degrees of freedom, 0.1 %


def test_batches_of_groups_and_of_ranks():
    plan = Plan(clips=[IMAGE] * 9 + [VIDEO] * 9, buckets={IMAGE: list(range(9)), VIDEO: list(range(9, 18))})
    config = TrainConfig(data=DataConfig(group_data=True))
    config.model.model, config.run.sp_size, config.run.train_sp_batch_size = "tiny", 2, 3
    config.optimizer.train_batch_size, config.optimizer.gradient_accumulation_steps = 5, 2
    sizes = batch_sizes(plan, config, RANKS)
    assert sizes.micro == {IMAGE: 5, VIDEO: 3} and sizes.together == {IMAGE: 1, VIDEO: 2}
    assert sizes.steps == {IMAGE: 5 * 2 * 4, VIDEO: 3 * 2 * 2}
    config.optimizer.tokens_per_batch = 100  # for each rank: 16 of an image, 40 of its half of a video
    assert batch_sizes(plan, config, RANKS).micro == {IMAGE: 6, VIDEO: 2}
    config.optimizer.tokens_per_batch, config.data.group_data = None, False
    assert batch_sizes(plan, config, RANKS).for_order == 3 * 2 * 2


def test_ranks_that_do_not_make_groups_are_refused():
    with pytest.raises(UserError, match="--sp_size 3 does not divide the 4 GPUs of the run"):
        check_sp_size(3, 4)
    with pytest.raises(UserError, match="--sp_size 8 is more than the one GPU of the run: start it with torchrun"):
        check_sp_size(8, 1)
