"""Latents and text states ahead of training: python -m osp_fast.encode <the flags of training> --latent_cache FOLDER.

Run it with the flags of the training run, alone or under torchrun; run it again after an interruption or a change of
the data, and it encodes what is missing. Training with the same flags then reads the folder, and loads neither the VAE
nor the text encoder.
"""

import gc
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from osp_fast.assets.shapes import ensure_data
from osp_fast.cli import parse_train, train_parser
from osp_fast.config import TrainConfig
from osp_fast.data.buckets import load_plan
from osp_fast.data.cache_shards import locked
from osp_fast.data.identity import Identities
from osp_fast.data.latent_cache import SHARDS, LatentCache, shared_names
from osp_fast.device import rank_device
from osp_fast.errors import UserError, run_entry_point
from osp_fast.parallel.world import Ranks
from osp_fast.progress import say
from osp_fast.training.build import check_folders, load_text_encoder, load_vae, set_precision
from osp_fast.training.cached import networks_of
from osp_fast.training.guards import StopSignals
from osp_fast.training.place import plan_summary
from osp_fast.training.precompute import Share, encode_captions, encode_clips, prepare_folder


def main(argv: Sequence[str] | None = None) -> None:
    """Encode as the flags say. Raises `UserError`, and SystemExit when a signal ended the run (130 or 143)."""
    config, _ = parse_train(argv, train_parser("osp_fast.encode"))
    if not config.data.latent_cache:
        raise UserError("--latent_cache is missing: name the folder that latents and text states go to")
    ensure_data(config.data.data)
    code = encode(config, share_of_process())
    if code:
        sys.exit(code)


def share_of_process() -> Share:
    """This process's part of the work, as torchrun's environment says. Raises `UserError`."""
    ranks = Ranks.from_environment()
    return Share(ranks.rank, ranks.size, ranks.local_size)


def encode(config: TrainConfig, share: Share) -> int:
    """Encode this rank's part of what is missing. Returns the exit code: 0, or 130 or 143 after SIGINT or SIGTERM.

    Raises:
        UserError: anything that the user has to mend; what was encoded is kept.
    """
    device = rank_device(config.run.device)
    check_folders(config.model)
    plan = load_plan(config.data, config.run.seed, say if share.rank == 0 else None)
    if share.rank == 0:
        say(plan_summary(plan))
    folder, networks, identities = Path(config.data.latent_cache), networks_of(config), Identities()
    prepare_folder(folder, networks, identities, share.rank, say)
    set_precision(config.model)
    with locked(folder / SHARDS, share.rank), StopSignals() as stop:

        def stopped() -> bool:
            return stop.received is not None

        cache = LatentCache(folder, identities, shared_names(plan))
        doing = "encoding captions does not fit into the memory of {}: use --mixed_precision bf16, or --device cpu"
        try:
            texts = encode_captions(
                cache, plan, config, networks, share, lambda: load_text_encoder(config.model, device), stopped
            )
            doing = "encoding clips does not fit into the memory of {}: name a lower --vae_memory"
            gc.collect()  # the text encoder and the VAE are not in memory together
            if device.type == "cuda":
                torch.cuda.empty_cache()
            clips = encode_clips(
                cache, plan, config, share, lambda: load_vae(config.model, device), device, stopped, say
            )
        except torch.OutOfMemoryError as error:
            raise UserError(doing.format(device)) from error
    say(
        f"rank {share.rank}: {clips.encoded} clips and {texts.encoded} captions encoded, {clips.kept} and {texts.kept}"
        f" were there, {clips.rejected} clips broken"
    )
    if stop.received is not None:
        say(f"{stop.received.name}: stopped; go on with the same command")
    return stop.exit_code


if __name__ == "__main__":
    run_entry_point(main)
