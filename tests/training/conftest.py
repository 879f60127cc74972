"""A model of a few thousand weights with the golden VAE, and clips that need no files."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from osp_fast.config import TrainConfig
from osp_fast.diffusion.schedule import DiffusionObjective
from osp_fast.models.dit import DiT, DiTConfig
from osp_fast.models.wfvae import WFVAE
from osp_fast.seeding import torch_generator
from osp_fast.training.prepare import BatchMaker
from osp_fast.training.step import DenoisingLoss, MicroBatch

SHAPE = DiTConfig(
    num_layers=3, num_attention_heads=2, attention_head_dim=12, caption_channels=8, cross_attention_dim=24
)


@dataclass
class Clip:
    """The parts of a loaded clip that a step needs."""

    slot: int
    pixels: torch.Tensor  # (3, T, H, W) uint8
    caption: str = "a red circle"
    path: str = "clip.mp4"
    clip_index: int = 0
    rank: int = 0


@dataclass
class Batch:
    """The parts of a step's batch that the loop needs."""

    epoch: int
    index: int
    batches_in_epoch: int
    size: int
    clips: list[Clip]
    wait_s: float = 0.0
    ranks_per_clip: int = 1

    @property
    def slots(self) -> list[int]:
        return [clip.slot for clip in self.clips]


class ClipLoss:
    """Clips, the step's number and its number of clips -> the loss of each, by way of a micro-batch."""

    def __init__(self, maker: BatchMaker, loss: DenoisingLoss):
        self.maker, self.loss, self.dit = maker, loss, loss.dit

    def make(self, clips: list[Clip], step: int, slots: int = 1) -> MicroBatch:
        return self.maker(clips, self.maker.read(clips, step), step, slots)

    def __call__(self, clips: list[Clip], step: int, slots: int = 1) -> torch.Tensor:
        return self.loss(self.make(clips, step, slots))


class Words(nn.Module):
    """A text encoder: one state for each of the first four letters, drawn from the letter."""

    def forward(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        letters = [f"{text:<4.4}" for text in texts]
        states = [[torch.randn(8, generator=torch_generator(letter)) for letter in word] for word in letters]
        mask = [[1] + [int(letter != " ") for letter in word[1:]] for word in letters]
        return torch.stack([torch.stack(row) for row in states]), torch.tensor(mask)


@pytest.fixture(scope="session")
def vae() -> WFVAE:
    folder = Path(__file__).parents[1] / "golden" / "vae"
    return WFVAE.from_pretrained(folder).requires_grad_(False)


@pytest.fixture(scope="session")
def make_clip() -> Callable[..., Clip]:
    """(slot, (T, H, W), name) -> a clip of noise that depends on them."""

    def make(slot: int, size: tuple[int, int, int] = (5, 32, 32), name: str = "") -> Clip:
        generator = torch_generator("pixels", slot, *size, name)
        return Clip(slot, torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator), path=name)

    return make


@pytest.fixture(scope="session")
def make_batches(make_clip) -> Callable[..., Iterator[Batch]]:
    """(clips per step, epoch, first batch) -> batches without end, three in an epoch; all from the place alone."""

    def make(clips: int, epoch: int = 0, first: int = 0, size: tuple[int, int, int] = (1, 16, 16)) -> Iterator[Batch]:
        while True:
            for index in range(first, 3):
                names = [f"{epoch}-{index}-{slot}" for slot in range(clips)]
                yield Batch(epoch, index, 3, clips, [make_clip(slot, size, name) for slot, name in enumerate(names)])
            epoch, first = epoch + 1, 0

    return make


@pytest.fixture(scope="session")
def make_loss(vae) -> Callable[..., ClipLoss]:
    """(config, shape, dit) -> the loss of a model whose prediction depends on all of its input."""

    def make(config: TrainConfig | None = None, shape: DiTConfig = SHAPE, dit: DiT | None = None) -> ClipLoss:
        if dit is None:
            dit = DiT.create(shape, 0)
            # A fresh model predicts zeros, whatever it is given.
            for name, parameter in dit.named_parameters():
                parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch_generator("weights", name))
        config, cpu = config or TrainConfig(), torch.device("cpu")
        objective = DiffusionObjective(config.diffusion, cpu)
        maker = BatchMaker(vae, Words(), objective, config, cpu, lambda line: print(line, file=sys.stderr))
        return ClipLoss(maker, DenoisingLoss(dit, objective, bf16=config.model.mixed_precision == "bf16"))

    return make
