"""How often the convolution is compiled over calls that differ in frames, sizes and batch; see `stand_in.py`."""

import torch
from osp_fast.kernels import causal_conv3d, causal_conv3d_launch
from stand_in import report, stand_in

stand_in(causal_conv3d, causal_conv3d_launch)
weight = torch.zeros(128, 64, 3, 3, 3, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last_3d)
bias = torch.zeros(128, dtype=torch.bfloat16)
for batch, frames, height, width in ((1, 1, 200, 200), (2, 3, 150, 167), (1, 17, 97, 130), (3, 2, 131, 240)):
    x = torch.zeros(batch, frames, height, width, 64, dtype=torch.bfloat16).movedim(-1, 1)
    for version in ("descriptor", "pointer"):
        causal_conv3d.causal_conv3d_triton(x, weight, bias, version=version)
        causal_conv3d.causal_conv3d_triton(x, weight, bias, cache=causal_conv3d.next_cache(x, None, 3), version=version)
report()
