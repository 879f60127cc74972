"""One clip on several ranks: each computes its own tokens, and its own heads where all tokens meet.

DeepSpeed-Ulysses (Jacobs et al. 2023, arXiv:2309.14509) with shares of any size. Norms, products, cross-attention and
feed-forward see one token at a time, so a rank of m computes them for N/m tokens, all heads. In self-attention two
all-to-alls turn that into all N tokens of H/m heads and back (`kernels/sequence_pack.py` draws it): any pattern of
attention, skiparse and masks too, runs there as on one rank. RoPE is applied before, with positions in the whole clip.
In the end all ranks get the whole prediction. Neither N nor H need divide by m: the first N mod m ranks have one token
more, the first H mod m one head more, and ranks beyond H no head: they wait in self-attention.

Bytes that rank r sends to others, with its n_r tokens and h_r heads, at s bytes a number:
    in each block   B D s (3 n_r (H - h_r) + (N - n_r) h_r), for all ranks together about 4 B N H D s (m - 1) / m
    in a prediction B n_r C s (m - 1) more, where C are the numbers that the model predicts for a token: 32
So 93x480x640 in 16 bits, both halves of guidance as one batch on 8 ranks: 116 MB from each rank in each block.
"""

import math
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from osp_fast.kernels.rope3d import Rope3D
from osp_fast.kernels.sequence_pack import (
    SequenceLayout,
    pack_output,
    received_qkv,
    sequence_pack,
    unpack_output,
)
from osp_fast.models.attention import SelfAttention, VisibleKeys
from osp_fast.models.dit import DiT
from osp_fast.parallel.collectives import all_to_all


@dataclass(frozen=True)
class Ulysses:
    """A `TokenExchange` of the ranks of a group: tokens against heads. `shard_sequence` puts it in place.

    group: its name; ranks, rank: how many it has, and which of them this one is

    All methods raise `RankLost`. What they return has no gradient: backward raises RuntimeError.
    """

    group: str
    ranks: int
    rank: int

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> "Ulysses":
        """Of the ranks of `group`, which this one must be in."""
        return cls(group.group_name, dist.get_world_size(group), dist.get_rank(group))

    def share(self, x: Tensor) -> Tensor:
        """This rank's tokens (B, n, C), a view, of all (B, N, C)."""
        layout = self._layout(x.shape[1])
        return x.narrow(1, layout.first_token(), layout.tokens_of(self.rank))

    def attend(self, layer: SelfAttention, qkv: Tensor, rope: Rope3D, tokens: VisibleKeys) -> Tensor:
        """qkv (B, n, 3, H, D) of this rank's tokens -> (B, n, width), projected; see `TokenExchange`."""
        batch, _, _, heads, head_dim = qkv.shape
        layout = self._layout(math.prod(rope.size), heads, head_dim, batch)
        received = all_to_all(sequence_pack(qkv, layout, rope), *layout.qkv_splits(), self.group)
        q, k, v = received_qkv(received, layout)
        out = layer.attend(q, k, v, tokens) if layout.heads_of(self.rank) else q
        received = all_to_all(pack_output(out, layout), *layout.output_splits(), self.group)
        return layer.out(unpack_output(received, layout).flatten(2))

    def gather(self, x: Tensor, tokens: int) -> Tensor:
        """All tokens (B, N, C) on every rank, of this rank's (B, n, C)."""
        batch, own, channels = x.shape
        layout = self._layout(tokens)
        rows = [layout.tokens_of(rank) for rank in range(self.ranks)]
        cell = batch * channels
        # Shares may differ, so it is an all-to-all with the same for everyone.
        sent = x.transpose(0, 1).reshape(-1).repeat(self.ranks)
        received = all_to_all(sent, [own * cell] * self.ranks, [count * cell for count in rows], self.group)
        return received.view(tokens, batch, channels).transpose(0, 1)

    def _layout(self, tokens: int, heads: int = 1, head_dim: int = 1, batch: int = 1) -> SequenceLayout:
        return SequenceLayout(self.ranks, self.rank, tokens, heads, head_dim, batch)


def shard_sequence(dit: DiT, group: dist.ProcessGroup | None) -> DiT:
    """Let the ranks of `group` share each clip that the DiT gets; None: this rank computes all. Returns the model.

    Each rank needs all weights, and must be given the same latents, timesteps, texts and masks; `forward` returns the
    same bits on all of them. To be called before or after compiling and `use_attention`, but not between two uses of a
    CUDA graph.
    """
    return dit.share_tokens(None if group is None or dist.get_world_size(group) == 1 else Ulysses.of(group))
