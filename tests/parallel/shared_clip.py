"""What the ranks of `test_sequence.py` run, and what one rank computes for comparison."""

import itertools
import os
import signal
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

GOLDEN = Path(__file__).parents[1] / "golden/dit"
STEPS, SCALE = 3, 4.0
CACHED_STEPS, THRESHOLD = 6, 0.34  # the halves of guidance, each for itself, would decide differently
TIMEOUT_S = 30.0


def golden_inputs(with_latent_mask: bool) -> dict:
    io = load_file(GOLDEN / "io.safetensors")
    inputs = {name: io[name] for name in ("latents", "timestep", "text", "text_mask")}
    if with_latent_mask:  # a shorter clip beside a narrower one
        inputs["latent_mask"] = torch.ones_like(io["latent_mask"])
        inputs["latent_mask"][0, 2:] = inputs["latent_mask"][1, :, :, 9:] = 0
    return inputs


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def five_heads():
    """A DiT of 5 heads, with both kinds of skips, whose weights are all away from their zeros."""
    from osp_fast.models.dit import DiT, DiTConfig

    dit = DiT.create(
        DiTConfig(
            num_layers=4, num_attention_heads=5, attention_head_dim=12, caption_channels=16, cross_attention_dim=60
        ),
        seed=0,
    )
    with torch.no_grad():
        for number, parameter in enumerate(dit.parameters()):
            parameter.add_(drawn(*parameter.shape, seed=number), alpha=0.05)
    return dit.requires_grad_(False)


def five_heads_inputs(*size: int) -> dict:
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, 3:] = 0
    return dict(
        latents=drawn(2, 8, *size, seed=100),
        timestep=torch.tensor([900, 20]),
        text=drawn(2, 7, 16, seed=101),
        text_mask=mask,
    )


def with_adapters(dit):
    """LoRA's, as they are after some steps."""
    from osp_fast.models.lora import add_lora

    add_lora(dit, 2, 2.0, seed=0)
    for number, (name, parameter) in enumerate(dit.named_parameters()):
        if "lora_B" in name:
            parameter.data = drawn(*parameter.shape, seed=number) / 10
    return dit


def cases(ranks: int) -> list[tuple[str, object, dict]]:
    """Models and inputs: 105, 105, 300, 2 and 45 tokens, 2 and 5 heads, with masks, adapters and without."""
    from osp_fast.models.dit import DiT

    golden, five = DiT.from_pretrained(GOLDEN), five_heads().requires_grad_(True)
    every = [
        ("golden", golden, golden_inputs(False)),
        ("golden, latent mask", golden, golden_inputs(True)),
        ("five heads", five, five_heads_inputs(5, 12, 20)),
        ("two tokens", five, five_heads_inputs(1, 2, 4)),
        ("adapters", with_adapters(five_heads()), five_heads_inputs(3, 6, 10)),
    ]
    return {1: every, 2: every, 3: every[1:4]}.get(ranks, every[1:3])


def with_gradients(dit, inputs: dict) -> dict[str, torch.Tensor]:
    """The prediction, and the gradients of a loss that weighs each of its numbers in another way."""
    dit.zero_grad()
    prediction = dit(**inputs)
    (prediction * drawn(*prediction.shape, seed=7)).sum().backward()
    gradients = {name: parameter.grad for name, parameter in dit.named_parameters() if parameter.grad is not None}
    return {"prediction": prediction.detach(), **gradients}


@torch.no_grad()
def cached_text(dit, inputs: dict) -> torch.Tensor:
    """The prediction with what depends on the text made before."""
    inputs = dict(inputs)
    context = dit.text_context(inputs.pop("text"), inputs.pop("text_mask"))
    return dit(text=context, **inputs)


def denoised(dit, mesh, steps: int, threshold: float | None = None) -> tuple[torch.Tensor, int]:
    """A clip with guidance as the pipeline samples it, and how many calls the step cache skipped."""
    from osp_fast.diffusion.denoise import GuidedModel, Halves, Text, denoise, prepare_text
    from osp_fast.diffusion.samplers import make_scheduler
    from osp_fast.diffusion.step_cache import FirstBlockCache

    scheduler = make_scheduler("DDIM", "v_prediction", True)
    channels = dit.config.caption_channels
    text = Text(drawn(1, 9, channels, seed=1), torch.ones(1, 9))
    negative = Text(drawn(1, 9, channels, seed=2), torch.ones(1, 9).index_fill(1, torch.arange(4, 9), 0))
    halves = Halves.TOGETHER if mesh.half is None else Halves.APART
    cache = None if threshold is None else FirstBlockCache(threshold, mesh.agree)
    model = GuidedModel(
        dit,
        prepare_text(dit, text, negative, halves, mesh.half or 0),
        scheduler.set_steps(steps),
        SCALE,
        halves,
        step_cache=cache,
        exchange=None if mesh.half is None else mesh.exchange,
    )
    latents = denoise(model, scheduler, steps, drawn(1, 8, 3, 10, 14, seed=3))
    return latents, 0 if cache is None else cache.skipped


class Counted(TorchDispatchMode):
    """Bytes that this rank sends to others within the block, and how often it does, forward and backward."""

    def __init__(self, group=None):
        super().__init__()
        self.bytes = self.times = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        import torch.distributed as dist

        if function is torch.ops._c10d_functional.all_to_all_single.default:
            x, _, sent, group = args
            place = dist.get_rank(dist.distributed_c10d._resolve_process_group(group))
            self.bytes += (sum(sent) - sent[place]) * x.element_size()
            self.times += 1
        return function(*args, **(kwargs or {}))


class FileBuffer:
    """A `PeerBuffer` of processes: a file for each rank, which all of them have mapped."""

    def __init__(self, stem: Path, rank: int, group: str, size: int):
        import torch.distributed as dist

        self.stem, self.size, self.group = stem, size, dist.distributed_c10d._resolve_process_group(group)
        Path(f"{stem}-{rank}").write_bytes(b"\xff" * size)  # NaN, wherever a rank reads too early
        self.barrier(0)

    def of(self, rank: int, first: int, count: int, dtype: torch.dtype) -> torch.Tensor:
        whole = torch.from_file(f"{self.stem}-{rank}", shared=True, size=self.size, dtype=torch.uint8)
        return whole.view(dtype)[first : first + count]

    def barrier(self, channel: int) -> None:
        import torch.distributed as dist

        dist.barrier(self.group)


class AtOnce:
    """A `Lane` on which copies run while they are launched."""

    behind = staticmethod(nullcontext)

    def mark(self) -> str:
        return "done"

    def wait(self, mark: str) -> None:
        assert mark == "done"


def through_files(exchange, folder: Path):
    """Let an exchange without gradients go through `PeerMemory`. Returns it."""
    import torch.distributed as dist

    from osp_fast.parallel.peer_memory import PeerMemory

    for name in ("everyone", "scope", "others"):
        link, made = getattr(exchange, name), itertools.count()
        ranks = dist.get_process_group_ranks(dist.distributed_c10d._resolve_process_group(link.group))

        def allocate(size: int, stem=folder / f"{name}-{ranks[0]}", link=link, made=made) -> FileBuffer:
            return FileBuffer(Path(f"{stem}-{next(made)}"), link.rank, link.group, size)

        setattr(exchange, name, replace(link, peers=PeerMemory(link.rank, len(ranks), allocate, AtOnce())))
    return exchange


def share_clips(folder: str) -> None:
    """All checks of one number of ranks; what each found goes to `folder`."""
    import torch.distributed as dist

    from osp_fast.engine.levels import Level
    from osp_fast.parallel.guidance import SamplingMesh
    from osp_fast.parallel.mesh import SequenceGroup
    from osp_fast.parallel.sequence_plan import sequence_plans
    from osp_fast.parallel.world import open_world

    with open_world("cpu", TIMEOUT_S, TIMEOUT_S, print) as world:
        group = SequenceGroup.of(world, world.size, TIMEOUT_S)
        found, models = {}, cases(world.size)
        for plan in sequence_plans(world.size, 4):
            exchange = group.exchange(plan, 4)
            for name, dit, inputs in models:
                dit.share_tokens(exchange)
                with Counted() as forward, torch.no_grad():
                    whole = dit(**inputs)
                with Counted() as both:
                    results = with_gradients(dit, inputs)
                assert torch.equal(whole, results["prediction"])
                if name == "five heads":
                    dit.recompute_blocks(Level.NOTHING.recompute())
                    again = with_gradients(dit, inputs)
                    dit.recompute_blocks(None)
                    assert all(torch.equal(again[key], value) for key, value in results.items())
                assert torch._C._distributed_c10d._get_work_registry_size() == 0  # all that was begun was awaited
                for gradient in list(results.values())[1:]:
                    dist.all_reduce(gradient)
                if name == "five heads":
                    results["prediction, text context"] = cached_text(dit, inputs)
                    through = Path(folder, f"{plan.scope}")
                    through.mkdir(exist_ok=True)
                    dit.share_tokens(through_files(group.exchange(plan, 4), through))
                    with Counted() as nothing, torch.no_grad():
                        assert torch.equal(dit(**inputs), whole)
                    assert nothing.times == 0
                found[plan.scope, name] = dict(
                    results=results if world.rank == 0 else {"prediction": whole},
                    sent=(forward.bytes, both.bytes - forward.bytes),
                )
        torch.save(found, Path(folder, f"clips-{world.rank}.pt"))
        mesh, golden = SamplingMesh.of(world, True, TIMEOUT_S), models[0][1].requires_grad_(False)
        mesh.share(golden, sequence_plans(mesh.length, 4)[-1], print)
        clips = dict(describe=mesh.describe(), latents=denoised(golden, mesh, STEPS)[0])
        clips["cached"] = denoised(golden, mesh, CACHED_STEPS, THRESHOLD)
        torch.save(clips, Path(folder, f"guided-{world.rank}.pt"))


def train_on_shared_weights(folder: str) -> None:
    """Compiled blocks that recompute all, and weights that are spread over the same two ranks (FSDP2)."""
    from osp_fast.engine.compile import compile_blocks
    from osp_fast.engine.levels import Level
    from osp_fast.parallel.apply import shard_dit
    from osp_fast.parallel.mesh import SequenceGroup, make_mesh
    from osp_fast.parallel.sequence_plan import sequence_plans
    from osp_fast.parallel.world import open_world

    with open_world("cpu", TIMEOUT_S, TIMEOUT_S, print) as world:
        group = SequenceGroup.of(world, world.size, TIMEOUT_S)
        dit = five_heads().requires_grad_(True).recompute_blocks(Level.NOTHING.recompute())
        dit.share_tokens(group.exchange(sequence_plans(world.size, 4)[-1], 4))
        shard_dit(compile_blocks(dit, 1, "aot_eager"), make_mesh("cpu", world.size))
        found = with_gradients(dit, five_heads_inputs(5, 12, 20))
        # FSDP takes the mean of what are parts of a sum.
        gradients = {name: x.full_tensor() * world.size for name, x in found.items() if name != "prediction"}
        if world.is_first:
            torch.save(found | gradients, Path(folder, "trained.pt"))


def lose_a_rank(how: str) -> None:
    """Rank 2 of 4 is killed or stopped in its second step, or killed while the others wait to hear of its errors."""
    from osp_fast.errors import run_entry_point
    from osp_fast.models.dit import DiT
    from osp_fast.parallel.guidance import SamplingMesh
    from osp_fast.parallel.sequence_plan import sequence_plans
    from osp_fast.parallel.world import open_world

    timeout_s = 3.0 if how == "stopped" else TIMEOUT_S

    def run() -> None:
        with open_world("cpu", TIMEOUT_S, timeout_s, print) as world:
            mesh = SamplingMesh.of(world, True, timeout_s)
            plan = sequence_plans(mesh.length, 4)[-1]
            dit = DiT.from_pretrained(GOLDEN)
            calls = []

            def trouble(*arguments) -> None:
                calls.append(1)
                if world.rank == 2 and len(calls) == 2:
                    os.kill(os.getpid(), signal.SIGSTOP if how == "stopped" else signal.SIGKILL)

            dit.transformer_blocks[3].register_forward_hook(trouble)
            with world.together():
                if how != "killed later":
                    denoised(mesh.share(dit, plan, print), mesh, STEPS)
                elif world.rank == 2:
                    denoised(dit, SamplingMesh(), STEPS)

    run_entry_point(run)
