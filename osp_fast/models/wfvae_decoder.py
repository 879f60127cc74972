"""The WF-VAE's decoder: raw latents -> video.

In temporal chunks the decoder looks one frame ahead at the interpolation in `up2`: a chunk that is not the last holds
back the last interpolated frame, and the l2 branch of the wavelet pyramid is delayed by the same frame.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from osp_fast.kernels.haar import inverse_haar2d, inverse_haar3d
from osp_fast.models.wfvae_layers import (
    CausalConv3d,
    ChannelNorm,
    ChunkState,
    FrameConv,
    ResidualBlock,
    mid_layers,
    per_frame,
    run,
)

COLOURS = 3


class TimeInterpolation(nn.Module):
    """Double every frame but the clip's first in time; linear in between, or nearest. No parameters."""

    def __init__(self, mode: str):
        super().__init__()
        self.mode = mode

    @property
    def looks_ahead(self) -> bool:
        """Whether a frame's second half needs the frame after it."""
        return self.mode == "trilinear"

    def forward(self, x: Tensor, state: ChunkState | None) -> Tensor:
        """(B, C, T, H, W) -> 2T - 1 frames for a whole clip; chunk by chunk the same frames, one held back."""
        alone, rest = (x[:, :, :1], x[:, :, 1:]) if state is None or state.first else (x[:, :, :0], x)
        if state is None or not self.looks_ahead:
            return torch.cat((alone, self._double(rest)), dim=2) if rest.shape[2] else alone
        before = state.kept.get(self)
        held = before is not None
        frames = torch.cat((before, rest), dim=2) if held else rest
        if not frames.shape[2]:
            return alone
        state.kept[self] = frames[:, :, -1:]
        doubled = self._double(frames)
        # Of the frame before, the first half is out already; the last frame's second half waits for its successor.
        return torch.cat((alone, doubled[:, :, 1 if held else 0 : None if state.last else -1]), dim=2)

    def _double(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=(2, 1, 1), mode=self.mode)


class Upsample3d(nn.Module):
    """Double time (but for the first frame), rows and columns, then a causal convolution."""

    def __init__(self, channels: int, t_interpolation: str):
        super().__init__()
        self.time = TimeInterpolation(t_interpolation)
        self.conv = CausalConv3d(channels, channels, 3)

    def forward(self, x: Tensor, state: ChunkState | None) -> Tensor:
        """(B, C, T, H, W) -> (B, C, T', 2H, 2W)."""
        x = self.time(x, state)
        return self.conv(F.interpolate(x, scale_factor=(1, 2, 2), mode="trilinear"), state)


class Upsample2d(nn.Module):
    """Double rows and columns of each frame by repetition, then a 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, state: ChunkState | None = None) -> Tensor:
        """(B, C, T, H, W) -> (B, C, T, 2H, 2W)."""
        return per_frame(lambda frames: self.conv(F.interpolate(frames, scale_factor=2, mode="nearest")), x)


class DelayByHeldFrame(nn.Module):
    """Keeps the l2 branch in step with the main path while that holds back a frame. No parameters."""

    def forward(self, x: Tensor, state: ChunkState | None) -> Tensor:
        """(B, C, T, H, W): the frame kept before, then x, its last frame kept if the main path holds one back."""
        if state is None:
            return x
        before = state.kept.get(self)
        frames = x if before is None else torch.cat((before, x), dim=2)
        holds = not state.last and not (state.first and x.shape[2] == 1)
        state.kept[self] = frames[:, :, -1:] if holds else None
        return frames[:, :, :-1] if holds else frames


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
        self.delay = DelayByHeldFrame() if upsample.time.looks_ahead else None

    def forward(self, latents: Tensor, state: ChunkState | None) -> Tensor:
        """(B, latent_dim, T, H, W) -> (B, 3, T', 8H, 8W), T' = 4T - 3 for a whole clip."""
        first = state is None or state.first
        x = run(self.mid, self.conv_in(latents, state), state)
        x, flow = x[:, : -self.flow], x[:, -self.flow :]
        low_l2 = inverse_haar3d(run(self.connect_l2, flow, state), first)
        if self.delay is not None:
            low_l2 = self.delay(low_l2, state)
        x = run(self.up2, x, state)
        x, flow = x[:, : -self.flow], x[:, -self.flow :]
        low_l1 = inverse_haar2d(run(self.connect_l1, flow, state), low=low_l2)
        x = run(self.layer, run(self.up1, x, state), state)
        bands = self.conv_out(self.norm_out(x, silu=True))
        return inverse_haar3d(bands, first, low=low_l1)
