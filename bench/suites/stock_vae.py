"""The WF-VAE of stock PyTorch operations, in the usual way: what ours is compared with, in numbers, time and memory.

The clip at once, padded copies, norms of permuted activations; planar or channels-last memory. Parameters are those of
a `WFVAE`.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def filters(level: str) -> Tensor:
    """The wavelets of a level, l1 (4, 1, 2, 2) or l2 (8, 1, 2, 2, 2), bands by time, rows, columns."""
    from osp_fast.models.wfvae import wavelet_filters

    prefix, stored = f"decoder.inverse_wavelet_tranform_{level}.", wavelet_filters()
    if level == "l1":
        names = ["aa", "ad", "da", "dd"]
    else:
        names = [f"{rest}{time}" for rest in ("h", "hh", "g", "gh") for time in ("", "_v")]
        # The stored names are ordered by columns, rows, time.
        names = [names[4 * column + 2 * row + time] for time in (0, 1) for row in (0, 1) for column in (0, 1)]
    return torch.cat([stored[prefix + name] for name in names])


class StockLayers:
    """What encoder and decoder share.

    channels_last: of activations and of weights, of which this has its own; dtype: of both, the network's by default
    """

    def __init__(self, network: nn.Module, channels_last: bool, dtype: torch.dtype | None = None):
        self.channels_last, self.network = channels_last, copy.deepcopy(network).to(dtype)
        layouts = {4: torch.channels_last, 5: torch.channels_last_3d} if channels_last else {}
        for weight in self.network.parameters():
            weight.data = weight.data.contiguous(memory_format=layouts.get(weight.dim(), torch.contiguous_format))
        like = next(self.network.parameters())
        self.haar_3d, self.haar_2d = (filters(level).to(like) for level in ("l2", "l1"))

    def laid_out(self, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last_3d) if self.channels_last else x

    def middle(self, layers, x: Tensor) -> Tensor:
        first, attention, second = layers
        return self.residual(second, self.attention(attention, self.residual(first, x)))

    def causal(self, conv, x: Tensor, stride: int = 1) -> Tensor:
        x = F.pad(x, (0, 0, 0, 0, 2, 0), mode="replicate")
        return F.conv3d(x, conv.weight, conv.bias, stride, padding=(0, 1, 1) if stride == 1 else 0)

    def frames(self, conv, x: Tensor, stride: int = 1) -> Tensor:
        padding = 1 if stride == 1 else 0
        out = F.conv2d(x.transpose(1, 2).flatten(0, 1), conv.weight, conv.bias, stride, padding)
        return out.unflatten(0, (len(x), -1)).transpose(1, 2)

    def norm(self, norm, x: Tensor) -> Tensor:
        return norm(x.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)

    def residual(self, block, x: Tensor) -> Tensor:
        hidden = self.causal(block.conv1.conv, F.silu(self.norm(block.norm1.norm, x)))
        hidden = self.causal(block.conv2.conv, F.silu(self.norm(block.norm2.norm, hidden)))
        shortcut = block.nin_shortcut
        return hidden + (x if shortcut is None else F.conv3d(x, shortcut.conv.weight, shortcut.conv.bias))

    def attention(self, block, x: Tensor) -> Tensor:
        normed = self.norm(block.norm.norm, x)
        q, k, v = (F.conv3d(normed, part.conv.weight, part.conv.bias) for part in (block.q, block.k, block.v))
        q, k, v = (part.permute(0, 2, 3, 4, 1).flatten(2, 3) for part in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v).unflatten(2, x.shape[3:]).permute(0, 4, 1, 2, 3)
        return x + F.conv3d(out, block.proj_out.conv.weight, block.proj_out.conv.bias)


class StockDecoder(StockLayers):
    """Raw latents (B, C, T, h, w) -> video (B, 3, 4T - 3, 8h, 8w)."""

    def __init__(self, vae: nn.Module, channels_last: bool, dtype: torch.dtype | None = None):
        super().__init__(vae.decoder, channels_last, dtype)

    def __call__(self, latents: Tensor) -> Tensor:
        net = self.network
        x = self.middle(net.mid, self.causal(net.conv_in.conv, self.laid_out(latents)))
        x, flow = x[:, : -net.flow], x[:, -net.flow :]
        low = self.synthesis_3d(self.connect(net.connect_l2, flow))
        *blocks, upsample, last = net.up2
        for block in blocks:
            x = self.residual(block, x)
        x = self.residual(last, self.upsample_3d(upsample, x))
        x, flow = x[:, : -net.flow], x[:, -net.flow :]
        bands = self.connect(net.connect_l1, flow)
        low = self.synthesis_2d(torch.cat((bands[:, :3] + low, bands[:, 3:]), dim=1))
        *blocks, upsample, last = net.up1
        for block in blocks:
            x = self.residual(block, x)
        x = F.interpolate(x, scale_factor=(1, 2, 2), mode="nearest")
        x = self.residual(last, self.frames(upsample.conv, x))
        for block in net.layer:
            x = self.residual(block, x)
        bands = self.frames(net.conv_out, F.silu(self.norm(net.norm_out.norm, x)))
        return self.synthesis_3d(torch.cat((bands[:, :3] + low, bands[:, 3:]), dim=1))

    def connect(self, layers, x: Tensor) -> Tensor:
        for block in layers[:-1]:
            x = self.residual(block, x)
        return self.frames(layers[-1], x)

    def upsample_3d(self, layer, x: Tensor) -> Tensor:
        parts = [x[:, :, :1]]
        if x.shape[2] > 1:
            parts.append(F.interpolate(x[:, :, 1:], scale_factor=(2, 1, 1), mode="trilinear"))
        x = F.interpolate(torch.cat(parts, dim=2), scale_factor=(1, 2, 2), mode="trilinear")
        return self.causal(layer.conv.conv, x)

    def synthesis_3d(self, bands: Tensor) -> Tensor:
        # Band-major channels to colour-major ones, so that each colour is a group of its eight bands.
        bands = bands.unflatten(1, (8, 3)).transpose(1, 2).flatten(1, 2).contiguous()
        return F.conv_transpose3d(bands, self.haar_3d.repeat(3, 1, 1, 1, 1), stride=2, groups=3)[:, :, 1:]

    def synthesis_2d(self, bands: Tensor) -> Tensor:
        batch = len(bands)
        bands = bands.transpose(1, 2).flatten(0, 1).unflatten(1, (4, 3)).transpose(1, 2).flatten(1, 2)
        pixels = F.conv_transpose2d(bands.contiguous(), self.haar_2d.repeat(3, 1, 1, 1), stride=2, groups=3)
        return pixels.unflatten(0, (batch, -1)).transpose(1, 2)


class StockEncoder(StockLayers):
    """Video (B, 3, 4m + 1, H, W) in [-1, 1] -> mean and log-variance (B, 2 C, m + 1, H / 8, W / 8)."""

    def __init__(self, vae: nn.Module, channels_last: bool, dtype: torch.dtype | None = None):
        super().__init__(vae.encoder, channels_last, dtype)

    def __call__(self, video: Tensor) -> Tensor:
        net = self.network
        bands = self.analysis_3d(video)
        bands_l1 = self.analysis_2d(bands[:, :3])
        bands_l2 = self.analysis_3d(bands_l1[:, :3])
        first, *blocks, downsample = net.down1
        x = self.frames(first, self.laid_out(bands))
        for block in blocks:
            x = self.residual_2d(block, x)
        x = self.frames(downsample.conv, F.pad(x, (0, 1, 0, 1)), stride=2)
        first, *blocks, downsample = net.down2
        x = self.frames(first, torch.cat((x, self.frames(net.connect_l1, self.laid_out(bands_l1))), dim=1))
        for block in blocks:
            x = self.residual(block, x)
        x = self.causal(downsample.conv.conv, F.pad(x, (0, 1, 0, 1)), stride=2)
        x = torch.cat((x, self.frames(net.connect_l2, self.laid_out(bands_l2))), dim=1)
        x = self.middle(net.mid, x)
        return self.causal(net.conv_out.conv, F.silu(self.norm(net.norm_out.norm, x)))

    def residual_2d(self, block, x: Tensor) -> Tensor:
        hidden = self.frames(block.conv1, F.silu(self.norm(block.norm1.norm, x)))
        return x + self.frames(block.conv2, F.silu(self.norm(block.norm2.norm, hidden)))

    def analysis_3d(self, x: Tensor) -> Tensor:
        x = torch.cat((x[:, :, :1], x), dim=2)
        bands = F.conv3d(x, self.haar_3d.repeat(3, 1, 1, 1, 1), stride=2, groups=3)
        return bands.unflatten(1, (3, 8)).transpose(1, 2).flatten(1, 2)  # band-major

    def analysis_2d(self, x: Tensor) -> Tensor:
        bands = F.conv2d(x.transpose(1, 2).flatten(0, 1), self.haar_2d.repeat(3, 1, 1, 1), stride=2, groups=3)
        return bands.unflatten(1, (3, 4)).transpose(1, 2).flatten(1, 2).unflatten(0, (len(x), -1)).transpose(1, 2)
