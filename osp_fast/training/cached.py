"""Which latent cache a run trains from: made with its networks, and holding all of its plan."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from osp_fast.config import TrainConfig
from osp_fast.data.buckets import Clip, Plan
from osp_fast.data.identity import Identities
from osp_fast.data.latent_cache import (
    ENCODE,
    LatentCache,
    Missing,
    Networks,
    check_manifest,
    shared_names,
    variant_caption,
    variant_frames,
)
from osp_fast.errors import UserError
from osp_fast.models.text_encoder import find_folder, read_facts
from osp_fast.progress import Progress
from osp_fast.training.build import compute_dtype, vae_dtype

STAT_THREADS = 16  # files looked at together, for folders on a network
CLIPS_AT_ONCE = 4096


def networks_of(config: TrainConfig) -> Networks:
    """What the flags say of the networks. Raises `UserError`."""
    model = config.model
    text_encoder = find_folder(model.text_encoder_name_1, model.cache_dir)
    return Networks(
        vae=find_folder(model.ae_path, model.cache_dir),
        text_encoder=text_encoder,
        vae_dtype=str(vae_dtype(model)).removeprefix("torch."),
        text_dtype=str(compute_dtype(model)).removeprefix("torch."),
        max_length=model.model_max_length,
        chinese=read_facts(text_encoder).is_multilingual,
    )


def open_cache(config: TrainConfig, plan: Plan, report: Callable[[str], None]) -> LatentCache:
    """The cache that a run trains from. Raises `UserError` unless it holds all of the plan as everything is now."""
    folder, networks, identities = Path(config.data.latent_cache), networks_of(config), Identities()
    check_manifest(folder, networks, identities)
    cache = LatentCache(folder, identities, shared_names(plan))
    if not cache.holds_text(""):
        raise UserError(f"--latent_cache {folder}: the empty caption is not encoded: {ENCODE}")
    variants, missing = config.data.cache_variants, []

    def reason(place: tuple[Clip, int]) -> str | None:
        clip, variant = place
        try:
            cache.find(clip, variant_frames(clip, variant, config.data))
        except Missing as error:
            return str(error)
        caption = variant_caption(clip.entry, variant, networks.chinese)
        return None if cache.holds_text(caption) else f"its caption {caption[:60]!r} is not encoded"

    progress = Progress(len(plan.clips))
    with ThreadPoolExecutor(STAT_THREADS) as pool:
        for first in range(0, len(plan.clips), CLIPS_AT_ONCE):
            clips = plan.clips[first : first + CLIPS_AT_ONCE]
            places = [(clip, variant) for clip in clips for variant in range(variants)]
            found = zip(places, pool.map(reason, places), strict=True)
            missing += [(clip.entry.path, why) for (clip, _), why in found if why]
            progress.show(first + len(clips), f"checked {first + len(clips)}/{len(plan.clips)}", "latent cache")
    progress.close()
    total = len(plan.clips) * variants
    if missing:
        path, why = missing[0]
        raise UserError(
            f"--latent_cache {folder}: {len(missing)} of {total} clips cannot be read, the first of them {path}: {why}:"
            f" {ENCODE}"
        )
    report(f"latent cache {folder}: holds all {total} clips")
    return cache
