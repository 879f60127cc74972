"""Twenty steps are the same, within rounding, whatever computes them."""

import pytest
import torch

from osp_fast.config import OptimizerConfig, TrainConfig
from osp_fast.models.dit import DiT, DiTConfig
from osp_fast.parallel.shards import LocalShards
from osp_fast.parallel.world import Ranks, World
from osp_fast.seeding import torch_generator
from osp_fast.training.ema import EMA
from osp_fast.training.optimizer import build_optimizer
from osp_fast.training.step import MicroBatch, Update, accumulate_gradients

STEPS = 20
SMALL = DiTConfig(
    num_layers=2, num_attention_heads=1, attention_head_dim=24, caption_channels=8, cross_attention_dim=24, sparse_n=2
)


def micro_batches(step: int) -> list[MicroBatch]:
    """A picture and a video in turn, noise for latents."""
    generator = torch_generator("curve", step)
    size = (1, 8, 1, 4, 6) if step % 2 else (1, 8, 2, 4, 4)
    latents, noise, text = (torch.randn(shape, generator=generator) for shape in (size, size, (1, 3, 8)))
    timesteps = torch.randint(0, 1000, (1,), generator=generator)
    return [MicroBatch(latents, noise, timesteps, text, torch.tensor([[1, 1, step % 3 // 2]]))]


@pytest.fixture
def curve(make_loss, monkeypatch):
    """Train a model for twenty steps. Returns the losses and the norms of the gradients, (2, 20)."""

    # Both blocks are skiparse then, one of each kind; cross-attention is full.
    monkeypatch.setattr("osp_fast.models.dit.FIRST_DENSE", -1)

    def run(shape: DiTConfig = SMALL, prepare=lambda dit: dit) -> torch.Tensor:
        dit = DiT.create(shape, 0)
        with torch.no_grad():
            for name, parameter in dit.named_parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=torch_generator("weights", name))
        loss = make_loss(TrainConfig(), dit=prepare(dit)).loss
        shards = LocalShards(dit)
        # With AdamW's usual epsilon gradients that are rounding alone would make steps of full size.
        optimizer = build_optimizer(shards.local, OptimizerConfig(learning_rate=0.01, adam_epsilon=1e-3))
        update = Update(shards, optimizer, EMA(shards, 0.9), World(Ranks(), torch.device("cpu")), 1.0)
        numbers = [update(accumulate_gradients(loss, micro_batches(step)), step + 1) for step in range(STEPS)]
        return torch.stack(numbers)[:, :2].T

    return run


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == (2, STEPS) and expected.isfinite().all()
    assert expected[0].std() > 0.01 * expected[0].mean()  # it is a curve
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=0)


def test_triton_kernels_and_reference(curve, monkeypatch):
    expected = curve()
    monkeypatch.setenv("OSP_FAST_KERNELS", "triton")
    found = curve(prepare=lambda dit: dit.use_attention("triton"))
    assert not torch.equal(found, expected)  # other code has run
    assert_same(found, expected)
