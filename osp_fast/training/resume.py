"""Does a checkpoint fit the settings that it is resumed with? Decided field by field."""

from typing import Any

from osp_fast.config import TrainConfig, as_dict
from osp_fast.errors import UserError
from osp_fast.training.state import FILE_NAME, TrainerState

# The model would be trained towards something else, so its average and its optimizer state would mean nothing.
ANOTHER_MODEL = (
    "diffusion.prediction_type",
    "diffusion.rescale_betas_zero_snr",
    "diffusion.rf_scheduler",
    "model.model",
    "model.ae",
    "model.interpolation_scale_t",
    "model.interpolation_scale_h",
    "model.interpolation_scale_w",
    "model.sparse1d",
    "model.sparse_n",
    "model.lora_rank",
    "model.lora_alpha",
    "optimizer.use_8bit_adam",
    "optimizer.offload_optimizer",
)
# The checkpoint's place in the data, and what is drawn there, would mean nothing.
OTHER_DATA = (
    "run.seed",
    "data.num_frames",
    "data.train_fps",
    "data.speed_factor",
    "data.drop_short_ratio",
    "data.max_height",
    "data.max_width",
    "data.min_height",
    "data.min_width",
    "data.max_hxw",
    "data.min_hxw",
    "data.force_resolution",
    "data.hw_stride",
    "data.group_data",
    "data.min_bucket_size",
    "data.sp_frame_multiple",
)
# A user may well change these on purpose; the run goes on with the new value, and says so.
ON_PURPOSE = (
    "data.latent_cache",
    "data.cache_variants",
    "diffusion.snr_gamma",
    "diffusion.noise_offset",
    "diffusion.weighting_scheme",
    "diffusion.cfg",
    "model.text_encoder_name_1",
    "model.model_max_length",
    "model.ae_path",
    "model.mixed_precision",
    "model.vae_fp32",
    "optimizer.learning_rate",
    "optimizer.lr_scheduler",
    "optimizer.lr_warmup_steps",
    "optimizer.adam_beta1",
    "optimizer.adam_beta2",
    "optimizer.adam_epsilon",
    "optimizer.adam_weight_decay",
    "optimizer.max_grad_norm",
    "optimizer.train_batch_size",
    "optimizer.gradient_accumulation_steps",
    "optimizer.tokens_per_batch",
    "run.max_train_steps",
    "run.use_ema",
    "run.ema_decay",
    "run.ema_start_step",
)

# Settings that checkpoints of earlier versions do not hold, and what these did.
NEWER = {
    "data.latent_cache": None,
    "data.cache_variants": 1,
    "model.lora_rank": None,
    "model.lora_alpha": None,
    "optimizer.offload_optimizer": False,
    "optimizer.tokens_per_batch": None,
}


def check_resume(
    state: TrainerState, config: TrainConfig, batch_sizes: dict[str, int], data_fingerprint: str, name: str
) -> list[str]:
    """Compare a checkpoint's settings with those of the run that wants to go on from it.

    Args:
        batch_sizes: clips of one step on all ranks, for each bucket.
        data_fingerprint: of the present plan.
        name: the checkpoint's folder, for messages.

    Returns:
        Notices, one line for each setting that changed and may.

    Raises:
        UserError: a setting changed that makes the checkpoint's state or its place in the data meaningless.
    """
    was, now = _Settings(state.config, f"{name}/{FILE_NAME}"), _Settings(as_dict(config), "the settings")
    weights = f"--pretrained {name}/model and " if was["model.lora_rank"] is None else ""
    start_anew = f"to change it, start a new run with {weights}another --output_dir"
    for field in ANOTHER_MODEL + OTHER_DATA:
        if was[field] != now[field]:
            raise UserError(f"{name} was trained with {_flag(field)} {was[field]}, not {now[field]}: {start_anew}")
    if state.data_fingerprint != data_fingerprint:
        raise UserError(
            f"--data selects other clips than when {name} was written, so its place in the data means nothing: restore"
            f" the annotations; {start_anew}"
        )
    for bucket, clips in batch_sizes.items():
        if state.batch_sizes.get(bucket) != clips:
            raise UserError(
                f"{name} was trained with {state.batch_sizes.get(bucket)} clips of {bucket} per step (clips of a"
                " micro-batch times --gradient_accumulation_steps times GPUs, or times groups of --sp_size GPUs that"
                f" share clips), not {clips}, and so the order of clips would be another: choose them so that their"
                f" product is the same; {start_anew}"
            )
    on_purpose = ON_PURPOSE if now["model.lora_rank"] is None else ("model.pretrained", *ON_PURPOSE)
    return [
        f"{_flag(field)} is {now[field]}; {name} was trained with {was[field]}"
        for field in on_purpose
        if was[field] != now[field]
    ]


class _Settings:
    """Resolved settings by "group.field"; `source` is where they stand, for messages."""

    def __init__(self, config: dict[str, Any], source: str):
        self._config = config
        self._source = source

    def __getitem__(self, field: str) -> Any:
        group, name = field.split(".")
        try:
            found = self._config[group].get(name, NEWER[field]) if field in NEWER else self._config[group][name]
            # By default alpha is the rank.
            return self["model.lora_rank"] if field == "model.lora_alpha" and found is None else found
        except (KeyError, TypeError, AttributeError):
            raise UserError(f"{self._source}: config.{field} is missing: resume from another checkpoint") from None


def _flag(field: str) -> str:
    return "--" + field.split(".")[1]
