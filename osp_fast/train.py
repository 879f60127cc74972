"""Training from the command line: python -m osp_fast.train --preset tiny, or upstream's flags.

The run's settings, history and checkpoints go to `--output_dir`; `osp_fast/training` does the work.
"""

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from osp_fast.assets.build import ensure_tiny
from osp_fast.cli import parse_train
from osp_fast.config import TINY_FOLDER, TrainConfig, as_dict
from osp_fast.data.buckets import Plan, load_plan
from osp_fast.data.dataset import ClipLoader
from osp_fast.data.rejects import RejectLog
from osp_fast.device import resolve_device
from osp_fast.errors import UserError, run_entry_point
from osp_fast.models.attention_backends import resolve_attention
from osp_fast.progress import Progress
from osp_fast.training.build import (
    build_dit,
    build_vae,
    check_folders,
    check_text_encoder,
    compute_dtype,
    load_text_encoder,
    set_determinism,
    set_precision,
)
from osp_fast.training.cached import open_cache
from osp_fast.training.guards import StopSignals, refuse_parallel_runs
from osp_fast.training.loop import Trainer, prepare_output
from osp_fast.training.metrics import MetricsLog
from osp_fast.training.place import clips_per_step, plan_summary, starting_point, steps_per_epoch
from osp_fast.training.step import ClipLoss


def main(argv: Sequence[str] | None = None) -> None:
    """Train as the flags say. Raises `UserError`, and SystemExit when a signal ended the run (130 or 143)."""
    config, _ = parse_train(argv)
    refuse_parallel_runs(config.run)
    if config.run.preset == "tiny":
        ensure_tiny(TINY_FOLDER)
    code = train(config)
    if code:
        sys.exit(code)


def train(config: TrainConfig) -> int:
    """A training run from beginning to end. Returns the exit code: 0, or 130 or 143 after SIGINT or SIGTERM.

    Raises:
        UserError: anything that the user has to mend.
    """
    run = config.run
    output_dir = Path(run.output_dir)
    device = resolve_device(run.device)
    check_folders(config.model)
    resolve_attention(config.model.attention, device, compute_dtype(config.model))
    checkpoint = prepare_output(config, say)
    for group, values in as_dict(config).items():
        say(f"{group}: " + ", ".join(f"{name}={value}" for name, value in values.items()))
    plan = load_plan(config.data, run.seed, say)
    say(plan_summary(plan))
    cache = None if config.data.latent_cache is None else open_cache(config, plan, say)
    state = starting_point(config, plan, checkpoint, say)
    save_settings(config)
    total_steps = run.max_train_steps or run.num_train_epochs * steps_per_epoch(plan, config)
    if state.step >= total_steps:
        say(f"{checkpoint} is already at step {state.step} of {total_steps}: raise --max_train_steps to train further")
        return 0

    set_precision(config.model)
    set_determinism(run.deterministic, device)
    dit = build_dit(config, checkpoint, device)
    vae = build_vae(config.model, dit, device, weights=cache is None)
    text = check_text_encoder(config.model, dit)
    text_encoder = load_text_encoder(config.model, device) if cache is None else None
    size = sum(parameter.numel() for parameter in dit.parameters()) / 1e6
    say(f"{size:.1f} M parameters on {device}, {total_steps} steps")
    say(f"attention: {dit.attention_summary()}")
    stop = StopSignals()
    trainer = Trainer(config, ClipLoss(dit, vae, text_encoder, config, device), state, checkpoint, total_steps)
    loader = ClipLoader(
        plan,
        config.data,
        seed=run.seed,
        global_batch_size=clips_per_step(config),
        drop_caption=config.diffusion.cfg,
        chinese=text.is_multilingual,
        rejects=RejectLog(output_dir / "rejects.jsonl", config.data.max_bad_samples),
        cache=cache,
        epoch=state.epoch,
        first_batch=state.batch,
        stopped=lambda: stop.received is not None,
    )
    continued = checkpoint is not None and checkpoint.resolve().parent == output_dir.resolve()
    metrics = MetricsLog(run, resumed_step=state.step if continued else 0)
    progress = Progress(total_steps, first=state.step)
    try:
        with stop:
            last = trainer.run(loader, metrics, progress, stop)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"step {state.step + 1} does not fit into the memory of {device}: use --gradient_checkpointing,"
            " --vae_memory, --mixed_precision bf16 or a smaller --train_batch_size"
        ) from error
    finally:
        progress.close()
        metrics.close()
        loader.close()
    if state.step < total_steps:
        say(f"{stop.received.name}: stopped after step {state.step}; go on with --resume_from_checkpoint {last}")
        return stop.exit_code
    say(f"trained {state.step} steps: {last}\nsample from it: {sample_command(config, plan, last)}")
    return 0


def say(line: str) -> None:
    """Print a line for the user on stderr, at once also into a pipe."""
    print(line, file=sys.stderr, flush=True)


def save_settings(config: TrainConfig) -> None:
    """Save the resolved settings as `output_dir/settings.json`. Raises `UserError`."""
    file = Path(config.run.output_dir) / "settings.json"
    try:
        file.write_text(json.dumps(as_dict(config), indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{file} cannot be written ({error}): make room or choose another --output_dir") from error


def sample_command(config: TrainConfig, plan: Plan, checkpoint: Path) -> str:
    """The command that samples from a checkpoint at the size that most clips have."""
    bucket = max(plan.buckets, key=lambda bucket: len(plan.buckets[bucket]))
    caption = plan.clips[plan.buckets[bucket][0]].entry.captions[0]
    words = ["python", "-m", "osp_fast.sample"]
    words += ["--model_path", str(checkpoint / ("model_ema" if config.run.use_ema else "model"))]
    if config.run.preset is not None:
        words += ["--preset", config.run.preset]
    else:
        words += ["--ae", config.model.ae, "--ae_path", config.model.ae_path]
        words += ["--text_encoder_name_1", config.model.text_encoder_name_1]
        words += ["--max_sequence_length", str(config.model.model_max_length)]
        if config.model.cache_dir is not None:
            words += ["--cache_dir", config.model.cache_dir]
    if config.diffusion.rf_scheduler:
        words += ["--sample_method", "FlowMatchEulerDiscrete"]
    elif config.diffusion.prediction_type == "sample":
        words += ["--sample_method", "DDIM"]
    words += ["--num_frames", str(bucket.frames), "--height", str(bucket.height), "--width", str(bucket.width)]
    return shlex.join([*words, "--text_prompt", caption])


if __name__ == "__main__":
    run_entry_point(main)
