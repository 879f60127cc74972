"""Tiles in time and space change rounding only, with halos no wider than the layers need."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from osp_fast.models.wfvae import WFVAE, WFVAE_CONFIGS, WFVAEConfig
from osp_fast.models.wfvae_layers import ChunkState
from osp_fast.models.wfvae_stream import Plan, decoder_windows, encoder_windows

GOLDEN = Path(__file__).parents[1] / "golden/vae"
SMALL = WFVAEConfig(
    latent_dim=2,
    base_channels=8,
    encoder_num_resblocks=1,
    encoder_energy_flow_hidden_size=4,
    decoder_num_resblocks=1,
    decoder_energy_flow_hidden_size=4,
    scale=(1.0,) * 2,
    shift=(0.0,) * 2,
)


def random_vae(config: WFVAEConfig, dtype: torch.dtype = torch.float32) -> WFVAE:
    torch.manual_seed(0)
    return WFVAE(config).to(dtype).requires_grad_(False)


@pytest.fixture(scope="module")
def golden() -> WFVAE:
    return WFVAE.from_pretrained(GOLDEN).requires_grad_(False)


SMALL_VAE = random_vae(SMALL)
SIZES = st.tuples(st.integers(0, 4), st.integers(1, 20), st.integers(1, 5))  # 4n+1 frames, cells
PLANS = st.builds(
    Plan,
    chunk=st.one_of(st.none(), st.integers(1, 4)),
    tile=st.tuples(st.integers(2, 12), st.integers(1, 5)),
    tiles_outside=st.booleans(),
)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def check(vae: WFVAE, size: tuple[int, int, int], plan: Plan) -> None:
    frames, rows, columns = size
    generator = torch.Generator().manual_seed(sum(size))
    video = torch.rand((1, 3, 4 * frames + 1, 8 * rows, 8 * columns), generator=generator) * 2 - 1
    whole, tiled = vae.encode(video), vae.encode(video, tiles=plan)
    assert relative(tiled.mean, whole.mean) <= 1e-5 and relative(tiled.logvar, whole.logvar) <= 1e-5
    latents = torch.randn(whole.mean.shape, generator=generator)
    assert relative(vae.decode(latents, tiles=plan), vae.decode(latents)) <= 1e-5


@settings(max_examples=30)
@given(SIZES, PLANS)
def test_tiled_equals_untiled(size, plan):
    check(SMALL_VAE, size, plan)


@settings(max_examples=6)
@given(SIZES, PLANS)
def test_golden_tiled_equals_untiled(golden, size, plan):
    check(golden, size, plan)


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_halos_are_exactly_what_the_layers_need(part):
    """A change in the first and in the last row of what `needs` says changes the cell, one just beyond does not."""
    network = getattr(random_vae(SMALL, torch.float64), part)
    stage, needs = (network.early, network.early_needs) if part == "encoder" else (network.late, network.late_needs)
    into, out_of = (8, 1) if part == "encoder" else (1, 8)
    width = 3 if part == "encoder" else network.mid[-1].conv2.conv.out_channels
    base, change = torch.randn(1, width, 1, 40 * into, into).double(), torch.randn(1, width, 1, into).double()
    cell = slice(20 * out_of, 21 * out_of)
    first, end = needs((cell.start, cell.stop))

    def result(row: int | None) -> torch.Tensor:
        x, state = base.clone(), ChunkState()
        if row is not None:
            x[:, :, :, row] += change
        state.last = True
        return stage(x, state)[:, :, :, cell]

    whole = result(None)
    assert [torch.equal(result(row), whole) for row in (first - 1, first, end - 1, end)] == [True, False, False, True]


def test_windows_cover_an_axis_once():
    vae = random_vae(SMALL)
    for cells, tile in ((1, 1), (7, 3), (30, 7), (5, 100)):
        for found in (encoder_windows(vae.encoder, cells, tile), decoder_windows(vae.decoder, cells, tile)):
            assert [cell for window in found for cell in range(*window.own)] == list(range(cells))
            assert all(0 <= w.padded[0] <= w.own[0] and w.own[1] <= w.padded[1] <= cells for w in found)
            assert max(w.own[1] - w.own[0] for w in found) <= tile


def test_pieces_of_any_length():
    vae = random_vae(WFVAE_CONFIGS["tiny"])
    generator = torch.Generator().manual_seed(0)
    video = torch.rand((2, 3, 21, 16, 24), generator=generator) * 2 - 1
    plan = Plan(chunk=2, tile=(1, 2))
    moments = torch.cat(list(vae.encode_stream(iter(video.split([2, 7, 1, 11], dim=2)), plan)), dim=2)
    assert relative(moments[:, :8], vae.encode(video).mean) < 1e-5
    latents = moments[:, :8]
    pieces = list(vae.decode_stream(iter(latents.split([1, 4, 1], dim=2)), plan))
    assert [piece.shape[2] for piece in pieces] == [3, 8, 10]
    assert relative(torch.cat(pieces, dim=2), vae.decode(latents)) < 1e-5


def test_frames_come_before_all_is_read():
    vae = random_vae(WFVAE_CONFIGS["tiny"])
    read = []

    def frames():
        for number in range(21):
            read.append(number)
            yield torch.zeros(1, 3, 1, 8, 8)

    stream = vae.encode_stream(frames(), Plan(chunk=1))
    assert next(stream).shape[2] == 1 and len(read) == 2
    assert next(stream).shape[2] == 1 and len(read) == 6
    with pytest.raises(ValueError, match="4n\\+1"):
        list(vae.encode_stream(iter(torch.zeros(1, 3, 8, 8, 8).split(1, dim=2)), Plan(chunk=1)))


def test_gradients_through_chunks_and_tiles():
    vae = random_vae(SMALL, torch.float64)
    latents = torch.randn(1, 2, 3, 4, 3, dtype=torch.float64).requires_grad_()
    found, expected = (
        torch.autograd.grad(vae.decode(latents, tiles).square().sum(), latents)[0] for tiles in ((2, 2, 2), None)
    )
    torch.testing.assert_close(found, expected)
