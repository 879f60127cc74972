"""`--dry_run`: the plan of memory and the predicted seconds of a sampling run, whatever this machine has of it.

Networks whose folder is named are read from its config.json alone; the others are the released ones.
"""

import torch

from osp_fast.checks import with_recipe
from osp_fast.config import SampleConfig
from osp_fast.device import resolve_dtype
from osp_fast.engine.devices import H100, find_device
from osp_fast.models.text_encoder import find_folder
from osp_fast.models.weights import read_recipe
from osp_fast.models.wfvae_plan import gib
from osp_fast.pipeline.folders import ModelFolders
from osp_fast.pipeline.planning import RELEASED_DIT, Budget
from osp_fast.sampling.folders import find_dit
from osp_fast.sampling.models import clip_settings


def dry_run(config: SampleConfig) -> list[str]:
    """What would be done, line by line. Raises `UserError` if it does not fit."""
    dit = find_dit(config) if config.model_path else None
    recipe = read_recipe(dit) if dit is not None else None
    config = with_recipe(config, recipe)
    # A GPU that is not here: its rates are an H100's.
    device = torch.device("cpu" if config.device == "cpu" else "cuda")
    rates, words = None, "a CPU"
    if device.type == "cuda":
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        rates = (find_device(name) if name else None) or H100
        words = name if name and find_device(name) else f"{name or 'a GPU'}, seconds of an {H100.name}"

    def folder(named: str | None):
        return find_folder(named, config.cache_dir) if named else None

    folders = ModelFolders(
        dit,
        folder(config.ae_path),
        folder(config.text_encoder_name_1),
        dtype=resolve_dtype(config.dtype, device),
        max_length=config.max_sequence_length,
        attention=config.attention,
        refiner=folder(config.caption_refiner),
        refiner_max_tokens=config.refiner_max_tokens,
        text_8bit=config.text_8bit,
    )
    budget = config.memory_budget or (rates.memory if rates else None)
    if budget is None:
        return ["on a CPU nothing is planned without --memory_budget"]
    settings = clip_settings(config)
    calls = len(settings.scheduler(recipe).set_steps(settings.steps))
    clips = max(1, len(config.text_prompt)) * config.num_samples_per_prompt
    plan = Budget(folders, device, budget, config.save_memory, rates=rates).plan(settings, clips, calls)
    size = f"{config.num_frames}x{config.height}x{config.width}"
    guidance = "" if settings.guided else ", without guidance"
    return [
        f"{dit or RELEASED_DIT}, {size}, {calls} model calls{guidance}, {folders.dtype}: {gib(budget)} of {words}",
        *plan.lines(),
    ]
