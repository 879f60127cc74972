"""Sampling from the command line: python -m osp_fast.sample --preset tiny --text_prompt "...", or upstream's flags.

Each sample is `{method}_{index}_gs{g}_s{steps}.mp4` (one frame: .jpg) in `--save_img_path`, with a JSON file beside it
that holds all that made it; more than one sample also give a grid. What is there already is skipped, so the same
command goes on after an interruption. Under torchrun the processes share the clips, or with `--sp` each clip.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from osp_fast.cli import parse_sample
from osp_fast.config import SampleConfig
from osp_fast.device import memory_allowance, rank_device
from osp_fast.errors import UserError, run_entry_point
from osp_fast.parallel.guidance import SamplingMesh
from osp_fast.parallel.world import Ranks, World, open_world
from osp_fast.pipeline.settings import NEGATIVE_PROMPT
from osp_fast.pipeline.team import Team
from osp_fast.progress import say
from osp_fast.sampling.clips import SamplingJob
from osp_fast.sampling.dry_run import dry_run
from osp_fast.sampling.folders import writable_folder
from osp_fast.sampling.models import Models
from osp_fast.sampling.output import Output
from osp_fast.sampling.prompts import clean_prompts, read_prompts

COLLECTIVE_SECONDS = 600.0  # with --sp, in which all ranks must have come to the same exchange


def main(argv: Sequence[str] | None = None) -> None:
    """Sample as the flags say. Raises `UserError`, for what the flags, folders and files say before any sampling."""
    config = parse_sample(argv)
    if config.dry_run:
        print("\n".join(dry_run(config)))
        return
    prompts = read_prompts(config.text_prompt)
    with processes(config) as (world, together):
        try:
            sample(config, prompts, world, together)
        except RuntimeError as error:
            # CUDA has a class for it, the CPU's allocator only words.
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
            raise UserError(
                f"a clip of this size does not fit into the memory of {world.device}: use --memory_budget, "
                "--vae_memory, --save_memory or a smaller size"
            ) from error


@contextmanager
def processes(config: SampleConfig) -> Iterator[tuple[World, bool]]:
    """This process among those of torchrun, and whether they share each clip, for which alone they must meet."""
    ranks = Ranks.from_environment()
    if config.sp and ranks.size == 1:
        say("note: --sp has no effect in a single process: start several with torchrun")
    if config.sp and ranks.size > 1:
        with open_world(config.device, config.start_timeout, COLLECTIVE_SECONDS, say) as world:
            yield world, True
        return
    device = rank_device(config.device)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    yield World(ranks, device), False


def sample(config: SampleConfig, prompts: list[str], world: World, together: bool) -> None:
    """Make the clips of `prompts`, as one of the processes of `world`. Raises `UserError`."""

    def report(line: str) -> None:
        say(line if world.is_first else f"rank {world.rank}: {line}")

    if together and config.memory_budget is None and world.device.type == "cuda":
        # One plan for all: they must compute in the same way.
        config.memory_budget = -world.greatest(-memory_allowance(world.device))[0]
    models = Models.of(config, world.device)
    clean_prompts(prompts, models.clean)  # before anything is loaded
    settings = models.settings()
    folder = writable_folder(config.save_img_path)
    if world.is_first:
        say("sampling with\n" + "\n".join(f"  {name}: {value}" for name, value in settings.items()))
    to_all = report if world.is_first else lambda line: None
    if together:
        mesh = SamplingMesh.of(world, config.guidance_scale != 1, COLLECTIVE_SECONDS)
        pipeline = models.pipeline(to_all, team=Team(mesh, config.sp_mode, models.folders.dtype, to_all))
    else:
        pipeline = models.pipeline(to_all)
    negative = models.clip_settings().negative_prompt
    output = Output(
        folder,
        settings | {"models": models.fingerprints()},
        prompts,
        config.num_samples_per_prompt,
        NEGATIVE_PROMPT if negative is None else negative,
    )
    if config.overwrite and world.is_first:
        if not (world.alone or together):
            raise UserError(
                "--overwrite is for one process or --sp, as others may have begun: remove the clips, or name another "
                "--save_img_path"
            )
        for clip in output.clips:
            output.forget(clip)
    SamplingJob(models, pipeline, prompts, output, world, together, report).run()


if __name__ == "__main__":
    run_entry_point(main)
