"""What ranks that share a clip send each other, and the sentence in which they end when one of them is lost.

An exchange is begun in one place and awaited in another; what is computed between the two hides it: on a GPU it runs
on a stream of its own. Backward mirrors both. The gradient of what has arrived is on its way as soon as it is known,
and is awaited where the exchange was begun. Each collective waits for the slowest rank, at most as long as the timeout
of its group. The operations are PyTorch's functional collectives, as eager code, compiled code, recomputation and
tensors without contents all take them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives
from torch import Tensor
from torch._subclasses import FakeTensor

from osp_fast.errors import UserError

GLOO_WORDS = ("gloo/transport", "Application timeout caused pair closure")


class RankLost(UserError):
    """Another rank has ended or does not answer: nothing can be agreed upon with it any more."""


class Splits(NamedTuple):
    """How many elements of a flat tensor go to each rank of a group, and come from each: `sent`, `received`."""

    sent: list[int]
    received: list[int]

    def back(self) -> "Splits":
        """Of the way back."""
        return Splits(self.received, self.sent)


class Coming(NamedTuple):
    """What other ranks send: `begin_all_to_all` made it, `arrived` takes it.

    contents: not to be touched yet; ticket: of what was sent the shape, for its gradient, without memory
    mark: of `PeerMemory`, where that brings it
    """

    contents: Tensor
    ticket: Tensor | None
    mark: Any = None


def begin_all_to_all(x: Tensor, splits: Splits, group: str) -> Coming:
    """Send pieces of a flat x (sum(sent),) to the ranks of the group of that name, and let theirs come."""
    return Coming(*_Begun.apply(x, *splits, group))


def arrived(coming: Coming, splits: Splits, group: str) -> Tensor:
    """What has come, (sum(received),), as soon as it is there. splits and group are those of its beginning."""
    return _Arrived.apply(coming.contents, coming.ticket, *splits, group)


def _begin(x: Tensor, sent: list[int], received: list[int], group: str) -> Tensor:
    return torch.ops._c10d_functional.all_to_all_single(x.contiguous(), received, sent, group)


def _wait(x: Tensor) -> Tensor:
    if isinstance(x, FakeTensor) and not torch.compiler.is_compiling():
        return x  # of tensors without contents the operation would make another one
    return torch.ops._c10d_functional.wait_tensor(x)


class _Begun(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, sent, received, group):
        contents = _begin(x, sent, received, group)
        ctx.mark_non_differentiable(contents)
        ctx.set_materialize_grads(False)  # else the contents' would be zeros of their size
        return contents, x.new_empty(1).expand(x.shape)

    @staticmethod
    def backward(ctx, _, grad):
        return _wait(grad), None, None, None


class _Arrived(torch.autograd.Function):
    @staticmethod
    def forward(ctx, contents, ticket, sent, received, group):
        ctx.back = received, sent, group
        return _wait(contents)

    @staticmethod
    def backward(ctx, grad):
        return None, _begin(grad, *ctx.back), None, None, None


def all_gather(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """x of each rank of `group`, or of all: (ranks, *x.shape), the same bits on each. Raises `RankLost`."""
    out = x.new_empty((dist.get_world_size(group), *x.shape))
    with all_answering():
        dist.all_gather(list(out.unbind()), x.contiguous(), group=group)
    return out


@contextmanager
def all_answering() -> Iterator[None]:
    """Let a collective that fails raise `RankLost`; other errors stay as they are."""
    try:
        yield
    except RuntimeError as error:
        if not _is_of_collective(error):
            raise
        raise RankLost(
            f"rank {dist.get_rank()} of {dist.get_world_size()} waits in vain for another rank"
            f" ({str(error).strip().splitlines()[0]}): see which rank ended first, and why, and start all again"
        ) from error


def _is_of_collective(error: RuntimeError) -> bool:
    """Whether NCCL's or gloo's, whose errors have no type of their own."""
    return isinstance(error, dist.DistError) or any(words in str(error) for words in GLOO_WORDS)
