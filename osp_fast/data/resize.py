"""From decoded frames to a bucket's pixels: resize, centre-crop."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from osp_fast.data.buckets import Bucket
from osp_fast.data.geometry import Geometry, centre_offset

SLICE_BYTES = 64 << 20  # of float32 frames that are resized at once


def resize_and_crop(frames: np.ndarray, geometry: Geometry, bucket: Bucket) -> Tensor:
    """Frames (T, h, w, 3) uint8 of `geometry.source` -> (3, T, H, W) uint8 of the bucket's size.

    Bilinear with antialias and align_corners in float32, rounded to the nearest integer (spec: training); then the
    centre is cropped. The result shares no memory with `frames`.
    """
    count, height, width, _ = frames.shape
    size = geometry.resize_h, geometry.resize_w
    top, left = centre_offset(size[0], bucket.height), centre_offset(size[1], bucket.width)
    pixels = torch.empty((3, count, bucket.height, bucket.width), dtype=torch.uint8)
    step = max(1, SLICE_BYTES // (max(height * width, size[0] * size[1]) * 3 * 4))
    for first in range(0, count, step):
        part = torch.from_numpy(frames[first : first + step]).permute(0, 3, 1, 2)
        if (height, width) != size:
            part = F.interpolate(part.float(), size, mode="bilinear", antialias=True, align_corners=True).round_()
        cropped = part[..., top : top + bucket.height, left : left + bucket.width]
        pixels[:, first : first + step] = cropped.transpose(0, 1)
    return pixels
