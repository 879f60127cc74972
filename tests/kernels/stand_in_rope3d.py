"""How often 3D RoPE is compiled over calls that differ in clip, place, lengths and batch alone; see `stand_in.py`."""

import torch
from osp_fast.kernels import rope3d_launch
from osp_fast.kernels.rope3d import make_rope3d
from stand_in import report, stand_in

stand_in(rope3d_launch)
CALLS = ((1, (1, 1, 1), 0, 1), (2, (3, 5, 7), 0, 105), (1, (3, 5, 7), 17, 37), (3, (2, 16, 16), 1, 511))
for batch, size, start, tokens in CALLS:
    q, k, v = torch.zeros(batch, tokens, 3, 2, 96, dtype=torch.bfloat16).unbind(2)
    axes = make_rope3d(size, 96).axes
    weight = torch.ones(96)
    places = torch.zeros(tokens, dtype=torch.int32)
    for positions, norms in ((None, (None, None)), (None, (weight, weight)), (places, (None, None))):
        place = (axes, size, start, positions)
        rope3d_launch.rope3d_forward(q, k, q, k, *place, *norms, 1e-6)
        saved = (q, k) if norms[0] is not None else (None, None)
        rope3d_launch.rope3d_backward(q, k, v, *place, *saved, *norms, 1e-6)
report()
