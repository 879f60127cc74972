"""How often attention is compiled over calls that differ in lengths and batch alone; see `stand_in.py`."""

import torch
from osp_fast.kernels import skiparse_attention_launch as launch
from stand_in import report, stand_in

stand_in(launch)
for batch, tokens in ((1, 2048), (2, 1), (2, 37), (3, 2001), (1, 2016), (16, 5)):
    q, k, v = torch.zeros(batch, tokens, 3, 2, 96, dtype=torch.bfloat16).unbind(2)
    lengths = torch.zeros(batch + 1, dtype=torch.int32)[1:]  # its start is not on 16 bytes
    arguments = (None, lengths, "group", 4)
    out, lse = launch.attention_forward(q, k, v, *arguments, "auto")
    for deterministic in (False, True):
        launch.attention_backward(out, q, k, v, out, lse, *arguments, deterministic, "auto")
report()
