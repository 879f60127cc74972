"""What a decode copies, and how long it takes beside stock PyTorch operations."""

import statistics
import time

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from bench.suites.stock_vae import StockDecoder
from osp_fast.models.wfvae import WFVAE, WFVAE_CONFIGS
from osp_fast.models.wfvae_stream import Plan

COPIES = (
    "aten::copy_",
    "aten::cat",
    "aten::constant_pad_nd",
    "aten::replication_pad3d",
    "aten::index_put_",
    "aten::roll",
)


@pytest.fixture(scope="module")
def vae() -> WFVAE:
    torch.manual_seed(0)
    return WFVAE(WFVAE_CONFIGS["tiny"]).requires_grad_(False)


def copies(run) -> list[tuple[int, str]]:
    """(values moved, operation < its callers) of everything that copies, pads or joins; from the profiler."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as trace:
        run()
    found = []
    for event in trace.events():
        if event.name in COPIES:
            callers, caller = [], event
            while caller is not None:
                callers.append(caller.name.removeprefix("aten::"))
                caller = caller.cpu_parent
            shape = tuple(event.input_shapes[0] if event.input_shapes else ())
            found.append((shape, " < ".join(callers)))
    return found


def is_mathematics(vae: WFVAE, shape: tuple[int, ...], where: str) -> bool:
    """Copies that neither carry nor pad: interleaved wavelets, biases and repacked weights of PyTorch's products."""
    weights = {tuple(p[:, :, 0].shape if p.dim() == 5 else p.shape) for p in vae.parameters()}
    return (
        "cat < stack" in where
        or ("_to_copy" in where and shape == ())
        or "addmm" in where
        or "_slow_conv2d_forward" in where
        or ("_convolution" in where and shape in weights)
    )


@pytest.mark.parametrize("chunk", [None, 2])
def test_nothing_is_copied_for_cache_and_padding(vae, chunk):
    latents = torch.randn(1, 8, 6, 16, 16).contiguous(memory_format=torch.channels_last_3d)
    pieces = []

    def run() -> None:
        pieces.extend(vae.decode_stream((latents,), Plan(chunk)))

    with torch.no_grad():
        found = [(shape, where) for shape, where in copies(run) if not is_mathematics(vae, shape, where)]
    # On a CPU, LayerNorm makes the channels dense that leave for the wavelets: those of up2 and of connect_l1 and l2.
    split = [shape for shape, where in found if where.endswith("native_layer_norm < layer_norm")]
    widths = {vae.decoder.flow, vae.decoder.mid[0].conv2.conv.out_channels}
    assert {shape[-1] for shape in split} <= widths and len(split) == 4 * len(pieces)
    assert len(found) == len(split), found


def test_the_count_sees_a_cache_that_is_joined(vae):
    latents = torch.randn(1, 8, 3, 16, 16)
    found = copies(lambda: StockDecoder(vae, channels_last=False)(latents))
    assert sum("replication_pad3d" in where for _, where in found) > 15


@pytest.mark.parametrize("channels_last", [False, True])
def test_stock_operations_agree(vae, channels_last):
    latents = torch.randn(1, 8, 3, 8, 10)
    expected = StockDecoder(vae, channels_last)(latents)
    torch.testing.assert_close(vae.decode(latents), expected, rtol=1e-4, atol=1e-4)


def test_decode_is_no_slower_than_stock_operations(vae):
    """In turns, so that a busy machine slows all of them."""
    latents = torch.randn(1, 8, 5, 12, 12)
    rivals = [vae.decode, StockDecoder(vae, channels_last=False), StockDecoder(vae, channels_last=True)]
    seconds: list[list[float]] = [[] for _ in rivals]
    with torch.no_grad():
        for round_number in range(6):
            for times, decode in zip(seconds, rivals, strict=True):
                start = time.perf_counter()
                decode(latents)
                if round_number:
                    times.append(time.perf_counter() - start)
    ours, *stock = (statistics.median(times) for times in seconds)
    print(f"decode {1e3 * ours:.1f} ms, stock {', '.join(f'{1e3 * one:.1f}' for one in stock)} ms")
    assert ours <= min(stock)
