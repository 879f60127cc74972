"""The number of steps in an epoch."""

import pytest

from osp_fast.config import DataConfig, OptimizerConfig, TrainConfig
from osp_fast.data.buckets import Bucket, Plan
from osp_fast.data.order import epoch_batches
from osp_fast.training.place import batch_sizes, steps_per_epoch, video_tokens


@pytest.mark.parametrize("group_data", [False, True])
@pytest.mark.parametrize("batch", [1, 3, 4, 100])
def test_steps_per_epoch_are_the_batches_that_the_order_makes(group_data, batch):
    shapes = [Bucket(1, 32, 32)] * 7 + [Bucket(5, 32, 32)] * 4 + [Bucket(5, 32, 64)]
    plan = Plan(clips=shapes, buckets={shape: [i for i, s in enumerate(shapes) if s == shape] for shape in set(shapes)})
    config = TrainConfig(data=DataConfig(group_data=group_data), optimizer=OptimizerConfig(train_batch_size=1))
    config.optimizer.gradient_accumulation_steps = batch
    batches = epoch_batches(shapes, seed=0, epoch=0, global_batch_size=batch, group_data=group_data)
    assert steps_per_epoch(plan, batch_sizes(plan, config, 1), group_data) == len(batches)


def test_a_budget_of_tokens_makes_batches_by_bucket():
    image, video = Bucket(1, 64, 64), Bucket(17, 64, 96)
    assert (video_tokens(image, "tiny"), video_tokens(video, "tiny")) == (16, 120)
    shapes = [image] * 20 + [video] * 5
    plan = Plan(clips=shapes, buckets={image: list(range(20)), video: list(range(20, 25))})
    config = TrainConfig(data=DataConfig(group_data=True))
    config.model.model, config.optimizer.gradient_accumulation_steps = "tiny", 2
    for budget, micro in ((100, {image: 6, video: 1}), (240, {image: 15, video: 2})):
        config.optimizer.tokens_per_batch = budget
        sizes = batch_sizes(plan, config, ranks=2)
        assert sizes.micro == micro and sizes.steps == {bucket: 4 * clips for bucket, clips in micro.items()}
        batches = epoch_batches(shapes, seed=0, epoch=0, global_batch_size=sizes.for_order, group_data=True)
        assert steps_per_epoch(plan, sizes, True) == len(batches)
        for batch in batches:
            buckets = {shapes[clip] for clip in batch}
            assert len(buckets) == 1 and len(batch) == sizes.steps[buckets.pop()]
        assert {clip for batch in batches for clip in batch} == set(range(25))
