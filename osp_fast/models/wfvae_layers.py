"""Layers that the WF-VAE's encoder and decoder share.

Parameter names are those of released checkpoints (a convolution is `conv`, a norm `norm` inside its wrapper). A clip
comes in temporal chunks, the whole clip being one of them; what a layer carries from chunk to chunk is in a
`ChunkState`. Every layer that may see a part of a frame says by `needs` which of its input's rows (columns alike) an
interval of its output depends on, so that tiles get halos that are exactly wide enough.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from osp_fast.kernels.channel_norm import channel_norm
from osp_fast.models.wfvae_conv import causal_conv3d, frame_conv, point_conv

NORM_EPS = 1e-6
SCORE_BYTES = 128 << 20  # of attention scores in float32, if no fused kernel serves; more are computed in turns
Span = tuple[int, int]  # rows or columns [first, end)


class ChunkState:
    """What one pass over a clip (or over one tile of its frames) in temporal chunks carries from chunk to chunk.

    `first` and `last` say where the current chunk stands; `kept` holds what each layer carries, keyed by the layer.
    """

    def __init__(self) -> None:
        self.first = True
        self.last = False
        self.kept: dict[nn.Module, Any] = {}


class CausalConv3d(nn.Module):
    """A convolution that is causal in time; see `wfvae_conv.py`."""

    def __init__(self, channels: int, out_channels: int, kernel: int, stride: int = 1):
        super().__init__()
        self.conv = nn.Conv3d(channels, out_channels, kernel, stride)

    def needs(self, rows: Span) -> Span:
        """Rows of the input that rows of the output depend on."""
        if self.conv.stride[0] == 2:
            return stride_2_needs(rows)
        reach = self.conv.kernel_size[1] // 2
        return rows[0] - reach, rows[1] + reach

    def forward(self, x: Tensor, state: ChunkState) -> Tensor:
        """(B, C, T, H, W) -> (B, C_out, T', H', W')."""
        carry = None if state.first else state.kept.pop(self)
        out, carry = causal_conv3d(x, self.conv.weight, self.conv.bias, self.conv.stride[0], carry, state.last)
        if carry is not None:
            state.kept[self] = carry
        return out


class PointConv(nn.Module):
    """A 1x1x1 convolution."""

    def __init__(self, channels: int, out_channels: int):
        super().__init__()
        self.conv = nn.Conv3d(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, C_out, T, H, W)."""
        return point_conv(x, self.conv.weight, self.conv.bias)


class ChannelNorm(nn.Module):
    """LayerNorm over channels, optionally followed by SiLU."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.LayerNorm(channels, NORM_EPS)

    def forward(self, x: Tensor, silu: bool = False) -> Tensor:
        """(B, C, ...) -> the same shape, in channels-last memory."""
        return channel_norm(x, self.norm.weight, self.norm.bias, self.norm.eps, silu)


class FrameConv(nn.Conv2d):
    """A 3x3 convolution of each frame; with stride 2, one zero at the right and at the bottom."""

    def __init__(self, channels: int, out_channels: int, stride: int = 1):
        super().__init__(channels, out_channels, 3, stride)

    def needs(self, rows: Span) -> Span:
        """Rows of the input that rows of the output depend on."""
        return stride_2_needs(rows) if self.stride[0] == 2 else (rows[0] - 1, rows[1] + 1)

    def forward(self, x: Tensor, state: ChunkState | None = None) -> Tensor:
        """(B, C, T, H, W) -> (B, C_out, T, H', W')."""
        return frame_conv(x, self.weight, self.bias, self.stride[0])


class ResidualBlock(nn.Module):
    """norm, SiLU, conv, norm, SiLU, conv, plus the input (through a 1x1x1 convolution when widths differ)."""

    def __init__(self, channels: int, out_channels: int):
        super().__init__()
        self.norm1 = ChannelNorm(channels)
        self.conv1 = CausalConv3d(channels, out_channels, 3)
        self.norm2 = ChannelNorm(out_channels)
        self.conv2 = CausalConv3d(out_channels, out_channels, 3)
        self.nin_shortcut = PointConv(channels, out_channels) if channels != out_channels else None

    def needs(self, rows: Span) -> Span:
        """Rows of the input that rows of the output depend on."""
        return self.conv1.needs(self.conv2.needs(rows))

    def forward(self, x: Tensor, state: ChunkState) -> Tensor:
        """(B, C, T, H, W) -> (B, C_out, T, H, W)."""
        hidden = self.conv1(self.norm1(x, silu=True), state)
        hidden = self.norm2(hidden, silu=True)
        hidden = self.conv2(hidden, state)
        hidden += x if self.nin_shortcut is None else self.nin_shortcut(x)
        return hidden


class ResidualBlock2d(nn.Module):
    """The same per frame with 2D convolutions."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm1 = ChannelNorm(channels)
        self.conv1 = FrameConv(channels, channels)
        self.norm2 = ChannelNorm(channels)
        self.conv2 = FrameConv(channels, channels)

    def needs(self, rows: Span) -> Span:
        """Rows of the input that rows of the output depend on."""
        return self.conv1.needs(self.conv2.needs(rows))

    def forward(self, x: Tensor, state: ChunkState) -> Tensor:
        """(B, C, T, H, W) -> the same shape."""
        hidden = self.conv1(self.norm1(x, silu=True))
        hidden = self.norm2(hidden, silu=True)
        hidden = self.conv2(hidden)
        hidden += x
        return hidden


class FrameAttention(nn.Module):
    """One head over the positions of each frame, from the normed input, added to the input."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.q = PointConv(channels, channels)
        self.k = PointConv(channels, channels)
        self.v = PointConv(channels, channels)
        self.proj_out = PointConv(channels, channels)

    def forward(self, x: Tensor, state: ChunkState) -> Tensor:
        """(B, C, T, H, W), whole frames -> the same shape; softmax scale 1 / sqrt(C)."""
        batch, _, frames, rows, columns = x.shape
        normed = self.norm(x)
        q, k, v = (layer(normed).movedim(1, -1).flatten(2, 3) for layer in (self.q, self.k, self.v))
        del normed
        turns = -(-batch * frames * (rows * columns) ** 2 * 4 // SCORE_BYTES)
        parts = [_attend(part, k, v) for part in q.tensor_split(turns, dim=2)]
        attended = torch.cat(parts, dim=2) if turns > 1 else parts[0]
        out = self.proj_out(attended.unflatten(2, (rows, columns)).movedim(-1, 1))
        out += x
        return out


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention over dimension 2 of (B, T, N, C)."""
    if q.is_meta:  # PyTorch would trace its plain formula there; the fused kernels of real devices hold the result only
        return torch.empty_like(q)
    return F.scaled_dot_product_attention(q, k, v)


def stride_2_needs(rows: Span) -> Span:
    """Rows that a 3x3 window at every second row, beginning at row 0, sees for these rows of the output."""
    return 2 * rows[0], 2 * rows[1] + 1


def run(layers: Iterable[nn.Module], x: Tensor, state: ChunkState) -> Tensor:
    """Apply layers in turn, handing each the state."""
    for layer in layers:
        x = layer(x, state)
    return x


def needs(layers: nn.ModuleList, rows: Span) -> Span:
    """Rows of the first layer's input that rows of the last one's output depend on."""
    for layer in reversed(layers):
        rows = layer.needs(rows)
    return rows


def union(one: Span, other: Span) -> Span:
    """The smallest interval that holds both."""
    return min(one[0], other[0]), max(one[1], other[1])


def mid_layers(channels: int, width: int, out_channels: int, attention: bool) -> nn.ModuleList:
    """residual, attention over each frame (if wanted), residual."""
    middle = [FrameAttention(width)] if attention else []
    return nn.ModuleList([ResidualBlock(channels, width), *middle, ResidualBlock(width, out_channels)])
