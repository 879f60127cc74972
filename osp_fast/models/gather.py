"""Skip sets gathered for attention kernels that know dense sequences only, and the results put back in token order.

Shape suffixes: b batch, m keys, s sets, h heads, d head dimension. L is the length of a set.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def visible_keys(k_bmhd: Tensor, key_mask: Tensor | None, key_lengths: Tensor | None) -> Tensor | None:
    """(B, M) bool, true where a key may be seen; None if all may."""
    visible = None if key_mask is None else key_mask.bool()
    if key_lengths is not None:
        within = torch.arange(k_bmhd.shape[1], device=k_bmhd.device) < key_lengths[:, None]
        visible = within if visible is None else visible & within
    return visible


def with_all_where_none(visible_bms: Tensor) -> tuple[Tensor, Tensor]:
    """`visible_bms` with every key visible in sets that have no visible one, and which sets have one, (B, S).

    No kernel then meets an empty softmax; the caller zeroes the rows of those sets.
    """
    sees_any = visible_bms.any(1)
    return visible_bms | ~sees_any[:, None], sees_any


def pack_keys(tensors: tuple[Tensor, ...], seen: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Visible keys of all sequences, one after the other.

    tensors are (B, M, S, H, D), seen is (B * S, M). Returns the sequences' bounds, (B * S + 1,) int32, and the rows
    (B * S * M, H, D): how many are visible is not known without waiting for the device, so rows that are in no sequence
    follow. They hold zeros, and what a backward pass may leave for them reaches no key.
    """
    bounds = F.pad(seen.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    order = seen.logical_not().flatten().byte().argsort(stable=True)
    used = (torch.arange(order.numel(), device=order.device) < bounds[-1])[:, None, None]
    return bounds, [torch.where(used, x.transpose(1, 2).flatten(0, 2)[order], 0.0) for x in tensors]


def split_sets(x: Tensor, mode: str, sparse_n: int) -> list[Tensor]:
    """(B, N, ...) -> the skip sets, those of one length together: a list of (B, L, S, ...).

    A set is made of runs of neighbours, one token (single) or k tokens (group), of which each period of k runs gives it
    one. The sets differ in length by what they get of the last, incomplete period.
    """
    if mode == "full" or sparse_n == 1:
        return [x.unsqueeze(2)]
    tokens = x.shape[1]
    run, periods = _periods(tokens, mode, sparse_n)
    whole, tail = x.split((periods * run * sparse_n, tokens - periods * run * sparse_n), dim=1)
    sets = whole.unflatten(1, (periods, sparse_n, run)).transpose(2, 3).flatten(1, 2)
    parts = []
    for first, last, extra in _set_lengths(tokens, mode, sparse_n):
        part = sets[:, :, first:last]
        if extra:
            rest = tail[:, first * run : first * run + (last - first) * extra]
            part = torch.cat((part, rest.unflatten(1, (last - first, extra)).transpose(1, 2)), dim=1)
        parts.append(part)
    return parts


def merge_sets(parts: list[Tensor], mode: str, sparse_n: int, tokens: int) -> Tensor:
    """The inverse of `split_sets`."""
    if mode == "full" or sparse_n == 1:
        return parts[0].squeeze(2)
    run, periods = _periods(tokens, mode, sparse_n)
    shared = periods * run
    bodies = [part[:, :shared] for part in parts]
    sets = bodies[0] if len(bodies) == 1 else torch.cat(bodies, dim=2)
    whole = sets.unflatten(1, (periods, run)).transpose(2, 3).flatten(1, 3)
    if tokens == whole.shape[1]:
        return whole
    return torch.cat((whole, *(part[:, shared:].transpose(1, 2).flatten(1, 2) for part in parts)), dim=1)


def _periods(tokens: int, mode: str, sparse_n: int) -> tuple[int, int]:
    """Tokens of a run, and complete periods of `sparse_n` runs."""
    run = 1 if mode == "single" else sparse_n
    return run, tokens // (run * sparse_n)


def _set_lengths(tokens: int, mode: str, sparse_n: int) -> list[tuple[int, int, int]]:
    """For each length of sets: first set, set after the last, tokens of each from the incomplete period.

    Sets without a token are left out. The incomplete period gives full runs to the first sets, a part of one to the
    next set, nothing to the others.
    """
    run, periods = _periods(tokens, mode, sparse_n)
    full, part = divmod(tokens - periods * run * sparse_n, run)
    ends = ((0, full, run), (full, full + bool(part), part), (full + bool(part), sparse_n, 0))
    return [(first, last, extra) for first, last, extra in ends if last > first and (periods or extra)]
