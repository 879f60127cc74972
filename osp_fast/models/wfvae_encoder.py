"""The WF-VAE's encoder: video -> mean and log-variance, in two stages.

`early` goes down to the latents' resolution and may be given tiles of the frames; `late` sees whole frames, because
its attention does.
"""

import torch
from torch import Tensor, nn

from osp_fast.kernels.haar import haar2d, haar3d
from osp_fast.models.wfvae_layers import (
    CausalConv3d,
    ChannelNorm,
    ChunkState,
    FrameConv,
    ResidualBlock,
    ResidualBlock2d,
    Span,
    mid_layers,
    needs,
    run,
    union,
)
from osp_fast.models.wfvae_resample import Downsample2d, Downsample3d

COLOURS = 3


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

    @property
    def width(self) -> int:
        """Channels between the stages."""
        return self.mid[0].norm1.norm.normalized_shape[0]

    def early_needs(self, rows: Span) -> Span:
        """Rows of pixels that rows of latent cells depend on through `early`; may reach beyond the frame."""
        joined = needs(self.down2, rows)
        main = needs(self.down1, joined)
        level_1 = self.connect_l1.needs(joined)
        level_2 = self.connect_l2.needs(rows)
        # Each wavelet level below another doubles: pixels, outer bands, bands of l1, bands of l2.
        outer = union(main, (2 * min(level_1[0], 2 * level_2[0]), 2 * max(level_1[1], 2 * level_2[1])))
        return 2 * outer[0], 2 * outer[1]

    def early(self, video: Tensor, state: ChunkState) -> Tensor:
        """(B, 3, T, H, W), uint8 or in [-1, 1] -> (B, width, T', H/8, W/8)."""
        dtype = self.connect_l1.weight.dtype
        x, low = haar3d(video, state.first, dtype, video.dtype == torch.uint8, with_low=True, channels_last=True)
        bands_l1, low = haar2d(low, with_low=True, channels_last=True)
        bands_l2 = haar3d(low, state.first, channels_last=True)
        for layer in self.down1:  # and not `run`, beside which this function would hold on to x
            x = layer(x, state)
        x = torch.cat((x, self.connect_l1(bands_l1)), dim=1)
        for layer in self.down2:
            x = layer(x, state)
        return torch.cat((x, self.connect_l2(bands_l2)), dim=1)

    def late(self, x: Tensor, state: ChunkState) -> Tensor:
        """Whole frames of `early` -> mean and log-variance, (B, 2 * latent_dim, T', H/8, W/8)."""
        x = run(self.mid, x, state)
        return self.conv_out(self.conv_out.prepare(x, state, self.norm_out.and_silu), state)
