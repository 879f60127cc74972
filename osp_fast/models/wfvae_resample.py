"""How the WF-VAE halves and doubles time, rows and columns, chunk by chunk."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from osp_fast.kernels.causal_conv3d_sums import by_frames
from osp_fast.models.wfvae_layers import CausalConv3d, ChunkState, FrameConv, Span


class Downsample2d(nn.Module):
    """Halve rows and columns of each frame."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = FrameConv(channels, channels, stride=2)

    def needs(self, rows: Span) -> Span:
        """Rows of the input that rows of the output depend on."""
        return self.conv.needs(rows)

    def forward(self, x: Tensor, state: ChunkState) -> Tensor:
        """(B, C, T, H, W) -> (B, C, T, H/2, W/2)."""
        return self.conv(x)


class Downsample3d(nn.Module):
    """Halve time, rows and columns."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = CausalConv3d(channels, channels, 3, stride=2)

    def needs(self, rows: Span) -> Span:
        """Rows of the input that rows of the output depend on."""
        return self.conv.needs(rows)

    def forward(self, x: Tensor, state: ChunkState) -> Tensor:
        """(B, C, T, H, W) -> (B, C, T', H/2, W/2), T' = (T + 1) / 2 in the first chunk, T / 2 after it."""
        return self.conv(x, state)


class Upsample2d(nn.Module):
    """Double rows and columns of each frame by repetition, then a 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = FrameConv(channels, channels)

    def needs(self, rows: Span) -> Span:
        """Rows of the input that rows of the output depend on."""
        first, end = self.conv.needs(rows)
        return first // 2, (end + 1) // 2

    def forward(self, x: Tensor, state: ChunkState) -> Tensor:
        """(B, C, T, H, W) -> (B, C, T, 2H, 2W)."""
        # Of images, whose channels-last memory PyTorch's kernel takes as it is; of videos it makes planar copies.
        return self.conv(by_frames(x, lambda images: F.interpolate(images, scale_factor=2, mode="nearest")))


class Interpolation(nn.Module):
    """Double every frame but the clip's first in time, linearly or by repetition; all in rows and columns, linearly.

    A linear chunk that is not the last holds its last frame back (doubled in rows and columns), as the frame after it
    plays a part in it. No parameters.
    """

    def __init__(self, mode: str):
        super().__init__()
        self.looks_ahead = mode == "trilinear"

    def needs(self, rows: Span) -> Span:
        """Rows of the input that rows of the output depend on."""
        return (rows[0] - 1) // 2, rows[1] // 2 + 1

    def forward(self, x: Tensor, state: ChunkState) -> Tensor:
        """(B, C, T, H, W) -> (B, C, T', 2H, 2W), T' = 2T - 1 for a whole clip."""
        if not self.looks_ahead:
            doubled = F.interpolate(x, scale_factor=(2, 1, 1), mode="nearest")
            return double_space(doubled[:, :, 1:] if state.first else doubled)
        held = state.kept.pop(self, None)
        out = _Trilinear.apply(x, held, state.first, not state.last)
        if not state.last and not (state.first and x.shape[2] == 1):
            state.kept[self] = double_space(x[:, :, -1:])
        return out


class _Trilinear(torch.autograd.Function):
    """Interpolation of one chunk, each part written where it belongs: there is nothing to concatenate."""

    @staticmethod
    def forward(ctx, x: Tensor, held: Tensor | None, alone: bool, holds_back: bool) -> Tensor:
        ctx.save_for_backward(x, held)
        ctx.options = alone, holds_back
        rest = x[:, :, 1:] if alone else x
        before = 1 if alone or held is not None else 0
        after = 2 * rest.shape[2] - holds_back if rest.shape[2] else 0
        batch, channels, _, rows, columns = x.shape
        out = x.new_empty((batch, before + after, 2 * rows, 2 * columns, channels)).movedim(-1, 1)
        for sample in range(batch):  # of one sample, frames are contiguous
            if alone:
                _write_doubled(x[sample, None, :, :1], out[sample, None, :, :1], time=1.0)
            if after:
                _write_doubled(rest[sample, None], out[sample, None, :, before:], time=2.0)
        if held is not None:
            # So far the first new frame stands as if nothing came before it.
            new = out[:, :, 1:2]
            torch.lerp(held, new, 0.25, out=out[:, :, :1])
            new.lerp_(held, 0.25)
        return out

    @staticmethod
    def backward(ctx, grad):
        inputs = [None if x is None else x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            out = trilinear_ref(*inputs, *ctx.options)
        given = [x for x in inputs if x is not None]
        grads = torch.autograd.grad(out, given, grad)
        return grads[0], grads[1] if len(grads) > 1 else None, None, None


def trilinear_ref(x: Tensor, held: Tensor | None, alone: bool, holds_back: bool) -> Tensor:
    """The formula of `Interpolation`'s chunks, in plain PyTorch."""
    first, rest = (x[:, :, :1], x[:, :, 1:]) if alone else (x[:, :, :0], x)
    parts = [double_space(first)] if alone else []
    if rest.shape[2]:
        rest = double_space(rest)
        frames = rest if held is None else torch.cat((held, rest), dim=2)
        doubled = F.interpolate(frames, scale_factor=(2, 1, 1), mode="trilinear")
        # Of the frame before, the first half is out already.
        parts.append(doubled[:, :, 0 if held is None else 1 : -1 if holds_back else None])
    return torch.cat(parts, dim=2)


def double_space(x: Tensor) -> Tensor:
    """(B, C, T, H, W) -> (B, C, T, 2H, 2W), linearly."""
    return F.interpolate(x, scale_factor=(1, 2, 2), mode="trilinear")


def _write_doubled(x: Tensor, out: Tensor, time: float) -> None:
    """Write the first frames of x's doubling in space, and in time by `time`, into out."""
    torch.ops.aten.upsample_trilinear3d.out(x, out.shape[2:], False, time, 2.0, 2.0, out=out)


class Upsample3d(nn.Module):
    """Double time (but for the first frame), rows and columns, then a causal convolution."""

    def __init__(self, channels: int, t_interpolation: str):
        super().__init__()
        self.interpolation = Interpolation(t_interpolation)
        self.conv = CausalConv3d(channels, channels, 3)

    def needs(self, rows: Span) -> Span:
        """Rows of the input that rows of the output depend on."""
        return self.interpolation.needs(self.conv.needs(rows))

    def forward(self, x: Tensor, state: ChunkState) -> Tensor:
        """(B, C, T, H, W) -> (B, C, T', 2H, 2W)."""
        return self.conv(self.conv.prepare(x, state, self.interpolation, last_frames=1), state)
