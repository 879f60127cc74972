"""How often the packing is compiled over calls that differ in rank, lengths and batch alone; see `stand_in.py`."""

import torch
from osp_fast.kernels import rope3d_launch, sequence_pack_launch
from osp_fast.kernels.rope3d import make_rope3d
from osp_fast.kernels.sequence_pack import SequenceLayout
from osp_fast.kernels.sequence_pack_ops import NO_ROPE
from stand_in import report, stand_in

stand_in(sequence_pack_launch, rope3d_launch)
rope, weight = make_rope3d((4, 16, 16), 96), torch.ones(96)
for batch, tokens, rank in ((1, 1024, 0), (2, 3, 1), (3, 1001, 2), (1, 37, 1)):
    layout = SequenceLayout(3, rank, tokens, 5, 96, batch)
    sizes = (batch, layout.tokens_of(rank), 5, 96)
    q, k, v = torch.zeros(*sizes[:2], 3, *sizes[2:], dtype=torch.bfloat16).unbind(2)
    for norms in ((None, None), (weight, weight)):
        place = rope._replace(start=layout.first_token())
        buffer = sequence_pack_launch.pack(q, k, v, *place, *norms, 1e-6, 3, 1, 1)
        saved = (q, k) if norms[0] is not None else (None, None)
        sequence_pack_launch.pack_backward(buffer, sizes, *place, *saved, *norms, 1e-6, 3, 1, 1)
    sequence_pack_launch.pack(q, k, v, *NO_ROPE, None, None, 1e-6, 1, 1, 1)  # a gradient of `received_qkv`
    buffer = sequence_pack_launch.pack(None, None, v, *NO_ROPE, None, None, 1e-6, 3, 1, 1)
    sequence_pack_launch.unpack(buffer, sizes, 3, 1, 1)
report()
