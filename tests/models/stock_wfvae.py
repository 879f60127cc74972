"""The WF-VAE's decoder of stock PyTorch operations: what `WFVAE.decode` is compared with, in numbers and in time."""

import torch
import torch.nn.functional as F
from torch import Tensor

from osp_fast.models.wfvae import WFVAE, wavelet_filters


class StockDecoder:
    """The decoder's formulas in the usual way: the clip at once, padded copies, planar or channels-last memory."""

    def __init__(self, vae: WFVAE, channels_last: bool):
        self.network, self.channels_last = vae.decoder, channels_last
        filters = wavelet_filters()
        prefix = "decoder.inverse_wavelet_tranform_"
        names = [f"{rest}{time}" for rest in ("h", "hh", "g", "gh") for time in ("", "_v")]
        # Bands are ordered by time, rows, columns; the stored names by columns, rows, time.
        order = [names[4 * column + 2 * row + time] for time in (0, 1) for row in (0, 1) for column in (0, 1)]
        self.haar_3d = torch.cat([filters[f"{prefix}l2.{name}"] for name in order])
        self.haar_2d = torch.cat([filters[f"{prefix}l1.{name}"] for name in ("aa", "ad", "da", "dd")])

    def __call__(self, latents: Tensor) -> Tensor:
        net = self.network
        x = latents.contiguous(memory_format=torch.channels_last_3d) if self.channels_last else latents
        x = self.causal(net.conv_in.conv, x)
        first, attention, second = net.mid
        x = self.residual(second, self.attention(attention, self.residual(first, x)))
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

    def causal(self, conv, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, 0, 2, 0), mode="replicate")
        return F.conv3d(x, conv.weight, conv.bias, padding=(0, 1, 1))

    def frames(self, conv, x: Tensor) -> Tensor:
        out = F.conv2d(x.transpose(1, 2).flatten(0, 1), conv.weight, conv.bias, padding=1)
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
