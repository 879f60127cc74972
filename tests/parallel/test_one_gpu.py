"""Two processes share clips on one GPU, with the Triton kernels; what they exchange goes through CPU memory.

NCCL takes no two ranks on one GPU: this proves kernels, layouts and gradients where there is only one.
"""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import shared_clip
from ranks import RankProcesses

from osp_fast.parallel.links import Link

TOLERANCE = 2e-4  # of float32, whose products take TF32's ten bits where Triton chooses so


class HostLink(Link):
    """A `Link` of processes that only gloo connects."""

    def begin(self, x, splits_of, slot):
        return super().begin(x.cpu(), splits_of, slot)

    def arrived(self, coming, splits_of):
        return super().arrived(coming, splits_of).to("cuda")


def on_gpu(inputs: dict) -> dict:
    return {name: value.cuda() for name, value in inputs.items()}


def share_on_one_gpu(folder: str) -> None:
    import torch.distributed as dist

    from osp_fast.parallel.mesh import SequenceGroup
    from osp_fast.parallel.sequence_plan import sequence_plans
    from osp_fast.parallel.world import open_world

    with open_world("cpu", 60.0, 60.0, print) as world:
        group, found = SequenceGroup.of(world, world.size, 60.0), {}
        for plan in sequence_plans(world.size, 4):
            exchange = group.exchange(plan, 4)
            for name in ("everyone", "scope", "others"):
                link = getattr(exchange, name)
                setattr(exchange, name, HostLink(link.group, link.rank))
            for name, dit, inputs in shared_clip.cases(world.size)[:3]:
                results = shared_clip.with_gradients(dit.cuda().share_tokens(exchange), on_gpu(inputs))
                found[plan.scope, name] = {key: value.cpu() for key, value in results.items()}
                for key, value in found[plan.scope, name].items():
                    if key != "prediction":
                        dist.all_reduce(value)
        if world.is_first:
            torch.save(found, Path(folder, "found.pt"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_two_processes_on_one_gpu(tmp_path):
    ranks = RankProcesses(2, tmp_path, share_on_one_gpu, (str(tmp_path),))
    assert ranks.codes(300) == [0, 0], ranks.printed()
    alone = {name: shared_clip.with_gradients(dit, inputs) for name, dit, inputs in shared_clip.cases(2)[:3]}
    for (_, name), results in torch.load(tmp_path / "found.pt").items():
        for key, value in results.items():
            scale = max(alone[name][key].norm().item(), 1e-3)
            assert (value - alone[name][key]).norm().item() / scale <= TOLERANCE, (name, key)
