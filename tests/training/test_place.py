"""The number of steps in an epoch."""

import pytest

from osp_fast.config import DataConfig, OptimizerConfig, TrainConfig
from osp_fast.data.buckets import Bucket, Plan
from osp_fast.data.order import epoch_batches
from osp_fast.training.place import steps_per_epoch


@pytest.mark.parametrize("group_data", [False, True])
@pytest.mark.parametrize("batch", [1, 3, 4, 100])
def test_steps_per_epoch_are_the_batches_that_the_order_makes(group_data, batch):
    shapes = [Bucket(1, 32, 32)] * 7 + [Bucket(5, 32, 32)] * 4 + [Bucket(5, 32, 64)]
    plan = Plan(clips=shapes, buckets={shape: [i for i, s in enumerate(shapes) if s == shape] for shape in set(shapes)})
    config = TrainConfig(data=DataConfig(group_data=group_data), optimizer=OptimizerConfig(train_batch_size=1))
    config.optimizer.gradient_accumulation_steps = batch
    batches = epoch_batches(shapes, seed=0, epoch=0, global_batch_size=batch, group_data=group_data)
    assert steps_per_epoch(plan, config) == len(batches)
