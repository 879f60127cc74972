"""The attention backends of the DiT against dense attention in float64, their gathering, and which one serves what."""

import sys
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from osp_fast.kernels.rope3d import make_rope3d
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from osp_fast.errors import UserError
from osp_fast.models import attention_backends
from osp_fast.models.attention import VisibleKeys, block_ranges
from osp_fast.models.attention_backends import (
    FlashAttention,
    resolve_attention,
    sdpa_attention,
    select_attention,
    skiparse_attention_ref,
    skiparse_attention_triton,
)
from osp_fast.models.dit import DIT_CONFIGS, DiT, DiTConfig
from osp_fast.models.gather import merge_sets, split_sets

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
MODES = ("full", "single", "group")
MASKS = (None, "holes", "lengths", "both", "empty")
SMALL = DiTConfig(
    num_layers=5, num_attention_heads=2, attention_head_dim=24, caption_channels=10, cross_attention_dim=48, sparse_n=2
)


def by_definition(q, k, v, mode, sparse_n, key_mask=None, key_lengths=None):
    """Dense attention with the mask "same set and visible"; a row that sees nothing is zero."""
    place = torch.arange(k.shape[1])
    number = {"full": 0 * place, "single": place % sparse_n, "group": place // sparse_n % sparse_n}[mode]
    visible = torch.ones(len(q), q.shape[1], k.shape[1], dtype=torch.bool)
    if mode != "full":
        visible &= number[:, None] == number
    if key_mask is not None:
        visible &= key_mask[:, None]
    if key_lengths is not None:
        visible &= place < key_lengths[:, None, None]
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / q.shape[-1] ** 0.5
    weights = torch.exp(scores - scores.amax(-1, keepdim=True)) * visible[:, None]
    weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-300)
    return torch.einsum("bhnm,bmhd->bnhd", weights, v)


class Poison(torch.autograd.Function):
    """The identity, whose gradient is NaN from row `used` on: there, flash-attn leaves what its memory held."""

    @staticmethod
    def forward(context, x, used):
        context.used = used
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        gradient = gradient.clone()
        gradient[context.used :] = float("nan")
        return gradient, None


def dense_stand_in(q, k, v, deterministic):
    """What flash_attn_func computes: (B, L, H, D)."""
    weights = (torch.einsum("blhd,bmhd->bhlm", q, k) / q.shape[-1] ** 0.5).softmax(-1)
    return torch.einsum("bhlm,bmhd->blhd", weights, v)


def varlen_stand_in(q, k, v, bounds_q, bounds_k, longest_q, longest_k, deterministic):
    """What flash_attn_varlen_func computes: packed sequences (rows, H, D), each between two bounds."""
    assert bounds_q.dtype == bounds_k.dtype == torch.int32 and bounds_q[-1] == len(q)
    k, v = (Poison.apply(x, bounds_k[-1]) for x in (k, v))
    outs = []
    for i in range(len(bounds_q) - 1):
        (q_rows,), (k_rows, v_rows) = (
            [x[bounds[i] : bounds[i + 1]][None] for x in tensors]
            for tensors, bounds in (((q,), bounds_q), ((k, v), bounds_k))
        )
        assert q_rows.shape[1] <= longest_q and 1 <= k_rows.shape[1] <= longest_k
        outs.append(dense_stand_in(q_rows, k_rows, v_rows, deterministic)[0])
    return torch.cat(outs)


FLASH = FlashAttention(dense_stand_in, varlen_stand_in, "stand-in")
BACKENDS = {"sdpa": sdpa_attention, "flash": FLASH, "reference": skiparse_attention_ref}


def draw(tokens, keys, heads, dim, mask, seed, dtype=torch.float64, batch=2):
    """q, k, v as slices of one product, which is how the layers have them, a mask, lengths, and an output gradient."""
    generator = torch.Generator().manual_seed(seed)

    def normal(length, parts):
        return torch.randn(batch, length, parts, heads, dim, generator=generator, dtype=dtype)

    (q,), (k, v) = normal(tokens, 1).unbind(2), normal(keys, 2).unbind(2)
    key_mask = key_lengths = None
    if mask in ("holes", "both"):
        key_mask = torch.rand(batch, keys, generator=generator) < 0.6
    if mask in ("lengths", "both"):
        key_lengths = torch.randint(0, keys + 1, (batch,), generator=generator, dtype=torch.int32)
    if mask == "empty":
        key_mask = torch.zeros(batch, keys, dtype=torch.bool)
    return (q, k, v), key_mask, key_lengths, normal(tokens, 1)[:, :, 0]


def results(function, tensors, mode, sparse_n, key_mask, key_lengths, gradient):
    """The output and the gradients of q, k, v."""
    tensors = [x.detach().requires_grad_() for x in tensors]
    out = function(*tensors, mode, sparse_n, key_mask, key_lengths)
    return out, *torch.autograd.grad(out, tensors, gradient)


@pytest.mark.parametrize("name", ["sdpa", "flash", "reference"])
@settings(max_examples=80)
@given(
    tokens=st.integers(1, 67),
    keys=st.none() | st.integers(1, 20),
    heads=st.integers(1, 3),
    sparse_n=st.sampled_from([1, 2, 3, 4, 6]),
    mode=st.sampled_from(MODES),
    mask=st.sampled_from(MASKS),
    seed=st.integers(0, 2**31),
)
def test_backends_agree_with_float64(name, tokens, keys, heads, sparse_n, mode, mask, seed):
    mode = mode if keys is None else "full"
    tensors, *masks, gradient = draw(tokens, keys or tokens, heads, 8, mask, seed)
    expected = results(by_definition, tensors, mode, sparse_n, *masks, gradient)
    found = results(BACKENDS[name], tensors, mode, sparse_n, *masks, gradient)
    for ours, right in zip(found, expected, strict=True):
        assert ours.shape == right.shape and torch.allclose(ours, right, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mode, mask", [("full", "both"), ("single", None), ("group", "lengths"), ("group", "empty")])
def test_triton_agrees_with_float64(mode, mask):
    tensors, *masks, gradient = draw(37, 37, 2, 24, mask, 0)
    expected = results(by_definition, tensors, mode, 3, *masks, gradient)
    tensors, gradient = [x.float() for x in tensors], gradient.float()
    found = results(skiparse_attention_triton, tensors, mode, 3, *masks, gradient)
    for ours, right in zip(found, expected, strict=True):
        assert (ours - right).norm() <= 1e-5 * right.norm()


@given(
    tokens=st.integers(1, 80),
    sparse_n=st.integers(1, 7),
    mode=st.sampled_from(MODES),
    seed=st.integers(0, 2**31),
)
def test_sets_hold_their_tokens_and_come_back(tokens, sparse_n, mode, seed):
    x = torch.arange(tokens)[None, :, None].expand(2, tokens, 3)
    parts = split_sets(x, mode, sparse_n)
    assert len(parts) <= (1 if mode == "full" else 2 if mode == "single" else 3)
    seen = []
    for part in parts:
        for members in part[0, :, :, 0].T.tolist():
            number = {"full": 0, "single": members[0] % sparse_n, "group": members[0] // sparse_n % sparse_n}[mode]
            place = torch.arange(tokens)
            place = {"full": 0 * place, "single": place % sparse_n, "group": place // sparse_n % sparse_n}[mode]
            assert sorted(members) == (place == number).nonzero()[:, 0].tolist()
            seen += members
    assert sorted(seen) == list(range(tokens))
    assert torch.equal(merge_sets(parts, mode, sparse_n, tokens), x)


class Calls(TorchDispatchMode):
    """The names of the attention operators that were called, and whether each had a mask."""

    def __init__(self):
        super().__init__()
        self.attention = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, kwargs = str(function), kwargs or {}
        assert "softmax" not in name, "attention fell apart into unfused products"
        if "attention" in name and "backward" not in name:
            assert not torch.backends.cuda.math_sdp_enabled(), "PyTorch might choose its unfused fallback"
            self.attention.append((name, kwargs.get("attn_mask") is not None))
        return function(*args, **kwargs)


@pytest.mark.parametrize(
    "mode, tokens, mask, calls",
    [
        ("full", 7, None, 1),
        ("single", 12, None, 1),
        ("single", 14, None, 2),  # two sets of four tokens, two of three
        ("group", 32, None, 1),
        ("group", 38, None, 3),  # a set of twelve tokens, one of ten, two of eight
        ("group", 38, "both", 3),
    ],
)
def test_sdpa_runs_fused_kernels_and_masks_only_what_is_masked(mode, tokens, mask, calls):
    tensors, *masks, _ = draw(tokens, tokens, 2, 8, mask, 0, torch.float32)
    with Calls() as seen:
        sdpa_attention(*tensors, mode, 4, *masks)
    assert seen.attention == [("aten._scaled_dot_product_flash_attention_for_cpu.default", mask is not None)] * calls
    assert torch.backends.cuda.math_sdp_enabled(), "the choice ends with the call"


def test_single_skip_of_even_length_is_gathered_without_a_copy():
    x = torch.randn(2, 12, 3, 8)
    (part,) = split_sets(x, "single", 4)
    assert part.flatten(2, 3).data_ptr() == x.data_ptr()
    assert merge_sets([part], "single", 4, 12).data_ptr() == x.data_ptr()


@pytest.mark.parametrize("deterministic", [False, True])
def test_flash_is_called_as_its_package_wants(deterministic):
    calls = []

    def record(*args, deterministic):
        calls.append((args, deterministic))
        return args[0]

    flash = FlashAttention(record, record, "stand-in")
    tensors, *_ = draw(6, 6, 2, 8, None, 0)
    masks = (torch.tensor([[1, 1, 1, 0, 1, 1], [1, 1, 1, 1, 1, 1]]).bool(), torch.tensor([6, 3], dtype=torch.int32))
    torch.use_deterministic_algorithms(deterministic)
    try:
        flash(*tensors, "single", 2)
        flash(*tensors, "single", 2, *masks)
    finally:
        torch.use_deterministic_algorithms(False)
    (dense, first), (varlen, second) = calls
    assert first is second is deterministic
    assert [x.shape for x in dense] == [(2, 3, 4, 8)] * 3  # two sets of three tokens as further heads
    q, k, v, bounds_q, bounds_k, longest_q, longest_k = varlen
    assert bounds_q.tolist() == [0, 3, 6, 9, 12] and longest_q == longest_k == 3
    assert bounds_k.tolist() == [0, 3, 5, 7, 8]
    visible = [(0, 0), (0, 2), (0, 4), (0, 1), (0, 5), (1, 0), (1, 2), (1, 1)]
    for packed, x in ((k, tensors[1]), (v, tensors[2])):
        assert torch.equal(packed[:8], torch.stack([x[place] for place in visible])) and not packed[8:].any()
    assert torch.equal(q, tensors[0].unflatten(1, (3, 2)).transpose(1, 2).flatten(0, 2))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", ["sdpa", "flash", "reference"])
def test_nothing_waits_for_the_device(name, mask):
    """Fake tensors have no values: what needs one on the CPU fails."""
    tensors, *masks, _ = draw(38, 38, 2, 8, mask, 0, torch.float32)
    flash = FlashAttention(lambda q, *_, deterministic: q.clone(), lambda q, *_, deterministic: q.clone(), "stand-in")
    with FakeTensorMode() as fakes:
        tensors = [fakes.from_tensor(x) for x in tensors]
        masks = [None if mask is None else fakes.from_tensor(mask) for mask in masks]
        for mode in MODES:
            out = ({**BACKENDS, "flash": flash})[name](*tensors, mode, 4, *masks)
            assert out.shape == (2, 38, 2, 8)


def test_lengths_end_behind_the_last_real_token():
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0]])
    found = VisibleKeys.from_mask(mask)
    assert found.lengths.tolist() == [2, 4, 0] and found.lengths.dtype == torch.int32
    assert torch.equal(found.mask, mask.bool())
    assert VisibleKeys.from_mask(None) == (None, None)


def test_every_layer_gets_mask_and_lengths():
    calls = []

    def record(q, k, v, mode, sparse_n, key_mask, key_lengths):
        calls.append((mode, sparse_n, k.shape[1], key_mask.dtype, key_lengths.tolist()))
        return q

    dit = DiT.create(SMALL, 0)
    backend = attention_backends.AttentionBackend("record", record, lambda mode, sparse_n: "test")
    for block in dit.transformer_blocks:
        block.self_attention.backend = block.cross_attention.backend = backend
    latent_mask = torch.ones(2, 1, 4, 4)
    latent_mask[0, :, 2:] = 0
    text_mask = torch.tensor([[1, 0, 0], [1, 0, 1]])
    dit(torch.randn(2, 8, 1, 4, 4), torch.tensor([1, 2]), torch.randn(2, 3, 10), text_mask, latent_mask)
    modes = ["full", "full", "single", "group", "single"]
    cross = ("full", 1, 3, torch.bool, [1, 3])
    assert calls == [call for mode in modes for call in ((mode, 2, 4, torch.bool, [2, 4]), cross)]


def test_a_masked_forward_does_not_wait_for_the_device():
    with FakeTensorMode():
        dit = DiT(SMALL)
        dit.use_attention("sdpa")
        out = dit(
            torch.randn(2, 8, 1, 4, 4), torch.ones(2), torch.randn(2, 3, 10), torch.ones(2, 3), torch.ones(2, 1, 4, 4)
        )
    assert out.shape == (2, 8, 1, 4, 4)


@pytest.mark.parametrize("name", [None, "triton", "sdpa", "reference"])
def test_blocks_compile_as_one_graph(name):
    dit = DiT.create(SMALL, 0)
    if name is not None:
        dit.use_attention(name)
    block = torch.compile(dit.transformer_blocks[3], backend="eager", fullgraph=True)
    arguments = (torch.randn(1, 6, 48), None, torch.randn(1, 6, 48), make_rope3d((1, 2, 3), 24), VisibleKeys())
    text = (torch.randn(1, 3, 48), VisibleKeys.from_mask(torch.tensor([[1, 1, 0]])))
    (found, pending), (expected, other) = (run(*arguments, *text) for run in (block, dit.transformer_blocks[3]))
    assert torch.allclose(found, expected, atol=1e-6)
    assert torch.allclose(pending.y, other.y, atol=1e-6) and torch.allclose(pending.gate, other.gate, atol=1e-6)


def test_which_backend_serves_which_block(monkeypatch):
    def version(device, dtype, head_dim, mode, sparse_n):
        return "pointer" if mode == "group" and sparse_n == 4 else "descriptor"

    with torch.device("meta"):
        tiny, released = DiT(DIT_CONFIGS["tiny"]), DiT(DIT_CONFIGS["OpenSoraT2V_v1_3-2B/122"])
    assert released.use_attention("reference", CPU).attention_summary() == (
        "reference (plain PyTorch) serves self-attention of blocks 0-1, 30-31 (full), 2-28 even (single skip), "
        "3-29 odd (group skip), and cross-attention of all"
    )
    assert tiny.use_attention("sdpa", CPU).attention_summary() == (
        "sdpa (fused PyTorch kernels) serves self-attention of blocks 0-1 (full), 2, 4 (single skip), 3 (group skip), "
        "and cross-attention of all"
    )
    monkeypatch.setattr(attention_backends, "serving_version", version)
    assert tiny.use_attention("auto", CUDA).attention_summary() == (
        "triton (descriptor) serves self-attention of blocks 0-1 (full), 2, 4 (single skip), and cross-attention of "
        "all; triton (pointer) serves self-attention of block 3 (group skip)"
    )
    for block in tiny.transformer_blocks[:2]:
        block.cross_attention.backend = select_attention("sdpa", CPU, torch.float32, 48)
    served = tiny.attention_summary().split("; ")
    assert served[0].endswith("and cross-attention of blocks 2-4")
    assert served[1] == "sdpa (fused PyTorch kernels) serves cross-attention of blocks 0-1"


@pytest.mark.parametrize(
    "indices, words",
    [([0], "0"), ([0, 1], "0-1"), ([2, 4], "2, 4"), ([1, 3, 5], "1-5 odd"), ([0, 1, 3, 5, 6], "0-1, 3, 5-6")],
)
def test_block_ranges(indices, words):
    assert block_ranges(indices) == words


def test_what_auto_means(monkeypatch):
    monkeypatch.delenv("OSP_FAST_KERNELS", raising=False)
    assert resolve_attention("auto", CPU, torch.float32) == "reference"
    assert resolve_attention("auto", CUDA, torch.bfloat16) == "triton"
    monkeypatch.setenv("OSP_FAST_KERNELS", "reference")
    assert resolve_attention("auto", CUDA, torch.bfloat16) == "reference"
    assert resolve_attention("triton", CUDA, torch.bfloat16) == "triton"
    monkeypatch.setenv("OSP_FAST_KERNELS", "cuda")
    with pytest.raises(UserError, match="OSP_FAST_KERNELS='cuda' is unknown"):
        resolve_attention("sdpa", CPU, torch.float32)


@pytest.mark.parametrize(
    "name, device, dtype, words",
    [
        ("triton", CPU, torch.float32, "triton needs an NVIDIA GPU, not the cpu: use --attention reference"),
        ("flash", CPU, torch.bfloat16, "flash needs an NVIDIA GPU, not the cpu: use --attention sdpa"),
        ("flash", CUDA, torch.float32, "not float32: add --mixed_precision bf16 .* or --dtype bf16"),
        ("flash", CUDA, torch.bfloat16, "pip install flash-attn"),
    ],
)
def test_what_cannot_serve_ends_in_one_sentence(monkeypatch, name, device, dtype, words):
    monkeypatch.setattr(attention_backends, "interpreting", lambda: False)
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(UserError, match=words):
        resolve_attention(name, device, dtype)


def test_a_head_dimension_that_triton_does_not_serve():
    with pytest.raises(UserError, match=r"--attention triton: .* not 256; use --attention sdpa"):
        select_attention("triton", CPU, torch.float32, 256)


def test_flash_attn_is_used_where_it_is_installed(monkeypatch):
    package = types.SimpleNamespace(
        flash_attn_func=dense_stand_in, flash_attn_varlen_func=varlen_stand_in, __version__="2.8.3"
    )
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    backend = select_attention("flash", CUDA, torch.bfloat16, 96)
    assert backend.function == FlashAttention(dense_stand_in, varlen_stand_in, "2.8.3")
    assert (backend.name, backend.version("full", 1)) == ("flash", "flash-attn 2.8.3")
