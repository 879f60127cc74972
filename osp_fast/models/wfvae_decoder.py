"""The WF-VAE's decoder: raw latents -> video, in two stages.

`early` works at the latents' resolution on whole frames, because its attention does; `late` goes up to pixels and may
be given tiles of the frames. In temporal chunks the decoder looks one frame ahead at the interpolation in `up2`: a
chunk that is not the last holds back one frame, and the l2 branch of the wavelet pyramid is delayed by the same frame.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn

from osp_fast.kernels.haar import inverse_haar2d, inverse_haar3d
from osp_fast.models.wfvae_layers import (
    CausalConv3d,
    ChannelNorm,
    ChunkState,
    FrameConv,
    ResidualBlock,
    Span,
    mid_layers,
    needs,
    run,
    union,
)
from osp_fast.models.wfvae_resample import Upsample2d, Upsample3d

COLOURS = 3


class DelayByHeldFrame(nn.Module):
    """Keeps the l2 branch in step with the main path while that holds back a frame. No parameters."""

    def forward(self, x: Tensor, state: ChunkState) -> list[Tensor]:
        """(B, C, T, H, W): the frame kept before, then x without its last frame if the main path holds one back."""
        parts = [part for part in (state.kept.pop(self, None),) if part is not None]
        if state.last or (state.first and x.shape[2] == 1):
            return [*parts, x]
        state.kept[self] = x[:, :, -1:]  # three channels: what it holds on to is small
        return [*parts, x[:, :, :-1]]


class Decoder(nn.Module):
    """Main path mid -> up2 -> up1 -> layer; its last channels leave for the wavelet pyramid after mid and up2."""

    def __init__(self, config) -> None:
        super().__init__()
        base, flow, blocks = (
            config.base_channels,
            config.decoder_energy_flow_hidden_size,
            config.decoder_num_resblocks,
        )
        connect = config.connect_res_layer_num
        self.flow = flow
        self.conv_in = CausalConv3d(config.latent_dim, 4 * base, 3)
        self.mid = mid_layers(4 * base, 4 * base, 4 * base + flow, config.use_attention)
        upsample = Upsample3d(4 * base, config.t_interpolation)
        self.up2 = nn.ModuleList(
            [
                *(ResidualBlock(4 * base, 4 * base) for _ in range(blocks)),
                upsample,
                ResidualBlock(4 * base, 4 * base + flow),
            ]
        )
        widths = [4 * base] + [2 * base] * blocks
        self.up1 = nn.ModuleList(
            [
                *(ResidualBlock(a, b) for a, b in pairwise(widths)),
                Upsample2d(2 * base),
                ResidualBlock(2 * base, 2 * base),
            ]
        )
        widths = [2 * base] + [base] * blocks
        self.layer = nn.ModuleList(ResidualBlock(a, b) for a, b in pairwise(widths))
        self.norm_out = ChannelNorm(base)
        self.conv_out = FrameConv(base, 8 * COLOURS)
        self.connect_l1 = nn.ModuleList(
            [*(ResidualBlock(flow, flow) for _ in range(connect)), FrameConv(flow, 4 * COLOURS)]
        )
        self.connect_l2 = nn.ModuleList(
            [*(ResidualBlock(flow, flow) for _ in range(connect)), FrameConv(flow, 8 * COLOURS)]
        )
        self.delay = DelayByHeldFrame() if upsample.interpolation.looks_ahead else None

    def early(self, latents: Tensor, state: ChunkState) -> Tensor:
        """(B, latent_dim, T, h, w) -> (B, width, T, h, w)."""
        pieces = self.conv_in.prepare(latents, state, _channels_last)
        return run(self.mid, self.conv_in(pieces, state), state)

    def late_needs(self, rows: Span) -> Span:
        """Rows of latent cells that rows of pixels depend on through `late`; may reach beyond the frame."""
        outer = _halved(rows)
        main = needs(self.up1, needs(self.layer, self.conv_out.needs(outer)))
        level_1 = needs(self.connect_l1, _halved(outer))
        level_2 = needs(self.connect_l2, _halved(_halved(outer)))
        return union(needs(self.up2, union(main, level_1)), level_2)

    def late(self, x: Tensor, state: ChunkState, dtype: torch.dtype | None = None) -> Tensor:
        """`early`'s result, whole frames or a tile -> pixels (B, 3, T', 8H, 8W), T' = 4T - 3 for a whole clip.

        dtype: of the pixels; by default the network's.
        """
        x, flow = x[:, : -self.flow], x[:, -self.flow :]
        # Three channels each: their sums cost nothing in float32, and every rounding of them would be seen.
        low = [inverse_haar3d(run(self.connect_l2, flow, state), state.first, torch.float32)]
        if self.delay is not None:
            low = self.delay(low[0], state)
        for layer in self.up2:  # and not `run`, beside which this function would hold on to x
            x = layer(x, state)
        x, flow = x[:, : -self.flow], x[:, -self.flow :]
        bands = run(self.connect_l1, flow, state)
        if len(low) > 1:
            start = 0
            for part in low:
                bands[:, :COLOURS, start : start + part.shape[2]].add_(part)
                start += part.shape[2]
        low = inverse_haar2d(bands, torch.float32, low=low[0] if len(low) == 1 else None)
        del bands, flow
        for layer in (*self.up1, *self.layer):
            x = layer(x, state)
        x = self.norm_out(x, silu=True)
        bands = self.conv_out(x)
        del x
        return inverse_haar3d(bands, state.first, dtype, low=low)


def _channels_last(x: Tensor, state: ChunkState) -> Tensor:
    """As all that follows is, too."""
    return x.contiguous(memory_format=torch.channels_last_3d)


def _halved(rows: Span) -> Span:
    """Rows of bands that rows of their synthesis depend on."""
    return rows[0] // 2, (rows[1] + 1) // 2
