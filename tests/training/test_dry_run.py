"""`--dry_run`: bytes of real shards, without the model; tables that say what the flags make of it."""

import time

import pytest
import torch

from osp_fast.config import TrainConfig
from osp_fast.data.buckets import Bucket
from osp_fast.errors import UserError
from osp_fast.models.dit import DiT
from osp_fast.training import dry_run as module
from osp_fast.training.dry_run import Machine, dry_run
from osp_fast.training.footprint import measure_footprint, resolve_dit, text_encoder_numbers

GIB = 2**30


def make_config(**changed: object) -> TrainConfig:
    values = dict(
        model="tiny", ae="tiny", mixed_precision="bf16", num_frames=17, max_height=64, max_width=64, latent_cache="x"
    )
    values |= changed
    config = TrainConfig()
    for group in (config.data, config.model, config.optimizer, config.run):
        for name in [name for name in values if hasattr(group, name)]:
            setattr(group, name, values.pop(name))
    assert not values
    return config


def tables(config: TrainConfig, buckets: dict[Bucket, int] | None = None) -> tuple[list[list[dict[str, str]]], str]:
    """Each number of GPUs: the rows of its table; and all lines."""
    lines: list[str] = []
    dry_run(config, buckets, lines.append)
    found: list[list[dict[str, str]]] = []
    headers: list[str] = []
    for line in lines:
        words = [word.strip() for word in line.split("  ") if word.strip()]
        if words[0] == "bucket":
            found.append([])
            headers = words
        elif found and len(words) == len(headers):
            found[-1].append(dict(zip(headers, words, strict=True)))
    return found, "\n".join(lines)


@pytest.mark.parametrize("gpus, shard_size", [(1, None), (2, None), (8, None), (64, None), (64, 8), (512, None)])
def test_bytes_are_those_of_the_shards(gpus, shard_size):
    config = make_config(model="OpenSoraT2V_v1_3-2B/122", use_ema=True, shard_size=shard_size)
    footprint, sharding = measure_footprint(config, resolve_dit(config), gpus, None)
    ranks = shard_size or gpus
    with torch.device("meta"):
        shapes = [parameter.shape for parameter in DiT(resolve_dit(config)).parameters()]
    # FSDP2 cuts the first axis into equal parts, rounded up.
    rows = [-(-shape[0] // ranks) * shape[1:].numel() for shape in shapes]
    whole = sum(shape.numel() for shape in shapes)
    assert footprint.weights == footprint.gradients == footprint.average == 4 * sum(rows)
    assert footprint.optimizer == 8 * sum(rows)
    assert sharding.weights == whole and sharding.local_trained == sum(rows)
    assert whole <= ranks * sum(rows) < 1.08 * whole
    assert (footprint.gathered > 0) == (gpus > 1)


def test_the_released_model_in_a_few_seconds():
    size = dict(num_frames=93, max_height=640, max_width=640)
    config = make_config(model="OpenSoraT2V_v1_3-2B/122", use_ema=True, dry_run=[1, 8, 64], **size)
    started = time.perf_counter()
    (alone, eight, many), text = tables(config)
    assert time.perf_counter() - started < 30  # 4 s on an idle core
    assert [float(alone[0][name]) for name in ("weights", "gradients", "optimizer", "EMA")] == [
        10.33, 10.33, 20.65, 10.33,
    ]  # fmt: skip
    assert eight[0]["weights"] == "1.29" and many[0]["weights"] == "0.16" and many[0]["VAE+text"] == "cached"
    for row in (alone[0], eight[0], many[0]):
        names = ("weights", "gradients", "optimizer", "EMA", "gathered", "activations")
        assert float(row["total"]) == pytest.approx(sum(float(row[name]) for name in names), abs=0.04)
        assert 0.85 < float(row["total"]) / 79.1 < 1.0 and 1.0 < float(row["s/step"]) < 4.0
    throughput = [float(rows[0]["tokens/s"].replace(",", "")) for rows in (alone, eight, many)]
    assert throughput[1] > 8 * throughput[0] > throughput[0] == pytest.approx(38400 / float(alone[0]["s/step"]), 0.01)
    assert "1 GPU; activations: " in text and "64 GPUs; activations: " in text and "is no GPU here" in text


def test_flags_and_buckets():
    buckets = {Bucket(17, 64, 64): 3, Bucket(1, 64, 64): 9, Bucket(9, 32, 64): 5}
    config = make_config(
        dry_run=[2], tokens_per_batch=160, group_data=True, use_ema=True, offload_ema=True, use_8bit_adam=True
    )
    ((video, short, image),), _ = tables(config, buckets)
    assert [row["clips"] for row in (video, short, image)] == ["2", "6", "10"]
    assert [row["bucket"] for row in (video, short, image)] == ["17x64x64", "9x32x64", "1x64x64"]
    assert video["EMA"] == "0.00"
    # Without groups all meet in one batch, of the largest size.
    config = make_config(dry_run=[1], train_batch_size=3, gradient_checkpointing=True)
    ((row,),), text = tables(config, {Bucket(1, 96, 64): 3, Bucket(9, 32, 64): 9})
    assert (row["bucket"], row["clips"]) == ("9x96x64", "3") and "5 blocks keep nothing" in text
    bytes_of = {}
    for name in ("plain", "use_8bit_adam", "offload_optimizer"):
        config = make_config(**({} if name == "plain" else {name: True}))
        bytes_of[name] = measure_footprint(config, resolve_dit(config), 1, None)[0].optimizer
    assert bytes_of["offload_optimizer"] == 0 and bytes_of["plain"] / 4.1 < bytes_of["use_8bit_adam"]
    assert bytes_of["use_8bit_adam"] < bytes_of["plain"] / 3.8
    config = make_config(lora_rank=4)
    adapters, _ = measure_footprint(config, resolve_dit(config), 2, None)
    assert 10 * adapters.gradients < adapters.weights and adapters.optimizer == 2 * adapters.gradients


def test_gpus_that_share_clips():
    size = dict(model="OpenSoraT2V_v1_3-2B/122", num_frames=29, max_height=256, max_width=256, group_data=True)
    shared = dict(sp_size=2, train_sp_batch_size=2, gradient_checkpointing=True, dry_run=[2, 3], **size)
    buckets = {Bucket(29, 256, 256): 3, Bucket(1, 256, 256): 9}
    ((one, image_of_one),), _ = tables(make_config(dry_run=[2], gradient_checkpointing=True, **size), buckets)
    ((two, image),), text = tables(make_config(**shared), buckets)
    assert image == image_of_one and (two["clips"], one["clips"]) == ("2", "1")
    # Half of two clips on each is as much as one clip on each, but for their texts and what they send.
    for name, tolerance in (("activations", 0.2), ("s/step", 0.15), ("tokens/s", 0.15), ("weights", 0)):
        found, expected = (float(row[name].replace(",", "")) for row in (two, one))
        assert found == pytest.approx(expected, rel=tolerance), name
    assert "2 GPUs hold skip sets" in text and "3 GPUs: --sp_size 2 does not divide the 3 GPUs" in text


def test_what_cannot_be_ends_in_a_sentence(monkeypatch):
    with pytest.raises(UserError, match="give --max_height, --max_width and --num_frames"):
        dry_run(make_config(max_height=None, max_width=None, max_hxw=4096), None, print)
    with pytest.raises(UserError, match="--activation_memory 0.0 MiB is too little"):
        dry_run(make_config(activation_memory=1000), None, print)
    found, text = tables(make_config(dry_run=[2, 8], shard_size=4))
    assert len(found) == 1 and "2 GPUs: --shard_size 4 does not divide the 2 GPUs" in text
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(module, "this_machine", lambda: Machine("a GPU", 20 << 20, None))
    ((row,),), text = tables(make_config(dry_run=[], latent_cache=None, vae_memory=GIB))
    assert row["s/step"] == row["MFU"] == "-" and row["VAE+text"] != "cached" and "4 GPUs; " in text
    assert "does not fit into 20.0 MiB" in text and "rates are not known" in text


def test_the_text_encoder_is_counted_by_its_config(tmp_path):
    from transformers import MT5Config, MT5EncoderModel, T5Config, T5EncoderModel

    sizes = dict(vocab_size=50, d_model=16, d_kv=4, d_ff=24, num_layers=3, num_heads=2)
    for number, (config_class, model_class, gated) in enumerate(
        [(T5Config, T5EncoderModel, "relu"), (MT5Config, MT5EncoderModel, "gated-gelu")]
    ):
        config = config_class(feed_forward_proj=gated, **sizes)
        config.save_pretrained(tmp_path / str(number))
        with torch.device("meta"):
            model = model_class(config)
        vocabulary = sizes["vocab_size"] * sizes["d_model"]  # stays in CPU memory
        expected = sum(p.numel() for p in model.parameters()) - vocabulary
        assert text_encoder_numbers(str(tmp_path / str(number)), None) == expected
    assert text_encoder_numbers(None, None) == 4_630_714_368  # of google/mt5-xxl
