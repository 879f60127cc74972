"""What runs around an exchange: a profile of operations on the Triton path, on tensors without contents."""

import pytest
import torch
from osp_fast.kernels.launch import forced_path
from osp_fast.kernels.rope3d import make_rope3d
from osp_fast.kernels.skiparse_attention import skiparse_attention_triton
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from osp_fast.models.attention import SelfAttention, VisibleKeys
from osp_fast.models.attention_backends import AttentionBackend
from osp_fast.parallel.links import Link
from osp_fast.parallel.sequence import SequenceExchange
from osp_fast.parallel.sequence_plan import SequencePlan

HEADS, HEAD_DIM, SIZE = 24, 96, (8, 16, 16)
# Operations that only look at memory in another way, or take memory.
VIEWS = {"view", "_unsafe_view", "transpose", "unbind", "select", "narrow", "slice", "split", "split_with_sizes"}
VIEWS |= {"expand", "detach", "unsqueeze", "t", "alias", "empty", "new_empty", "as_strided", "device", "wait_tensor"}


class Profile(TorchDispatchMode):
    """The operations that touch memory, by name."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name not in VIEWS:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def profile(plan: SequencePlan, mode: str, monkeypatch) -> tuple[list[str], list[str]]:
    """Of a layer's forward and backward on the first rank."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    tokens = SIZE[0] * SIZE[1] * SIZE[2]
    with FakeTensorMode(), forced_path("triton"):
        with torch.device("cpu"):
            layer = SelfAttention(HEADS * HEAD_DIM, HEADS, mode, 4)
        layer.backend = AttentionBackend("triton", skiparse_attention_triton, lambda mode, sparse_n: "")
        layer.exchange = SequenceExchange(plan, 0, 4, *[Link("")] * 3)
        kind = layer.exchange.kinds([mode])[0]
        clip = layer.exchange.clip(tokens, HEADS, torch.device("cpu"))
        rope, visible = clip.place(kind, mode, make_rope3d(SIZE, HEAD_DIM), VisibleKeys(), 1)
        x = torch.empty(1, tokens // plan.ranks, HEADS * HEAD_DIM, requires_grad=True)
        with Profile() as forward:
            y = layer(x, rope, visible)
        gradient = torch.empty_like(y)
        with Profile() as backward:
            y.backward(gradient)
    return forward.names, backward.names


LINEAR_BACKWARD = ["mm", "mm", "sum"]
PROJECTION_BACKWARD = ["piece_projection_buffer_gradient", "piece_projection_weight_gradient"]


@pytest.mark.parametrize("plan", [SequencePlan(4), SequencePlan(8), SequencePlan(8, 4)], ids=SequencePlan.describe)
@pytest.mark.parametrize("mode", ["full", "single", "group"])
def test_nothing_is_copied_around_ulysses(plan, mode, monkeypatch):
    """Packing, exchange, attention, exchange, projection, in two rounds: no transpose, cat or copy between them.

    The one cat is of the two rounds' gradients of the projection's weight, which are no tokens.
    """
    forward, backward = profile(plan, mode, monkeypatch)
    exchange = "all_to_all_single"
    attended = ["skiparse_attention", exchange]
    assert forward == ["addmm", *["sequence_pack"] * 2, *[exchange] * 2, *attended * 2, *["piece_projection"] * 2]
    attended = ["skiparse_attention_backward", "sequence_pack_parts", exchange]
    assert backward == [
        *PROJECTION_BACKWARD,
        exchange,  # on its way while the other round's gradients are computed
        *PROJECTION_BACKWARD,
        "sum",
        exchange,
        "cat",
        *attended * 2,
        "sequence_pack_rounds_backward",
        *LINEAR_BACKWARD,
    ]


@pytest.mark.parametrize("mode", ["single", "group"])
def test_ranks_that_hold_skip_sets_send_nothing_in_attention(mode, monkeypatch):
    forward, backward = profile(SequencePlan(4, 4), mode, monkeypatch)
    assert forward == ["addmm", "rope3d_", "skiparse_attention", "addmm"]
    assert backward == [*LINEAR_BACKWARD, "skiparse_attention_backward", "rope3d_backward", *LINEAR_BACKWARD]
