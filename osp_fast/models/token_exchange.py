"""What a model needs of whoever lets several ranks compute one clip: `osp_fast.parallel.sequence` has it.

Shape suffixes: b batch, n a rank's tokens, h heads, d head dimension; N is all tokens of the clip.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from osp_fast.kernels.rope3d import Rope3D

if TYPE_CHECKING:
    from osp_fast.models.attention import SelfAttention, VisibleKeys


class SharedTokens(Protocol):
    """A size of clip whose tokens ranks share. kind: how they lie in a block, one of `TokenExchange.kinds`."""

    def share(self, x: Tensor, kind: str) -> Tensor:
        """x (B, N, C), all tokens, the same on every rank -> (B, n, C), this rank's."""

    def place(
        self, kind: str, mode: str, rope: Rope3D, tokens: "VisibleKeys", batch: int
    ) -> tuple[Rope3D, "VisibleKeys"]:
        """Of all tokens' positions and visibility, what `attend` needs in blocks that attend in `mode`."""

    def gather(self, x: Tensor, kind: str) -> Tensor:
        """x (B, n, C), this rank's -> (B, N, C), all tokens on every rank: the inverse of `share`."""


class TokenExchange(Protocol):
    """How ranks share clips: each has some of the tokens, wherever a token is computed without the others.

    Tokens meet in self-attention alone, so all of it but its first product is the exchange's. Every rank must call
    every method, in the same order. B is the same on all ranks; n, a rank's number of tokens, need not be.
    """

    def kinds(self, modes: Sequence[str]) -> list[str]:
        """How tokens lie in each block, given how the blocks attend. Where it changes they `move` in between."""

    def answering(self) -> AbstractContextManager:
        """What a clip is computed in: it says so where another rank is lost."""

    def clip(self, tokens: int, heads: int, device: torch.device) -> SharedTokens:
        """A clip of so many tokens in a model of so many heads."""

    def attend(self, layer: "SelfAttention", qkv: Tensor, rope: Rope3D, tokens: "VisibleKeys") -> Tensor:
        """qkv (B, n, 3, H, D) of this rank's tokens, as `layer.qkv` made it -> (B, n, width), as `layer.out` makes it.

        rope, tokens: from `SharedTokens.place`; qkv may be overwritten.
        """

    def move(self, compute: Callable[[slice], Tensor], tokens: int) -> Tensor:
        """This rank's tokens in the other kind of order, (B, n, C).

        compute: makes those of a slice of the rank's n `tokens`, in the present order; it is called part by part, so
        that one part can move while the next is computed
        """
