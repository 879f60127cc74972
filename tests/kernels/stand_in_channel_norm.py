"""How often the kernels of channel_norm are compiled over calls that differ in sizes alone; see `stand_in.py`."""

import torch
from osp_fast.kernels import channel_norm_launch as launch
from stand_in import report, stand_in

stand_in(launch)
for batch, frames, rows, columns in ((1, 3, 16, 16), (2, 1, 5, 7), (3, 2, 1, 1), (1, 1, 1, 1), (16, 1, 8, 9)):
    x = torch.zeros(batch, frames, rows, columns, 128, dtype=torch.bfloat16).movedim(-1, 1)
    weight, bias = torch.zeros(2, 128, dtype=torch.bfloat16)
    out = launch.channel_norm_forward(x, weight, bias, 1e-6, True)
    launch.channel_norm_backward(out, x, weight, bias, 1e-6, True)
    # Frames of a longer clip: samples are not evenly spaced, which is a number like another.
    longer = torch.zeros(batch, frames + 2, rows, columns, 128, dtype=torch.bfloat16).movedim(-1, 1)[:, :, 1:-1]
    launch.channel_norm_forward(longer, weight, bias, 1e-6, True)
report()
