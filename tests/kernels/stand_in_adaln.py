"""How often the kernels of adaln are compiled over calls that differ in lengths and batch alone; see `stand_in.py`."""

import torch
from osp_fast.kernels import adaln, adaln_launch
from stand_in import report, stand_in

stand_in(adaln, adaln_launch)
for batch, tokens in ((1, 2048), (2, 1), (2, 37), (3, 2001), (1, 1), (16, 5)):
    x, y = torch.zeros(2, batch, tokens, 96, dtype=torch.bfloat16)
    shift, scale, gate = torch.zeros(batch, 6, 96, dtype=torch.bfloat16)[:, :3].unbind(1)
    rows = (None,) * 5
    residual, modulated, means, inverses = adaln_launch.adaln_forward(
        x, y, gate, None, shift, scale, *rows[:4], 1e-6, False, x.dtype
    )
    adaln_launch.adaln_backward(
        residual, modulated, residual, y, gate, None, shift, scale, *rows[:4], means, inverses, False
    )
report()
