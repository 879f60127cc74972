"""The wavelet codec as a WF-VAE."""

import torch
import torch.nn.functional as F

from osp_fast.assets.codec import wavelet_codec


def smooth_videos(count: int, seed: int) -> list[torch.Tensor]:
    """Coarse random colours, enlarged: what the lowest wavelet level can hold."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 3, 4, 4, generator=generator) * 2 - 1
    videos = F.interpolate(coarse, (9, 32, 32), mode="trilinear")
    return list(videos)


def test_reconstruction_and_unit_variance():
    videos = smooth_videos(32, seed=0)
    vae = wavelet_codec(videos)
    held_out = torch.stack(smooth_videos(8, seed=1))
    with torch.no_grad():
        posterior = vae.encode(held_out)
        latents = vae.normalize(posterior.mean)
        video = vae.decode(vae.denormalize(latents))
    psnr = 10 * torch.log10(4 / F.mse_loss(video, held_out))
    assert psnr > 20, psnr  # colours that are independent noise are the hardest case
    assert abs(latents.std() - 1) < 0.1 and abs(latents.mean()) < 0.1
    deviations = latents.std(dim=(0, 2, 3, 4))
    assert deviations[:3].min() > deviations[-2:].max() > 0.1  # strong components first, faint ones not lost
    assert posterior.logvar.max() < -15


def test_latents_are_linear_in_the_picture():
    """Norm and SiLU cancel: the network computes the projection itself."""
    videos = smooth_videos(32, seed=0)
    vae = wavelet_codec(videos)
    a, b = torch.stack(videos[:2])[:, None]
    with torch.no_grad():
        mixed = vae.encode(0.3 * a + 0.7 * b).mean
        expected = 0.3 * vae.encode(a).mean + 0.7 * vae.encode(b).mean
    assert (mixed - expected).abs().max() < 1e-3 * expected.abs().max()


def test_the_fit_is_repeatable():
    first, again = (wavelet_codec(smooth_videos(16, seed=2)).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
