"""A WF-VAE without training: principal components of wavelet coefficients, written as the network's weights.

The lowest level of the network's wavelet pyramid has 24 coefficients per latent cell. Their eight principal components
over a data set become the latents. The weights route them through the real architecture: every residual block and
attention is an identity (its last convolution is zero), and the norm and SiLU before the encoder's output are undone,
because silu(z) - silu(-z) = z, and large constant channels make the norm's deviation a constant.

What it keeps is the coarse picture, 4x4 pixels and 2 frames fine at best; that is enough for coloured shapes.
"""

import dataclasses
import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from osp_fast.kernels.haar import haar2d_ref, haar3d_ref
from osp_fast.models.wfvae import WFVAE, WFVAE_CONFIGS

COEFFICIENTS = 24
CARRIER = 3000.0  # constant channels, a hundred times a latent's range, so that the norm's deviation hardly moves
LOGVAR = -20.0


def wavelet_codec(videos: Iterable[Tensor]) -> WFVAE:
    """Fit the codec to videos (3, T, H, W) in [-1, 1].

    Latents come out with zero mean and, over all channels, unit variance. A channel's deviation is the root of its
    component's: made all equal, the faint components would take as much of a small model's attention as the strong.
    """
    mean, basis, variance = _principal_components(videos)
    scale = variance**-0.25 / variance.sqrt().mean().sqrt()
    with torch.device("meta"):
        vae = WFVAE(dataclasses.replace(WFVAE_CONFIGS["tiny"], scale=tuple(scale.tolist())))
    vae.to_empty(device="cpu")
    with torch.no_grad():
        _write_identities(vae)
        _write_encoder(vae, mean, basis)
        _write_decoder(vae, mean, basis)
    return vae


def _principal_components(videos: Iterable[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (24,), basis (8, 24) and variances (8,) of the lowest wavelet level over all latent cells."""
    count, total, products = 0, torch.zeros(COEFFICIENTS).double(), torch.zeros(COEFFICIENTS, COEFFICIENTS).double()
    for video in videos:
        low = haar2d_ref(haar3d_ref(video[None])[:, :3])[:, :3]
        cells = haar3d_ref(low)[0].flatten(1).double()
        count += cells.shape[1]
        total += cells.sum(1)
        products += cells @ cells.T
    mean = total / count
    eigenvalues, vectors = torch.linalg.eigh(products / count - torch.outer(mean, mean))
    latent_dim = WFVAE_CONFIGS["tiny"].latent_dim
    basis = vectors.T.flip(0)[:latent_dim]
    # Eigenvectors are known up to their sign; fix it, so that every machine writes the same file.
    basis = basis * basis.gather(1, basis.abs().argmax(1, keepdim=True)).sign()
    return mean.float(), basis.float(), eigenvalues.flip(0)[:latent_dim].clamp_min(1e-6).float()


def _write_identities(vae: WFVAE) -> None:
    """Zero every convolution and set every norm to one; residual blocks of equal width become identities."""
    for module in vae.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            module.weight.zero_()
            module.bias.zero_()
        elif isinstance(module, nn.LayerNorm):
            module.weight.fill_(1.0)
            module.bias.zero_()


def _write_encoder(vae: WFVAE, mean: Tensor, basis: Tensor) -> None:
    """Latents z as channel pairs (z, -z) beside constant carriers; norm and SiLU undone; pairs subtracted."""
    encoder, latent_dim = vae.encoder, len(basis)
    pairs = torch.cat((basis, -basis))
    encoder.connect_l2.weight[: 2 * latent_dim, :, 1, 1] = pairs
    encoder.connect_l2.bias[: 2 * latent_dim] = -pairs @ mean
    widen = encoder.mid[0].nin_shortcut.conv
    main = widen.in_channels - encoder.connect_l2.out_channels
    index = torch.arange(2 * latent_dim)
    widen.weight[index, main + index] = 1.0
    carriers = widen.bias[2 * latent_dim :]
    carriers[0::2], carriers[1::2] = CARRIER, -CARRIER
    encoder.norm_out.norm.weight.fill_(CARRIER * math.sqrt(len(carriers) / widen.out_channels))
    out = encoder.conv_out.conv
    index = torch.arange(latent_dim)
    out.weight[index, index, -1, 1, 1] = 1.0
    out.weight[index, index + latent_dim, -1, 1, 1] = -1.0
    out.bias[latent_dim:] = LOGVAR


def _write_decoder(vae: WFVAE, mean: Tensor, basis: Tensor) -> None:
    """Latents leave the main path after `mid` as the 24 coefficients that they stand for."""
    decoder, latent_dim = vae.decoder, len(basis)
    index = torch.arange(latent_dim)
    decoder.conv_in.conv.weight[index, index, -1, 1, 1] = 1.0
    leave = decoder.mid[-1].nin_shortcut.conv
    leave.weight[-COEFFICIENTS:, :latent_dim, 0, 0, 0] = basis.T
    leave.bias[-COEFFICIENTS:] = mean
    index = torch.arange(COEFFICIENTS)
    decoder.connect_l2[-1].weight[index, index, 1, 1] = 1.0
