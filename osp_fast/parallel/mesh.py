"""How ranks share the weights, and how they share clips."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from osp_fast.errors import UserError
from osp_fast.parallel.links import Link
from osp_fast.parallel.peer_memory import open_peer_memory
from osp_fast.parallel.sequence import SequenceExchange
from osp_fast.parallel.sequence_plan import SequencePlan
from osp_fast.parallel.world import World

REPLICATE, SHARD = "replicate", "shard"
DATA, SEQUENCE = "data", "sequence"


def check_shard_size(shard_size: int | None, size: int) -> None:
    """Raise `UserError` unless `--shard_size` divides the number of ranks."""
    if shard_size is not None and size % shard_size:
        raise UserError(
            f"--shard_size {shard_size} does not divide the {size} GPUs of the run: name how many of them are to share"
            " one copy of the weights"
        )


def make_mesh(device_type: str, size: int, shard_size: int | None = None) -> DeviceMesh:
    """The mesh of `size` ranks, consecutive ones sharing a copy of the weights.

    One dimension, "shard" (FSDP), unless `shard_size` is smaller than `size`: then two, "replicate" and "shard", each
    group of `shard_size` ranks holding a copy (HSDP: Zhao et al. 2023, "PyTorch FSDP"). Ranks that share clips are
    among them: what each adds to the gradients is a part like any other's. Raises `UserError`.
    """
    check_shard_size(shard_size, size)
    if shard_size is None or shard_size == size:
        return init_device_mesh(device_type, (size,), mesh_dim_names=(SHARD,))
    return init_device_mesh(device_type, (size // shard_size, shard_size), mesh_dim_names=(REPLICATE, SHARD))


def check_sp_size(sp_size: int, size: int) -> None:
    """Raise `UserError` unless `--sp_size` divides the number of ranks."""
    if sp_size > size:
        have = "one GPU" if size == 1 else f"{size} GPUs"
        raise UserError(
            f"--sp_size {sp_size} is more than the {have} of the run: start it with torchrun --nproc-per-node {sp_size}"
        )
    if size % sp_size:
        raise UserError(
            f"--sp_size {sp_size} does not divide the {size} GPUs of the run: name how many of them are to share one"
            " clip"
        )


@dataclass(frozen=True)
class SequenceGroup:
    """The ranks that share clips, as one of them sees it: consecutive ones, in a mesh of outer x "sequence".

    mesh: of all ranks of the run; None: every rank has clips of its own
    files: the group's ranks for what is in CPU memory, also from another thread; None in a group of one
    timeout_s: in which all must have come to the same exchange
    """

    mesh: DeviceMesh | None
    files: dist.ProcessGroup | None
    world: World
    timeout_s: float

    @classmethod
    def of(cls, world: World, size: int, timeout_s: float, outer: str = DATA) -> "SequenceGroup":
        """Groups of `size` ranks of `world`; all ranks must call it. outer: what the groups are there for.

        Raises `UserError`.
        """
        check_sp_size(size, world.size)
        if size == 1:
            return cls(None, None, world, timeout_s)
        ranks = torch.arange(world.size).view(-1, size)
        rows, columns = ranks.tolist(), ranks.T.tolist()
        mesh = DeviceMesh.from_group(
            # Weights travel in the group of all ranks, and NCCL keeps the order within a group: clips have their own.
            [join_group(columns, world, timeout_s), join_group(rows, world, timeout_s, own=True)],
            world.device.type,
            mesh=ranks,
            mesh_dim_names=(outer, SEQUENCE),
        )
        return cls(mesh, join_group(rows, world, timeout_s, backend="gloo"), world, timeout_s)

    @property
    def size(self) -> int:
        """How many ranks share a clip."""
        return 1 if self.mesh is None else self.mesh.size(1)

    @property
    def rank(self) -> int:
        """Which of them this one is."""
        return 0 if self.mesh is None else self.mesh.get_local_rank(SEQUENCE)

    @property
    def data_size(self) -> int:
        """How many groups there are."""
        return self.world.size // self.size

    def exchange(
        self, plan: SequencePlan, sparse_n: int, report: Callable[[str], None] | None = None
    ) -> SequenceExchange | None:
        """What a DiT needs to share clips (`share_tokens`); all ranks must call it, with the same plan.

        report: for sampling alone: GPUs that can are to write into each other's memory, and what they do is reported

        None in a group of one. Raises ValueError if the plan is for another number of ranks.
        """
        if plan.ranks != self.size:
            raise ValueError(f"a plan for {plan.ranks} ranks does not serve {self.size}")
        if self.mesh is None:
            return None
        everyone = scope = others = self._link(self.mesh.get_group(SEQUENCE), report)
        if plan.scope > 1 and plan.heads > 1:
            ranks = torch.arange(self.world.size).view(-1, plan.scope, plan.heads)
            scope = self._link(self._join(ranks.flatten(0, 1)), report)
            others = self._link(self._join(ranks.mT.flatten(0, 1)), report)
        return SequenceExchange(plan, self.rank, sparse_n, everyone, scope, others)

    def _join(self, rows: torch.Tensor) -> dist.ProcessGroup:
        return join_group(rows.tolist(), self.world, self.timeout_s)

    def _link(self, group: dist.ProcessGroup, report: Callable[[str], None] | None) -> Link:
        peers = None if report is None else open_peer_memory(self.world, group, self.timeout_s, report)
        return Link(group.group_name, dist.get_rank(group), peers)


def join_group(
    rows: list[list[int]], world: World, timeout_s: float, backend: str | None = None, own: bool = False
) -> dist.ProcessGroup:
    """Make a group of each row of ranks, which all ranks must do; returns the one that this rank is in.

    own: also where it is of all ranks, who have one already
    """
    if len(rows) == 1 and backend is None and not own:
        return dist.group.WORLD
    timeout, of_cpus = timedelta(seconds=timeout_s), backend == "gloo"
    groups = [dist.new_group(row, timeout, backend, use_local_synchronization=of_cpus) for row in rows]
    return next(group for row, group in zip(rows, groups, strict=True) if world.rank in row)
