"""A clip's latents as tokens, one for each patch, and back.

Shape suffixes: b batch, c channels, t frames, h rows, w columns; p, q, r are the same three inside a patch.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn


class PatchEmbedding(nn.Conv3d):
    """A convolution with the patch as its kernel and stride: each patch becomes a token."""

    def __init__(self, channels: int, width: int, patch: tuple[int, int, int]):
        super().__init__(channels, width, patch, stride=patch)

    def forward(self, latents: Tensor, share: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """(B, C, T, H, W) -> (B, N, width), or of those patches alone that `share` takes out of all."""
        if share is None:
            return super().forward(latents).flatten(2).transpose(1, 2).contiguous()
        return F.linear(share(patchify(latents, self.kernel_size)), self.weight.flatten(1), self.bias)


def patchify(latents: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """(B, C, T, H, W) -> (B, N, C * p_t * p_h * p_w): tokens in (t, h, w) order, the channel first inside a patch.

    A product with a convolution's weight, flattened, is then that convolution with the patch as its stride.
    """
    frames, rows, columns = patch
    x_bctphqwr = latents.unflatten(4, (-1, columns)).unflatten(3, (-1, rows)).unflatten(2, (-1, frames))
    return x_bctphqwr.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)


def unpatchify(x: Tensor, size: tuple[int, ...], patch: tuple[int, int, int]) -> Tensor:
    """(B, N, p_t * p_h * p_w * C) -> (B, C, T, H, W); size: (T, H, W) in tokens. The channel is last inside a patch."""
    x_bthwpqrc = x.unflatten(1, size).unflatten(-1, (*patch, -1))
    return x_bthwpqrc.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)
