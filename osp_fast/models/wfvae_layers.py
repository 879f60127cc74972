"""Layers that the WF-VAE's encoder and decoder share.

Parameter names are those of released checkpoints (a convolution is `conv`, a norm `norm` inside its wrapper). A clip
comes in temporal chunks, the whole clip being one of them; what a layer carries from chunk to chunk is in a
`ChunkState`. Every layer that may see a part of a frame says by `needs` which of its input's rows (columns alike) an
interval of its output depends on, so that tiles get halos that are exactly wide enough.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from osp_fast.kernels.causal_conv3d import causal_conv3d, causal_conv3d_ref, next_cache, serving_path
from osp_fast.kernels.causal_conv3d_launch import Stride
from osp_fast.kernels.causal_conv3d_sums import sum_of_chunk
from osp_fast.kernels.channel_norm import channel_norm

NORM_EPS = 1e-6
SCORE_BYTES = 128 << 20  # of attention scores in float32, if no fused kernel serves; more are computed in turns
Span = tuple[int, int]  # rows or columns [first, end)


class ChunkState:
    """What one pass over a clip (or over one tile of its frames) in temporal chunks carries from chunk to chunk.

    `first` and `last` say where the current chunk stands; `kept` holds what each layer carries, keyed by the layer.
    """

    def __init__(self, first: bool = True, last: bool = False, kept: dict[nn.Module, Any] | None = None) -> None:
        self.first = first
        self.last = last
        self.kept = {} if kept is None else kept


class CausalConv3d(nn.Module):
    """A convolution that is causal in time, of frames that `prepare` has made.

    Where Triton serves, the kernel reads the last frames of the chunk before in place, beside this chunk's. So that
    these do not hold on to all the memory of their chunk, nor are copied, they are prepared by themselves: a chunk
    comes in two pieces, which are convolved into one output. PyTorch's convolutions cannot write so: there the sums
    that are not finished yet are carried (`sum_of_chunk`), 16-bit ones rounded between the kernel's frames. Neither
    copies what `prepare` made to pad or to carry it; of an input that was not prepared, the frames to keep are copied.
    """

    def __init__(self, channels: int, out_channels: int, kernel: int, stride: int = 1):
        super().__init__()
        self.conv = nn.Conv3d(channels, out_channels, kernel, stride)
        keep_channels_last(self.conv)

    def needs(self, rows: Span) -> Span:
        """Rows of the input that rows of the output depend on."""
        if self.conv.stride[0] == 2:
            return stride_2_needs(rows)
        reach = self.conv.kernel_size[1] // 2
        return rows[0] - reach, rows[1] + reach

    def prepare(
        self, x: Tensor, state: ChunkState, make: Callable[[Tensor, ChunkState], Tensor], last_frames: int = 2
    ) -> list[Tensor]:
        """What `make` makes of a chunk, (B, C, T', H, W) in pieces, for a convolution of stride 1.

        last_frames: of x, of which the frames come that the next chunk sees.
        """
        begin = x.shape[2] - last_frames
        if state.last or begin < 1 or not self._reads_in_place(x):
            return [make(x, state)]
        states = (ChunkState(first, False, state.kept) for first in (state.first, False))
        return [make(part, part_state) for part, part_state in zip(x.tensor_split([begin], 2), states, strict=True)]

    def forward(self, x: Tensor | list[Tensor], state: ChunkState, residual: Tensor | None = None) -> Tensor:
        """(B, C, T, H, W), or pieces of it as `prepare` gives them -> (B, C_out, T', H', W'), plus the residual."""
        pieces = x if isinstance(x, list) else [x]
        if self._reads_in_place(pieces[0]):
            return self._in_place(pieces, state, residual, owned=pieces is x)
        conv, (x,) = self.conv, pieces
        if self._learns_whole_clips(x, state):
            out, _ = causal_conv3d_ref(x, conv.weight, conv.bias, conv.stride)
            return out if residual is None else out + residual
        carry = None if state.first else state.kept.pop(self)
        out, carry = sum_of_chunk(x, conv.weight, conv.bias, Stride(*conv.stride[:2]), carry, state.last)
        if carry is not None:
            state.kept[self] = carry
        if residual is not None:
            out += residual
        return out

    def _reads_in_place(self, x: Tensor) -> bool:
        conv = self.conv
        return serving_path(x.device, x.dtype, conv.in_channels, conv.out_channels, conv.kernel_size) == "triton"

    def _learns_whole_clips(self, x: Tensor, state: ChunkState) -> bool:
        """On a CPU PyTorch's own 3-D convolution takes 0.6 times as long with its backward as a sum of 2-D ones."""
        differentiated = torch.is_grad_enabled() and (x.requires_grad or self.conv.weight.requires_grad)
        return differentiated and x.device.type == "cpu" and state.first and state.last

    def _in_place(self, pieces: list[Tensor], state: ChunkState, residual: Tensor | None, owned: bool) -> Tensor:
        conv, cache, out, done = self.conv, state.kept.pop(self, None), None, 0
        if len(pieces) > 1 and torch.is_grad_enabled():
            given = (*pieces, *(cache or ()), *conv.parameters(), *(() if residual is None else (residual,)))
            if any(x.requires_grad for x in given):
                pieces = [torch.cat(pieces, dim=2)]  # autograd knows no output that is written in parts
        if len(pieces) > 1:
            first = pieces[0]
            size = (len(first), sum(piece.shape[2] for piece in pieces), *first.shape[3:], conv.out_channels)
            out = first.new_empty(size).movedim(-1, 1)
        for piece in pieces:
            place = slice(done, done + piece.shape[2])
            done = place.stop
            result = causal_conv3d(
                piece,
                conv.weight,
                conv.bias,
                conv.stride,
                cache,
                residual if out is None or residual is None else residual[:, :, place],
                out=None if out is None else out[:, :, place],
            )
            if not (state.last and piece is pieces[-1]):
                cache = next_cache(piece, cache, conv.kernel_size[0], conv.stride[0])
        if not state.last:
            # Frames of what another layer has made: a copy of one is less than all its chunk.
            state.kept[self] = cache if owned else [frame.clone() for frame in cache]
        return result if out is None else out


class PointConv(nn.Module):
    """A 1x1x1 convolution."""

    def __init__(self, channels: int, out_channels: int):
        super().__init__()
        self.conv = nn.Conv3d(channels, out_channels, 1)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """(B, C, T, H, W) -> (B, C_out, T, H, W), plus the residual."""
        return causal_conv3d(x, self.conv.weight, self.conv.bias, residual=residual)


class ChannelNorm(nn.Module):
    """LayerNorm over channels, optionally followed by SiLU."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.LayerNorm(channels, NORM_EPS)

    def forward(self, x: Tensor, silu: bool = False) -> Tensor:
        """(B, C, ...) -> the same shape, in channels-last memory."""
        return channel_norm(x, self.norm.weight, self.norm.bias, self.norm.eps, silu)

    def and_silu(self, x: Tensor, state: ChunkState) -> Tensor:
        """The norm and SiLU of a convolution's input."""
        return self(x, silu=True)


class FrameConv(nn.Conv2d):
    """A 3x3 convolution of each frame; with stride 2, one zero at the right and at the bottom."""

    def __init__(self, channels: int, out_channels: int, stride: int = 1):
        super().__init__(channels, out_channels, 3, stride)
        keep_channels_last(self)

    def needs(self, rows: Span) -> Span:
        """Rows of the input that rows of the output depend on."""
        return stride_2_needs(rows) if self.stride[0] == 2 else (rows[0] - 1, rows[1] + 1)

    def forward(self, x: Tensor, state: ChunkState | None = None, residual: Tensor | None = None) -> Tensor:
        """(B, C, T, H, W) -> (B, C_out, T, H', W'), plus the residual."""
        return causal_conv3d(x, self.weight, self.bias, (1, *self.stride), residual=residual)


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
        hidden = self.conv1(self.conv1.prepare(x, state, self.norm1.and_silu), state)
        hidden = self.conv2.prepare(hidden, state, self.norm2.and_silu)
        if self.nin_shortcut is None:
            return self.conv2(hidden, state, residual=x)
        hidden = self.conv2(hidden, state)
        return self.nin_shortcut(x, residual=hidden)


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
        return self.conv2(hidden, residual=x)


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
        return self.proj_out(attended.unflatten(2, (rows, columns)).movedim(-1, 1), residual=x)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention over dimension 2 of (B, T, N, C)."""
    if q.is_meta:  # PyTorch would trace its plain formula there; the fused kernels of real devices hold the result only
        return torch.empty_like(q)
    return F.scaled_dot_product_attention(q, k, v)


def keep_channels_last(conv: nn.Conv2d | nn.Conv3d) -> None:
    """Keep a convolution's weight with channels last, as its kernels read it."""
    layout = torch.channels_last if conv.weight.dim() == 4 else torch.channels_last_3d
    conv.weight.data = conv.weight.data.contiguous(memory_format=layout)


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
