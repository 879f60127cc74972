"""Layers that the WF-VAE's encoder and decoder share.

Parameter names are those of released checkpoints (a convolution is `conv`, a norm `norm` inside its wrapper). Layers
that look back in time take a `ChunkState`, or None when they are given the whole clip at once.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from osp_fast.kernels.causal_conv3d import causal_conv3d_ref
from osp_fast.kernels.channel_norm import channel_norm

NORM_EPS = 1e-6


class ChunkState:
    """What one pass over a clip in temporal chunks carries from chunk to chunk.

    `first` and `last` say where the current chunk stands; `kept` holds each layer's frames, keyed by the layer.
    """

    def __init__(self) -> None:
        self.first = True
        self.last = False
        self.kept: dict[nn.Module, Tensor | None] = {}


class CausalConv3d(nn.Module):
    """A convolution that is causal in time; see `kernels/causal_conv3d.py`."""

    def __init__(self, channels: int, out_channels: int, kernel: int, stride: int = 1):
        super().__init__()
        self.conv = nn.Conv3d(channels, out_channels, kernel, stride)

    def forward(self, x: Tensor, state: ChunkState | None) -> Tensor:
        """(B, C, T, H, W) -> (B, C_out, T', H', W')."""
        cache = None if state is None else state.kept.get(self)
        out, tail = causal_conv3d_ref(x, self.conv.weight, self.conv.bias, self.conv.stride[0], cache)
        if state is not None:
            state.kept[self] = tail
        return out


class PointConv(CausalConv3d):
    """A 1x1x1 convolution: nothing to carry."""

    def __init__(self, channels: int, out_channels: int):
        super().__init__(channels, out_channels, kernel=1)

    def forward(self, x: Tensor, state: ChunkState | None = None) -> Tensor:
        """(B, C, T, H, W) -> (B, C_out, T, H, W)."""
        return self.conv(x)


class ChannelNorm(nn.Module):
    """LayerNorm over channels, optionally followed by SiLU."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.LayerNorm(channels, NORM_EPS)

    def forward(self, x: Tensor, silu: bool = False) -> Tensor:
        """(B, C, ...) -> the same shape."""
        return channel_norm(x, self.norm.weight, self.norm.bias, self.norm.eps, silu)


class ResidualBlock(nn.Module):
    """norm, SiLU, conv, norm, SiLU, conv, plus the input (through a 1x1x1 convolution when widths differ)."""

    def __init__(self, channels: int, out_channels: int):
        super().__init__()
        self.norm1 = ChannelNorm(channels)
        self.conv1 = CausalConv3d(channels, out_channels, 3)
        self.norm2 = ChannelNorm(out_channels)
        self.conv2 = CausalConv3d(out_channels, out_channels, 3)
        self.nin_shortcut = PointConv(channels, out_channels) if channels != out_channels else None

    def forward(self, x: Tensor, state: ChunkState | None) -> Tensor:
        """(B, C, T, H, W) -> (B, C_out, T, H, W)."""
        hidden = self.conv1(self.norm1(x, silu=True), state)
        hidden = self.conv2(self.norm2(hidden, silu=True), state)
        return hidden + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class ResidualBlock2d(nn.Module):
    """The same per frame with 2D convolutions."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm1 = ChannelNorm(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = ChannelNorm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, state: ChunkState | None = None) -> Tensor:
        """(B, C, T, H, W) -> the same shape."""
        hidden = per_frame(self.conv1, self.norm1(x, silu=True))
        return x + per_frame(self.conv2, self.norm2(hidden, silu=True))


class FrameAttention(nn.Module):
    """One head over the positions of each frame, from the normed input, added to the input."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.q = PointConv(channels, channels)
        self.k = PointConv(channels, channels)
        self.v = PointConv(channels, channels)
        self.proj_out = PointConv(channels, channels)

    def forward(self, x: Tensor, state: ChunkState | None = None) -> Tensor:
        """(B, C, T, H, W) -> the same shape; softmax scale 1 / sqrt(C)."""
        normed = self.norm(x)
        q, k, v = (layer(normed).permute(0, 2, 3, 4, 1).flatten(2, 3) for layer in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v).unflatten(2, x.shape[3:]).permute(0, 4, 1, 2, 3)
        return x + self.proj_out(attended)


class FrameConv(nn.Conv2d):
    """A 3x3 convolution of each frame."""

    def __init__(self, channels: int, out_channels: int):
        super().__init__(channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor, state: ChunkState | None = None) -> Tensor:
        """(B, C, T, H, W) -> (B, C_out, T, H, W)."""
        return per_frame(super().forward, x)


def per_frame(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a layer of images (B, C, H, W) to each frame of a video (B, C, T, H, W)."""
    batch = x.shape[0]
    out = layer(x.transpose(1, 2).flatten(0, 1))
    return out.unflatten(0, (batch, -1)).transpose(1, 2)


def run(layers: nn.ModuleList, x: Tensor, state: ChunkState | None) -> Tensor:
    """Apply layers in turn, handing each the state."""
    for layer in layers:
        x = layer(x, state)
    return x


def mid_layers(channels: int, width: int, out_channels: int, attention: bool) -> nn.ModuleList:
    """residual, attention over each frame (if wanted), residual."""
    middle = [FrameAttention(width)] if attention else []
    return nn.ModuleList([ResidualBlock(channels, width), *middle, ResidualBlock(width, out_channels)])
