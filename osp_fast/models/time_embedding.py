"""What the DiT makes of a timestep (AdaLN-single): nothing of it depends on the clip, so one call serves all steps."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TIME_CHANNELS = 256


class TimeContext(NamedTuple):
    """What the DiT needs of timesteps: e (B, d), and the six modulation vectors that all blocks share (B, 6, d)."""

    embedded: Tensor
    modulation: Tensor

    def at(self, index: int, batch: int) -> "TimeContext":
        """Number `index` of these timesteps, for a batch of clips."""
        return TimeContext(*(part[index].expand(batch, *part.shape[1:]).contiguous() for part in self))


class TimeEmbedding(nn.Module):
    """Timesteps -> their `TimeContext`."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIME_CHANNELS, width), nn.SiLU(), nn.Linear(width, width))
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, timestep: Tensor) -> TimeContext:
        """timestep (B,), 0..999."""
        half = TIME_CHANNELS // 2
        frequency = torch.exp(torch.arange(half, dtype=torch.float32, device=timestep.device) * (-math.log(1e4) / half))
        angle = timestep.float()[:, None] * frequency
        sinusoid = torch.cat((angle.cos(), angle.sin()), dim=-1)
        embedded = self.mlp(sinusoid.to(self.modulation.weight.dtype))
        return TimeContext(embedded, self.modulation(F.silu(embedded)).unflatten(-1, (6, -1)))
