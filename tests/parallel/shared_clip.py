"""What the ranks of `test_sequence.py` run, and what one rank computes for comparison."""

import os
import signal
from pathlib import Path

import torch
from safetensors.torch import load_file

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


@torch.no_grad()
def predictions(golden, five) -> dict[str, torch.Tensor]:
    """105, 45 and 2 tokens; 2 and 5 heads; with masks and without."""
    found = {}
    for name, dit, inputs in (
        ("golden", golden, golden_inputs(False)),
        ("golden, latent mask", golden, golden_inputs(True)),
        ("five heads", five, five_heads_inputs(3, 6, 10)),
        ("two tokens", five, five_heads_inputs(1, 2, 4)),
    ):
        found[name] = dit(**inputs)
        context = dit.text_context(inputs.pop("text"), inputs.pop("text_mask"))
        found[f"{name}, text context"] = dit(text=context, **inputs)
    return found


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


class Counted:
    """Bytes that this rank sends to others, by collective, within the block."""

    def __enter__(self):
        import torch.distributed as dist

        self.all_to_all = self.all_gather = 0
        self.honest = dist.all_to_all_single, dist.all_gather
        to_all, gather = self.honest

        def counting_to_all(out, x, received, sent, group):
            others = sum(sent) - sent[dist.get_rank(group)]
            self.all_to_all += others * x.element_size()
            to_all(out, x, received, sent, group=group)

        def counting_gather(out, x, group):
            self.all_gather += x.numel() * x.element_size()
            gather(out, x, group=group)

        dist.all_to_all_single, dist.all_gather = counting_to_all, counting_gather
        return self

    def __exit__(self, *error):
        import torch.distributed as dist

        dist.all_to_all_single, dist.all_gather = self.honest


def backward_is_refused(dit) -> str:
    """What a backward pass through the exchange says."""
    dit.proj_out.requires_grad_()
    try:
        dit(**golden_inputs(False)).sum().backward()
    except RuntimeError as error:
        return str(error)
    finally:
        dit.requires_grad_(False)
    return "no error"


@torch.no_grad()
def compiled(mesh) -> torch.Tensor:
    from osp_fast.engine.compile import compile_blocks

    dit = compile_blocks(mesh.share(five_heads()), 1, "eager")
    return dit(**five_heads_inputs(3, 6, 10))


def share_clips(folder: str) -> None:
    """All checks of one number of ranks; what each found goes to `folder`."""
    from osp_fast.models.dit import DiT
    from osp_fast.parallel.guidance import SamplingMesh
    from osp_fast.parallel.world import open_world

    with open_world("cpu", TIMEOUT_S, TIMEOUT_S, print) as world:
        golden, five = DiT.from_pretrained(GOLDEN).requires_grad_(False), five_heads()
        whole, guided = (SamplingMesh.of(world, guided, TIMEOUT_S) for guided in (False, True))
        for dit in (golden, five):
            whole.share(dit)
        found = {"predictions": predictions(golden, five), "describe": (whole.describe(), guided.describe())}
        with Counted() as prediction, torch.no_grad():
            five(**five_heads_inputs(3, 6, 10))
        if world.size == 2:
            found["backward"] = backward_is_refused(golden)
            found["compiled"] = compiled(whole)
        guided.share(golden)
        with Counted() as clip:
            found["latents"], _ = denoised(golden, guided, STEPS)
        found["cached"] = denoised(golden, guided, CACHED_STEPS, THRESHOLD)
        found["bytes"] = (prediction.all_to_all, prediction.all_gather, clip.all_to_all, clip.all_gather)
        torch.save(found, Path(folder, f"{world.rank}.pt"))


def lose_a_rank(how: str) -> None:
    """Rank 2 of 4 is killed or stopped in its second step, or killed while the others wait to hear of its errors."""
    from osp_fast.errors import run_entry_point
    from osp_fast.models.dit import DiT
    from osp_fast.parallel.guidance import SamplingMesh
    from osp_fast.parallel.world import open_world

    timeout_s = 3.0 if how == "stopped" else TIMEOUT_S

    def run() -> None:
        with open_world("cpu", TIMEOUT_S, timeout_s, print) as world:
            mesh = SamplingMesh.of(world, True, timeout_s)
            dit = DiT.from_pretrained(GOLDEN)
            calls = []

            def trouble(*arguments) -> None:
                calls.append(1)
                if world.rank == 2 and len(calls) == 2:
                    os.kill(os.getpid(), signal.SIGSTOP if how == "stopped" else signal.SIGKILL)

            dit.transformer_blocks[3].register_forward_hook(trouble)
            with world.together():
                if how != "killed later":
                    denoised(mesh.share(dit), mesh, STEPS)
                elif world.rank == 2:
                    denoised(dit, SamplingMesh(), STEPS)

    run_entry_point(run)
