"""Which settings a resumed run may change."""

import copy

import pytest

from osp_fast.config import TrainConfig, as_dict
from osp_fast.errors import UserError
from osp_fast.training.resume import ANOTHER_MODEL, ON_PURPOSE, OTHER_DATA, check_resume
from osp_fast.training.state import TrainerState, recipe_of

SIZES = {"1x16x16": 4}  # clips of a step
# Settings that a resumed run may change without a word: what is computed stays the same.
SILENT = {
    "data.dataset",
    "data.data",  # judged by the clips that it selects
    "data.sample_rate",
    "data.dataloader_num_workers",
    "data.decode_timeout",
    "data.max_bad_samples",
    "model.pretrained",
    "model.cache_dir",
    "model.enable_tiling",
    "model.vae_memory",
    "model.attention",
    "model.gradient_checkpointing",
    "model.activation_memory",
    "model.compile",
    "model.cuda_graphs",
    "model.allow_tf32",
    "optimizer.optimizer",
    "optimizer.max_skipped_steps",
    "run.preset",
    "run.output_dir",
    "run.logging_dir",
    "run.report_to",
    "run.log_interval",
    "run.num_train_epochs",
    "run.checkpointing_steps",
    "run.checkpoints_total_limit",
    "run.resume_from_checkpoint",
    "run.checkpoints_keep_every",
    "run.async_save",
    "run.validation_steps",
    "run.validation_prompt",
    "run.validation_sampling_steps",
    "run.profile",
    "run.hang_factor",
    "run.hang_seconds",
    "run.start_timeout",
    "run.shard_size",
    "run.dry_run",
    "run.offload_ema",
    "run.sp_size",
    "run.sp_mode",
    "run.train_sp_batch_size",
    "run.deterministic",
    "run.device",
}


def state_of(config: TrainConfig) -> TrainerState:
    return TrainerState(1, 0, 1, 1, 0, 0, 0, SIZES, "clips", as_dict(config), {}, {})


def changed(field: str) -> TrainConfig:
    config = copy.deepcopy(TrainConfig())
    group, name = field.split(".")
    value = getattr(getattr(config, group), name)
    new = not value if isinstance(value, bool) else 7 if value is None or isinstance(value, int | float) else "other"
    setattr(getattr(config, group), name, new)
    return config


def test_every_setting_is_decided_once():
    fields = [f"{group}.{name}" for group, values in as_dict(TrainConfig()).items() for name in values]
    assert sorted(fields) == sorted((*ANOTHER_MODEL, *OTHER_DATA, *ON_PURPOSE, *SILENT))


@pytest.mark.parametrize("field", ANOTHER_MODEL + OTHER_DATA)
def test_contradictions_are_refused_and_named(field):
    with pytest.raises(UserError, match=f"--{field.split('.')[1]} .*--pretrained ck/model"):
        check_resume(state_of(TrainConfig()), changed(field), SIZES, "clips", "ck")


@pytest.mark.parametrize("field", ON_PURPOSE)
def test_deliberate_changes_are_told(field):
    notices = check_resume(state_of(TrainConfig()), changed(field), SIZES, "clips", "ck")
    assert any(f"--{field.split('.')[1]} is" in notice for notice in notices)


@pytest.mark.parametrize("field", sorted(SILENT))
def test_the_rest_may_change(field):
    assert check_resume(state_of(TrainConfig()), changed(field), SIZES, "clips", "ck") == []


def test_another_global_batch_or_other_clips_are_refused():
    with pytest.raises(UserError, match=r"4 clips of 1x16x16 per step.*not 8"):
        check_resume(state_of(TrainConfig()), TrainConfig(), {"1x16x16": 8}, "clips", "ck")
    with pytest.raises(UserError, match="--data selects other clips"):
        check_resume(state_of(TrainConfig()), TrainConfig(), SIZES, "other clips", "ck")


def test_a_state_without_settings_is_refused():
    state = state_of(TrainConfig())
    del state.config["optimizer"]
    with pytest.raises(UserError, match=r"ck/trainer_state.json: config\.optimizer\.\w+ is missing"):
        check_resume(state, TrainConfig(), SIZES, "clips", "ck")


def test_recipe_words():
    config = TrainConfig()
    config.data.max_height, config.data.max_width, config.data.force_resolution = 480, 640, True
    config.diffusion.prediction_type = "v_prediction"
    assert recipe_of(config).size == "480x640" and recipe_of(config).prediction_type == "v_prediction"
    config.data.force_resolution = False
    config.data.min_height = config.data.min_width = 320
    assert recipe_of(config).size == "within 480x640, at least 320x320"
    config.data.max_hxw = 262144
    assert recipe_of(config).size == "area <= 262144"
    config.data.min_hxw = 65536
    assert recipe_of(config).size == "65536 <= area <= 262144"
