"""Skiparse attention as an operation: tracing, compilation, checkpointing, which version serves, what is refused."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from osp_fast.kernels import skiparse_attention as op
from osp_fast.kernels.skiparse_attention import (
    serving_version,
    skiparse_attention,
    skiparse_attention_ref,
    skiparse_attention_triton,
)
from osp_fast.kernels.skiparse_attention_launch import attention_forward, choose_version, fits_descriptor
from osp_fast.kernels.skiparse_attention_spec import make_inputs
from osp_fast.kernels.skiparse_sets import split_head_dim
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode


def test_flop_counter_sees_both_directions():
    inputs = make_inputs(device="cpu", dtype=torch.float32, seed=0, batch=1, tokens=32, heads=2, head_dim=32,
                         mode="single", sparse_n=4)  # fmt: skip
    with FlopCounterMode(display=False) as counter:
        skiparse_attention_triton(**inputs).sum().backward()
    assert counter.get_total_flops() == 3.5 * 4 * 2 * 32 * 32 * 8


@pytest.mark.parametrize("mode", op.MODES)
@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(mode, masked):
    q, k, v = torch.randn(1, 21, 3, 1, 16).unbind(2)
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    mask = torch.rand(1, 21) < 0.6 if masked else None
    lengths = torch.tensor([17], dtype=torch.int32) if masked else None
    sparse_n = 1 if mode == "full" else 4
    arguments = (q, k, v, mask, lengths, mode, sparse_n, True, "pointer")
    torch.library.opcheck(torch.ops.osp_fast.skiparse_attention.default, arguments)
    q, k, v = (x.detach() for x in (q, k, v))
    out, lse = torch.ops.osp_fast.skiparse_attention(q, k, v, mask, lengths, mode, sparse_n, True, "pointer")
    arguments = (torch.randn_like(out), q, k, v, out, lse, mask, lengths, mode, sparse_n, True, "pointer")
    torch.library.opcheck(torch.ops.osp_fast.skiparse_attention_backward.default, arguments)


@pytest.mark.parametrize("mode", op.MODES)
def test_compiles_without_breaks_and_once_for_all_lengths(mode, monkeypatch):
    monkeypatch.setenv("OSP_FAST_KERNELS", "triton")
    compiles = []

    def backend(graph, _):
        compiles.append(graph)
        return graph

    def attend(qkv):
        q, k, v = qkv.unbind(2)
        return skiparse_attention(q, k, v, mode, 4) * 2

    torch._dynamo.reset()
    compiled = torch.compile(attend, backend=backend, fullgraph=True, dynamic=True)
    for tokens in (32, 37, 48, 64, 33):
        qkv = torch.randn(2, tokens, 3, 2, 16, requires_grad=True)
        found = compiled(qkv)
        expected = attend(qkv)
        assert torch.equal(found, expected)
        assert torch.autograd.grad(found.sum(), qkv)[0].shape == qkv.shape
    assert len(compiles) == 1


def test_a_new_length_compiles_no_kernel(tmp_path):
    script = Path(__file__).parent / "stand_in_skiparse_attention.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    result = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == {
        "skiparse_attention_fwd_kernel": 1,
        "skiparse_attention_bwd_rows_kernel": 1,
        "skiparse_attention_bwd_keys_kernel": 2,  # fused and deterministic
        "skiparse_attention_bwd_queries_kernel": 1,
    }


def test_compiles_with_aot_autograd(monkeypatch):
    monkeypatch.setenv("OSP_FAST_KERNELS", "triton")
    torch._dynamo.reset()
    q, k, v = (torch.randn(1, 40, 2, 32, requires_grad=True) for _ in range(3))
    compiled = torch.compile(
        lambda q, k, v: skiparse_attention(q, k, v, "group", 4, deterministic=True), backend="aot_eager", fullgraph=True
    )
    found = torch.autograd.grad(compiled(q, k, v).square().sum(), (q, k, v))
    expected = torch.autograd.grad(skiparse_attention_ref(q, k, v, "group", 4).square().sum(), (q, k, v))
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_checkpointing_that_saves_the_output_attends_once(monkeypatch):
    calls = []
    monkeypatch.setattr(op, "attention_forward", lambda *a: calls.append(1) or attention_forward(*a))

    def policy(ctx, function, *args, **kwargs):
        saved = function == torch.ops.osp_fast.skiparse_attention.default
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

    def block(x):
        q, k, v = (x * 2).sin().unbind(2)
        return skiparse_attention_triton(q, k, v, "single", 4).cos()

    x = torch.randn(1, 21, 3, 1, 16, requires_grad=True)
    expected = torch.autograd.grad(block(x).sum(), x)[0]
    calls.clear()
    context = functools.partial(create_selective_checkpoint_contexts, policy)
    out = checkpoint(block, x, use_reentrant=False, context_fn=context)
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], expected) and len(calls) == 1
    calls.clear()
    torch.autograd.grad(checkpoint(block, x, use_reentrant=False).sum(), x)
    assert len(calls) == 2


def test_group_skip_of_a_small_case_by_hand():
    """k = 2, eight tokens: group skip has the sets {0, 1, 4, 5} and {2, 3, 6, 7}."""
    q = k = torch.zeros(1, 8, 1, 6)
    v = torch.arange(8.0).view(1, 8, 1, 1).expand(1, 8, 1, 6)
    for function in (skiparse_attention, skiparse_attention_triton):
        out = function(q, k, v.contiguous(), "group", sparse_n=2)[0, :, 0, 0]
        assert torch.allclose(out, torch.tensor([2.5, 2.5, 4.5, 4.5, 2.5, 2.5, 4.5, 4.5]))
        out = function(q, k, v.contiguous(), "single", sparse_n=2)[0, :, 0, 0]
        assert torch.allclose(out, torch.tensor([3.0, 4.0] * 4))


def test_nothing_to_attend_to():
    q, k = torch.randn(2, 5, 1, 16, requires_grad=True), torch.randn(2, 0, 1, 16, requires_grad=True)
    out = skiparse_attention_triton(q, k, k)
    assert out.shape == q.shape and not out.any()
    assert not torch.autograd.grad(out.sum(), q)[0].any()
    assert skiparse_attention_triton(q[:, :0], k, k).shape == (2, 0, 1, 16)


def test_head_dimension_is_split_without_padding_where_it_can_be():
    assert [split_head_dim(d) for d in (24, 32, 48, 64, 96, 128)] == [
        (16, 16), (32, 0), (32, 16), (64, 0), (64, 32), (128, 0)]  # fmt: skip


def test_which_version_serves():
    half = torch.bfloat16
    assert choose_version(90, half, 96, "single", 4) == choose_version(100, half, 96, "group", 4) == "descriptor"
    for case in (
        (80, half, 96, "single", 4),  # no TMA
        (120, half, 96, "single", 4),  # a multiprocessor has too little shared memory for these blocks
        (90, torch.float32, 96, "single", 4),
        (90, half, 24, "single", 4),  # not a sum of two powers of two of at least 16
        (90, half, 96, "group", 3),  # a box has powers of two of rows
    ):
        assert choose_version(*case) == "pointer"
    assert serving_version(torch.device("cpu"), torch.float16, 96, "group", 4) == "pointer, interpreted"
    x = torch.zeros(2, 8, 3, 2, 32)
    assert fits_descriptor(x[:, :, 0]) and not fits_descriptor(x[:, :, 0].transpose(1, 2))
    assert not fits_descriptor(torch.zeros(2 * 8 * 2 * 32 + 1)[1:].view(2, 8, 2, 32))


def test_what_does_not_fit_is_refused():
    x = torch.zeros(1, 8, 2, 12)
    for arguments, words in (
        ((x, x, x, "diagonal"), "diagonal"),
        ((x, x, x, "single", 0), "sparse_n"),
        ((x, x[:, :4], x, "full"), "shapes"),
        ((x, x[:, :4], x[:, :4], "single"), "as many keys"),
        ((x, x.double(), x.double()), "one dtype"),
        ((x, x, x, "full", 4, torch.ones(1, 3)), "key_mask"),
        ((x, x, x, "full", 4, None, torch.ones(2, dtype=torch.int32)), "key_lengths"),
        ((x, x, x, "full", 4, None, torch.ones(1)), "int32"),
        ((x, x, x, "full", 4, torch.ones(1, 8, device="meta")), "must be on cpu"),
    ):
        for function in (skiparse_attention, skiparse_attention_triton):
            with pytest.raises(ValueError, match=words):
                function(*arguments)
    wide = torch.zeros(1, 8, 1, 136)
    refused = (wide, "up to 128"), (x.double(), "not float64"), (x.bfloat16(), "interpreter multiplies no bfloat16")
    for arguments, words in (((tensor,) * 3, words) for tensor, words in refused):
        with pytest.raises(ValueError, match=words):
            skiparse_attention_triton(*arguments)
    for version, words in (
        ("descriptor", "cannot be read through descriptors"),
        ("warp_specialized", "needs a Hopper GPU"),
        ("fast", "'fast' is unknown"),
    ):
        with pytest.raises(ValueError, match=words):
            skiparse_attention_triton(x, x, x, version=version)


def test_needs_a_gpu_or_the_interpreter(monkeypatch):
    monkeypatch.setattr("osp_fast.kernels.launch.interpreting", lambda: False)
    x = torch.zeros(1, 8, 1, 16)
    with pytest.raises(ValueError, match="needs an NVIDIA GPU"):
        skiparse_attention_triton(x, x, x)
    with pytest.raises(ValueError, match="needs an NVIDIA GPU"):
        serving_version(torch.device("cpu"), torch.float32, 96, "full", 1)
