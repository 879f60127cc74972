"""How often the projection from pieces is compiled over calls that differ in length and batch; see `stand_in.py`."""

import torch
from osp_fast.kernels import piece_projection, piece_projection_launch
from osp_fast.kernels.sequence_pack import SequenceLayout
from stand_in import report, stand_in

stand_in(piece_projection, piece_projection_launch)
weight, bias = torch.zeros(512, 480, dtype=torch.bfloat16), torch.zeros(512, dtype=torch.bfloat16)
for batch, tokens, rank in ((1, 1024, 0), (2, 33, 1), (3, 1001, 2), (1, 37, 1)):
    layout = SequenceLayout(3, rank, tokens, 5, 96, batch)
    own = layout.tokens_of(rank)
    buffer = torch.zeros(batch * own * 480, dtype=torch.bfloat16)
    add = torch.zeros(batch, own, 512, dtype=torch.bfloat16)
    piece_projection.project_pieces_triton(buffer, weight, bias, layout, version="pointer")
    piece_projection.project_pieces_triton(buffer, weight, None, layout, add, version="descriptor")
report()
