"""How much two videos differ: PSNR, and SSIM (Wang et al., "Image quality assessment", 2004), summed frame by frame."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW, SIGMA = 11, 1.5  # pixels; of SSIM's Gaussian window
C1, C2 = 0.01**2, 0.03**2  # SSIM's constants for values in [0, 1]


class Quality:
    """Means over all frames given so far. PSNR is of the mean squared error of all values, in dB against their range.

    SSIM is the mean over frames, colours and window positions inside the frame (a smaller window for frames that are
    smaller than it).
    """

    def __init__(self) -> None:
        self.frames = 0
        self._squared = self._ssim = 0.0

    def add(self, found: Tensor, expected: Tensor) -> None:
        """Frames (t, 3, H, W) with values in [0, 1], both alike."""
        found, expected = found.float(), expected.float()
        self._squared += (found - expected).square().mean((1, 2, 3)).double().sum().item()
        self._ssim += _ssim(found, expected).mean((1, 2, 3)).double().sum().item()
        self.frames += len(found)

    @property
    def psnr(self) -> float:
        """dB; infinite for equal videos."""
        error = self._squared / self.frames
        return -10 * math.log10(error) if error else math.inf

    @property
    def ssim(self) -> float:
        """At most 1, which equal videos have."""
        return self._ssim / self.frames


def _ssim(x: Tensor, y: Tensor) -> Tensor:
    """The similarity at each position of the window."""

    def blurred(values: Tensor) -> Tensor:
        for dim in (2, 3):
            size = min(WINDOW, values.shape[dim] - 1 + values.shape[dim] % 2)
            places = torch.arange(size, dtype=values.dtype, device=values.device) - size // 2
            kernel = torch.exp(-(places**2) / (2 * SIGMA**2))
            kernel = (kernel / kernel.sum()).view((1, 1, -1, 1) if dim == 2 else (1, 1, 1, -1))
            values = F.conv2d(values, kernel.expand(values.shape[1], -1, -1, -1), groups=values.shape[1])
        return values

    mean_x, mean_y = blurred(x), blurred(y)
    variances = blurred(x * x) - mean_x**2 + blurred(y * y) - mean_y**2
    covariance = blurred(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + C1) / (mean_x**2 + mean_y**2 + C1)
    return luminance * (2 * covariance + C2) / (variances + C2)
