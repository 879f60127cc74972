"""Sampling from the command line: python -m osp_fast.sample --preset tiny --text_prompt "...", or upstream's flags.

Each sample is `{method}_{index}_gs{g}_s{steps}.mp4` (one frame: .jpg) in `--save_img_path`, with a JSON file beside it
that holds all that made it; more than one sample also give a grid.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from osp_fast.checks import with_recipe
from osp_fast.cli import parse_sample
from osp_fast.config import SAMPLE_PRESETS, SampleConfig, as_dict
from osp_fast.data.captions import clean_caption
from osp_fast.device import check_single_process, resolve_device, resolve_dtype
from osp_fast.engine.compile import check_compiler
from osp_fast.errors import UserError, run_entry_point
from osp_fast.models.attention_backends import resolve_attention
from osp_fast.models.lora import merge_lora
from osp_fast.models.lora_files import agreed_recipe, holds_lora, load_lora
from osp_fast.models.text_encoder import find_folder
from osp_fast.models.weights import read_recipe, write_json
from osp_fast.pipeline import (
    NEGATIVE_PROMPT,
    PROMPT_TEMPLATE,
    VideoPipeline,
    resolve_parametrization,
)
from osp_fast.progress import Progress, duration, say
from osp_fast.sample_files import ClipFiles, Grid, versions
from osp_fast.training.checkpoint import list_checkpoints

TILING_FRAMES = 4  # latent frames decoded at once, at most, with --enable_tiling


def main(argv: Sequence[str] | None = None) -> None:
    """Sample as the flags say. Raises `UserError`, for what the flags, folders and files say before any sampling."""
    config = parse_sample(argv)
    refuse_what_is_missing(config)
    prompts = read_prompts(config.text_prompt)
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    attention = resolve_attention(config.attention, device, dtype)
    dit_folder = find_dit(config)
    vae_folder = find_folder(config.ae_path, config.cache_dir)
    text_encoder_folder = find_folder(config.text_encoder_name_1, config.cache_dir)
    lora = load_lora(find_lora(config.lora)) if config.lora else None
    recipe = read_recipe(dit_folder)
    if lora is not None:
        recipe = agreed_recipe(recipe, dit_folder, lora)
    config = with_recipe(config, recipe)
    parametrization = resolve_parametrization(
        recipe, config.sample_method, config.prediction_type, config.rescale_betas_zero_snr
    )
    calls = len(parametrization.scheduler(config.sample_method).set_steps(config.num_sampling_steps))
    output = writable_folder(config.save_img_path)
    settings = {
        **as_dict(config),
        **parametrization._asdict(),
        "model_path": str(dit_folder),
        "ae_path": str(vae_folder),
        "text_encoder_name_1": str(text_encoder_folder),
        "device": str(device),
        "attention": attention,
        "dtype": str(dtype).removeprefix("torch."),
    }
    if lora is not None:
        settings |= {"lora": str(lora.file), "lora_rank": lora.rank, "lora_alpha": lora.alpha}
    say("sampling with\n" + "\n".join(f"  {name}: {value}" for name, value in settings.items()))
    pipeline = VideoPipeline.from_folders(
        dit_folder,
        vae_folder,
        text_encoder_folder,
        recipe,
        dtype=dtype,
        device=device,
        max_length=config.max_sequence_length,
        attention=attention,
        round_rope_angles=config.round_rope_angles,
        save_memory=config.save_memory,
    )
    if lora is not None:
        merge_lora(pipeline.dit, lora, config.lora_scale)
    say(f"attention: {pipeline.dit.attention_summary()}")
    if config.compile:
        check_compiler(device)
        pipeline.compile_blocks()
    try:
        run(config, pipeline, prompts, calls, settings, output)
    except RuntimeError as error:
        # CUDA has a class for it, the CPU's allocator only words.
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise UserError(
            f"{config.num_frames}x{config.height}x{config.width} does not fit into the memory of {device}: use "
            "--vae_memory, --save_memory or a smaller size"
        ) from error


def run(
    config: SampleConfig,
    pipeline: VideoPipeline,
    prompts: list[str],
    calls: int,
    settings: dict[str, Any],
    output: Path,
) -> None:
    """Generate and write all samples of `prompts`; `calls` model calls make one, `settings` go into every sidecar."""
    chinese = pipeline.text_encoder.is_multilingual
    cleaned = clean_prompts(prompts, lambda text: clean_caption(text, chinese=chinese))
    negative = config.negative_prompt
    negative = NEGATIVE_PROMPT if negative is None else clean_caption(negative, chinese=chinese)
    per_prompt = config.num_samples_per_prompt
    total = len(prompts) * per_prompt
    progress = Progress(total * calls)

    def show(prompt: int, sample: int, done: int, _: int) -> None:
        clip = prompt * per_prompt + sample
        pace = progress.pace(clip * calls + done)
        facts = f"{pace:.2f} s/step, {duration(pace * (calls - done))} left for this clip"
        place = f"clip {clip + 1}/{total}, step {done}/{calls}"
        progress.show(clip * calls + done, place, facts, milestone=done == calls)

    clips = pipeline.generate(
        cleaned,
        negative_prompt=negative,
        num_frames=config.num_frames,
        height=config.height,
        width=config.width,
        steps=config.num_sampling_steps,
        guidance_scale=config.guidance_scale,
        method=config.sample_method,
        seed=config.seed,
        samples_per_prompt=per_prompt,
        prediction_type=config.prediction_type,
        rescale_betas_zero_snr=config.rescale_betas_zero_snr,
        vae_memory=config.vae_memory,
        most_latent_frames=TILING_FRAMES if config.enable_tiling else None,
        on_step=show,
        on_frames=lambda prompt, sample, frames: files.write(prompt * per_prompt + sample, frames),
        report=progress.message,
    )
    grid = Grid(per_prompt, config.width) if per_prompt > 1 else Grid.of(total, config.width)
    method, suffix = config.sample_method, f"gs{config.guidance_scale}_s{config.num_sampling_steps}"
    with ClipFiles(lambda index: output / f"{method}_{index}_{suffix}", config.num_frames, config.fps) as files:
        for index, clip in enumerate(clips):
            path = files.finish(index)
            sidecar = {
                "index": index,
                "prompt_index": clip.prompt_index,
                "sample_index": clip.sample_index,
                "prompt": prompts[clip.prompt_index],
                "full_prompt": PROMPT_TEMPLATE.format(clip.prompt),
                **{name: value for name, value in settings.items() if name != "text_prompt"},
                "negative_prompt": negative,
                "versions": versions(),
            }
            write_json(path.with_name(path.stem + ".json"), sidecar)
            progress.message(f"wrote {path}")
            grid.add(clip.frames)
    progress.close()
    if total > 1:
        say(f"wrote {grid.write(output / f'{method}_{suffix}_grid', config.fps)}")


def refuse_what_is_missing(config: SampleConfig) -> None:
    """Raise `UserError` for flags of upstream that this version does not serve."""
    check_single_process("osp_fast.sample")
    if config.sp:
        raise UserError("--sp is not part of this version: leave it out, one GPU samples the whole clip")
    if config.caption_refiner:
        raise UserError("--caption_refiner is not part of this version: leave it out and write the prompt in full")


def read_prompts(arguments: Sequence[str]) -> list[str]:
    """The prompts of `--text_prompt`: its values, or the lines of the one .txt file that it names, without blank ones.

    Raises `UserError` for a file that is missing, empty or not UTF-8 text, and for an empty prompt.
    """
    files = [argument for argument in arguments if argument.lower().endswith(".txt") and _names_a_file(argument)]
    if not files:
        prompts = [argument.strip() for argument in arguments]
        if not all(prompts):
            raise UserError(f"--text_prompt: prompt number {prompts.index('') + 1} is empty, write one or leave it out")
        return prompts
    if len(arguments) > 1:
        raise UserError(f"--text_prompt takes prompts or one .txt file: give {files[0]} alone")
    path = Path(files[0])
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(
            f"--text_prompt {path} is not text in UTF-8: save it as plain text, a prompt per line"
        ) from None
    except OSError as error:
        raise UserError(
            f"--text_prompt {path} cannot be read ({error.strerror}): name a .txt file of prompts"
        ) from None
    if "\0" in text:
        raise UserError(f"--text_prompt {path} is a binary file: save it as plain text, a prompt per line")
    prompts = [line.strip() for line in re.split(r"\r?\n|\r", text) if line.strip()]
    if not prompts:
        raise UserError(f"--text_prompt {path} holds no prompt: write one per line")
    return prompts


def _names_a_file(argument: str) -> bool:
    """Whether an argument that ends in .txt is meant as a file: it is one, or has no words."""
    return Path(argument).is_file() or not any(character.isspace() for character in argument)


def clean_prompts(prompts: Sequence[str], clean: Callable[[str], str]) -> list[str]:
    """Prompts in the form of the training captions. Raises `UserError` where nothing is left."""
    cleaned = [clean(prompt) for prompt in prompts]
    for prompt, text in zip(prompts, cleaned, strict=True):
        if not text:
            raise UserError(f"--text_prompt {prompt!r} is empty after cleaning: write it in words that captions have")
    return cleaned


def find_dit(config: SampleConfig) -> Path:
    """The model folder that `--model_path` names: itself, a checkpoint's, or that of a run's newest checkpoint.

    Of a checkpoint the average is taken if there is one. Raises `UserError` if there is no model.
    """
    named = Path(config.model_path)
    if not list_checkpoints(named) and (named / "config.json").is_file():
        return named
    found = in_newest_checkpoint(named, ("model_ema", "model"))
    if found is not None:
        return found
    adapters = in_newest_checkpoint(named, ("lora_ema", "lora"))
    if adapters is not None:
        raise UserError(
            f"--model_path {named} holds LoRA adapters only: give --lora {adapters}, and in --model_path the model that"
            " they were trained on"
        )
    if config.model_path == SAMPLE_PRESETS["tiny"]["model_path"]:
        raise UserError(f"there is no tiny model at {named} yet: run python -m osp_fast.train --preset tiny first")
    return find_folder(config.model_path, config.cache_dir)


def find_lora(name: str) -> Path:
    """The adapters that `--lora` names: a folder or file, those of a checkpoint, or of a run's newest checkpoint.

    Of a checkpoint the average is taken if there is one.
    """
    named = Path(name)
    return named if holds_lora(named) else in_newest_checkpoint(named, ("lora_ema", "lora")) or named


def in_newest_checkpoint(named: Path, parts: Sequence[str]) -> Path | None:
    """The first of these folders that a checkpoint has, or a run's newest checkpoint; None if it has none."""
    checkpoints = list_checkpoints(named)
    checkpoint = checkpoints[-1][1] if checkpoints else named
    found = next((checkpoint / part for part in parts if (checkpoint / part).is_dir()), None)
    if found is not None and checkpoints:
        say(f"{named}: the newest checkpoint is {found}")
    return found


def writable_folder(name: str) -> Path:
    """The output folder, made if need be. Raises `UserError` if it cannot be written to."""
    folder = Path(name)
    probe = folder / ".write_probe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"--save_img_path {folder} cannot be written to ({error.strerror}): name another") from None
    return folder


if __name__ == "__main__":
    run_entry_point(main)
