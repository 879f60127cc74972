"""Does a checkpoint fit the settings that it is resumed with? Decided field by field."""

from typing import Any

from osp_fast.config import TrainConfig, as_dict
from osp_fast.errors import UserError
from osp_fast.training.state import TrainerState

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
    "optimizer.use_8bit_adam",
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
    "run.max_train_steps",
    "run.use_ema",
    "run.ema_decay",
    "run.ema_start_step",
)


def check_resume(state: TrainerState, config: TrainConfig, data_fingerprint: str, name: str) -> list[str]:
    """Compare a checkpoint's settings with those of the run that wants to go on from it.

    Args:
        data_fingerprint: of the present plan.
        name: the checkpoint's folder, for messages.

    Returns:
        Notices, one line for each setting that changed and may.

    Raises:
        UserError: a setting changed that makes the checkpoint's state or its place in the data meaningless.
    """
    now = as_dict(config)
    start_anew = f"to change it, start a new run with --pretrained {name}/model and another --output_dir"
    for field in ANOTHER_MODEL + OTHER_DATA:
        was, wanted = _value(state.config, field), _value(now, field)
        if was != wanted:
            raise UserError(f"{name} was trained with {_flag(field)} {was}, not {wanted}: {start_anew}")
    was, wanted = _global_batch(state.config), _global_batch(now)
    if was != wanted:
        raise UserError(
            f"{name} was trained with {was} clips per step (--train_batch_size times --gradient_accumulation_steps),"
            f" not {wanted}: {start_anew}"
        )
    if state.data_fingerprint != data_fingerprint:
        raise UserError(
            f"--data selects other clips than when {name} was written, so its place in the data means nothing: restore"
            f" the annotations; {start_anew}"
        )
    return [
        f"{_flag(field)} is {_value(now, field)}; {name} was trained with {_value(state.config, field)}"
        for field in ON_PURPOSE
        if _value(state.config, field) != _value(now, field)
    ]


def _value(config: dict[str, Any], field: str) -> Any:
    group, name = field.split(".")
    return config.get(group, {}).get(name)


def _flag(field: str) -> str:
    return "--" + field.split(".")[1]


def _global_batch(config: dict[str, Any]) -> int:
    return config["optimizer"]["train_batch_size"] * config["optimizer"]["gradient_accumulation_steps"]
