"""The packing as operations: tracing, one compilation for all lengths, bytes, a real exchange of three processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from osp_fast.kernels.rope3d import make_rope3d
from osp_fast.kernels.sequence_pack import (
    SequenceLayout,
    pack_output,
    received_qkv,
    sequence_pack,
    sequence_pack_ref,
    sequence_pack_rounds,
    unpack_output,
)
from osp_fast.kernels.sequence_pack_ops import NO_ROPE
from osp_fast.kernels.sequence_pack_spec import SPEC
from osp_fast.kernels.skiparse_attention import skiparse_attention_ref
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

HERE = Path(__file__).parent
HEADS, HEAD_DIM = 5, 12
SIZES = ((3, 4, 7), (3, 3, 3), (4, 2, 3))  # in the first all lengths differ: equal ones are one symbol


@pytest.fixture(autouse=True)
def triton_path(monkeypatch):
    monkeypatch.setenv("OSP_FAST_KERNELS", "triton")


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("rotated", [False, True])
def test_opcheck_of_q_k_v(norm, rotated):
    qkv, rope = torch.randn(2, 4, 3, HEADS, HEAD_DIM), make_rope3d((1, 3, 4), HEAD_DIM)
    anywhere = torch.tensor([0, 7, 7, 3], dtype=torch.int32)
    place = (*rope[:2], *((0, anywhere) if norm else (5, None))) if rotated else NO_ROPE
    norms = [torch.randn(HEAD_DIM) if norm else None for _ in range(2)]
    leaves = [None if x is None else x.clone().requires_grad_() for x in (qkv, *norms)]
    operations = torch.ops.osp_fast
    torch.library.opcheck(operations.sequence_pack.default, (leaves[0], *place, *leaves[1:], 1e-6, [3, 1, 1]))
    arguments = (qkv.flatten(), (2, 4, HEADS, HEAD_DIM), *place, qkv if norm else None, *norms, 1e-6, [3, 1, 1])
    torch.library.opcheck(operations.sequence_pack_backward.default, arguments)
    if not norm:
        rounds = ([torch.randn(2 * 4 * 3 * part * HEAD_DIM) for part in (3, 2)], (2, 4, HEADS, HEAD_DIM))
        arguments = (*rounds, *place, [3, 2], [3, 1, 1])
        torch.library.opcheck(operations.sequence_pack_rounds_backward.default, arguments)


def test_opcheck_of_parts():
    x = torch.randn(2, 4, HEADS, HEAD_DIM)
    operations = torch.ops.osp_fast
    torch.library.opcheck(operations.sequence_pack_parts.default, (None, None, x.clone().requires_grad_(), [3, 1, 1]))
    torch.library.opcheck(operations.sequence_pack_parts.default, (x, x, x, [1, 1, 1]))
    buffer = x.flatten().requires_grad_()
    torch.library.opcheck(operations.sequence_unpack_parts.default, (buffer, x.shape, [3, 2, 1]))


def test_what_is_received_can_be_differentiated_twice():
    layout = SequenceLayout(1, 0, 4, HEADS, HEAD_DIM, 2)

    def second(buffer):
        q, k, v = received_qkv(buffer, layout)
        gradient = torch.autograd.grad((q.pow(3) + k.pow(2) * v).sum(), buffer, create_graph=True)[0]
        return torch.autograd.grad(gradient.pow(2).sum(), buffer)[0]

    buffer = torch.randn(2 * 4 * 3 * HEADS * HEAD_DIM, requires_grad=True)
    found = second(buffer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OSP_FAST_KERNELS", "reference")
        assert torch.allclose(found, second(buffer), rtol=1e-5, atol=1e-5)


def attend(qkv, rope):
    """All of it for a single rank, which exchanges nothing with others."""
    layout = SequenceLayout(1, 0, qkv.shape[1], HEADS, HEAD_DIM, qkv.shape[0])
    rounds = [layout._replace(heads=heads) for heads in (HEADS - 2, 2)]
    outs = []
    for buffer, part in zip(sequence_pack_rounds(qkv * 1, rounds, rope), rounds, strict=True):
        q, k, v = received_qkv(buffer.sin(), part)
        outs.append(unpack_output(pack_output(skiparse_attention_ref(q, k, v), part).cos(), part))
    return torch.cat(outs, 2)


@pytest.mark.parametrize("path", ["triton", "reference"])
def test_compiles_without_breaks_and_once_for_all_lengths(path, monkeypatch):
    monkeypatch.setenv("OSP_FAST_KERNELS", path)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend, backend=counter, fullgraph=True, dynamic=True)
    compiles = 0
    for size in SIZES:
        tokens = size[0] * size[1] * size[2]
        qkv = torch.randn(2, tokens, 3, HEADS, HEAD_DIM, requires_grad=True)
        arguments = (qkv, make_rope3d(size, HEAD_DIM))
        found, expected = compiled(*arguments), attend(*arguments)
        assert torch.allclose(found, expected, atol=1e-6)
        gradients = [torch.autograd.grad(x.square().sum(), qkv)[0] for x in (found, expected)]
        assert torch.allclose(*gradients, atol=1e-5)
        compiles = compiles or counter.frame_count  # of the first size; a float among the arguments makes it start anew
    assert counter.frame_count == compiles


def run(script, *arguments, **environment):
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(script), *map(str, arguments)]
    result = subprocess.run(command, env=plain | environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_another_rank_or_length_compiles_no_kernel(tmp_path):
    counts = json.loads(run(HERE / "stand_in_sequence_pack.py", TRITON_CACHE_DIR=str(tmp_path)))
    # Forward without norm, with it, a gradient of what was received, one tensor alone; back all but the third.
    assert counts == {"sequence_pack_kernel": 4, "sequence_unpack_kernel": 3}


EXCHANGE = """
import sys
import torch
import torch.distributed as dist
from osp_fast.kernels.rope3d import make_rope3d
from osp_fast.kernels.sequence_pack import SequenceLayout, pack_output, received_qkv, sequence_pack, unpack_output

def work(rank, store):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=3)
    layout = SequenceLayout(3, rank, 7, 5, 12, 2)
    torch.manual_seed(0)
    qkv = torch.randn(2, 7, 3, 5, 12)
    own = qkv[:, layout.first_token() :][:, : layout.tokens_of(rank)]

    def exchange(buffer, sent, received):
        out = buffer.new_empty(sum(received))
        dist.all_to_all_single(out, buffer, received, sent)
        return out

    buffer = exchange(sequence_pack(own, layout), *layout.qkv_splits())
    heads = slice(layout.first_unit(), layout.first_unit() + layout.units_of(rank))
    for found, expected in zip(received_qkv(buffer, layout), qkv.unbind(2)):
        assert torch.equal(found, expected[:, :, heads])
    back = exchange(pack_output(received_qkv(buffer, layout)[2], layout), *layout.output_splits())
    assert torch.equal(unpack_output(back, layout), own[:, :, 2])
    dist.destroy_process_group()

if __name__ == "__main__":
    torch.multiprocessing.spawn(work, (sys.argv[1],), nprocs=3)
    print("ok")
"""


def test_three_processes_exchange_by_these_splits(tmp_path):
    script = tmp_path / "exchange.py"
    script.write_text(EXCHANGE)
    assert run(script, tmp_path / "store", OSP_FAST_KERNELS="reference").endswith("ok\n")


@pytest.mark.parametrize("norm, sets", [(False, 1), (True, 2)])
def test_spec_makes_calls_that_run(norm, sets):
    sizes = dict(ranks=3, rank=1, batch=2, size=(1, 3, 4), heads=2, head_dim=24, rope=True, norm=norm, sets=sets)
    inputs = SPEC.make_inputs(device="cpu", dtype=torch.float32, seed=0, **sizes)
    assert torch.allclose(SPEC.operation(**inputs), sequence_pack_ref(**inputs), atol=1e-5)
    bound = {name: SPEC.tunable.bind(inputs, name) for name, _ in SPEC.tunable.candidates(inputs, 0)}
    assert len(bound) == 2
    for call in bound.values():
        call()


@pytest.mark.parametrize("norm", [False, True])
def test_moves_the_bytes_of_the_spec(norm, count_traffic):
    width, sets = (8, 2) if norm else (5, 1)  # this rank's tokens are the middle one of three rows
    sizes = dict(ranks=3, rank=1, batch=2, size=(1, 3, width), heads=2, head_dim=24, rope=True, norm=norm, sets=sets)
    inputs = SPEC.make_inputs(device="cpu", dtype=torch.float16, seed=0, **sizes)
    table, vectors = 2 * 4 * 4 * (1 + 1 + width), norm * 2 * 24 * 4
    with count_traffic() as moved:
        out = sequence_pack(**inputs)
    assert moved.loaded + moved.stored == SPEC.bytes("forward", **sizes) + table + vectors
    leaves = [x for x in inputs.values() if isinstance(x, torch.Tensor)]
    with count_traffic() as moved:
        torch.autograd.grad(out, leaves, torch.randn_like(out))
    (launch,) = moved.launches
    programs = 2  # one on each multiprocessor of the interpreter
    assert launch.loaded + launch.stored == SPEC.bytes("backward", **sizes) + table + vectors * (1 + programs)


def test_rounds_have_one_gradient(count_traffic):
    """A launch for each round writes its heads of it: each byte once, and nothing else happens."""
    rounds, rope = [SequenceLayout(3, 1, 7, heads, 12, 2) for heads in (4, 3)], make_rope3d((1, 7, 1), 12)
    qkv = torch.randn(2, 2, 3, 7, 12, requires_grad=True)
    buffers = sequence_pack_rounds(qkv, rounds, rope)
    grads = [torch.randn_like(x) for x in buffers]
    names = []

    class Recorded(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            names.append(function._schema.name)
            return function(*arguments, **(options or {}))

    with count_traffic() as moved, Recorded():
        torch.autograd.grad(buffers, qkv, grads)
    assert len(moved.launches) == 2 and moved.stored == 4 * qkv.numel()
    assert {name for name in names if "osp_fast" in name} == {"osp_fast::sequence_pack_rounds_backward"}
    assert not set(names) & {
        "aten::add",
        "aten::add_",
        "aten::cat",
        "aten::zeros",
        "aten::slice_backward",
        "aten::copy_",
    }


def test_other_passes_move_each_byte_once(count_traffic):
    layout = SequenceLayout(3, 1, 7, 5, 12, 2)
    buffer = torch.randn(2 * 7 * 3 * 2 * 12, requires_grad=True)
    out = torch.randn(2, 7, 2, 12)
    back = torch.randn(2 * 2 * 5 * 12, requires_grad=True)
    with count_traffic() as moved:
        views = received_qkv(buffer, layout)
        pack_output(out[:1], layout._replace(batch=1))
    assert not moved.launches
    unpacked = unpack_output(back, layout)  # its own launch is counted below
    for call, elements in (
        (lambda: torch.autograd.grad(views, buffer, [torch.randn_like(x) for x in views]), buffer.numel()),
        (lambda: pack_output(out, layout), out.numel()),
        (lambda: unpack_output(back, layout), back.numel()),
        (lambda: torch.autograd.grad(unpacked, back, torch.randn_like(unpacked)), back.numel()),
    ):
        with count_traffic() as moved:
            call()
        assert len(moved.launches) == 1 and moved.loaded == moved.stored == 4 * elements
