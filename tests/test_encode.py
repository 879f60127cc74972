"""python -m osp_fast.encode, and training from what it makes."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from osp_fast.cli import parse_train
from osp_fast.data.buckets import load_plan
from osp_fast.data.cache_shards import read_records, read_tensor, shards
from osp_fast.data.identity import Identities
from osp_fast.data.latent_cache import SHARDS, LatentCache
from osp_fast.encode import encode, share_of_process
from osp_fast.errors import UserError
from osp_fast.models import dit as dit_module
from osp_fast.models.text_encoder import TextEncoder
from osp_fast.training.cached import networks_of
from osp_fast.training.precompute import Share, encode_captions, encode_clips, prepare_folder

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "tests" / "training" / "small_run.py"
SPEC = importlib.util.spec_from_file_location("small_run", SCRIPT)
small = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(small)


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("assets")
    return dict(
        data=small.write_data(root / "data", images=4, videos=4),
        text_encoder=small.write_text_encoder(root / "text_encoder"),
    )


@pytest.fixture
def assets(originals, tmp_path) -> dict[str, Path]:
    """The data and the text encoder, in a folder that a test may change."""
    shutil.copytree(originals["data"].parent, tmp_path / "data")
    shutil.copytree(originals["text_encoder"], tmp_path / "text_encoder")
    data = tmp_path / "data" / "data.txt"
    data.write_text(f"{data.parent},{data.parent / 'clips.json'}\n")
    return dict(data=data, text_encoder=tmp_path / "text_encoder")


@pytest.fixture
def run(assets, tmp_path, monkeypatch, capfd):
    """Run encode or train in this process with --latent_cache; keyword arguments change flags. Returns stderr."""
    from osp_fast import encode as encode_module
    from osp_fast import train as train_module

    monkeypatch.setitem(dit_module.DIT_CONFIGS, "tiny", small.SMALL)

    def call(program: str, output: str = "run", **changed: object) -> str:
        values = {**assets, "output": tmp_path / output, "latent_cache": tmp_path / "cache", **changed}
        capfd.readouterr()
        (encode_module if program == "encode" else train_module).main(small.flags(**values))
        return capfd.readouterr().err

    return call


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def contents(cache: Path) -> dict[str, torch.Tensor]:
    """Name -> tensor of all items."""
    return {
        name: read_tensor(shard, name)
        for shard in shards(cache / SHARDS)
        for name, record in read_records(shard).items()
        if "reject" not in record
    }


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    """Whether both hold the same; the VAE's sums are rounded otherwise in batches of another size."""
    return found.keys() == expected.keys() and all(
        torch.allclose(tensor, found[name], rtol=1e-4, atol=1e-5) for name, tensor in expected.items()
    )


def test_training_from_the_cache_is_training(run, tmp_path, monkeypatch):
    """Clips of one window and one caption: nothing is drawn otherwise, so all losses are equal; resumed, too."""
    said = run("encode")
    assert "rank 0: 8 clips and 4 captions encoded, 0 and 0 were there, 0 clips broken" in said
    assert "clip 8/8: " in said and "0:00:00 left" in said
    options = dict(max_train_steps=9, log_interval=1, cfg=0.3, checkpointing_steps=5)
    run("train", "plain", latent_cache=None, **options)

    def nothing(*arguments, **options):
        raise AssertionError("neither networks nor decoders are needed")

    monkeypatch.setattr("osp_fast.models.text_encoder.TextEncoder.from_pretrained", nothing)
    monkeypatch.setattr("osp_fast.models.wfvae.WFVAE.from_pretrained", nothing)
    monkeypatch.setattr("osp_fast.data.video.Decoder._start", nothing)
    said = run("train", "cached", **options)
    assert f"latent cache {tmp_path / 'cache'}: holds all 8 clips" in said
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "plain"), rel=1e-6)
    run("train", "cached2", **{**options, "max_train_steps": 5})
    run("train", "cached2", **options, resume_from_checkpoint="latest")
    assert losses(tmp_path / "cached2") == losses(tmp_path / "cached")


def test_mixed_sizes_in_bfloat16_with_a_dropped_caption(run, tmp_path):
    options = dict(mixed_precision="bf16", group_data=False, cfg=1.0, log_interval=1)
    run("encode", **options)
    cache = LatentCache(tmp_path / "cache")
    assert {tensor.dtype for tensor in contents(cache.folder).values()} == {torch.bfloat16}
    run("train", "plain", latent_cache=None, **options)
    run("train", "cached", **options)
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "plain"), rel=1e-6)


def test_variants_are_windows_and_captions(run, assets, tmp_path):
    annotation = assets["data"].parent / "clips.json"
    entries = json.loads(annotation.read_text())
    for entry in entries:
        entry["cap"] = ["a red square", "a blue square", "a green square", "red", "blue", "green"]
    annotation.write_text(json.dumps(entries))
    options = dict(num_frames=5, cache_variants=3, max_train_steps=12)
    said = run("encode", **options)
    cache = contents(tmp_path / "cache")
    assert 8 < sum(name.startswith("clip.") for name in cache) <= 4 + 3 * 4
    assert 4 <= sum(name.startswith("text.") for name in cache) <= 7
    run("train", **options)
    said = run("encode", **options)
    assert ": 0 clips and 0 captions encoded" in said
    with pytest.raises(UserError, match=r"of 80 clips cannot be read, the first of them .*: run python -m osp_fast.e"):
        run("train", "other", **{**options, "cache_variants": 10})


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


def test_a_broken_video_is_left_out_as_in_training(run, assets, tmp_path):
    video = assets["data"].parent / "5.mp4"
    video.write_bytes(video.read_bytes()[:200])
    said = run("encode")
    assert "1 broken" in said and "7 clips and 4 captions encoded" in said and said.rstrip().endswith("1 clips broken")
    (line,) = (tmp_path / "cache" / "rejects-r0000.jsonl").read_text().splitlines()
    assert json.loads(line)["path"].endswith("/5.mp4")
    run("train", "cached", max_train_steps=8, log_interval=1)
    rejected = [json.loads(line) for line in (tmp_path / "cached/rejects.jsonl").read_text().splitlines()]
    assert [Path(one["path"]).name for one in rejected] == ["5.mp4"] and rejected[0]["substitute"]
    run("train", "plain", latent_cache=None, max_train_steps=8, log_interval=1)
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "plain"), rel=1e-6)
    with pytest.raises(UserError, match="more than --max_bad_samples 0"):
        run("encode", max_bad_samples=0)


def test_what_is_neither_file_nor_missing_is_broken_once(run, assets, tmp_path):
    """A folder in a video's place: it has a size and a time, but no contents."""
    (assets["data"].parent / "5.mp4").unlink()
    (assets["data"].parent / "5.mp4").mkdir()
    run("encode")
    kept = len(shards(tmp_path / "cache" / SHARDS))
    run("train")
    assert "7 and 4 were there, 1 clips broken" in run("encode")  # tried again, and nothing new to tell
    assert len(shards(tmp_path / "cache" / SHARDS)) == kept


def test_two_roots_with_equal_names_sizes_and_times(run, assets, tmp_path):
    data = assets["data"].parent
    other = tmp_path / "other"
    shutil.copytree(data, other)
    contents_of = sorted((path.stat().st_size, path.name) for path in data.glob("*.png"))
    (size, first), (other_size, second) = contents_of[:2]
    swapped = (data / second).read_bytes()[:size].ljust(size, b"\0") if size <= other_size else b""
    pixels = bytearray((data / first).read_bytes())
    assert swapped and len(swapped) == len(pixels)
    (other / first).write_bytes((data / second).read_bytes() + bytes(0))
    for folder in (data, other):
        file = folder / first
        file.write_bytes(file.read_bytes().ljust(max(size, other_size) + 8, b"\0"))  # PNG ends before
        os.utime(file, ns=(7, 7))
    assert (data / first).stat().st_size == (other / first).stat().st_size
    entries = [one for one in json.loads((data / "clips.json").read_text()) if one["path"] == first]
    (data / "clips.json").write_text(json.dumps(entries))
    assets["data"].write_text(f"{data},{data / 'clips.json'}\n{other},{data / 'clips.json'}\n")
    run("encode")
    clips = [tensor for name, tensor in contents(tmp_path / "cache").items() if name.startswith("clip.")]
    assert len(clips) == 2 and not torch.allclose(*clips)
    run("train", max_train_steps=1)
    assert ": 0 clips and 0 captions encoded, 2 and" in run("encode")


def test_a_small_memory_makes_small_batches(run, tmp_path):
    run("encode")
    run("encode", latent_cache=tmp_path / "small", vae_memory="3MiB")
    assert same(contents(tmp_path / "small"), contents(tmp_path / "cache"))
    with pytest.raises(UserError, match="VAE encode of .* needs at least"):
        run("encode", latent_cache=tmp_path / "none", vae_memory="1MiB")


def test_what_was_encoded_before_an_error_is_kept(run, tmp_path, monkeypatch):
    monkeypatch.setattr("osp_fast.training.precompute.CAPTIONS_AT_ONCE", 1)
    forward, calls = TextEncoder.forward, []

    def full(encoder, texts):
        calls.append(texts)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(encoder, texts)

    monkeypatch.setattr(TextEncoder, "forward", full)
    with pytest.raises(UserError, match="encoding captions does not fit into the memory of cpu"):
        run("encode")
    assert len(contents(tmp_path / "cache")) == 2
    assert "2 captions encoded, 0 and 2 were there" in run("encode")


def test_a_signal_ends_the_wait_for_a_hanging_file(assets, tmp_path):
    """And a file of which several clips are cut is tried once."""
    data = assets["data"].parent
    (data / "4.mp4").unlink()
    os.mkfifo(data / "4.mp4")
    entries = json.loads((data / "clips.json").read_text())
    (data / "clips.json").write_text(json.dumps([entries[4]]))
    process = start(assets, tmp_path / "cache", 1, {}, decode_timeout=50)
    until = time.monotonic() + 60
    while not shards(tmp_path / "cache" / SHARDS):  # the captions
        assert time.monotonic() < until and process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    time.sleep(1)
    begun = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 143 and time.monotonic() - begun < 15


def test_a_stop_during_captions_loads_no_vae(assets, tmp_path):
    config, _ = parse_train(small.flags(**assets, output=tmp_path / "none", latent_cache=tmp_path / "cache"))
    plan = load_plan(config.data, 0)
    networks, identities = networks_of(config), Identities()
    prepare_folder(tmp_path / "cache", networks, identities, 0, print)
    cache = LatentCache(tmp_path / "cache", identities)

    def never():
        raise AssertionError("nothing is to be loaded")

    for counts in (
        encode_captions(cache, plan, config, networks, Share(), never, lambda: True),
        encode_clips(cache, plan, config, Share(), never, torch.device("cpu"), lambda: True, print),
    ):
        assert counts.encoded == 0


def test_a_line_that_is_repeated_is_encoded_once(run, assets, tmp_path):
    annotation = assets["data"].parent / "clips.json"
    entries = json.loads(annotation.read_text())
    annotation.write_text(json.dumps(entries + entries))
    assert "rank 0: 8 clips and 4 captions encoded" in run("encode")
    run("train")


def test_any_number_of_ranks_makes_the_same_cache(run, assets, tmp_path, monkeypatch):
    run("encode")
    one = contents(tmp_path / "cache")
    for world in (2, 3):
        folder = tmp_path / f"cache{world}"
        config, _ = parse_train(small.flags(**assets, output=tmp_path / "none", latent_cache=folder))
        for rank in range(world):
            assert encode(config, Share(rank, world)) == 0
        found = contents(folder)
        assert same(found, one)
        assert len({path.name.split("-")[1] for path in shards(folder / SHARDS)}) == world
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert share_of_process() == Share(2, 3, 3)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert share_of_process() == Share(2, 3, 1)
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(UserError, match="RANK 3 is not one of WORLD_SIZE 3"):
        share_of_process()


def start(
    assets: dict[str, Path], cache: Path, items: int, environment: dict[str, str], **changed: object
) -> subprocess.Popen:
    """The program in a process of its own, which writes a shard for every few items."""
    code = (
        f"import sys, osp_fast.data.cache_shards as s; s.SHARD_ITEMS = {items}; from osp_fast.errors import *;"
        "import osp_fast.encode as e; run_entry_point(lambda: e.main(sys.argv[1:]))"
    )
    flags = small.flags(**assets, output=cache.parent / "none", latent_cache=cache, **changed)
    path = os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))
    return subprocess.Popen(
        [sys.executable, "-c", code, *flags],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **environment},
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_processes_beside_each_other_one_killed_and_started_again(run, assets, tmp_path):
    run("encode")
    one, folder = contents(tmp_path / "cache"), tmp_path / "cache2"
    processes = [start(assets, folder, 1, {"RANK": str(rank), "WORLD_SIZE": "2"}) for rank in range(2)]
    until = time.monotonic() + 60
    while not any(name.name.endswith("r0001.safetensors") for name in shards(folder / SHARDS)):
        assert time.monotonic() < until and processes[1].poll() is None, processes[1].stderr.read()
        time.sleep(0.002)
    processes[1].send_signal(signal.SIGKILL)
    assert processes[0].communicate(timeout=60) and processes[0].returncode == 0
    processes[1].communicate()
    kept = {path.name: path.read_bytes() for path in shards(folder / SHARDS)}
    assert contents(folder).keys() < one.keys()
    with pytest.raises(UserError, match="cannot be read|is not encoded"):
        run("train", latent_cache=folder)
    said = run("encode", latent_cache=folder)  # now with one rank
    found = contents(folder)
    assert same(found, one)
    assert all((folder / SHARDS / name).read_bytes() == before for name, before in kept.items())
    encoded = sum(name.startswith("clip.") for shard in shards(folder / SHARDS) if shard.name not in kept
                  for name in read_records(shard))  # fmt: skip
    assert f"rank 0: {encoded} clips" in said and encoded < 8
    run("train", latent_cache=folder)


def test_a_signal_stops_at_a_shard(assets, tmp_path):
    process = start(assets, tmp_path / "cache", 1, {})
    until = time.monotonic() + 60
    while not shards(tmp_path / "cache" / SHARDS):
        assert time.monotonic() < until and process.poll() is None, process.stderr.read()
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143 and "SIGTERM: stopped; go on with the same command" in said
    assert not list((tmp_path / "cache" / SHARDS).glob("*.part"))


def test_as_a_program_bad_input_is_one_sentence(assets, tmp_path):
    command = [sys.executable, "-m", "osp_fast.encode", *small.flags(**assets, output=tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: --latent_cache is missing: name the folder that latents and text states go to\n"
