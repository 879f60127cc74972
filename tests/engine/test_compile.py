"""Compiled blocks: how often they are compiled, that nothing falls back, and the warm-up.

The backend runs the traced graph as it is, or without Inductor's code: what is tested is what is compiled, and when.
"""

import logging

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import noop_context_fn

from osp_fast.diffusion.step_cache import FirstBlockCache
from osp_fast.engine import compile as engine_compile
from osp_fast.engine.compile import (
    RecompileCounter,
    WarmUpBucket,
    check_compiler,
    compile_blocks,
    count_kinds,
    warm_up,
)
from osp_fast.engine.levels import Level
from osp_fast.errors import UserError
from osp_fast.models.dit import DiT, DiTConfig
from osp_fast.parallel.apply import shard_dit

CPU, GPU = torch.device("cpu"), torch.device("cuda")
PARTITION = "aot_eager_decomp_partition"  # Inductor's split into forward and backward, without its code


def make_dit(layers: int, level: Level = Level.EVERYTHING) -> DiT:
    config = DiTConfig(
        num_layers=layers,
        num_attention_heads=1,
        attention_head_dim=24,
        caption_channels=8,
        cross_attention_dim=24,
        sparse_n=2,
    )
    dit = DiT(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in dit.parameters():
            parameter.normal_(std=0.2, generator=generator)
    return dit.recompute_blocks(level.recompute())


def gradients(dit: DiT, frames: int = 1) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    latents, text = torch.randn(1, 8, frames, 4, 4, generator=draw), torch.randn(1, 3, 8, generator=draw)
    dit(latents, torch.tensor([7]), text, torch.ones(1, 3)).square().mean().backward()
    found = [parameter.grad for parameter in dit.parameters()]
    for parameter in dit.parameters():
        parameter.grad = None
    return found


def as_traced(graph, inputs):
    return graph.forward


@pytest.fixture(autouse=True)
def nothing_compiled_yet():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_blocks_alike_share_their_graphs_and_no_known_size_is_compiled_again():
    expected = gradients(make_dit(32))
    dit = compile_blocks(make_dit(32), buckets=1, backend=as_traced)
    assert count_kinds(dit) == 4  # the first block, to which nothing is added, and three kinds of attention
    counter = RecompileCounter()
    found = gradients(dit)
    assert counter.count == 4
    assert all(map(torch.equal, found, expected))
    counter.reset()
    gradients(dit)
    assert counter.count == 0
    gradients(dit, frames=2)
    assert counter.count == 4
    counter.reset()
    gradients(dit, frames=1)
    gradients(dit, frames=2)
    assert counter.count == 0


def sample(dit: DiT, frames: int, seed: int, step_cache=None) -> torch.Tensor:
    """A step of sampling, for a prompt and a negative prompt whose lengths go by the seed."""
    draw = torch.Generator().manual_seed(seed)
    mask = torch.arange(6) < torch.tensor([[1 + seed], [5 - seed]])
    with torch.no_grad():
        text = dit.text_context(torch.randn(2, 6, 8, generator=draw), mask)
        time = dit.time_context(torch.tensor([900.0, 400.0, 7.0])).at(seed, 2)
        return dit(torch.randn(2, 8, frames, 4, 4, generator=draw), time, text, step_cache=step_cache)


def test_sampling_compiles_each_size_once_whatever_prompt_and_timestep():
    clips = [(frames, seed) for frames in (1, 2) for seed in (0, 1, 2)]
    plain = make_dit(4, Level.NOTHING)
    expected = [sample(plain, *clip) for clip in clips]
    dit, counter = compile_blocks(make_dit(4, Level.NOTHING), 1, "aot_eager"), RecompileCounter()
    for clip, result in zip(clips, expected, strict=True):
        torch.testing.assert_close(sample(dit, *clip), result)
        assert counter.count == count_kinds(dit) * clip[0]  # of the first size 4, of both 8
    torch.testing.assert_close(sample(dit, 1, 0, FirstBlockCache(0.1)), expected[0])
    assert counter.count == 8  # behind a step cache the second block gets what the first one gets


def test_too_many_sizes_are_refused_and_limits_are_those_of_these_blocks(monkeypatch):
    limits = torch._dynamo.config.recompile_limit, torch._dynamo.config.accumulated_recompile_limit
    monkeypatch.setattr(engine_compile, "GRAPHS_TO_SPARE", 0)
    monkeypatch.setattr(engine_compile, "MODES_OF_GRAD", 1)
    dit = compile_blocks(make_dit(1), buckets=2, backend=as_traced)
    for frames in (1, 2, 1, 2):
        gradients(dit, frames)
    with pytest.raises(UserError, match="--compile: the DiT's blocks met .* many more sizes"):
        gradients(dit, frames=3)
    assert limits == (torch._dynamo.config.recompile_limit, torch._dynamo.config.accumulated_recompile_limit)


def kept_bytes(dit: DiT) -> int:
    """Of all that forward keeps, in graphs or not, beside weights."""
    kept = {}
    weights = {parameter.data_ptr() for parameter in dit.parameters()}

    def pack(x: torch.Tensor) -> torch.Tensor:
        kept[x.data_ptr()] = x.numel() * x.element_size()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        dit(torch.randn(1, 8, 2, 8, 8), torch.tensor([7]), torch.randn(1, 3, 8))
    return sum(size for place, size in kept.items() if place not in weights)


def test_what_is_recomputed_is_so_in_a_graph(monkeypatch):
    """Also with the context that says so outside of graphs only, and where the Triton path works in place."""
    monkeypatch.setenv("OSP_FAST_KERNELS", "triton")
    dit = make_dit(1).use_attention("triton")
    expected, everything = gradients(dit), kept_bytes(dit)
    compile_blocks(dit.recompute_blocks(noop_context_fn), 2, PARTITION)
    assert kept_bytes(dit) < 0.5 * everything
    for found, gradient in zip(gradients(dit), expected, strict=True):
        assert (found - gradient).norm() <= 1e-5 * gradient.norm()


def test_pytorchs_warning_of_in_place_operations_is_not_passed_on(caplog):
    compile_blocks(make_dit(1, Level.NOTHING), 1, as_traced)
    logger = logging.getLogger("torch._higher_order_ops.wrap")
    with caplog.at_level(logging.WARNING, logger.name):
        logger.addHandler(caplog.handler)
        logger.warning("Detected that context_fn is passed to torch.utils.checkpoint under torch.compile.")
        logger.warning("something else")
        logger.removeHandler(caplog.handler)
    assert {record.message for record in caplog.records} == {"something else"}


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_hooks_of_fsdp_stay_outside(one_rank):
    expected = gradients(make_dit(4))
    dit = compile_blocks(shard_dit(make_dit(4, Level.NOTHING), one_rank), 1, as_traced)
    counter = RecompileCounter()
    for _ in range(2):
        for found, gradient in zip(gradients(dit), expected, strict=True):
            torch.testing.assert_close(found.full_tensor(), gradient)
    assert counter.count == 3  # no block differs for being the first where each adds all of its parts


def test_warm_up_goes_from_the_largest_down_and_leaves_no_trace():
    dit = compile_blocks(make_dit(2), buckets=2, backend=as_traced)
    weights = [parameter.clone() for parameter in dit.parameters()]
    buckets = [WarmUpBucket("5x32x32", 1, 8), WarmUpBucket("1x32x32", 3, 4)]
    state, ran, lines = torch.get_rng_state(), [], []

    def run(bucket: WarmUpBucket) -> None:
        ran.append(bucket.size)
        torch.rand(())
        size = (bucket.tokens // 4, 4, 4)
        latents, text = torch.randn(bucket.clips, 8, *size), torch.randn(bucket.clips, 3, 8)
        dit(latents, torch.ones(bucket.clips), text, torch.ones(bucket.clips, 3)).square().mean().backward()

    assert warm_up(dit, buckets, run, lines.append) == 4
    assert ran == ["1x32x32", "5x32x32"]
    assert lines[0] == "compiling bucket 1/2: 1x32x32, 3 clips"
    assert lines[1].startswith("compiling bucket 2/2: 5x32x32, 1 clip (the last one took ")
    assert " s left)" in lines[1] and lines[2].startswith("compiled 4 graphs for 2 buckets in ")
    assert all(parameter.grad is None for parameter in dit.parameters())
    assert all(map(torch.equal, dit.parameters(), weights)) and torch.equal(torch.get_rng_state(), state)
    assert warm_up(dit, buckets, run, lines.append) == 0


def test_a_bucket_that_does_not_fit_is_named():
    def full(bucket):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(UserError, match="bucket 93x640x640, 4 clips does not fit into the memory of cpu: use "):
        warm_up(make_dit(1), [WarmUpBucket("93x640x640", 4, 38_400)], full, print)


def test_a_missing_compiler_is_a_sentence(monkeypatch):
    monkeypatch.setenv("PATH", "")
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="--compile needs a C\\+\\+ compiler on a CPU: install g\\+\\+"):
        check_compiler(CPU)
    with pytest.raises(UserError, match="--compile needs a C compiler on a GPU, and there is none: install gcc"):
        check_compiler(GPU)
    monkeypatch.setenv("CC", "nowhere")
    with pytest.raises(UserError, match="CC=nowhere is not there"):
        check_compiler(GPU)
    monkeypatch.setenv("CC", "/bin/sh")
    monkeypatch.setenv("CXX", "/bin/sh")
    check_compiler(GPU)
    check_compiler(CPU)
