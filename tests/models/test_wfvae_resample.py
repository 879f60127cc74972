"""Interpolation in chunks against the plain one of the whole clip, forward and backward."""

import pytest
import torch
import torch.nn.functional as F

from osp_fast.models.wfvae_layers import ChunkState
from osp_fast.models.wfvae_resample import Interpolation


def whole(x: torch.Tensor, mode: str) -> torch.Tensor:
    """Frame 0 alone, the others doubled among themselves; then rows and columns."""
    parts = [x[:, :, :1]]
    if x.shape[2] > 1:
        parts.append(F.interpolate(x[:, :, 1:], scale_factor=(2, 1, 1), mode=mode))
    return F.interpolate(torch.cat(parts, dim=2), scale_factor=(1, 2, 2), mode="trilinear")


def in_chunks(x: torch.Tensor, mode: str, lengths: list[int]) -> torch.Tensor:
    layer, state, outs = Interpolation(mode), ChunkState(), []
    for number, part in enumerate(x.split(lengths, dim=2)):
        state.last = number == len(lengths) - 1
        outs.append(layer(part, state))
        state.first = False
    assert not state.kept
    return torch.cat(outs, dim=2)


@pytest.mark.parametrize("mode", ["trilinear", "nearest"])
@pytest.mark.parametrize("lengths", [[1], [4], [1, 1, 1], [1, 3], [2, 1, 2], [3, 3]])
def test_chunks(mode, lengths):
    x = torch.randn(2, 3, sum(lengths), 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = x.contiguous(memory_format=torch.channels_last_3d).requires_grad_()
    found, expected = in_chunks(x, mode, lengths), whole(x, mode)
    torch.testing.assert_close(found, expected)
    slope = torch.linspace(0, 1, expected.numel(), dtype=x.dtype).view_as(expected)
    torch.testing.assert_close(
        *(torch.autograd.grad((out * slope).sum(), x, retain_graph=True)[0] for out in (found, expected))
    )
    with torch.no_grad():
        torch.testing.assert_close(in_chunks(x, mode, lengths), expected)
