"""Training from the command line, with real files: killed and resumed, stopped, refused."""

import importlib.util
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from osp_fast.config import Recipe
from osp_fast.errors import UserError
from osp_fast.models import dit as dit_module
from osp_fast.models.dit import DiT
from osp_fast.models.weights import read_recipe

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "tests" / "training" / "small_run.py"
SPEC = importlib.util.spec_from_file_location("small_run", SCRIPT)
small = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(small)
WEIGHTS = "diffusion_pytorch_model.safetensors"
TIMINGS = ("s_per_step", "data_wait_s", "tokens_per_s", "model_tflops", "memory_", "time")


@pytest.fixture(scope="module")
def assets(tmp_path_factory) -> dict[str, Path]:
    """Data of one picture size and of mixed sizes and lengths, and a text encoder."""
    root = tmp_path_factory.mktemp("assets")
    return dict(
        data=small.write_data(root / "data", images=6, videos=3),
        text_encoder=small.write_text_encoder(root / "text_encoder"),
    )


@pytest.fixture
def train(assets, tmp_path, monkeypatch, capfd):
    """Run a training in this process; keyword arguments change flags. Returns its output folder and what it printed."""
    from osp_fast.train import main

    monkeypatch.setitem(dit_module.DIT_CONFIGS, "tiny", small.SMALL)

    def run(name: str = "run", **changed: object) -> tuple[Path, str]:
        main(small.flags(**{**assets, "output": tmp_path / name, **changed}))
        return tmp_path / name, capfd.readouterr().err

    return run


def start(assets: dict[str, Path], output: Path, **changed: object) -> subprocess.Popen:
    """Start a training in a process of its own."""
    command = [sys.executable, str(SCRIPT), *small.flags(**assets, output=output, **changed)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", ""))),
    }
    # A session of its own, so that its decoder processes can be reached together with it, as by Ctrl-C.
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for_steps(process: subprocess.Popen, output: Path, steps: int) -> None:
    """Wait until a run has logged so many steps."""
    file = output / "metrics.jsonl"
    until = time.monotonic() + 60
    while not file.exists() or file.read_text().count("\n") < steps:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < until, "the run makes no progress"
        time.sleep(0.002)


def history(output: Path) -> list[dict]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith(TIMINGS)} for line in lines]


def weights(folder: Path) -> bytes:
    """The file of a model folder."""
    return (folder / WEIGHTS).read_bytes()


def tensors(checkpoint: Path) -> dict[str, bytes]:
    """The bytes of every tensor of a checkpoint, by folder and name."""
    return {
        f"{file.parent.name} {name}": tensor.numpy().tobytes()
        for file in checkpoint.rglob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def test_killed_and_resumed_is_bit_for_bit_a_run_never_killed(assets, tmp_path):
    settings = dict(max_train_steps=40, checkpointing_steps=6, checkpoints_total_limit=2, lr_scheduler="cosine")
    whole = start(assets, tmp_path / "whole", **settings)
    assert whole.wait() == 0, whole.stderr.read()
    moments = sorted(random.sample(range(2, 39), 2))
    for moment in moments:
        killed = start(assets, tmp_path / "killed", resume_from_checkpoint="latest", **settings)
        wait_for_steps(killed, tmp_path / "killed", moment)
        time.sleep(random.uniform(0, 0.1))
        killed.kill()  # only the parent: its decoder processes must notice by themselves
        killed.wait()
    resumed = start(assets, tmp_path / "killed", resume_from_checkpoint="latest", **settings)
    assert resumed.wait() == 0, resumed.stderr.read()
    assert history(tmp_path / "killed") == history(tmp_path / "whole"), f"killed after steps {moments}"
    assert [line["step"] for line in history(tmp_path / "whole")] == list(range(1, 41))
    expected = tensors(tmp_path / "whole" / "checkpoint-40")
    assert tensors(tmp_path / "killed" / "checkpoint-40") == expected
    assert {name.split()[0] for name in expected} == {"model", "model_ema", "optimizer"}
    names = sorted(path.name for path in (tmp_path / "killed").iterdir() if path.is_dir())
    assert names == ["checkpoint-36", "checkpoint-40"]


@pytest.mark.parametrize(
    "number, send, code", [(signal.SIGTERM, os.kill, 143), (signal.SIGINT, os.killpg, 130)], ids=["kill", "Ctrl-C"]
)
def test_a_signal_saves_and_stops(assets, tmp_path, number, send, code):
    run = start(assets, tmp_path / "run", max_train_steps=100000)
    wait_for_steps(run, tmp_path / "run", 2)
    send(run.pid, number)
    assert run.wait(timeout=30) == code
    printed = run.stderr.read()
    last = history(tmp_path / "run")[-1]["step"]
    assert f"{number.name}: stopped after step {last}" in printed and "Traceback" not in printed
    assert (tmp_path / "run" / f"checkpoint-{last}" / "trainer_state.json").is_file()


def test_what_a_run_leaves_and_says(train):
    output, printed = train(rescale_betas_zero_snr=True, report_to="tensorboard")
    checkpoint = output / "checkpoint-4"
    recipe = Recipe("v_prediction", True, False, 24.0, 9, "256 <= area <= 1536", 16)
    assert read_recipe(checkpoint / "model") == read_recipe(checkpoint / "model_ema") == recipe
    assert json.loads((output / "settings.json").read_text())["optimizer"]["learning_rate"] == 0.01
    assert "learning_rate=0.01" in printed and "clips: 9\ndropped: none\nbuckets" in printed
    assert f"python -m osp_fast.sample --model_path {checkpoint / 'model_ema'}" in printed
    assert "--text_prompt 'a red square'" in printed
    assert len(history(output)) == 4 and list((output / "logs").glob("events*"))
    assert all(torch.isfinite(tensor).all() for tensor in DiT.from_pretrained(checkpoint / "model").parameters())


def test_accumulation_is_a_larger_batch(train):
    together, _ = train("together", train_batch_size=2, gradient_accumulation_steps=1)
    apart, _ = train("apart", train_batch_size=1, gradient_accumulation_steps=2)
    losses = [[line["loss"] for line in history(output)] for output in (together, apart)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_mixed_sizes_and_lengths_in_one_batch(train):
    output, _ = train(group_data=False, train_batch_size=9, max_train_steps=2)
    assert [line["samples_seen"] for line in history(output)] == [9, 18]


@pytest.mark.parametrize(
    "options",
    [
        dict(mixed_precision="bf16", gradient_checkpointing=True, enable_tiling=True, use_ema=False),
        dict(mixed_precision="bf16", vae_fp32=True, snr_gamma=5.0, noise_offset=0.1, offload_ema=True, allow_tf32=True),
        dict(prediction_type=None, rf_scheduler=True, num_train_epochs=2, max_train_steps=None, train_batch_size=5),
    ],
    ids=["bf16", "vae_fp32", "flow"],
)
def test_options_train(train, options):
    output, _ = train(**options)
    lines = history(output)
    # Four buckets, none of them with more than five clips: four steps are an epoch of the last run.
    assert len(lines) == (8 if "num_train_epochs" in options else 4)
    assert all(line["loss"] > 0 and line["skipped"] == 0 for line in lines)
    assert (output / f"checkpoint-{len(lines)}" / "model_ema").is_dir() == options.get("use_ema", True)


def test_attention_is_chosen_and_told(train):
    chosen, printed = train("chosen", attention="sdpa")
    served = "self-attention of blocks 0-1 (full), 2 (single skip), 3 (group skip), and cross-attention of all"
    assert f"attention: sdpa (fused PyTorch kernels) serves {served}\n" in printed
    default, printed = train("default")
    assert f"attention: reference (plain PyTorch) serves {served}\n" in printed
    losses = [[line["loss"] for line in history(output)] for output in (chosen, default)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_deterministic_runs_are_equal_and_the_flag_ends_with_the_run(train):
    def determined(name: str) -> dict[str, bytes]:
        output, _ = train(name, deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
        return tensors(output / "checkpoint-4")

    try:
        assert determined("first") == determined("second")
        train("third", max_train_steps=1)
        assert not torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_starting_anew_or_from_the_wrong_place_is_refused(train):
    train()
    with pytest.raises(UserError, match=r"already holds checkpoint-4.*--resume_from_checkpoint latest"):
        train()
    with pytest.raises(UserError, match="checkpoint-9 does not exist"):
        train(resume_from_checkpoint="checkpoint-9")
    with pytest.raises(UserError, match="--prediction_type v_prediction, not epsilon"):
        train(resume_from_checkpoint="latest", prediction_type="epsilon")
    with pytest.raises(UserError, match="--seed 42, not 7"):
        train(resume_from_checkpoint="latest", seed=7)
    _, printed = train(resume_from_checkpoint="latest")
    assert "already at step 4 of 4" in printed


def test_a_changed_annotation_is_noticed(train, assets, tmp_path):
    train()
    entries = json.loads((assets["data"].parent / "clips.json").read_text())
    (tmp_path / "fewer.json").write_text(json.dumps(entries[1:]))
    (tmp_path / "fewer.txt").write_text(f"{assets['data'].parent},{tmp_path / 'fewer.json'}\n")
    with pytest.raises(UserError, match="--data selects other clips"):
        train(resume_from_checkpoint="latest", data=tmp_path / "fewer.txt")


def test_resuming_overrides_pretrained_and_tells_what_changed(train):
    first, _ = train("first")
    _, printed = train("second", resume_from_checkpoint="latest", pretrained=first / "checkpoint-4" / "model")
    assert "no checkpoint in" in printed and "is not used" not in printed
    changed = dict(max_train_steps=6, learning_rate=0.005, pretrained=first / "checkpoint-4" / "model")
    output, printed = train("first", resume_from_checkpoint="latest", **changed)
    assert "is not used: --resume_from_checkpoint overrides it" in printed
    assert "--learning_rate is 0.005" in printed and "was trained with 0.01" in printed
    assert [line["lr"] for line in history(output)] == [0.01] * 4 + [0.005] * 2


def test_pretrained_gives_the_weights_strictly(train, tmp_path):
    first, _ = train("first")
    folder = first / "checkpoint-4" / "model"
    # At a learning rate this small the weights stay as they are.
    second, _ = train("second", pretrained=folder, learning_rate=1e-30, max_train_steps=1)
    assert weights(second / "checkpoint-1" / "model") == weights(folder)
    fresh, _ = train("fresh", learning_rate=1e-30, max_train_steps=1)
    assert weights(fresh / "checkpoint-1" / "model") != weights(folder)
    with pytest.raises(UserError, match="num_layers is 4, but --model OpenSoraT2V_v1_3-2B/122 has 32"):
        train("third", pretrained=folder, model="OpenSoraT2V_v1_3-2B/122")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_layers": 3}))
    with pytest.raises(UserError, match="num_layers is 3, but --model tiny has 4"):
        train("fourth", pretrained=folder)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"config.json is missing"):
        train("fifth", pretrained=folder)


def test_a_fresh_model_depends_on_the_seed_alone(train):
    runs = [
        train(name, seed=seed, learning_rate=1e-30, max_train_steps=1)[0]
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    a, b, c = (weights(run / "checkpoint-1" / "model") for run in runs)
    assert a == b != c


@pytest.mark.parametrize(
    "changed, words",
    [
        (dict(ae_path="/nowhere"), "--ae_path.*/nowhere"),
        (dict(text_encoder_name_1="/nowhere"), "--text_encoder_name_1.*/nowhere"),
        (dict(ae_path=None), "--ae_path is missing"),
        (dict(sp_size=2), "--sp_size 2"),
        (dict(device="gpu"), "--device"),
        (dict(use_8bit_adam=True), "--use_8bit_adam"),
        (dict(attention="flash", mixed_precision="bf16"), "--attention flash needs an NVIDIA GPU, not the cpu"),
    ],
)
def test_bad_settings_end_in_one_sentence(train, changed, words):
    with pytest.raises(UserError, match=words):
        train(**changed)


@pytest.mark.parametrize(
    "environment, words",
    [
        (dict(WORLD_SIZE="2"), "MASTER_ADDR and MASTER_PORT must name .*start with torchrun"),
        (dict(WORLD_SIZE="2", RANK="2"), "RANK 2 is not one of WORLD_SIZE 2"),
        (dict(WORLD_SIZE="many"), "RANK and WORLD_SIZE must be whole numbers"),
    ],
)
def test_a_wrong_environment_is_named(train, monkeypatch, environment, words):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=words):
        train()


def test_a_long_run_with_all_that_watches_it(assets, tmp_path, monkeypatch, capfd):
    from osp_fast.train import main

    monkeypatch.setitem(dit_module.DIT_CONFIGS, "tiny", small.SMALL)
    settings = dict(
        group_data=True,
        train_batch_size=None,
        tokens_per_batch=24,
        gradient_accumulation_steps=2,
        max_train_steps=8,
        checkpointing_steps=1,
        checkpoints_total_limit=1,
        checkpoints_keep_every=4,
        max_skipped_steps=3,
        validation_steps=4,
        validation_sampling_steps=2,
        activation_memory="64MiB",
        profile=2,
        hang_factor=50,
        hang_seconds=60,
        use_ema=True,
    )
    output = tmp_path / "run"
    switches = ["--no-async_save", "--no-compile", "--no-cuda_graphs", "--validation_prompt", "a red square", "grey"]
    main([*small.flags(**assets, output=output, **settings), *switches])
    printed = capfd.readouterr().err
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-8"]
    assert sorted(path.name for path in (output / "validation").iterdir()) == ["step-4", "step-8"]
    assert len(list((output / "validation" / "step-4").glob("[01].*"))) == 4  # two clips and what made them
    assert list((output / "profile").glob("rank-0-steps-6-7.json.gz")) and "profile of steps 6-7" in printed
    assert "activations: " in printed and "validation: 2 clips of" in printed
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert all(line["recompiled"] == 0 and line["memory_peak_gib"] > 0 for line in lines)
    # Buckets of 4 to 18 tokens: from 2 x 6 clips of a picture to 2 x 1 of the widest video.
    samples = [line["samples_seen"] for line in lines]
    assert {after - before for before, after in zip([0, *samples], samples, strict=False)} <= {12, 8, 4, 2}


def test_a_slow_reader_is_waited_for_and_told(train, monkeypatch):
    from osp_fast.data.dataset import ClipLoader

    honest = ClipLoader._clip

    def slowly(self, *arguments):
        time.sleep(0.4)
        return honest(self, *arguments)

    monkeypatch.setattr(ClipLoader, "_clip", slowly)
    output, printed = train(dataloader_num_workers=1, max_train_steps=4)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert sum(line["data_wait_s"] for line in lines) > 0.5
    assert all(line["data_wait_s"] <= line["s_per_step"] for line in lines)
    assert all(line["tokens_per_s"] > 0 and line["model_tflops"] > 0 for line in lines)
    assert re.search(r"step 4/4: loss .*, \d+% waiting for data", printed)
