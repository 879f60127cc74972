"""The way between the ranks of a group: through PyTorch's collectives, or straight into the other GPUs' memory."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from osp_fast.parallel.collectives import Coming, Splits, arrived, begin_all_to_all
from osp_fast.parallel.peer_memory import PeerMemory


@dataclass(frozen=True)
class Link:
    """How this rank exchanges with others. group: the name of theirs; rank: which of them this one is.

    peers: takes what has no gradient, outside of compiled code
    """

    group: str
    rank: int = 0
    peers: PeerMemory | None = None

    def begin(self, x: Tensor, splits_of: Callable[[int], Splits], slot: str) -> Coming:
        """Send pieces of a flat x. splits_of: of any rank's exchange; slot: tells the exchanges of a block apart."""
        if self.peers is None or torch.compiler.is_compiling() or torch.is_grad_enabled():
            return begin_all_to_all(x, splits_of(self.rank), self.group)
        return self.peers.begin(x, splits_of, slot)

    def arrived(self, coming: Coming, splits_of: Callable[[int], Splits]) -> Tensor:
        """What has come. Without a gradient it may be overwritten when the same slot is used again."""
        if coming.mark is None:
            return arrived(coming, splits_of(self.rank), self.group)
        return self.peers.arrived(coming)
