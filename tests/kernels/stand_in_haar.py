"""How often the Haar kernels are compiled over calls that differ in frames and batch alone; see `stand_in.py`."""

import torch
from osp_fast.kernels import haar_launch
from stand_in import report, stand_in

stand_in(haar_launch)
half = torch.bfloat16
for batch, frames in ((1, 9), (2, 1), (2, 5), (3, 93), (16, 1)):
    pixels = torch.zeros(batch, 3, frames, 32, 64, dtype=torch.uint8)
    bands, low = haar_launch.analyse(pixels, "repeat", half, 0.5, 0.0, True, True)
    haar_launch.synthesise(bands, low, "zero", half, 0.5, 0.0)
report()
