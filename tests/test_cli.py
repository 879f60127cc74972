"""Flags: upstream's lists, presets, notices, and one sentence with exit code 2 for what cannot be."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from osp_fast.checks import with_recipe
from osp_fast.cli import memory_size, parse_sample, parse_train
from osp_fast.config import Recipe
from osp_fast.errors import UserError

TRAIN_FLAGS = """
--model OpenSoraT2V_v1_3-2B/122 --text_encoder_name_1 google/mt5-xxl --cache_dir cache --dataset t2v --data data.txt
--ae WFVAEModel_D8_4x8x8 --ae_path vae --sample_rate 1 --num_frames 93 --max_height 480 --max_width 640
--interpolation_scale_t 1.0 --interpolation_scale_h 1.0 --interpolation_scale_w 1.0 --gradient_checkpointing
--train_batch_size 1 --dataloader_num_workers 8 --gradient_accumulation_steps 1 --max_train_steps 1000000
--num_train_epochs 3 --learning_rate 1e-5 --lr_scheduler constant --lr_warmup_steps 0 --mixed_precision bf16
--report_to wandb --checkpointing_steps 500 --checkpoints_total_limit 3 --allow_tf32 --model_max_length 512 --use_ema
--ema_start_step 0 --ema_decay 0.9999 --offload_ema --cfg 0.1 --resume_from_checkpoint latest --pretrained weights
--speed_factor 1.0 --drop_short_ratio 0.0 --hw_stride 32 --sparse1d --sparse_n 4 --train_fps 16 --seed 1234
--group_data --prediction_type v_prediction --snr_gamma 5.0 --noise_offset 0.02 --force_resolution
--rescale_betas_zero_snr --max_hxw 262144 --min_hxw 65536 --optimizer adamW --adam_beta1 0.9 --adam_beta2 0.999
--adam_epsilon 1e-15 --adam_weight_decay 0.01 --use_8bit_adam --max_grad_norm 1.0 --log_interval 10 --enable_tiling
--vae_fp32 --rf_scheduler --weighting_scheme logit_normal --sp_size 8 --train_sp_batch_size 2 --output_dir runs/a
--logging_dir logs --min_height 320 --min_width 320 --use_decord --trained_data_global_step 7 --foreach_ema
--extra_save_mem --enable_profiling
""".split()
SAMPLE_FLAGS = """
--model_path ckpt --version v1_3 --num_frames 93 --height 352 --width 640 --cache_dir cache
--text_encoder_name_1 google/mt5-xxl --text_prompt sora.txt --ae WFVAEModel_D8_4x8x8 --ae_path vae
--save_img_path out --fps 18 --guidance_scale 7.5 --num_sampling_steps 100 --max_sequence_length 512
--sample_method EulerAncestralDiscrete --seed 1234 --num_samples_per_prompt 2 --rescale_betas_zero_snr
--prediction_type v_prediction --caption_refiner refiner --enable_tiling --save_memory --compile --sp
""".split()
MINIMAL = ["--data", "data.txt", "--max_hxw", "65536"]


def print_config(module: str, flags: list[str]) -> dict:
    done = subprocess.run(
        [sys.executable, "-m", f"osp_fast.{module}", *flags, "--print_config"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_all_flags_of_upstreams_training_scripts():
    config = print_config("train", TRAIN_FLAGS)
    flat = {name: value for group in config.values() if isinstance(group, dict) for name, value in group.items()}
    given = dict(zip(TRAIN_FLAGS, [*TRAIN_FLAGS[1:], ""], strict=True))
    accepted = {"use_decord", "trained_data_global_step", "foreach_ema", "extra_save_mem", "enable_profiling"}
    for flag, value in given.items():
        name = flag.removeprefix("--")
        if not flag.startswith("--") or name in accepted:
            continue
        if value.startswith("--"):
            assert flat[name] is True, flag
        else:
            assert str(flat[name]).lower() == value.lower() or float(flat[name]) == float(value), flag
    notices = " ".join(config["notices"])
    assert all(f"--{name}" in notices for name in accepted)
    assert "--max_hxw has no effect with --force_resolution" in notices


def test_all_flags_of_upstreams_sampling_scripts():
    config = print_config("sample", SAMPLE_FLAGS)
    assert config["sp"] and config["compile"] and config["caption_refiner"] == "refiner"
    assert config["text_prompt"] == ["sora.txt"] and config["height"] == 352 and config["fps"] == 18


def test_each_accepted_flag_gives_one_line(capsys):
    parse_train([*MINIMAL, "--use_decord", "--trained_data_global_step", "5"])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(line.startswith("note: --") for line in lines)


def test_preset_sets_defaults_and_flags_win():
    config, _ = parse_train(["--preset", "tiny", "--learning_rate", "0.5"])
    assert config.model.model == "tiny" and config.data.num_frames == 17 and config.optimizer.learning_rate == 0.5
    sample = parse_sample(["--preset", "tiny", "--text_prompt", "a", "b", "--height", "96"])
    assert sample.height == 96 and sample.ae == "tiny" and sample.text_prompt == ["a", "b"]


def test_parsers_do_not_share_state():
    parse_train(["--preset", "tiny"])
    config, _ = parse_train(MINIMAL)
    assert config.model.model == "OpenSoraT2V_v1_3-2B/122" and config.run.preset is None


def test_choices_ignore_case():
    sample = parse_sample(["--preset", "tiny", "--text_prompt", "a", "--sample_method", "ddim"])
    assert sample.sample_method == "DDIM"


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--max_hxw", "65536"], "--data is missing"),
        (["--data", "x"], "no size is given"),
        ([*MINIMAL, "--num_frames", "92"], "4n+1: use 89 or 93"),
        ([*MINIMAL, "--num_frames", "many"], "'many' is not a whole number"),
        ([*MINIMAL, "--learning_rate", "nan"], "not a finite number"),
        ([*MINIMAL, "--learning_rate", "0"], "greater than 0"),
        ([*MINIMAL, "--cfg", "1.5"], "at most 1"),
        ([*MINIMAL, "--adam_beta1", "1"], "less than 1"),
        ([*MINIMAL, "--mixed_precision", "fp16"], "'fp16' is unknown; choose from no, bf16"),
        ([*MINIMAL, "--hw_stride", "24"], "not a multiple of 16"),
        ([*MINIMAL, "--min_hxw", "70000"], "greater than --max_hxw"),
        ([*MINIMAL, "--sample_rate", "2"], "--train_fps 12"),
        ([*MINIMAL, "--num_frame", "93"], "did you mean --num_frames"),
        ([*MINIMAL, "stray"], "stray is not a flag"),
        ([*MINIMAL, "--seed"], "expected one argument"),
        ([*MINIMAL, "--sp_mode", "ring"], "--sp_mode 'ring' is unknown: use auto, ulysses, scope, or groups x GPUs"),
        ([*MINIMAL, "--sp_mode", "4x0"], "such as 4x2"),
        (["--data", "x", "--max_height", "480"], "give both or neither"),
        (["--data", "x", "--min_hxw", "480"], "no size is given"),
        (["--data", "x", "--max_height", "480", "--max_width", "640", "--min_hxw", "9"], "--min_hxw needs --max_hxw"),
        (["--data", "x", "--max_hxw", "65536", "--force_resolution"], "needs --max_height and --max_width"),
        (
            ["--data", "x", "--max_height", "500", "--max_width", "640", "--force_resolution"],
            "--max_height 500 is not a multiple of 32 (--hw_stride): use 480 or 512",
        ),
        (
            "--data x --max_height 480 --max_width 640 --min_height 500 --min_width 64".split(),
            "--min_height 500 is greater",
        ),
    ],
)
def test_impossible_training_values(flags, words):
    with pytest.raises(UserError) as caught:
        parse_train(flags)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--preset", "tiny"], "--text_prompt is missing"),
        (["--text_prompt", "a"], "--model_path is missing"),
        (["--preset", "tiny", "--text_prompt", "a", "--num_frames", "16"], "use 13 or 17"),
        (["--preset", "tiny", "--text_prompt", "a", "--height", "100"], "use 96 or 112"),
        ([*SAMPLE_FLAGS, "--height", "360"], "--height 360 is not a multiple of 16"),
        ([*SAMPLE_FLAGS, "--max_sequence_length", "100000000000"], "at most 8192"),
        (["--preset", "tiny", "--text_prompt", "a", "--sample_method", "Magic"], "choose from DDIM"),
        (["--preset", "tiny", "--text_prompt", "a", "--sp", "--sp_mode", "4*2"], "--sp_mode '4*2' is unknown"),
        (["--preset", "huge"], "'huge'"),
    ],
)
def test_impossible_sampling_values(flags, words):
    with pytest.raises(UserError) as caught:
        parse_sample(flags)
    assert words in str(caught.value)


def test_sizes_and_rate_follow_the_recipe():
    recipe = Recipe("v_prediction", True, False, 16.0, 29, "48x64", 16)
    config = parse_sample(["--preset", "tiny", "--text_prompt", "a", "--height", "80"])
    assert (config.num_frames, config.width, config.fps) == (None, None, None)
    filled = with_recipe(config, recipe)
    assert (filled.num_frames, filled.height, filled.width, filled.fps) == (29, 80, 64, 16.0)
    with pytest.raises(UserError, match="--height 80 is not a multiple of 32"):
        with_recipe(config, replace(recipe, hw_stride=32))
    released = parse_sample(SAMPLE_FLAGS[:2] + SAMPLE_FLAGS[10:])
    filled = with_recipe(released, None)
    assert (filled.num_frames, filled.height, filled.width) == (93, 480, 640)
    with pytest.raises(UserError, match="--height 720 is not a multiple of 32"):
        with_recipe(replace(released, height=720), None)


def test_a_flag_takes_back_what_a_preset_sets():
    config, _ = parse_train(["--preset", "tiny", "--no-force_resolution", "--no-use_ema", "--max_hxw", "4096"])
    assert not config.data.force_resolution and not config.run.use_ema and config.data.group_data


def test_flags_without_effect_are_named(capsys):
    ignored = (
        "--max_hxw 4096 --min_height 320 --min_width 320 --offload_ema --weighting_scheme mode --lr_warmup_steps 7"
    )
    parse_train(["--data", "data.txt", *ignored.split()])
    printed = capsys.readouterr().err
    parse_sample(["--preset", "tiny", "--text_prompt", "a", "--sp_mode", "4x2"])
    printed += capsys.readouterr().err
    for flag in ("min_height", "min_width", "offload_ema", "weighting_scheme", "lr_warmup_steps", "sp_mode"):
        assert f"note: --{flag} has no effect" in printed


@pytest.mark.parametrize("module", ["train", "sample", "inspect"])
def test_mistakes_exit_with_code_2_and_one_line(module):
    done = subprocess.run(
        [sys.executable, "-m", f"osp_fast.{module}", "--no_such_flag"], capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: --no_such_flag") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "module, flag", [("train", "--snr_gamma"), ("sample", "--sample_method"), ("inspect", "--json")]
)
def test_help_explains_flags(module, flag):
    done = subprocess.run([sys.executable, "-m", f"osp_fast.{module}", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and f"\n  {flag} " in done.stdout and done.stderr == ""


@pytest.mark.parametrize(
    "text, size",
    [
        ("4GiB", 4 << 30),
        ("500 MiB", 500 << 20),
        ("1.5gib", 3 << 29),
        ("2GB", 2 * 10**9),
        ("3m", 3 * 10**6),
        ("1048576", 1 << 20),
        ("7B", 7),
        ("auto", None),
    ],
)
def test_amounts_of_memory(text, size):
    assert memory_size(text) == size


@pytest.mark.parametrize("text", ["", "much", "0", "-4GiB", "4XiB", "4 GiB more"])
def test_what_is_no_amount_of_memory(text):
    with pytest.raises(
        UserError, match="--vae_memory: .* is not an amount of memory: write bytes, 500MiB, 4GiB or auto"
    ):
        parse_train([*MINIMAL, f"--vae_memory={text}"])


def test_the_vaes_memory_in_both_programs():
    config, _ = parse_train([*MINIMAL, "--vae_memory", "4GiB"])
    assert config.model.vae_memory == 4 << 30
    assert parse_train(MINIMAL)[0].model.vae_memory is None
    folders = ["--model_path", "a", "--ae_path", "b", "--text_encoder_name_1", "c", "--text_prompt", "a cat"]
    assert parse_sample([*folders, "--vae_memory", "500MiB"]).vae_memory == 500 << 20
