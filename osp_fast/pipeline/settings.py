"""What is sampled: sizes, steps, guidance, and how the DiT was trained."""

from dataclasses import dataclass
from typing import NamedTuple

from osp_fast.config import Recipe
from osp_fast.diffusion.samplers import FLOW_METHOD, Scheduler, make_scheduler
from osp_fast.errors import UserError
from osp_fast.models.dit import DiTConfig
from osp_fast.models.wfvae_stream import SPACE_STRIDE, TIME_STRIDE

PROMPT_TEMPLATE = "high quality, high aesthetic, {}"
NEGATIVE_PROMPT = (
    "low quality, low resolution, low aesthetic, blurry, out of focus, grainy, noisy, overexposed, washed out colors, "
    "flicker, jittery motion, frozen frame, compression artifacts, distorted, deformed body, extra limbs, "
    "malformed hands, disfigured face, cropped, watermark, subtitles, logo, text"
)


class Parametrization(NamedTuple):
    """What a DiT predicts ("velocity" with rectified flow) and on which noise schedule."""

    prediction_type: str
    rescale_betas_zero_snr: bool
    rectified_flow: bool

    def scheduler(self, method: str) -> Scheduler:
        """The sampler that `--sample_method` names, for such a DiT. Raises `UserError` if it cannot sample one."""
        return make_scheduler(method, *self)


def resolve_parametrization(
    recipe: Recipe | None,
    method: str,
    prediction_type: str | None = None,
    rescale_betas_zero_snr: bool | None = None,
) -> Parametrization:
    """How the DiT was trained: by its recipe; without one by the flags, whose defaults are epsilon and off.

    Rectified flow (by the recipe, else by `method`) has its own prediction, so the flags play no part in it. Raises
    `UserError` if a flag contradicts the recipe.
    """
    if recipe.rectified_flow if recipe else method == FLOW_METHOD:
        return Parametrization("velocity", False, True)
    if recipe is None:
        return Parametrization(prediction_type or "epsilon", bool(rescale_betas_zero_snr), False)
    for flag, given, trained in (
        ("--prediction_type", prediction_type, recipe.prediction_type),
        ("--rescale_betas_zero_snr", rescale_betas_zero_snr, recipe.rescale_betas_zero_snr),
    ):
        if given is not None and given != trained:
            raise UserError(
                f"{flag} {given} contradicts the checkpoint's recipe.json, which says {trained}: leave the flag out"
            )
    return Parametrization(recipe.prediction_type, recipe.rescale_betas_zero_snr, False)


@dataclass(frozen=True)
class ClipSettings:
    """What all clips of a run have in common.

    num_frames, height, width: pixels; steps: of the sampler `method`; guidance_scale: 1 turns guidance off
    negative_prompt: replaces `NEGATIVE_PROMPT`
    prediction_type, rescale_betas_zero_snr: the training's, where the checkpoint has no recipe
    step_cache: the threshold of `FirstBlockCache`, None: off
    vae_memory: bytes that decoding may hold, None: what is free; most_latent_frames: decoded at once
    """

    num_frames: int
    height: int
    width: int
    steps: int
    guidance_scale: float
    method: str
    negative_prompt: str | None = None
    prediction_type: str | None = None
    rescale_betas_zero_snr: bool | None = None
    step_cache: float | None = None
    vae_memory: int | None = None
    most_latent_frames: int | None = None

    @property
    def guided(self) -> bool:
        return self.guidance_scale != 1

    @property
    def negative(self) -> str:
        """The negative prompt in words."""
        return NEGATIVE_PROMPT if self.negative_prompt is None else self.negative_prompt

    def texts(self, prompts: list[str]) -> list[str]:
        """What is encoded for these prompts: each in the template, and the negative prompt last, if it is needed."""
        return [PROMPT_TEMPLATE.format(prompt) for prompt in prompts] + [self.negative] * self.guided

    def scheduler(self, recipe: Recipe | None) -> Scheduler:
        """The sampler, started. Raises `UserError` if it cannot sample such a model, or not in so many steps."""
        trained = resolve_parametrization(recipe, self.method, self.prediction_type, self.rescale_betas_zero_snr)
        scheduler = trained.scheduler(self.method)
        scheduler.set_steps(self.steps)
        return scheduler

    def latent_size(self, config: DiTConfig) -> tuple[int, int, int]:
        """(T, H, W) in latent cells. Raises `UserError` for sizes that the networks cannot give."""
        token = SPACE_STRIDE * config.patch_size
        if self.num_frames < 1 or (self.num_frames - 1) % TIME_STRIDE:
            raise UserError(f"--num_frames {self.num_frames} is not of the form {TIME_STRIDE}n+1: use 1, 5, 9, ...")
        for flag, size in (("--height", self.height), ("--width", self.width)):
            if size < 1 or size % token:
                raise UserError(f"{flag} {size} is not a multiple of {token} pixels, the size of a token: change it")
        return (self.num_frames - 1) // TIME_STRIDE + 1, self.height // SPACE_STRIDE, self.width // SPACE_STRIDE
