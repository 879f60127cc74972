"""What changes after encoding is an error in training, which encoding again mends."""

import json
import os
import shutil

import pytest
import torch
from encoding import contents, small
from safetensors.torch import load_file, save_file

from osp_fast.errors import UserError

FAULTS = {
    "contents": r"4\.mp4: .*4\.mp4 has changed since it was encoded: run python -m osp_fast\.encode with",
    "crop": r"4\.mp4: it was encoded with other frames, another crop or another size: run",
    "caption": r"4\.mp4: its caption 'a grey square' is not encoded: run",
    "new clip": r"new\.mp4: it is not encoded: run",
    "removed": r"4\.mp4: .*4\.mp4 has changed since it was encoded: run",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_change_of_the_data_is_an_error_and_encoding_mends_it(fault, run, assets, tmp_path):
    run("encode")
    before = contents(tmp_path / "cache")
    data = assets["data"].parent
    annotation = data / "clips.json"
    entries = json.loads(annotation.read_text())
    if fault == "contents":
        shutil.copy(data / "7.mp4", data / "4.mp4")
    elif fault == "crop":
        entries[4]["crop"] = [0, 32, 0, 16]
    elif fault == "caption":
        entries[4]["cap"] = ["a grey square"]
    elif fault == "new clip":
        shutil.copy(data / "4.mp4", data / "new.mp4")
        entries.append({**entries[4], "path": "new.mp4"})
    else:
        (data / "4.mp4").unlink()
    annotation.write_text(json.dumps(entries))
    with pytest.raises(UserError, match=rf"1 of \d clips cannot be read, the first of them [^:]*{FAULTS[fault]}"):
        run("train")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    said = run("encode")
    counts = {"caption": "0 clips and 1", "removed": "0 clips and 0"}.get(fault, "1 clips and 0")
    assert f"rank 0: {counts} captions encoded" in said
    assert f"{int(fault == 'removed')} clips broken" in said
    run("train")
    after = contents(tmp_path / "cache")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_copy_elsewhere_with_new_times_is_the_same_data(run, assets, tmp_path):
    run("encode")
    copy = {"data": tmp_path / "elsewhere", "text_encoder": tmp_path / "encoder"}
    for name, folder in copy.items():
        shutil.copytree(assets[name].parent if name == "data" else assets[name], folder)
        for path in folder.iterdir():
            os.utime(path, ns=(5, 5))
    data = copy["data"] / "data.txt"
    data.write_text(f"{data.parent},{data.parent / 'clips.json'}\n")
    shutil.rmtree(assets["data"].parent)
    given = {"data": data, "text_encoder_name_1": copy["text_encoder"]}
    run("train", **given)
    assert ": 0 clips and 0 captions encoded" in run("encode", **given)


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"num_frames": 5}, r"4 of 8 clips cannot be read, .*it was encoded with other frames"),
        ({"train_fps": 18}, r"clips cannot be read, .*it was encoded with other frames"),
        ({"max_hxw": 32 * 32}, r"clips cannot be read, .*another size"),
        (
            {"mixed_precision": "bf16"},
            r"cache\.json: vae_dtype is not what .*\(float32, now bfloat16\): change --mixed",
        ),
        (
            {"mixed_precision": "bf16", "vae_fp32": True},
            r"cache\.json: text_dtype is not what .*\(float32, now bfloat16",
        ),
        ({"model_max_length": 6}, r"cache\.json: max_length is not what .*\(8, now 6\): change --model_max_length"),
        (
            {"latent_cache": "nowhere"},
            r"--latent_cache nowhere: there is no cache\.json: run python -m osp_fast\.encode",
        ),
    ],
)
def test_other_flags_are_an_error(changed, said, run):
    given = {"num_frames": 5} if "train_fps" in changed else {}
    run("encode", **given)
    with pytest.raises(UserError, match=said):
        run("train", **{**given, **changed})


@pytest.mark.parametrize("network", ["vae", "text_encoder"])
def test_other_weights_are_an_error(network, run, assets, tmp_path):
    folder = tmp_path / "copy"
    name = "ae_path" if network == "vae" else "text_encoder_name_1"
    shutil.copytree(small.GOLDEN_VAE if network == "vae" else assets["text_encoder"], folder)
    given = {name: folder}
    run("encode", **given)
    run("train", **given)
    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    largest = max(tensors, key=lambda one: tensors[one].numel())
    tensors[largest] = tensors[largest] * 1.0001
    save_file(tensors, file, metadata={"format": "pt"})
    for program in ("train", "encode"):
        with pytest.raises(
            UserError, match=rf"cache\.json: {network} is not what .*{file.name} has changed\): change --"
        ):
            run(program, "other", **given)
