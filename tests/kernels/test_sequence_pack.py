"""The packing for an all-to-all: layouts, every rank's calls against float64, attention across simulated ranks."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from osp_fast.kernels.rope3d import make_rope3d, rope3d_ref
from osp_fast.kernels.sequence_pack import (
    SequenceLayout,
    output_pieces,
    pack_output,
    received_qkv,
    sequence_pack,
    sequence_pack_ref,
    sequence_pack_rounds,
    sequence_pack_triton,
    unpack_output,
)
from osp_fast.kernels.sequence_pack_spec import SPEC
from osp_fast.kernels.skiparse_attention import skiparse_attention_ref
from osp_fast.kernels.skiparse_attention_launch import fits_descriptor


def relative(found, expected):
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))


def exchange(buffers, splits):
    """What each rank receives: an all-to-all in one process; splits are each rank's (sent, received)."""
    pieces = [buffer.split(sent) for buffer, (sent, _) in zip(buffers, splits, strict=True)]
    received = []
    for rank, (_, expected) in enumerate(splits):
        arrived = [sent[rank] for sent in pieces]
        assert [x.numel() for x in arrived] == expected
        received.append(torch.cat(arrived))
    return received


def layouts(ranks, tokens, heads, head_dim, batch):
    return [SequenceLayout(ranks, rank, tokens, heads, head_dim, batch) for rank in range(ranks)]


@given(
    ranks=st.integers(1, 8),
    periods=st.integers(0, 40),
    heads=st.integers(1, 12),
    grain=st.sampled_from((1, 4, 12)),
    sets=st.integers(1, 4),
)
def test_shares_are_balanced_and_complete(ranks, periods, heads, grain, sets):
    sets = sets if grain % sets == 0 else 1
    every = [x._replace(grain=grain, sets=sets) for x in layouts(ranks, periods * grain, heads, 6, 2)]
    for total, of_one, shares, firsts in (
        (periods * grain, grain, [x.tokens_of(x.rank) for x in every], [x.first_token() for x in every]),
        (sets * heads, 1, [x.units_of(x.rank) for x in every], [x.first_unit() for x in every]),
    ):
        assert sum(shares) == total and shares == sorted(shares, reverse=True) and shares[0] - shares[-1] <= of_one
        assert firsts == [sum(shares[:rank]) for rank in range(ranks)]
        assert all(share % of_one == 0 for share in shares)
    dealt = [
        (index, unit) for x in every for index, units in x.unit_sets() for unit in range(x.units_of(x.rank))[units]
    ]
    assert [index for index, _ in dealt] == sorted(list(range(sets)) * heads)
    assert [unit for _, unit in dealt] == [unit for x in every for unit in range(x.units_of(x.rank))]
    for splits in ([x.qkv_splits() for x in every], [x.output_splits() for x in every]):
        for sender in range(ranks):
            assert [splits[receiver][1][sender] for receiver in range(ranks)] == splits[sender][0]


def test_the_picture_in_the_docstring():
    """7 tokens, 5 heads, 3 ranks: each number says which of q, k, v, which token and which head it is of."""
    every = layouts(3, 7, 5, 2, 1)
    names = [[[f"{part}{t}{h}" for h in range(5)] for part in "qkv"] for t in range(7)]
    numbers = torch.arange(7 * 3 * 5.0).view(1, 7, 3, 5, 1).expand(-1, -1, -1, -1, 2)
    flat = [name for token in names for part in token for name in part]
    shards = [numbers[:, x.first_token() :][:, : x.tokens_of(x.rank)] for x in every]
    sent = [sequence_pack_triton(qkv, x) for qkv, x in zip(shards, every, strict=True)]
    read = [[flat[int(i)] for i in buffer[::2]] for buffer in sent]
    assert read[1][:12] == ["q30", "q31", "k30", "k31", "v30", "v31", "q40", "q41", "k40", "k41", "v40", "v41"]
    assert read[1][24:] == ["q34", "k34", "v34", "q44", "k44", "v44"]
    arrived = [flat[int(i)] for i in exchange(sent, [x.qkv_splits() for x in every])[0][::2]]
    assert arrived == [f"{part}{t}{h}" for t in range(7) for part in "qkv" for h in (0, 1)]


CALLS = dict(
    ranks=st.integers(1, 8),
    place=st.floats(0, 0.99),
    size=st.sampled_from([(1, 1, 1), (1, 5, 7), (3, 2, 5), (2, 3, 3)]),
    heads=st.integers(1, 7),
    head_dim=st.sampled_from([6, 18, 24, 96]),
    batch=st.integers(1, 3),
    rope=st.booleans(),
    norm=st.booleans(),
    dtype=st.sampled_from((torch.float32, torch.float16)),
    strided=st.booleans(),
    sets=st.sampled_from([(1, 1), (2, 1), (2, 3), (3, 2)]),
)


@given(**CALLS)
@settings(max_examples=25)
@example(3, 0.5, (1, 5, 7), 5, 96, 2, True, True, torch.float32, False, (3, 2))
@example(5, 0.9, (3, 2, 5), 3, 24, 1, True, False, torch.float32, True, (1, 1))  # ranks without a head
def test_kernels_against_float64(ranks, place, size, heads, head_dim, batch, rope, norm, dtype, strided, sets):
    generator = torch.Generator().manual_seed(0)
    tokens, grain = size[0] * size[1] * size[2], sets[0] * sets[1]
    padded = -(-tokens // grain) * grain
    layout = SequenceLayout(ranks, int(place * ranks), padded, heads, head_dim, batch, grain, *sets)
    angles = make_rope3d(size, head_dim, (1.0, 2.0, 0.5)) if rope else None
    own = layout.tokens_of(layout.rank)
    if rope and grain > 1:
        angles = angles._replace(positions=torch.randint(tokens, (own,), generator=generator, dtype=torch.int32))
    qkv = torch.randn(own, batch, 3, heads + 1, head_dim, generator=generator).to(dtype).transpose(0, 1)[:, :, :, 1:]
    qkv = (qkv if strided else qkv.contiguous()).requires_grad_()
    norms = [(1 + 0.3 * torch.randn(head_dim, generator=generator)).requires_grad_() for _ in range(2 * norm)]
    qkv64, *norms64 = (x.detach().double().requires_grad_() for x in (qkv, *norms))
    found = sequence_pack_triton(qkv, layout, angles, *norms)
    expected = sequence_pack_ref(qkv64, layout, angles, *norms64)
    forward, backward = SPEC.tolerances[dtype]
    assert found.shape == (sum(layout.qkv_splits()[0]),) and found.dtype == dtype
    assert relative(found, expected) <= forward
    grad = torch.randn(2 * found.numel(), generator=generator).to(dtype)[::2]
    grad = grad if strided else grad.contiguous()
    gradients = torch.autograd.grad(found, [qkv, *norms], grad)
    expected = torch.autograd.grad(expected, [qkv64, *norms64], grad.double())
    assert all(relative(a, b) <= backward for a, b in zip(gradients, expected, strict=True))
    if not rope and not norm:
        assert torch.equal(found, sequence_pack_ref(qkv, layout))  # copied, not computed


@pytest.mark.parametrize("path", ["triton", "reference"])
@pytest.mark.parametrize(
    "ranks, size, heads, batch, norm",
    [(1, (2, 3, 3), 3, 2, True), (2, (2, 3, 3), 4, 1, True), (3, (1, 7, 1), 5, 2, True), (4, (1, 4, 5), 6, 1, False),
     (8, (3, 2, 5), 5, 2, False), (8, (1, 1, 3), 8, 1, True)],
)  # fmt: skip
def test_attention_of_all_ranks_equals_attention_of_one(ranks, size, heads, batch, norm, path, monkeypatch):
    """Pack, exchange, attend, pack, exchange, unpack: outputs and gradients against float64 on the whole."""
    monkeypatch.setenv("OSP_FAST_KERNELS", path)
    torch.manual_seed(0)
    tokens, head_dim = size[0] * size[1] * size[2], 12
    rope = make_rope3d(size, head_dim)
    qkv = torch.randn(batch, tokens, 3, heads, head_dim, requires_grad=True)
    norms = [torch.rand(head_dim).add(0.5).requires_grad_() for _ in range(2 * norm)]
    every = layouts(ranks, tokens, heads, head_dim, batch)
    shards = [qkv[:, x.first_token() :][:, : x.tokens_of(x.rank)] for x in every]
    sent = [sequence_pack(shard, x, rope, *norms) for shard, x in zip(shards, every, strict=True)]
    outs = []
    for buffer, layout in zip(exchange(sent, [x.qkv_splits() for x in every]), every, strict=True):
        q, k, v = received_qkv(buffer, layout)
        assert q.shape == (batch, tokens, layout.units_of(layout.rank), head_dim)
        assert q.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
        outs.append(pack_output(skiparse_attention_ref(q, k, v, "single", 2), layout))
    back = exchange(outs, [x.output_splits() for x in every])
    out = torch.cat([unpack_output(buffer, x) for buffer, x in zip(back, every, strict=True)], 1)
    whole, *norms64 = (x.detach().double().requires_grad_() for x in (qkv, *norms))
    expected = skiparse_attention_ref(*rope3d_ref(whole, rope, *norms64), "single", 2)
    assert relative(out, expected) < 1e-6
    grad = torch.randn(out.shape)
    gradients = torch.autograd.grad(out, [qkv, *norms], grad)
    expected = torch.autograd.grad(expected, [whole, *norms64], grad.double())
    assert all(relative(a, b) < 1e-5 for a, b in zip(gradients, expected, strict=True))


@pytest.mark.parametrize("path", ["triton", "reference"])
@pytest.mark.parametrize(
    "ranks, k, heads, batch, mode",
    [(3, 2, 3, 2, "single"), (4, 2, 3, 1, "group"), (4, 3, 2, 2, "group"), (5, 3, 5, 1, "single"),
     (7, 2, 3, 1, "group")],
)  # fmt: skip
def test_units_of_sets_and_heads(ranks, k, heads, batch, mode, path, monkeypatch):
    """Ranks that hold a part of the sets' heads each attend fully in them: together that is skiparse attention."""
    monkeypatch.setenv("OSP_FAST_KERNELS", path)
    torch.manual_seed(0)
    tokens, head_dim, run = 5 * k * k, 12, 1 if mode == "single" else k
    rope = make_rope3d((1, 5, k * k), head_dim)
    mask = torch.rand(batch, tokens) < 0.8
    in_set = torch.arange(tokens).unflatten(0, (-1, k, run)).transpose(0, 1).flatten(1)
    qkv = torch.randn(batch, tokens, 3, heads, head_dim, requires_grad=True)
    every = [x._replace(grain=k * k, sets=k, run=run) for x in layouts(ranks, tokens, heads, head_dim, batch)]
    shards = [qkv[:, x.first_token() :][:, : x.tokens_of(x.rank)] for x in every]
    sent = [sequence_pack(shard, x, rope) for shard, x in zip(shards, every, strict=True)]
    outs = []
    for buffer, layout in zip(exchange(sent, [x.qkv_splits() for x in every]), every, strict=True):
        q, k_, v = received_qkv(buffer, layout)
        assert q.shape == (batch, tokens // k, layout.units_of(layout.rank), head_dim)
        attended = [q[:, :, :0]]
        for index, units in layout.unit_sets():
            parts = (x[:, :, units] for x in (q, k_, v))
            attended.append(skiparse_attention_ref(*parts, "full", key_mask=mask[:, in_set[index]]))
        outs.append(pack_output(torch.cat(attended, 2), layout))
    back = exchange(outs, [x.output_splits() for x in every])
    out = torch.cat([unpack_output(buffer, x) for buffer, x in zip(back, every, strict=True)], 1)
    whole = qkv.detach().double().requires_grad_()
    expected = skiparse_attention_ref(*rope3d_ref(whole, rope), mode, k, key_mask=mask)
    assert relative(out, expected) < 1e-6
    grad = torch.randn(out.shape)
    found = torch.autograd.grad(out, qkv, grad)[0]
    assert relative(found, torch.autograd.grad(expected, whole, grad.double())[0]) < 1e-5


@pytest.mark.parametrize("path", ["triton", "reference"])
@pytest.mark.parametrize("heads, anywhere", [((4, 3), False), ((1, 2, 2), True), ((5,), False)])
def test_rounds_are_the_heads_one_after_the_other(heads, anywhere, path, monkeypatch):
    monkeypatch.setenv("OSP_FAST_KERNELS", path)
    torch.manual_seed(0)
    every, rope = [SequenceLayout(3, 1, 7, part, 12, 2) for part in heads], make_rope3d((1, 7, 1), 12)
    rope = rope._replace(positions=torch.tensor([5, 0], dtype=torch.int32)) if anywhere else rope
    qkv = torch.randn(2, 2, 3, sum(heads), 12, requires_grad=True)
    found = sequence_pack_rounds(qkv, every, rope)
    whole = qkv.detach().double().requires_grad_()
    expected = [sequence_pack_ref(x, y, rope) for x, y in zip(whole.split(heads, 3), every, strict=True)]
    assert all(relative(a, b) < 1e-6 for a, b in zip(found, expected, strict=True))
    grads = [torch.randn(x.shape) for x in found]
    found = torch.autograd.grad(found, qkv, grads)[0]
    assert relative(found, torch.autograd.grad(expected, whole, [x.double() for x in grads])[0]) < 1e-6


def test_projection_sums_over_pieces():
    layout = SequenceLayout(3, 1, 7, 5, 12, 2)
    buffer, weight, bias = torch.randn(2 * 2 * 60), torch.randn(60, 60), torch.randn(60)
    pieces = output_pieces(buffer, layout)
    assert [tuple(x.shape) for x in pieces] == [(2, 2, 24), (2, 2, 24), (2, 2, 12)]
    columns = weight.split([x.shape[2] for x in pieces], 1)
    found = sum(piece @ part.T for piece, part in zip(pieces, columns, strict=True)) + bias
    expected = F.linear(unpack_output(buffer, layout).flatten(2), weight, bias)
    assert torch.allclose(found.transpose(0, 1), expected, atol=1e-5)


def test_what_costs_no_copy(monkeypatch):
    monkeypatch.setenv("OSP_FAST_KERNELS", "triton")
    buffer = torch.randn(7 * 3 * 2 * 16)
    for x in received_qkv(buffer, SequenceLayout(3, 0, 7, 5, 16)):
        assert fits_descriptor(x)  # attention reads it in place
    out = torch.randn(1, 7, 2, 16)
    assert pack_output(out, SequenceLayout(3, 0, 7, 5, 16)).data_ptr() == out.data_ptr()
    by_token = torch.randn(7, 2, 2, 16)
    assert pack_output(by_token.transpose(0, 1), SequenceLayout(3, 0, 7, 5, 16, 2)).data_ptr() == by_token.data_ptr()
    by_sample = torch.randn(2, 7, 2, 16)
    packed = pack_output(by_sample, SequenceLayout(3, 0, 7, 5, 16, 2))
    assert torch.equal(packed.view(7, 2, 2, 16), by_sample.transpose(0, 1))


def test_what_does_not_fit_is_refused(monkeypatch):
    layout, ones = SequenceLayout(3, 1, 7, 5, 12, 2), torch.ones(12)
    qkv, rope = torch.zeros(2, 2, 3, 5, 12), make_rope3d((1, 7, 1), 12)
    cases = (
        (sequence_pack, (qkv[:, :1], layout), "as the layout says"),
        (sequence_pack, (qkv[:, :, :2], layout), "must be \\(B, N, 3, H, D\\)"),
        (sequence_pack, (qkv[..., :11], layout._replace(head_dim=11)), "must be even"),
        (sequence_pack, (qkv, layout, rope._replace(start=3)), "2 tokens from 6 on"),
        (sequence_pack, (qkv, layout, None, ones), "go together"),
        (received_qkv, (torch.zeros(5), layout), "must be flat"),
        (sequence_pack, (qkv, layout, rope._replace(positions=torch.zeros(3).int())), "one for each of 2 tokens"),
        (sequence_pack, (qkv, layout._replace(sets=2)), "7 tokens must be a multiple of the grain 1"),
        (sequence_pack_rounds, (qkv, []), "one or more"),
        (sequence_pack_rounds, (qkv, [layout, layout]), "as the layout says"),
        (sequence_pack_rounds, (qkv, [layout, layout._replace(rank=0)]), "alike but for their heads"),
        (sequence_pack_rounds, (qkv, [layout._replace(grain=2, sets=2)] * 2), "there must be one"),
        (received_qkv, (torch.zeros(5), layout._replace(grain=4)), "multiple of the grain 4"),
        (pack_output, (torch.zeros(2, 7, 1, 12), layout), "as the layout says"),
        (unpack_output, (torch.zeros(2, 2, 5, 12), layout), "must be flat"),
        (output_pieces, (torch.zeros(7), layout), "must be flat"),
    )
    for path in ("triton", "reference"):
        monkeypatch.setenv("OSP_FAST_KERNELS", path)
        for function, arguments, words in cases:
            with pytest.raises(ValueError, match=words):
                function(*arguments)
    with pytest.raises(ValueError, match="not float64"):
        sequence_pack_triton(qkv.double(), layout)
