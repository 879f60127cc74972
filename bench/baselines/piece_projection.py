"""What PyTorch offers for pieces: the unpacked copy and one product, or a product for each piece added to the last."""

import torch
import torch.nn.functional as F
from osp_fast.kernels.sequence_pack import SequenceLayout, output_pieces, unpack_output
from torch import Tensor

from bench.baselines import Baseline, compiled_reference, eager_reference, function_baseline


def baselines() -> tuple[Baseline, ...]:
    """The copy and the product, eager and compiled, and a product for each piece."""
    return eager_reference(unpacked), compiled_reference(unpacked), function_baseline("linear of each piece", added)


def unpacked(
    buffer: Tensor, weight: Tensor, bias: Tensor | None, layout: SequenceLayout, add: Tensor | None = None
) -> Tensor:
    """One product of what `unpack_output` copies."""
    y = F.linear(unpack_output(buffer, layout).flatten(2), weight, bias)
    return y if add is None else y + add


def added(
    buffer: Tensor, weight: Tensor, bias: Tensor | None, layout: SequenceLayout, add: Tensor | None = None
) -> Tensor:
    """A product for each piece, rounded and added to those before it."""
    pieces = [piece.transpose(0, 1) for piece in output_pieces(buffer, layout) if piece.shape[2]]
    columns = weight.split([piece.shape[2] for piece in pieces], 1)
    y = F.linear(pieces[0], columns[0], bias)
    if add is not None:
        y = y + add
    for piece, part in zip(pieces[1:], columns[1:], strict=True):
        y = torch.addmm(y.flatten(0, 1), piece.reshape(-1, piece.shape[2]), part.t()).view(y.shape)
    return y
