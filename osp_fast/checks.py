"""Settings that depend on each other: what contradicts ends in a `UserError`, what is overruled in a notice."""

import dataclasses
import re

from osp_fast.config import (
    SP_GRID,
    SP_MODES,
    DataConfig,
    DiffusionConfig,
    OptimizerConfig,
    Recipe,
    RunConfig,
    SampleConfig,
    TrainConfig,
)
from osp_fast.errors import UserError

FRAME_STEP = 4  # the VAE's temporal stride: clips have 4n + 1 frames
PIXEL_STEP = 16  # the VAE's spatial stride 8 times the DiT's patch 2
RELEASED_PIXEL_STEP = 32  # what the released checkpoints were trained on


def check_train(config: TrainConfig) -> list[str]:
    """Check a training configuration; returns notices, one line each. Raises `UserError` on a contradiction."""
    data, run = config.data, config.run
    alone = run.dry_run is not None and data.force_resolution  # one size is known without any clip
    if not data.data and not alone:
        raise UserError("--data is missing: name a data.txt, or use --preset tiny for the generated data set")
    if data.sample_rate != 1:
        raise UserError(
            f"--sample_rate {data.sample_rate} is not supported: the frame step follows from --train_fps, "
            f"so use --sample_rate 1 --train_fps {data.train_fps / data.sample_rate:g}"
        )
    check_frames("--num_frames", data.num_frames)
    notices = check_sizes(data)
    if config.diffusion.rf_scheduler:
        for name, is_set in (
            ("--snr_gamma", config.diffusion.snr_gamma is not None),
            ("--rescale_betas_zero_snr", config.diffusion.rescale_betas_zero_snr),
            ("--prediction_type", config.diffusion.prediction_type != "epsilon"),
        ):
            if is_set:
                notices.append(f"{name} has no effect with --rf_scheduler, which predicts the flow's velocity")
    if run.report_to in ("wandb", "all"):
        notices.append(f"--report_to {run.report_to}: metrics go to TensorBoard and metrics.jsonl, nothing is uploaded")
    if not run.use_ema:
        for name in ("ema_decay", "ema_start_step", "offload_ema"):
            if getattr(run, name) != getattr(RunConfig, name):
                notices.append(f"--{name} has no effect without --use_ema")
    if not config.diffusion.rf_scheduler and config.diffusion.weighting_scheme != DiffusionConfig.weighting_scheme:
        notices.append("--weighting_scheme has no effect without --rf_scheduler")
    if config.optimizer.lr_scheduler == "constant" and config.optimizer.lr_warmup_steps not in (
        0,
        OptimizerConfig.lr_warmup_steps,
    ):
        notices.append("--lr_warmup_steps has no effect with --lr_scheduler constant: use constant_with_warmup")
    check_sp_mode(run.sp_mode)
    if run.sp_mode != RunConfig.sp_mode and run.sp_size == 1:
        notices.append("--sp_mode has no effect with --sp_size 1")
    if run.train_sp_batch_size != 1 and run.sp_size == 1:
        notices.append("--train_sp_batch_size has no effect with --sp_size 1; --train_batch_size counts")
    if data.cache_variants != 1 and data.latent_cache is None:
        notices.append("--cache_variants has no effect without --latent_cache")
    if config.model.lora_rank is not None and not config.model.pretrained:
        raise UserError("--lora_rank adapts trained weights: name their folder with --pretrained")
    if run.validation_prompt and run.validation_steps is None:
        notices.append("--validation_prompt has no effect without --validation_steps")
    if run.checkpoints_keep_every is not None and run.checkpoints_total_limit is None:
        notices.append("--checkpoints_keep_every has no effect without --checkpoints_total_limit: all stay")
    if config.optimizer.tokens_per_batch is not None and config.optimizer.train_batch_size != 1:
        notices.append("--train_batch_size has no effect with --tokens_per_batch")
    if config.optimizer.tokens_per_batch is not None and run.train_sp_batch_size != 1 and run.sp_size > 1:
        notices.append("--train_sp_batch_size has no effect with --tokens_per_batch")
    if config.model.gradient_checkpointing and config.model.activation_memory is not None:
        notices.append("--gradient_checkpointing has no effect with --activation_memory, which recomputes what must be")
    if config.model.lora_alpha is not None and config.model.lora_rank is None:
        notices.append("--lora_alpha has no effect without --lora_rank")
    if config.optimizer.tokens_per_batch is not None and not data.group_data:
        raise UserError("--tokens_per_batch counts the tokens of clips of one size: add --group_data")
    if run.resume_from_checkpoint and config.model.pretrained and config.model.lora_rank is None:
        notices.append("--resume_from_checkpoint overrides --pretrained when a checkpoint is found")
    return notices


def check_sizes(data: DataConfig) -> list[str]:
    """Check the three ways to bound the resolution; returns notices. Raises `UserError`."""
    notices = []
    if data.hw_stride % PIXEL_STEP:
        raise UserError(
            f"--hw_stride {data.hw_stride} is not a multiple of {PIXEL_STEP}, the size of a token in pixels"
        )
    for low, high in (("min_height", "min_width"), ("max_height", "max_width")):
        if (getattr(data, low) is None) != (getattr(data, high) is None):
            raise UserError(f"--{low} and --{high} go together: give both or neither")
    if data.max_hxw is None and data.max_height is None:
        raise UserError("no size is given: use --max_height and --max_width, or --max_hxw")
    if data.force_resolution:
        if data.max_height is None:
            raise UserError("--force_resolution needs --max_height and --max_width")
        for name in ("max_height", "max_width"):
            check_multiple(f"--{name}", getattr(data, name), data.hw_stride, "--hw_stride")
        for name in ("max_hxw", "min_hxw", "min_height", "min_width"):
            if getattr(data, name) is not None:
                notices.append(f"--{name} has no effect with --force_resolution")
        return notices
    if data.min_hxw is not None and data.max_hxw is None:
        raise UserError("--min_hxw needs --max_hxw")
    if data.max_hxw is not None:
        if data.min_hxw is not None and data.min_hxw > data.max_hxw:
            raise UserError(f"--min_hxw {data.min_hxw} is greater than --max_hxw {data.max_hxw}")
        for name in ("max_height", "max_width", "min_height", "min_width"):
            if getattr(data, name) is not None:
                notices.append(f"--{name} has no effect with --max_hxw")
        return notices
    if data.min_height is not None:
        for side in ("height", "width"):
            low, high = getattr(data, f"min_{side}"), getattr(data, f"max_{side}")
            if low > high:
                raise UserError(f"--min_{side} {low} is greater than --max_{side} {high}")
    return notices


def check_sample(config: SampleConfig) -> list[str]:
    """Check a sampling configuration; returns notices, one line each. Raises `UserError` on a contradiction."""
    if not config.text_prompt and not config.dry_run:
        raise UserError("--text_prompt is missing: give prompts, or one .txt file with a prompt per line")
    for name in ("model_path", "ae_path", "text_encoder_name_1"):
        if not getattr(config, name) and not config.dry_run:
            raise UserError(f"--{name} is missing: name a folder, or use --preset tiny")
    if config.num_frames is not None:
        check_frames("--num_frames", config.num_frames)
    for flag, size in (("--height", config.height), ("--width", config.width)):
        if size is not None:  # what the checkpoint was trained on may ask for more: see `with_recipe`
            check_multiple(flag, size, PIXEL_STEP)
    check_sp_mode(config.sp_mode)
    notices = []
    if config.sp_mode != SampleConfig.sp_mode and not config.sp:
        notices.append("--sp_mode has no effect without --sp")
    flow = config.sample_method == "FlowMatchEulerDiscrete"
    if flow and (config.prediction_type or config.rescale_betas_zero_snr):
        notices.append("--prediction_type and --rescale_betas_zero_snr have no effect with FlowMatchEulerDiscrete")
    if config.lora is None and config.lora_scale != SampleConfig.lora_scale:
        notices.append("--lora_scale has no effect without --lora")
    if config.cuda_graphs:
        for name, is_set in (("step_cache", config.step_cache), ("sp", config.sp), ("save_memory", config.save_memory)):
            if is_set:
                raise UserError(f"--cuda_graphs cannot hold what --{name} does: leave one of the two out")
    for name in ("refiner_max_tokens", "refiner_temperature"):
        if config.caption_refiner is None and getattr(config, name) != getattr(SampleConfig, name):
            notices.append(f"--{name} has no effect without --caption_refiner")
    return notices


def with_recipe(config: SampleConfig, recipe: Recipe | None) -> SampleConfig:
    """The configuration with its open sizes and frame rate filled in: as trained, else as the released models were.

    Raises `UserError` for a height or width that is not a multiple of what the model was trained on.
    """
    trained = re.fullmatch(r"(\d+)x(\d+)", recipe.size) if recipe else None
    height, width = (int(trained[1]), int(trained[2])) if trained else (480, 640)
    defaults = dict(
        num_frames=recipe.num_frames if recipe else 93,
        height=height,
        width=width,
        fps=recipe.train_fps if recipe else 24.0,
    )
    filled = {name: value for name, value in defaults.items() if getattr(config, name) is None}
    config = dataclasses.replace(config, **filled)
    released = PIXEL_STEP if config.ae == "tiny" else RELEASED_PIXEL_STEP
    step = recipe.hw_stride if recipe else released
    check_multiple("--height", config.height, step, "the checkpoint's stride")
    check_multiple("--width", config.width, step, "the checkpoint's stride")
    return config


def check_sp_mode(mode: str) -> None:
    """Raise `UserError` for a word that `--sp_mode` does not know; whether it goes with the GPUs is found out later."""
    if mode not in SP_MODES and not re.fullmatch(SP_GRID, mode):
        raise UserError(f"--sp_mode {mode!r} is unknown: use {', '.join(SP_MODES)}, or groups x GPUs such as 4x2")


def check_frames(flag: str, frames: int) -> None:
    """Raise `UserError` unless `frames` is 4n + 1."""
    if (frames - 1) % FRAME_STEP:
        below = (frames - 1) // FRAME_STEP * FRAME_STEP + 1
        raise UserError(f"{flag} {frames} is not of the form 4n+1: use {below} or {below + FRAME_STEP}")


def check_multiple(flag: str, size: int, step: int, source: str = "the model's stride") -> None:
    """Raise `UserError` unless `size` pixels is a multiple of `step`."""
    if size % step:
        below = size // step * step
        choice = f"{below} or {below + step}" if below else f"{step}"
        raise UserError(f"{flag} {size} is not a multiple of {step} ({source}): use {choice}")
