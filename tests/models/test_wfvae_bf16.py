"""bfloat16 beside float32 on clips of moving shapes: what rounding does to a reconstruction."""

import math
from pathlib import Path

import pytest
import torch

from osp_fast.assets.shapes import Scene
from osp_fast.config import EMBEDDED_MODEL
from osp_fast.models.wfvae import WFVAE

GOLDEN = Path(__file__).parents[1] / "golden/vae"


def psnr(found: torch.Tensor, expected: torch.Tensor) -> float:
    """dB against the range [-1, 1]."""
    return -10 * math.log10(((found - expected).double() / 2).square().mean())


@pytest.fixture(scope="module")
def clips() -> list[torch.Tensor]:
    """uint8 (1, 3, 17, 64, 64)."""
    return [torch.from_numpy(Scene.draw(n, 0).frames(17, 64)).permute(3, 0, 1, 2)[None] for n in range(6)]


def between(vae: WFVAE, clip: torch.Tensor, folder: Path) -> float:
    """PSNR between the reconstructions by a VAE in float32 and by the same one in bfloat16."""
    half = WFVAE.from_pretrained(folder, torch.bfloat16).requires_grad_(False)
    expected = vae.decode(vae.encode(clip).mean)
    return psnr(half.decode(half.encode(clip).mean, dtype=torch.float32), expected)


def test_a_vae_that_knows_the_pictures_loses_nothing_that_is_seen(clips):
    """The VAE of `--preset tiny`, which was trained on such pictures."""
    folder = EMBEDDED_MODEL / "vae"
    vae = WFVAE.from_pretrained(folder).requires_grad_(False)
    found = [between(vae, clip, folder) for clip in clips]
    print(f"between float32 and bfloat16: {', '.join(f'{one:.1f}' for one in found)} dB")
    assert min(found) >= 50


def test_random_weights_lose_more(clips):
    """Eight channels of random weights in every layer, no pictures: rounding the weights alone leaves 53 to 57 dB."""
    vae = WFVAE.from_pretrained(GOLDEN).requires_grad_(False)
    found = [between(vae, clip, GOLDEN) for clip in clips[:3]]
    print(f"between float32 and bfloat16: {', '.join(f'{one:.1f}' for one in found)} dB")
    assert min(found) >= 44


def test_chunks_and_tiles_in_bfloat16_change_rounding_only(clips):
    vae = WFVAE.from_pretrained(GOLDEN, torch.bfloat16).requires_grad_(False)
    latents = vae.encode(clips[0]).mean
    whole, tiled = vae.decode(latents), vae.decode(latents, tiles=(2, 4, 3))
    assert whole.dtype == torch.bfloat16 and psnr(tiled, whole) > 44
