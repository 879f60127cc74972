"""PSNR and SSIM against their definitions."""

import math

import numpy as np
import pytest
import torch

from osp_fast.data.quality import Quality


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def quality(found: torch.Tensor, expected: torch.Tensor) -> Quality:
    both = Quality()
    both.add(found, expected)
    return both


def test_equal_videos():
    x = noise(0, 2, 3, 16, 24)
    assert quality(x, x).psnr == math.inf and quality(x, x).ssim == pytest.approx(1)


def test_psnr_is_of_the_mean_error_of_all_frames():
    x, y, total = noise(0, 5, 3, 16, 24), noise(1, 5, 3, 16, 24), Quality()
    total.add(x[:2], y[:2])
    total.add(x[2:], y[2:])
    assert total.frames == 5
    assert total.psnr == pytest.approx(-10 * math.log10((x - y).double().square().mean()), abs=1e-5)
    assert total.ssim == pytest.approx(quality(x, y).ssim, abs=1e-6)


def test_ssim_of_one_window():
    x, y = (noise(seed, 1, 1, 11, 11) for seed in (0, 1))
    line = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    weights = np.outer(line, line) / line.sum() ** 2
    a, b = x[0, 0].double().numpy(), y[0, 0].double().numpy()
    mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
    variance_a, variance_b = (weights * (a - mean_a) ** 2).sum(), (weights * (b - mean_b) ** 2).sum()
    covariance = (weights * (a - mean_a) * (b - mean_b)).sum()
    expected = (2 * mean_a * mean_b + 1e-4) / (mean_a**2 + mean_b**2 + 1e-4)
    expected *= (2 * covariance + 9e-4) / (variance_a + variance_b + 9e-4)
    assert quality(x, y).ssim == pytest.approx(expected, abs=1e-5)


def test_small_frames_have_a_small_window():
    x, y = (noise(seed, 1, 3, 8, 8) for seed in (0, 1))
    assert -1 < quality(x, y).ssim < 0.5
