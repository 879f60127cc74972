"""3D RoPE as an operation: tracing, one compilation for all lengths, checkpointing, types under autocast."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from osp_fast.kernels.rope3d import make_rope3d, rope3d, rope3d_ref, rope3d_triton
from osp_fast.kernels.rope3d_spec import SPEC
from osp_fast.kernels.skiparse_attention import skiparse_attention_ref
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code
from torch.utils.checkpoint import checkpoint

HEADS, HEAD_DIM = 2, 12
SIZES = ((3, 4, 5), (3, 3, 3), (2, 5, 4), (4, 2, 7))  # the first of unequal lengths: equal ones are one symbol


@pytest.fixture(autouse=True)
def triton_path(monkeypatch):
    monkeypatch.setenv("OSP_FAST_KERNELS", "triton")


@pytest.mark.parametrize("norm", [False, True])
def test_opcheck(norm):
    rope = make_rope3d((2, 2, 3), HEAD_DIM, start=1)
    rope = rope._replace(start=0, positions=torch.randperm(11).int()) if norm else rope
    q, k, v = torch.randn(2, 11, 3, HEADS, HEAD_DIM).unbind(2)
    norms = [torch.randn(HEAD_DIM) if norm else None for _ in range(2)]
    arguments = (*rope, *norms, 1e-6)
    leaves = [x.clone().requires_grad_() for x in (q, k)]
    torch.library.opcheck(torch.ops.osp_fast.rope3d.default, (*leaves, *arguments))
    torch.library.opcheck(torch.ops.osp_fast.rope3d_.default, (q.clone(), k.clone(), *arguments))
    normed = (q, k) if norm else (None, None)
    for v_grad in (v, None):
        arguments = (q, k, v_grad, *rope, *normed, *norms, 1e-6)
        torch.library.opcheck(torch.ops.osp_fast.rope3d_backward.default, arguments)


class Attention(nn.Module):
    """A projection in front, attention behind: what the operation stands between in the model."""

    def __init__(self, norm):
        super().__init__()
        self.qkv = nn.Linear(8, 3 * HEADS * HEAD_DIM)
        self.norms = nn.ParameterList(torch.rand(HEAD_DIM) + 0.5 for _ in range(2 * norm))

    def forward(self, x, rope, function, **options):
        qkv = self.qkv(x).unflatten(-1, (3, HEADS, HEAD_DIM))
        return skiparse_attention_ref(*function(qkv, rope, *self.norms, **options)).sin()


@pytest.mark.parametrize("norm, inplace, anywhere", [(False, True, True), (False, False, False), (True, True, False)])
def test_compiles_between_projection_and_attention(norm, inplace, anywhere):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Attention(norm)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    compiles = 0
    for size in SIZES:
        tokens = size[0] * size[1] * size[2] - 1
        rope = make_rope3d(size, HEAD_DIM, start=1)
        rope = rope._replace(start=0, positions=torch.randperm(tokens).int()) if anywhere else rope
        x = torch.randn(2, tokens, 8, requires_grad=True)
        leaves = [x, *model.parameters()]
        out, expected = compiled(x, rope, rope3d, inplace=inplace), model(x, rope, rope3d_ref)
        assert torch.allclose(out, expected, atol=1e-5)
        for found, wanted in zip(
            torch.autograd.grad(out.square().sum(), leaves),
            torch.autograd.grad(expected.square().sum(), leaves),
            strict=True,
        ):
            assert torch.allclose(found, wanted, atol=1e-4)
        compiles = compiles or counter.frame_count  # of the first size; a float among the arguments makes it start anew
    assert counter.frame_count == compiles
    with torch.no_grad():
        assert torch.allclose(compiled(x, rope, rope3d, inplace=inplace), expected, atol=1e-5)


def test_in_place_stays_in_place_when_compiled():
    """Inductor gives the operation the projection's own memory, without a copy before it or behind."""
    torch._dynamo.reset()
    model, rope = Attention(False), make_rope3d((2, 2, 3), HEAD_DIM)
    compiled = torch.compile(lambda x: rope3d(model.qkv(x).unflatten(-1, (3, HEADS, HEAD_DIM)), rope, inplace=True))
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            out, code = run_and_get_code(compiled, torch.randn(2, 12, 8))
        assert "osp_fast.rope3d_." in code[0] and code[0].count(" = empty_strided_cpu(") == 1  # of the projection
        assert len({x.untyped_storage().data_ptr() for x in out}) == 1


def test_a_new_clip_compiles_no_kernel(tmp_path):
    script = Path(__file__).parent / "stand_in_rope3d.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    result = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == {
        "rope3d_fwd_kernel": 3,
        "rope3d_bwd_kernel": 3,
    }  # without norm, with it, with positions


@pytest.mark.parametrize("norm", [False, True])
def test_checkpointing_changes_nothing(norm):
    model, rope = Attention(norm), make_rope3d((2, 2, 3), HEAD_DIM)
    x = torch.randn(2, 12, 8, requires_grad=True)
    leaves = [x, *model.parameters()]

    def attend(x):
        return model(x, rope, rope3d, inplace=True)

    plain = torch.autograd.grad(attend(x).square().sum(), leaves)
    recomputed = torch.autograd.grad(checkpoint(attend, x, use_reentrant=False).square().sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))


def test_autocast_keeps_the_type():
    qkv, rope = torch.randn(1, 12, 3, HEADS, HEAD_DIM), make_rope3d((2, 2, 3), HEAD_DIM)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(x.dtype == torch.float32 for x in rope3d(qkv, rope))
        assert all(x.dtype == torch.bfloat16 for x in rope3d(qkv.bfloat16(), rope))


def test_weights_of_another_type():
    qkv, rope = torch.randn(1, 12, 3, HEADS, HEAD_DIM, dtype=torch.float16), make_rope3d((2, 2, 3), HEAD_DIM)
    norms = [torch.rand(HEAD_DIM).requires_grad_(), torch.rand(HEAD_DIM).half().requires_grad_()]
    out = rope3d_triton(qkv, rope, *norms)
    expected = rope3d_ref(qkv, rope, *norms)
    assert all(a.dtype == b.dtype and torch.allclose(a, b, atol=4e-3) for a, b in zip(out, expected, strict=True))
    gradients = torch.autograd.grad(out[0].sum() + out[1].sum(), norms)
    assert [x.dtype for x in gradients] == [torch.float32, torch.float16]


@pytest.mark.parametrize("norm", [False, True])
def test_spec_makes_calls_that_run(norm):
    sizes = {"batch": 2, "size": (2, 2, 3), "heads": 2, "head_dim": 24, "norm": norm}
    inputs = SPEC.make_inputs(device="cpu", dtype=torch.float32, seed=0, **sizes)
    expected = SPEC.reference(**inputs)
    for function in (SPEC.operation, *SPEC.variants.values()):
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(function(**inputs), expected, strict=True))
    bound = {name: SPEC.tunable.bind(inputs, name) for name, _ in SPEC.tunable.candidates(inputs, 0)}
    assert len(bound) == 2
    for call in bound.values():
        call()
    assert SPEC.bytes("forward", **sizes) == 8 * 2 * 12 * 2 * 24
    assert SPEC.bytes("backward", **sizes) == (16 if norm else 12) * 2 * 12 * 2 * 24


@pytest.mark.parametrize("norm", [False, True])
def test_moves_the_bytes_of_the_spec(norm, count_traffic):
    sizes = {"batch": 2, "size": (2, 3, 4), "heads": 2, "head_dim": 24, "norm": norm, "positions": norm}
    inputs = SPEC.make_inputs(device="cpu", dtype=torch.float16, seed=0, **sizes)
    table, vectors = inputs["rope"].axes.numel() * 4, norm * 2 * 24 * 4
    with count_traffic() as moved:
        out = rope3d(**inputs)
    assert moved.loaded + moved.stored == SPEC.bytes("forward", **sizes) + table + vectors
    leaves = [x for x in inputs.values() if isinstance(x, torch.Tensor)]
    with count_traffic() as moved:
        torch.autograd.grad(out, leaves, [torch.randn_like(x) for x in out])
    (launch,) = moved.launches
    programs = 2  # one on each multiprocessor of the interpreter
    assert launch.loaded + launch.stored == SPEC.bytes("backward", **sizes) + table + vectors * (1 + programs)
