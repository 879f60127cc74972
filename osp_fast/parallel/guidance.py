"""How the ranks of `sample --sp` share a clip: the two prompts of guidance, and the tokens of the clip.

With guidance each step predicts twice, without the prompt and with it, and the two predictions need nothing of each
other until they are mixed. So an even number of ranks forms two groups, one for each: half the ranks share the tokens
then, with half the batch, and less is sent: by 2 ranks only the predictions, by 8 ranks 14 % less than in one group. An
odd number of ranks is one group.

    ranks 0 to 5, with guidance      negative prompt  0 1 2     the tokens are shared along a row,
                                     prompt           3 4 5     predictions are exchanged along a column
"""

from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch import Tensor

from osp_fast.models.dit import DiT
from osp_fast.parallel.collectives import all_gather
from osp_fast.parallel.sequence import shard_sequence
from osp_fast.parallel.world import World

HALVES = 2


@dataclass(frozen=True)
class SamplingMesh:
    """The ranks that share a clip, seen from one of them.

    half: of guidance that this rank computes, 0 = negative prompt, 1 = prompt; None: both, or there is no guidance
    sequence: the ranks that share the tokens of this rank's batch; None: it computes all of them
    partners: the two ranks with the same tokens of both halves; None: see `half`
    """

    size: int = 1
    half: int | None = None
    sequence: dist.ProcessGroup | None = None
    partners: dist.ProcessGroup | None = None

    @classmethod
    def of(cls, world: World, guided: bool, timeout_s: float) -> "SamplingMesh":
        """Of all ranks of `world`, which must all call it, with the same arguments.

        guided: whether there is guidance; timeout_s: in which all must have come to the same exchange
        """
        if world.alone:
            return cls()
        if not guided or world.size % HALVES:
            return cls(world.size, sequence=dist.group.WORLD)
        length = world.size // HALVES
        rows = [list(range(half * length, (half + 1) * length)) for half in range(HALVES)]
        columns = [list(column) for column in zip(*rows, strict=True)]
        half, place = divmod(world.rank, length)
        # Every rank makes every group, in the same order. A row of one rank needs none, a column of all has one.
        timeout = timedelta(seconds=timeout_s)
        sequences = [None if length == 1 else dist.new_group(row, timeout=timeout) for row in rows]
        partners = [dist.group.WORLD if length == 1 else dist.new_group(column, timeout=timeout) for column in columns]
        return cls(world.size, half, sequences[half], partners[place])

    def share(self, dit: DiT) -> DiT:
        """Put the exchange of tokens into the DiT. Returns it."""
        return shard_sequence(dit, self.sequence)

    def exchange(self, prediction: Tensor) -> tuple[Tensor, Tensor]:
        """This half's prediction (B, C, T, H, W) -> the negative prompt's and the prompt's, the same bits on all ranks.

        Each rank sends the prediction once, 4 B C T H W bytes in float32. Only where `half` is not None. Raises
        `RankLost`.
        """
        negative, positive = all_gather(prediction, self.partners)
        return negative, positive

    def agree(self, sums: Tensor) -> Tensor:
        """Sums over this rank's tokens, (B, 2) for the step cache -> those over all tokens, the same bits on all ranks.

        (B, 2), or (2 B, 2) where the halves of guidance are apart, the negative prompt's first: the very rows that one
        rank has, so that it decides the same. Raises `RankLost`.
        """
        if self.size == 1:
            return sums
        every = all_gather(sums, dist.group.WORLD)
        groups = 1 if self.half is None else HALVES
        return every.unflatten(0, (groups, -1)).sum(1).flatten(0, 1)

    def describe(self) -> str:
        """For the user: who does what."""
        if self.size == 1:
            return "one GPU computes all"
        if self.half is None:
            return f"{self.size} GPUs share each clip's tokens"
        if self.sequence is None:
            return "2 GPUs share each clip: one for the prompt, one for the negative prompt"
        length = self.size // HALVES
        return (
            f"{self.size} GPUs share each clip: {length} for the prompt and {length} for the negative prompt, each with"
            " a part of the tokens"
        )
