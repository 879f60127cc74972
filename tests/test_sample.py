"""`python -m osp_fast.sample` from flags to files, on a small random model."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from osp_fast.config import Recipe
from osp_fast.data.decode import read_video
from osp_fast.errors import UserError
from osp_fast.models.dit import DiT
from osp_fast.models.lora import merge_lora, save_lora
from osp_fast.models.wfvae import WFVAE
from osp_fast.pipeline.settings import NEGATIVE_PROMPT
from osp_fast.sample import main
from osp_fast.sample_files import smaller
from osp_fast.sampling.prompts import read_prompts

sys.path.insert(0, str(Path(__file__).parent / "sampling"))
sys.path.insert(0, str(Path(__file__).parent / "models"))
from small import CONFIG, VAE_FOLDER, command_line, run, save_text_encoder, small_dit, small_flags

RECIPE = Recipe("v_prediction", True, False, 24.0, 9, "32x32", 16)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """dit/ as a release, run/ as a training run with two checkpoints, text/ a T5."""
    root = tmp_path_factory.mktemp("models")
    dit = small_dit()
    dit.save_pretrained(root / "dit")
    dit.save_pretrained(root / "run/checkpoint-9/model", RECIPE)
    for part in ("model", "model_ema"):
        dit.save_pretrained(root / f"run/checkpoint-10/{part}", RECIPE)
    save_text_encoder(root / "text")
    # Adapters of two products, which differ from run/'s recipe in nothing.
    tensors = {}
    for index, target in enumerate(("attn1.to_q", "attn2.to_out.0")):
        name = f"base_model.model.transformer_blocks.{index}.{target}.lora_"
        tensors |= {
            f"{name}{kind}.weight": torch.randn(shape, generator=torch.Generator().manual_seed(2))
            for kind, shape in (("A", (4, 48)), ("B", (48, 4)))
        }
    for part in ("lora", "lora_ema"):
        save_lora(root / f"tuned/checkpoint-3/{part}", tensors, 4, 8.0, RECIPE)
    return root


@pytest.fixture
def flags(models, tmp_path):
    return small_flags(models, tmp_path / "out")


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_as_a_program(flags, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    call = [sys.executable, "-m", "osp_fast.sample"]
    done = subprocess.run([*call, *command_line(flags)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert files(tmp_path / "out") == ["DDIM_0_gs3.0_s2.json", "DDIM_0_gs3.0_s2.mp4"]
    assert "  sample_method: DDIM\n" in done.stderr  # the resolved settings
    assert "clip 1/1, step 2/2:" in done.stderr
    assert f"wrote {tmp_path / 'out' / 'DDIM_0_gs3.0_s2.mp4'}" in done.stderr
    failed = subprocess.run([*call, *command_line(flags, steps=0)], capture_output=True, text=True, env=environment)
    assert failed.returncode == 2
    assert failed.stderr.splitlines()[-1].startswith("error: --steps is not a flag of osp_fast.sample")


def test_video_holds_the_frames(flags):
    import av

    folder = run(flags, fps=7)
    with av.open(str(folder / "DDIM_0_gs3.0_s2.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.height, stream.width, stream.average_rate) == (16, 32, 7)
        assert len(list(container.decode(stream))) == 5


def test_sidecar_says_how_to_make_it_again(flags, models):
    folder = run(flags, text_prompt=["A RED circle  moves", "left"], num_samples_per_prompt=2)
    names = [f"DDIM_{index}_gs3.0_s2" for index in range(4)]
    assert files(folder) == sorted(
        [*(name + end for name in names for end in (".mp4", ".json")), "DDIM_gs3.0_s2_grid.mp4"]
    )
    facts = [json.loads((folder / f"{name}.json").read_text()) for name in names]
    places = [(f["index"], f["prompt_index"], f["sample_index"], f["prompt"]) for f in facts]
    assert places == [
        (0, 0, 0, "A RED circle  moves"),
        (1, 0, 1, "A RED circle  moves"),
        (2, 1, 0, "left"),
        (3, 1, 1, "left"),
    ]
    expected = {
        "full_prompt": "high quality, high aesthetic, a red circle moves",
        "negative_prompt": NEGATIVE_PROMPT,
        "seed": 42,
        "num_sampling_steps": 2,
        "sample_method": "DDIM",
        "guidance_scale": 3.0,
        "num_frames": 5,
        "height": 16,
        "width": 32,
        "fps": 24,
        "prediction_type": "epsilon",
        "rescale_betas_zero_snr": False,
        "rectified_flow": False,
        "dtype": "float32",
        "model_path": str(models / "dit"),
    }
    assert {name: facts[0][name] for name in expected} == expected
    assert set(facts[0]["versions"]) == {"osp_fast", "torch", "diffusers"}


def test_same_seed_same_file_whatever_else_is_sampled(flags):
    method = "EulerAncestralDiscrete"
    folder = run(flags, sample_method=method)
    video = (folder / f"{method}_0_gs3.0_s2.mp4").read_bytes()
    more = run(flags, sample_method=method, text_prompt=["A red circle", "left"], num_samples_per_prompt=2)
    assert (more / f"{method}_0_gs3.0_s2.mp4").read_bytes() == video
    assert (more / f"{method}_1_gs3.0_s2.mp4").read_bytes() != video
    other = run(flags, sample_method=method, seed=43)
    assert (other / f"{method}_0_gs3.0_s2.mp4").read_bytes() != video


def test_what_is_there_is_skipped(flags, capsys):
    folder = run(flags, text_prompt=["A red circle", "left"])
    made = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    capsys.readouterr()
    main(command_line(flags, text_prompt=["A red circle", "left"]))
    assert "2 of 2 clips are there already: skipped" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == made
    for changes in (dict(negative_prompt="low"), dict(overwrite=True)):
        main(command_line(flags, text_prompt=["A red circle", "left"], **changes))
        assert "there already" not in capsys.readouterr().err
        now = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
        assert now.keys() == made.keys() and all(now[path] > time for path, time in made.items())
        made = now


def test_a_model_that_changed_is_sampled_anew(flags, models, tmp_path, capsys):
    shutil.copytree(models / "dit", tmp_path / "dit")
    folder = run(flags, model_path=tmp_path / "dit")
    before = (folder / "DDIM_0_gs3.0_s2.mp4").read_bytes()
    other = DiT.from_pretrained(tmp_path / "dit")
    with torch.no_grad():
        other.proj_out.weight.mul_(2)
    other.save_pretrained(tmp_path / "dit")
    main(command_line(flags, model_path=tmp_path / "dit"))
    assert "there already" not in capsys.readouterr().err
    assert (folder / "DDIM_0_gs3.0_s2.mp4").read_bytes() != before


def test_one_frame_is_an_image(flags):
    from PIL import Image

    folder = run(flags, num_frames=1, text_prompt=["a", "red", "circle"], save_memory=True, enable_tiling=True)
    assert [name for name in files(folder) if name.endswith(".jpg")] == [
        *(f"DDIM_{index}_gs3.0_s2.jpg" for index in range(3)),
        "DDIM_gs3.0_s2_grid.jpg",
    ]
    with Image.open(folder / "DDIM_0_gs3.0_s2.jpg") as image:
        assert image.size == (32, 16)
    with Image.open(folder / "DDIM_gs3.0_s2_grid.jpg") as grid:
        assert grid.width >= 64 and grid.height >= 32


def test_prompts_from_a_file(flags, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeffa red circle\n\n   \n  left \r\n", encoding="utf-8")
    assert read_prompts([str(path)]) == ["a red circle", "left"]
    folder = run(flags, text_prompt=[path])
    assert json.loads((folder / "DDIM_1_gs3.0_s2.json").read_text())["prompt"] == "left"


def test_newest_checkpoint_of_a_run(flags, models, capsys):
    for named in ("run", "run/checkpoint-10", "run/checkpoint-10/model_ema"):
        folder = run(flags, model_path=models / named)
        facts = json.loads((folder / "DDIM_0_gs3.0_s2.json").read_text())
        assert facts["model_path"] == str(models / "run/checkpoint-10/model_ema")
        # The recipe's way to sample, without a flag.
        assert facts["prediction_type"] == "v_prediction" and facts["rescale_betas_zero_snr"] is True
        assert ("the newest checkpoint is" in capsys.readouterr().err) == (named == "run")
    folder = run(flags, model_path=models / "run/checkpoint-9")
    facts = json.loads((folder / "DDIM_0_gs3.0_s2.json").read_text())
    assert facts["model_path"] == str(models / "run/checkpoint-9/model")


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(caption_refiner="llama"), "no model folder .* at llama"),
        (dict(model_path="missing"), "missing.*config.json|config.json.* missing"),
        (dict(ae_path="missing"), "missing"),
        (dict(text_encoder_name_1="missing"), "missing"),
        (dict(device="gpu"), "--device"),
        (dict(attention="flash"), "--attention flash needs an NVIDIA GPU, not the cpu"),
        (dict(attention="flashy"), "choose from auto, triton, sdpa, flash, reference"),
        (dict(num_sampling_steps=1), "--num_sampling_steps 1"),
        (dict(cuda_graphs=True), "--cuda_graphs needs an NVIDIA GPU, not the cpu"),
        (dict(cuda_graphs=True, step_cache=0.1), "--cuda_graphs cannot hold what --step_cache does"),
        (dict(lora="missing"), "missing does not exist: name a folder or a file of LoRA adapters"),
        (dict(lora="empty.txt"), "empty.txt is not a .safetensors file"),
        (dict(lora="tuned", prediction_type="epsilon"), "--prediction_type epsilon contradicts"),
        (dict(model_path="tuned"), "holds LoRA adapters only: give --lora .*checkpoint-3/lora_ema"),
        (dict(sample_method="FlowMatchEulerDiscrete", model_path="run"), "rectified flow"),
        (dict(prediction_type="epsilon", model_path="run"), "contradicts the checkpoint's recipe"),
        (dict(text_prompt=["missing.txt"]), "missing.txt cannot be read"),
        (dict(text_prompt=["empty.txt"]), "empty.txt holds no prompt"),
        (dict(text_prompt=["binary.txt"]), "binary.txt is not text"),
        (dict(text_prompt=["zeros.txt"]), "zeros.txt is a binary file"),
        (dict(text_prompt=["a", "empty.txt"]), "give .*empty.txt alone"),
        (dict(text_prompt=["a", " "]), "prompt number 2 is empty"),
        (dict(text_prompt=["\u4e00"]), "is empty after cleaning"),
        (dict(save_img_path="empty.txt"), "--save_img_path .*empty.txt cannot be written to"),
    ],
)
def test_mistakes_end_in_one_sentence(flags, models, tmp_path, monkeypatch, changes, words):
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("\n \n")
    Path("binary.txt").write_bytes(b"\x89PNG\r\n\xff\xfe")
    Path("zeros.txt").write_bytes(b"a\0b")
    changes = {name: models / value if value in ("run", "tuned") else value for name, value in changes.items()}
    with pytest.raises(UserError, match=words):
        main(command_line(flags, **changes))
    assert not list(tmp_path.glob("**/*.mp4"))


def test_networks_that_do_not_fit_are_refused(flags, tmp_path):
    DiT.create(replace(CONFIG, caption_channels=24), seed=0).save_pretrained(tmp_path / "wide")
    with pytest.raises(UserError, match=r"16 channels.* takes 24"):
        run(flags, model_path=tmp_path / "wide")
    DiT.create(replace(CONFIG, in_channels=4, out_channels=4), seed=0).save_pretrained(tmp_path / "narrow")
    with pytest.raises(UserError, match=r"8 latent channels.* takes 4"):
        run(flags, model_path=tmp_path / "narrow")
    DiT.create(replace(CONFIG, out_channels=16), seed=0).save_pretrained(tmp_path / "double")
    with pytest.raises(UserError, match="out_channels is 16 and in_channels 8"):
        run(flags, model_path=tmp_path / "double")


def test_frames_that_are_no_numbers_are_not_written(flags, tmp_path):
    vae = WFVAE.from_pretrained(VAE_FOLDER)
    with torch.no_grad():
        vae.decoder.conv_out.bias.fill_(float("nan"))
    vae.save_pretrained(tmp_path / "vae")
    with pytest.raises(UserError, match="frames are not finite numbers: check --ae_path"):
        run(flags, ae_path=tmp_path / "vae")
    assert not list((tmp_path / "out").glob("*.mp4"))


def test_sizes_and_rate_come_from_the_recipe(flags, models, tmp_path):
    DiT.create(CONFIG, seed=0).save_pretrained(tmp_path / "model", replace(RECIPE, train_fps=8.0))
    folder = run(flags, model_path=tmp_path / "model", num_frames=None, height=None, width=None)
    sidecar = json.loads(next(folder.glob("*.json")).read_text())
    assert [sidecar[name] for name in ("num_frames", "height", "width", "fps")] == [9, 32, 32, 8.0]
    assert read_video(next(folder.glob("*.mp4"))).shape == (9, 32, 32, 3)


def test_prompt_files_are_told_from_prompts(tmp_path):
    (tmp_path / "P.TXT").write_bytes("a blue square\u2028moves\r\n\r\na cat\n".encode())
    assert read_prompts([str(tmp_path / "P.TXT")]) == ["a blue square\u2028moves", "a cat"]
    assert read_prompts(["a hand writes notes.txt"]) == ["a hand writes notes.txt"]
    with pytest.raises(UserError, match="cannot be read"):
        read_prompts(["missing.txt"])


@pytest.mark.parametrize("attention, told", [("auto", "reference"), ("sdpa", "sdpa"), ("triton", "triton")])
def test_attention_is_chosen_and_told(flags, capsys, attention, told):
    folder = run(flags, attention=attention)
    assert json.loads((folder / "DDIM_0_gs3.0_s2.json").read_text())["attention"] == told
    printed = capsys.readouterr().err
    assert f"  attention: {told}\n" in printed and f"attention: {told} (" in printed
    assert " serves self-attention of blocks 0-1 (full), and cross-attention of all\n" in printed


def test_compile_reaches_every_block(flags, monkeypatch):
    compiled = []

    def compile(forward, **options):
        compiled.append(type(forward.__self__).__name__)
        assert options["fullgraph"] and not options["dynamic"]
        return forward

    monkeypatch.setattr(torch, "compile", compile)
    run(flags, compile=True)
    assert compiled == ["Block", "Block"]


def test_adapters_are_added_to_the_weights(flags, models, tmp_path, capsys):
    sidecar, video = "DDIM_0_gs3.0_s2.json", "DDIM_0_gs3.0_s2.mp4"
    base = DiT.from_pretrained(models / "dit")
    merge_lora(base, models / "tuned/checkpoint-3/lora", 0.5).save_pretrained(tmp_path / "merged", RECIPE)
    expected = (run(flags, model_path=tmp_path / "merged") / video).read_bytes()
    for named in ("tuned", "tuned/checkpoint-3", "tuned/checkpoint-3/lora_ema"):
        folder = run(flags, lora=models / named, lora_scale=0.5)
        assert (folder / video).read_bytes() == expected
        facts = json.loads((folder / sidecar).read_text())
        assert facts["lora"] == str(models / "tuned/checkpoint-3/lora_ema/adapter_model.safetensors")
        # How the adapters were trained is how their base is sampled with them.
        assert [facts[name] for name in ("lora_scale", "lora_rank", "lora_alpha")] == [0.5, 4, 8.0]
        assert facts["prediction_type"] == "v_prediction" and facts["rescale_betas_zero_snr"] is True
    assert "the newest checkpoint is" in capsys.readouterr().err
    DiT.create(CONFIG, seed=0).save_pretrained(tmp_path / "other", replace(RECIPE, prediction_type="epsilon"))
    with pytest.raises(
        UserError, match="says prediction_type v_prediction, but .*other/recipe.json, of the model, says"
    ):
        run(flags, model_path=tmp_path / "other", lora=models / "tuned")


def test_a_wide_grid_is_shrunk_by_whole_pixels():
    frames = np.arange(2 * 5 * 6 * 3, dtype=np.uint8).reshape(2, 5, 6, 3)
    half = smaller(frames, 2)
    assert half.shape == (2, 2, 3, 3) and half.dtype == np.uint8
    assert half[1, 0, 0, 0] == round(frames[1, :2, :2, 0].astype(float).mean())
    assert smaller(frames, 1) is frames
