"""Samples of a model while it trains, with the pipeline of `osp_fast.sample`.

Training with validation computes the very numbers of training without: the samples draw from their own named
generators, keep no gradients, and leave the DiT as it was.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from osp_fast.config import SAMPLE_PRESETS, SampleConfig, TrainConfig
from osp_fast.data.buckets import Bucket, Plan
from osp_fast.data.captions import clean_caption
from osp_fast.data.write import image_grid
from osp_fast.diffusion.samplers import FLOW_METHOD
from osp_fast.errors import UserError
from osp_fast.models.dit import DiT
from osp_fast.models.text_encoder import TextEncoder
from osp_fast.models.weights import write_json
from osp_fast.models.wfvae import WFVAE
from osp_fast.pipeline import ClipSettings, VideoPipeline, resolve_parametrization
from osp_fast.pipeline.settings import NEGATIVE_PROMPT, PROMPT_TEMPLATE
from osp_fast.sample_files import ClipFiles, Grid, versions
from osp_fast.training.build import compute_dtype, load_text_encoder, load_vae
from osp_fast.training.state import recipe_of

DEFAULT_PROMPTS = 4  # at most, from the captions of the data
TILING_FRAMES = 4  # latent frames decoded at once, at most, with --enable_tiling
BOARD_FRAMES = 5  # of a clip, in TensorBoard

# A clip is there: its number, its prompt, its frames, uint8 (T, H, W, 3), and the step.
OnClip = Callable[[int, str, np.ndarray, int], None]


class _Stopped(Exception):
    """The run is to end, so the samples are not to be."""


class _KnownTexts:
    """In the place of a text encoder: the states (1, L, C) and masks (1, L) of texts that were encoded before."""

    def __init__(self, encoder: TextEncoder, texts: list[str]):
        self._known = {text: encoder([text]) for text in texts}

    def __call__(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        states, masks = zip(*(self._known[text] for text in texts), strict=True)
        return torch.cat(states), torch.cat(masks)


class ValidationSampler:
    """Callable: a DiT in training, and the steps done -> files in `output_dir/validation/step-N`: clips, a grid.

    The prompts are those of `--validation_prompt`, by default captions of the data, at the size that most clips have.
    Their texts are encoded once, here. A sample that fails is reported, and training goes on.

    Args:
        vae: the run's; one on the meta device, as a run from a latent cache has it, is loaded for each validation.
        text_encoder: the run's; None: it is loaded here, for a moment.
        writes: whether this rank writes. All ranks must call the sampler, as each holds a part of the DiT.
        report: gets lines for the user.
        on_clip: gets each clip that was written.
        stopped: whether to give up, asked after each call of the DiT; all ranks must give the same answer.

    Raises:
        UserError: a prompt is empty, the number of steps does not go with the sampler, a network cannot be loaded.
    """

    def __init__(
        self,
        config: TrainConfig,
        plan: Plan,
        device: torch.device,
        vae: WFVAE,
        text_encoder: TextEncoder | None = None,
        *,
        writes: bool = True,
        report: Callable[[str], None] = lambda line: None,
        on_clip: OnClip = lambda *clip: None,
        stopped: Callable[[], bool] = lambda: False,
    ):
        self._config, self._device, self._vae = config, device, vae
        self._writes, self._report, self._on_clip, self._stopped = writes, report, on_clip, stopped
        self._recipe = recipe_of(config)
        self.bucket = commonest_bucket(plan)
        method = _method_for(config)
        parametrization = resolve_parametrization(self._recipe, method)
        steps = config.run.validation_sampling_steps
        try:
            parametrization.scheduler(method).set_steps(steps)
        except UserError as error:
            raise UserError(str(error).replace("--num_sampling_steps", "--validation_sampling_steps")) from None
        encoder = load_text_encoder(config.model, device) if text_encoder is None else text_encoder
        chinese = encoder.is_multilingual
        self.prompts = _prompts(config, plan, self.bucket, chinese)
        usual = SAMPLE_PRESETS.get(config.run.preset, {})  # what sampling does
        negative = usual.get("negative_prompt")
        self._settings: dict[str, Any] = dict(
            num_frames=self.bucket.frames,
            height=self.bucket.height,
            width=self.bucket.width,
            negative_prompt=NEGATIVE_PROMPT if negative is None else clean_caption(negative, chinese),
            guidance_scale=usual.get("guidance_scale", SampleConfig.guidance_scale),
            seed=config.run.seed,
            steps=steps,
            method=method,
        )
        self._parametrization = parametrization
        texts = [PROMPT_TEMPLATE.format(prompt) for prompt in self.prompts]
        self._texts = _KnownTexts(encoder, [*texts, self._settings["negative_prompt"]])
        if text_encoder is None:
            del encoder
            _give_back(device)

    def __call__(self, dit: DiT, step: int) -> list[Path]:
        """Sample; returns the clips and then the grid, nothing on ranks that do not write.

        dit: any, sharded or not; step: names the folder. Raises torch.OutOfMemoryError only while other ranks would
        wait for this one.
        """
        started = time.monotonic()
        try:
            latents = self._sample(dit)
        except _Stopped:
            return []
        except torch.OutOfMemoryError as error:
            if isinstance(dit, FSDPModule):
                raise
            return self._failed(step, error)
        except UserError as error:
            return self._failed(step, error)
        if not self._writes:
            return []
        try:
            paths = self._write(dit, latents, step)
        except (UserError, OSError, torch.OutOfMemoryError) as error:
            return self._failed(step, error)
        seconds = time.monotonic() - started
        self._report(f"validation: {len(latents)} clips of {self.bucket} in {paths[0].parent}, {seconds:.0f} s")
        return paths

    def _failed(self, step: int, error: Exception) -> list[Path]:
        if self._writes:
            self._report(f"validation at step {step} failed, and training goes on: {error}")
        return []

    def _sample(self, dit: DiT) -> list[Tensor]:
        """The latents (1, C, T, H, W) of each prompt."""

        def check(*_: int) -> None:
            if self._stopped():
                raise _Stopped

        pipeline = VideoPipeline(dit, self._vae, self._texts, self._recipe, self._device)
        bf16 = compute_dtype(self._config.model) == torch.bfloat16
        autocast = torch.autocast(self._device.type, torch.bfloat16, enabled=bf16)
        try:
            # The blocks' compiled graphs are for training: sampling has other sizes, and would compile them anew.
            with torch.compiler.set_stance("force_eager"), autocast:
                return [latents for *_, latents in pipeline.latents(self.prompts, **self._settings, on_step=check)]
        finally:
            if isinstance(dit, FSDPModule):
                dit.reshard()  # what is not in the blocks stays gathered otherwise, until the next backward

    def _write(self, dit: DiT, latents: list[Tensor], step: int) -> list[Path]:
        """Decode and write each clip, its sidecar, and the grid."""
        model, fps = self._config.model, self._config.data.train_fps
        folder = Path(self._config.run.output_dir) / "validation" / f"step-{step}"
        folder.mkdir(parents=True, exist_ok=True)
        loaded = not next(self._vae.parameters()).is_meta
        vae = self._vae if loaded else load_vae(model, self._device)
        pipeline = VideoPipeline(dit, vae, self._texts, self._recipe, self._device)
        tiling = TILING_FRAMES if model.enable_tiling else None
        settings = {name: value for name, value in self._settings.items() if name != "seed"}
        decode = pipeline.decoder(ClipSettings(**settings, vae_memory=model.vae_memory, most_latent_frames=tiling))
        grid, paths = Grid.of(len(latents), self.bucket.width), []
        with ClipFiles(lambda index: folder / str(index), self.bucket.frames, fps) as files:
            for index, clip in enumerate(latents):
                frames = decode(clip, partial(files.write, index))
                paths.append(files.finish(index))
                write_json(folder / f"{index}.json", self._sidecar(index, step))
                grid.add(frames)
                self._on_clip(index, self.prompts[index], frames, step)
        if len(paths) > 1:
            paths.append(grid.write(folder / "grid", fps))
        if not loaded:
            del pipeline, vae, decode
            _give_back(self._device)
        return paths

    def _sidecar(self, index: int, step: int) -> dict[str, Any]:
        """All that made a clip, under the names of `osp_fast.sample`'s sidecars."""
        settings = dict(self._settings)
        settings["num_sampling_steps"], settings["sample_method"] = settings.pop("steps"), settings.pop("method")
        return {
            "index": index,
            "step": step,
            "prompt": self.prompts[index],
            "full_prompt": PROMPT_TEMPLATE.format(self.prompts[index]),
            **settings,
            **self._parametrization._asdict(),
            "fps": self._config.data.train_fps,
            "mixed_precision": self._config.model.mixed_precision,
            "versions": versions(),
        }


def commonest_bucket(plan: Plan) -> Bucket:
    """The bucket that most clips are in."""
    return max(plan.buckets, key=lambda bucket: len(plan.buckets[bucket]))


def add_to_board(board: Any, index: int, prompt: str, frames: np.ndarray, step: int) -> None:
    """An `OnClip` for a TensorBoard SummaryWriter: frames of the clip side by side, and its prompt."""
    places = np.linspace(0, len(frames) - 1, min(BOARD_FRAMES, len(frames))).round().astype(int)
    board.add_image(f"validation/{index}", image_grid(list(frames[places]), len(places)), step, dataformats="HWC")
    board.add_text(f"validation/{index}", prompt, step)


def _method_for(config: TrainConfig) -> str:
    """What `osp_fast.sample` samples such a model with."""
    if config.diffusion.rf_scheduler:
        return FLOW_METHOD
    return "DDIM" if config.diffusion.prediction_type == "sample" else SampleConfig.sample_method


def _prompts(config: TrainConfig, plan: Plan, bucket: Bucket, chinese: bool) -> list[str]:
    """`--validation_prompt`, else the first captions of the bucket, in the form of the training captions."""
    given = config.run.validation_prompt
    prompts = [clean_caption(prompt, chinese) for prompt in given]
    for prompt, cleaned in zip(given, prompts, strict=True):
        if not cleaned:
            raise UserError(f"--validation_prompt {prompt!r} is empty after cleaning: write it in words")
    if prompts:
        return prompts
    found: dict[str, None] = {}
    for clip in plan.buckets[bucket]:
        found[clean_caption(plan.clips[clip].entry.captions[0], chinese)] = None
        found.pop("", None)
        if len(found) == DEFAULT_PROMPTS:
            break
    if not found:
        raise UserError(
            "--validation_steps: the captions of the data are empty after cleaning: give --validation_prompt"
        )
    return list(found)


def _give_back(device: torch.device) -> None:
    """Let others have the memory of what was just freed."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
