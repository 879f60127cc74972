"""The WF-VAE's encoder: video -> mean and log-variance."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from osp_fast.kernels.haar import haar2d, haar3d
from osp_fast.models.wfvae_layers import (
    CausalConv3d,
    ChannelNorm,
    ChunkState,
    FrameConv,
    ResidualBlock,
    ResidualBlock2d,
    mid_layers,
    per_frame,
    run,
)

COLOURS = 3


class Downsample2d(nn.Module):
    """Halve rows and columns of each frame."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor, state: ChunkState | None = None) -> Tensor:
        """(B, C, T, H, W) -> (B, C, T, H/2, W/2); one zero at the right and at the bottom."""
        return per_frame(lambda frames: self.conv(F.pad(frames, (0, 1, 0, 1))), x)


class Downsample3d(nn.Module):
    """Halve time, rows and columns."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = CausalConv3d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor, state: ChunkState | None) -> Tensor:
        """(B, C, T, H, W) -> (B, C, T', H/2, W/2), T' = (T + 1) / 2 in the first chunk, T / 2 after it."""
        return self.conv(x, state)


class Encoder(nn.Module):
    """Main path down1 -> down2 -> mid, joined after each of the first two by a level of the wavelet pyramid."""

    def __init__(self, config) -> None:
        super().__init__()
        base, flow, blocks = (
            config.base_channels,
            config.encoder_energy_flow_hidden_size,
            config.encoder_num_resblocks,
        )
        self.down1 = nn.ModuleList(
            [FrameConv(8 * COLOURS, base), *(ResidualBlock2d(base) for _ in range(blocks)), Downsample2d(base)]
        )
        self.connect_l1 = FrameConv(4 * COLOURS, flow)
        self.down2 = nn.ModuleList(
            [
                FrameConv(base + flow, 2 * base),
                *(ResidualBlock(2 * base, 2 * base) for _ in range(blocks)),
                Downsample3d(2 * base),
            ]
        )
        self.connect_l2 = FrameConv(8 * COLOURS, flow)
        self.mid = mid_layers(2 * base + flow, 4 * base, 4 * base, config.use_attention)
        self.norm_out = ChannelNorm(4 * base)
        self.conv_out = CausalConv3d(4 * base, 2 * config.latent_dim, 3)

    def forward(self, video: Tensor, state: ChunkState | None) -> Tensor:
        """(B, 3, T, H, W) -> mean and log-variance, (B, 2 * latent_dim, T', H/8, W/8)."""
        first = state is None or state.first
        bands, low = haar3d(video, first, with_low=True)
        bands_l1, low = haar2d(low, with_low=True)
        bands_l2 = haar3d(low, first)
        x = run(self.down1, bands, state)
        x = torch.cat((x, self.connect_l1(bands_l1)), dim=1)
        x = run(self.down2, x, state)
        x = torch.cat((x, self.connect_l2(bands_l2)), dim=1)
        x = run(self.mid, x, state)
        return self.conv_out(self.norm_out(x, silu=True), state)
