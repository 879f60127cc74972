"""FLOPs as PyTorch counts them, rates of GPUs by name, and predictions that move the right way."""

from dataclasses import replace

import pytest
import torch
from osp_fast.kernels.launch import forced_path
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from osp_fast.engine.cost import Sharding, Workload, block_flops, link_bytes, outer_flops, step_flops
from osp_fast.engine.devices import A100_80, DEVICES, H100, H200, find_device, peak_flops
from osp_fast.engine.exchange_cost import predict_step
from osp_fast.models.dit import DIT_CONFIGS, DiT

BIG, TINY = DIT_CONFIGS["OpenSoraT2V_v1_3-2B/122"], DIT_CONFIGS["tiny"]
CLIP = Workload(1, (24, 80, 80), 512, weight_dtype=torch.bfloat16)  # 93x640x640
WEIGHTS = 2_772_000_000


def sharding(gpus: int, shard_size: int | None = None, **changed) -> Sharding:
    shard_size = shard_size or gpus
    return Sharding(gpus, shard_size, WEIGHTS, WEIGHTS, WEIGHTS // shard_size, optimizer_bytes=40, **changed)


def test_flops_are_those_that_pytorch_counts():
    workload = Workload(2, (3, 8, 10), 6)
    with FakeTensorMode(), forced_path("triton"):
        dit = DiT(TINY)
        latents, text = torch.empty(2, 8, *workload.latent_size), torch.empty(2, 6, TINY.caption_channels)
        with FlopCounterMode(display=False) as forward:
            prediction = dit(latents, torch.empty(2, dtype=torch.long), text)
        with FlopCounterMode(display=False) as backward:
            prediction.sum().backward()
    flops = step_flops(TINY, workload)
    assert flops.products + flops.attention == forward.get_total_flops()
    assert flops.model == 3 * forward.get_total_flops()
    # Nobody asks for gradients of latents, text and sinusoids.
    unneeded = 2 * workload.clips * TINY.width * (3 * 4 * 5 * 8 * 4 + 6 * TINY.caption_channels + 256)
    assert flops.hardware == forward.get_total_flops() + backward.get_total_flops() + unneeded


@pytest.mark.parametrize(
    "latent, linear, attention, total",
    [((24, 44, 80), 104, 45, 149), ((24, 80, 80), 189, 149, 338), ((24, 90, 160), 424, 757, 1181)],
)
def test_flops_of_the_released_model(latent, linear, attention, total):
    """The published figures, in TFLOP: linear layers with cross-attention, self-attention, both."""
    workload = replace(CLIP, latent_size=latent)
    blocks = [block_flops(BIG, BIG.attention_mode(index), workload) for index in range(32)]
    both = sum(block.self_attention for block in blocks)
    others = sum(block.products + block.cross_attention for block in blocks) + outer_flops(BIG, workload)
    assert both / 1e12 == pytest.approx(attention, rel=0.01)
    assert others / 1e12 == pytest.approx(linear, rel=0.02)
    flops = step_flops(BIG, workload)
    assert (flops.products + flops.attention) / 1e12 == pytest.approx(total, rel=0.015)


def test_adapters_leave_out_gradients_of_weights():
    plain, adapted = (step_flops(BIG, workload) for workload in (CLIP, replace(CLIP, lora_rank=16)))
    assert 1.0 < (adapted.products + adapted.attention) / (plain.products + plain.attention) < 1.02
    assert adapted.model / (adapted.products + adapted.attention) == 2


@pytest.mark.parametrize(
    "name, device",
    [
        ("NVIDIA H100 80GB HBM3", H100),
        ("NVIDIA H200", H200),
        ("NVIDIA A100-SXM4-80GB", A100_80),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_devices_by_name(name, device):
    assert find_device(name) is device
    assert peak_flops(name) == (device.peak_flops if device else None)


def test_rates_are_within_their_datasheets():
    assert H100.matmul_flops == pytest.approx(798e12) and H100.copy_bytes == pytest.approx(3.0e12)
    for device in DEVICES:
        assert device.attention_backward < device.attention_forward < device.matmul_flops < device.peak_flops
        assert device.network_bytes < device.nvlink_bytes < device.copy_bytes


def test_a_step_of_one_gpu():
    alone = predict_step(BIG, CLIP, sharding(1), 0.0, H100)
    flops = step_flops(BIG, CLIP)
    assert alone.communication == 0 and 0.4 < flops.model / alone.total / H100.peak_flops < 0.6
    assert alone.products == pytest.approx(3 * flops.products / 798e12)
    assert alone.update == pytest.approx(40 * WEIGHTS / 3.0e12)
    more = predict_step(BIG, CLIP, sharding(1, accumulation=4), 0.25, H100)
    assert more.recompute == 1.0 and more.products == pytest.approx(4 * alone.products)
    assert more.update == alone.update
    assert predict_step(BIG, CLIP, sharding(1), 0.0, A100_80).total > 2.5 * alone.total


def test_communication_is_exposed_where_computing_is_short():
    image = replace(CLIP, latent_size=(1, 40, 40))
    for workload, exposed in ((CLIP, False), (image, True)):
        seconds = predict_step(BIG, workload, sharding(64), 0.0, H100)
        assert (seconds.communication > 0.1 * seconds.total) == exposed
        assert seconds.communication > 0
    # Copies of the weights add a sum over machines, by one port of each GPU.
    whole, copies = (predict_step(BIG, image, sharding(64, size), 0.0, H100).communication for size in (64, 8))
    assert copies != whole and copies > 0
    assert link_bytes(H100, 8) == H100.nvlink_bytes
    assert link_bytes(H100, 8, stride=8) == H100.network_bytes
    assert link_bytes(H100, 64) == min(H100.nvlink_bytes, 8 * H100.network_bytes)
