"""How the ranks of `sample --sp` share a clip: the two prompts of guidance, and the tokens of the clip.

With guidance each step predicts twice, without the prompt and with it, and the two predictions need nothing of each
other until they are mixed. So an even number of ranks forms two groups, one for each: half the ranks share the tokens
then, with half the batch, and less is sent: by 2 ranks only the predictions. An odd number of ranks is one group.

    ranks 0 to 5, with guidance      negative prompt  0 1 2     the tokens are shared along a row,
                                     prompt           3 4 5     predictions are exchanged along a column
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from osp_fast.models.dit import DiT
from osp_fast.parallel.collectives import all_gather
from osp_fast.parallel.mesh import SequenceGroup
from osp_fast.parallel.sequence_plan import SequencePlan
from osp_fast.parallel.world import World

HALVES = 2
GUIDANCE = "guidance"


@dataclass(frozen=True)
class SamplingMesh:
    """The ranks that share a clip, seen from one of them.

    size: how many there are
    half: of guidance that this rank computes, 0 = negative prompt, 1 = prompt; None: both, or there is no guidance
    sequence: the ranks that share the tokens of this rank's batch; None: it computes all of them
    """

    size: int = 1
    half: int | None = None
    sequence: SequenceGroup | None = None

    @classmethod
    def of(cls, world: World, guided: bool, timeout_s: float) -> "SamplingMesh":
        """Of all ranks of `world`, which must all call it, with the same arguments.

        guided: whether there is guidance; timeout_s: in which all must have come to the same exchange
        """
        if world.alone:
            return cls()
        if not guided or world.size % HALVES:
            return cls(world.size, None, SequenceGroup.of(world, world.size, timeout_s, GUIDANCE))
        length = world.size // HALVES
        sequence = SequenceGroup.of(world, length, timeout_s, GUIDANCE) if length > 1 else None
        return cls(world.size, world.rank // length, sequence)

    @property
    def length(self) -> int:
        """How many ranks share the tokens of a batch."""
        return 1 if self.sequence is None else self.sequence.size

    def share(self, dit: DiT, plan: SequencePlan, report: Callable[[str], None]) -> DiT:
        """Put the exchange of tokens into the DiT; all ranks must call it, with the same plan. Returns it."""
        if self.sequence is None:
            return dit.share_tokens(None)
        return dit.share_tokens(self.sequence.exchange(plan, dit.config.sparse_n, report))

    def exchange(self, prediction: Tensor) -> tuple[Tensor, Tensor]:
        """This half's prediction (B, C, T, H, W) -> the negative prompt's and the prompt's, the same bits on all ranks.

        Each rank sends the prediction once, 4 B C T H W bytes in float32. Only where `half` is not None. Raises
        `RankLost`.
        """
        partners = dist.group.WORLD if self.sequence is None else self.sequence.mesh.get_group(GUIDANCE)
        negative, positive = all_gather(prediction, partners)
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
        return (
            f"{self.size} GPUs share each clip: {self.length} for the prompt and {self.length} for the negative prompt,"
            " each with a part of the tokens"
        )
