"""The projection from pieces as an operation: tracing, compilation, FLOPs, bytes, the bench's ways to compute it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from osp_fast.kernels.piece_projection import project_pieces, project_pieces_ref, project_pieces_triton
from osp_fast.kernels.piece_projection_spec import SPEC
from osp_fast.kernels.sequence_pack import SequenceLayout
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from bench.baselines.piece_projection import baselines

HEADS, HEAD_DIM, FEATURES = 5, 16, 24
WIDTH = HEADS * HEAD_DIM
SMALL = dict(ranks=3, rank=1, batch=2, size=(1, 5, 7), heads=5, all_heads=7, head_dim=16, features=24)


@pytest.fixture(autouse=True)
def triton_path(monkeypatch):
    monkeypatch.setenv("OSP_FAST_KERNELS", "triton")


def test_opcheck():
    sizes = (2, 4, HEADS, HEAD_DIM)
    buffer, weight = torch.randn(2 * 4 * WIDTH), torch.randn(FEATURES, 2 * WIDTH)[:, WIDTH:]
    bias, add, grad = torch.randn(FEATURES), torch.randn(2, 4, FEATURES), torch.randn(8, FEATURES)
    operations = torch.ops.osp_fast
    for given in ((bias, None), (None, add)):
        leaves = [None if x is None else x.clone().requires_grad_() for x in (buffer, weight, *given)]
        torch.library.opcheck(operations.piece_projection.default, (*leaves, sizes, 3, "auto"))
    torch.library.opcheck(operations.piece_projection_buffer_gradient.default, (grad, weight, sizes, 3))
    torch.library.opcheck(operations.piece_projection_weight_gradient.default, (grad, buffer, sizes, 3))


def two_rounds(buffers, weight, bias):
    """A projection of heads that come in two parts."""
    tokens, y = buffers[0].shape[0] // (2 * 3 * HEAD_DIM), None
    for buffer, part, heads in zip(buffers, weight.split([3 * HEAD_DIM, 2 * HEAD_DIM], 1), (3, 2), strict=True):
        layout = SequenceLayout(1, 0, tokens, heads, HEAD_DIM, 2)
        y = project_pieces(buffer.sin(), part, bias if y is None else None, layout, y)
    return y.cos()


def test_compiles_without_breaks_and_once_for_all_lengths():
    torch._dynamo.reset()
    torch.manual_seed(0)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(two_rounds, backend=counter, fullgraph=True, dynamic=True)
    weight, bias = torch.randn(FEATURES, WIDTH, requires_grad=True), torch.randn(FEATURES, requires_grad=True)
    for tokens in (7, 12, 3):
        buffers = [torch.randn(2 * tokens * heads * HEAD_DIM, requires_grad=True) for heads in (3, 2)]
        found, expected = (function(buffers, weight, bias) for function in (compiled, two_rounds))
        assert torch.allclose(found, expected, atol=1e-5)
        leaves = [*buffers, weight, bias]
        gradients = [torch.autograd.grad(x.square().sum(), leaves) for x in (found, expected)]
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*gradients, strict=True))
    assert counter.frame_count == 1


def test_no_gradient_is_computed_that_nobody_wants():
    inputs = SPEC.make_inputs(device="cpu", dtype=torch.float32, seed=0, **SMALL, add=True)
    inputs["weight"] = inputs["weight"].detach()
    product = SPEC.flops("forward", **SMALL, add=True)
    with FlopCounterMode(display=False) as counter:
        out = project_pieces(**inputs)
        assert counter.get_total_flops() == product
        out.sum().backward()
    assert counter.get_total_flops() == 2 * product
    assert inputs["buffer"].grad is not None and torch.equal(inputs["add"].grad, torch.ones_like(out))


def test_a_new_length_compiles_no_kernel(tmp_path):
    script = Path(__file__).parent / "stand_in_piece_projection.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    result = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == {"piece_projection_fwd_kernel": 2}  # one of each version


@pytest.mark.parametrize("add", [False, True])
def test_spec_makes_calls_that_run(add):
    inputs = SPEC.make_inputs(device="cpu", dtype=torch.float32, seed=0, **SMALL, add=add)
    expected = project_pieces_ref(**inputs)
    for function in (SPEC.operation, *SPEC.variants.values()):
        assert torch.allclose(function(**inputs), expected, atol=1e-5)
    for kernel, _ in SPEC.tunable.candidates(inputs, 0):
        assert torch.allclose(SPEC.tunable.bind(inputs, kernel)(), expected, atol=1e-5)
    for baseline in baselines():
        call, leaves = baseline.bind(inputs)
        assert torch.allclose(call(), expected, atol=1e-5) and len(leaves) == 3


@pytest.mark.parametrize("add", [False, True])
def test_moves_the_bytes_of_the_spec(add, count_traffic):
    inputs = SPEC.make_inputs(device="cpu", dtype=torch.float16, seed=0, **SMALL, add=add)
    for version in ("pointer", "descriptor"):
        with count_traffic() as moved:
            project_pieces_triton(**inputs, version=version)
        assert moved.loaded + moved.stored == SPEC.bytes("forward", **SMALL, add=add)
