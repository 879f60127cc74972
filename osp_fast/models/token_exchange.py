"""What a model needs of whoever lets several ranks compute one clip: `osp_fast.parallel.sequence` has it.

Shape suffixes: b batch, n a rank's tokens, h heads, d head dimension; N is all tokens of the clip.
"""

from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from osp_fast.kernels.rope3d import Rope3D

if TYPE_CHECKING:
    from osp_fast.models.attention import SelfAttention, VisibleKeys


class TokenExchange(Protocol):
    """How ranks share a clip: each has some of its tokens, wherever a token is computed without the others.

    Tokens meet in self-attention alone, so all of it but its first product is the exchange's. Every rank must call
    every method, in the same order. B is the same on all ranks; n, a rank's number of tokens, need not be.
    """

    def share(self, x: Tensor) -> Tensor:
        """x (B, N, C), all tokens, the same on every rank -> (B, n, C), this rank's."""

    def attend(self, layer: "SelfAttention", qkv: Tensor, rope: Rope3D, tokens: "VisibleKeys") -> Tensor:
        """qkv (B, n, 3, H, D) of this rank's tokens, as `layer.qkv` made it -> (B, n, width), as `layer.out` makes it.

        rope and tokens are those of the whole clip; qkv may be overwritten.
        """

    def gather(self, x: Tensor, tokens: int) -> Tensor:
        """x (B, n, C), this rank's -> (B, N, C), all `tokens` of them on every rank: the inverse of `share`."""
