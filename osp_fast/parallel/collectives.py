"""What ranks that share a clip send each other, and the sentence in which they end when one of them is lost.

Each collective waits for the slowest rank, at most as long as the timeout of its group.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from osp_fast.errors import UserError


class RankLost(UserError):
    """Another rank has ended or does not answer: nothing can be agreed upon with it any more."""


# An operation of its own, as the name of the group and not the group is what compiled code can hold, and so that the
# error is raised here in compiled code too. It has no gradient: backward through it raises RuntimeError.
@torch.library.custom_op("osp_fast::all_to_all", mutates_args=())
def all_to_all(x: Tensor, sent: list[int], received: list[int], group: str) -> Tensor:
    """Pieces of a flat x (sum(sent),) to each rank of the group of that name, those from each one back.

    sent, received: elements to and from each rank; none is a number too. Returns (sum(received),). Raises `RankLost`.
    """
    out = x.new_empty(sum(received))
    with all_answering():
        dist.all_to_all_single(out, x.contiguous(), received, sent, group=_resolve_process_group(group))
    return out


@all_to_all.register_fake
def _(x, sent, received, group):
    return x.new_empty(sum(received))


def all_gather(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """x of each rank of `group`, or of all: (ranks, *x.shape), the same bits on each. Raises `RankLost`."""
    out = x.new_empty((dist.get_world_size(group), *x.shape))
    with all_answering():
        dist.all_gather(list(out.unbind()), x.contiguous(), group=group)
    return out


@contextmanager
def all_answering() -> Iterator[None]:
    """Let a collective that fails raise `RankLost`."""
    try:
        yield
    except RuntimeError as error:
        raise RankLost(
            f"rank {dist.get_rank()} of {dist.get_world_size()} waits in vain for another rank"
            f" ({str(error).strip().splitlines()[0]}): see which rank ended first, and why, and start all again"
        ) from error
