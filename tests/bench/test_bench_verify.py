"""`bench verify` on operations and models: what is right, and every way of being wrong. Kernels run interpreted."""

import dataclasses
import functools
import itertools
import pickle
from contextlib import contextmanager

import pytest
import torch
from osp_fast.kernels import causal_conv3d_launch
from osp_fast.kernels.spec import Shape, UnsupportedCall

from bench import verify, verify_models
from bench.accuracy import exact_float32
from bench.ops import load_specs
from bench.results import H100, read_result
from bench.suites import Options, Setting
from bench.worker import InProcess
from osp_fast.data.buckets import Bucket
from osp_fast.errors import UserError
from osp_fast.models.attention_backends import AttentionBackend, skiparse_attention_ref
from osp_fast.models.dit import DIT_CONFIGS, DiT, DiTConfig

CPU = torch.device("cpu")
SETTING = Setting(CPU, H100, lambda line: None)
SPECS = load_specs()


def check(spec, dtype=torch.float32):
    return verify.check_case(spec, spec.small[0], dtype, 0, CPU)


@pytest.mark.parametrize("name", SPECS)
def test_small_calls_are_of_every_kind(name):
    """Every option that production calls use, and every word, flag, kernel and stride that they give."""
    spec = SPECS[name]

    def kinds(shapes):
        found = {(key, None) for shape in shapes for key in shape.sizes}
        for key, value in itertools.chain(*(shape.sizes.items() for shape in shapes)):
            if isinstance(value, bool | str) or key in ("kernel", "stride"):
                found.add((key, value))
        return found

    assert kinds(spec.shapes) <= kinds(spec.small), kinds(spec.shapes) - kinds(spec.small)
    names = [shape.name for shape in spec.small]
    assert len(set(names)) == len(names)
    for shape in spec.small:
        inputs = spec.make_inputs(device=CPU, dtype=torch.float32, seed=0, **shape.sizes)
        assert sum(x.numel() for x in inputs.values() if isinstance(x, torch.Tensor)) < 1 << 16


def test_a_right_operation_verifies(toy):
    for dtype in toy.SPEC.tolerances:
        found = check(toy.SPEC, dtype)
        assert found["verdict"] == "ok" and set(found["errors"]) == {"out", "da", "db"} == set(found["repeats"])
        assert set(found["repeats"].values()) == {0.0}


@pytest.mark.parametrize(
    "spoil, verdict",
    [
        (lambda out: out * 1.001, "out 1.0e-03 > 1e-05"),
        (lambda out: out * float("nan"), "out nan > 1e-05"),
        (lambda out: out + 0.001 * (out - out.detach()), "da 1.0e-03"),
    ],
)
def test_a_wrong_operation_does_not(toy, spoil, verdict):
    assert verdict in check(dataclasses.replace(toy.SPEC, operation=lambda a, b: spoil(a @ b)))["verdict"]


def many(a, b):
    """A product, a view of an input, an integer result and one that no gradient passes through."""
    product = a @ b
    return product, a[:, 1:], (product > 0).to(torch.uint8), product.detach().square()


@pytest.mark.parametrize(
    "spoil, verdict",
    [
        (lambda outs: outs, "ok"),
        (lambda outs: (*outs[:1], outs[1] * 1.001, *outs[2:]), "out1 1.0e-03 > 1e-05"),
        (lambda outs: (*outs[:2], 1 - outs[2], outs[3]), "out2"),
        (lambda outs: (*outs[:3], outs[3] * float("nan")), "out3 nan"),
        (lambda outs: (outs[0] + 0.001 * (outs[0] - outs[0].detach()), *outs[1:]), "db 1.0e-03"),
    ],
)
def test_one_wrong_result_of_several_fails(toy, spoil, verdict):
    spec = dataclasses.replace(toy.SPEC, reference=many, operation=lambda a, b: spoil(many(a, b)))
    found = check(spec)
    assert verdict in found["verdict"] and set(found["errors"]) == {"out0", "out1", "out2", "out3", "da", "db"}


def test_an_operation_without_leaves_is_checked_forward_alone(toy):
    def make_inputs(**sizes):
        return {name: x.detach() for name, x in toy.make_inputs(**sizes).items()}

    found = check(dataclasses.replace(toy.SPEC, make_inputs=make_inputs))
    assert found["verdict"] == "ok" and set(found["errors"]) == {"out"}


def test_a_result_that_changes_between_runs_is_a_race(toy):
    turns = itertools.count()
    spec = dataclasses.replace(toy.SPEC, operation=lambda a, b: a @ b + 1e-6 * next(turns))
    found = check(spec)
    assert found["verdict"].startswith("out of two equal calls differs by") and found["repeats"]["out"] > 0


@pytest.mark.parametrize("written, verdict", [(13, "ok"), (12, "out nan > 1e-05")])
def test_a_tail_that_is_not_written_is_caught(toy, written, verdict):
    """A kernel that leaves out its last row, whatever fresh memory holds."""

    def copy(a):
        out = torch.empty_like(a)
        toy.rows_kernel[(2,)](a, out, written, ROWS=8, WIDTH=16)
        return out

    def make_inputs(device, dtype, seed):
        return {"a": torch.randn(13, 16, generator=torch.Generator().manual_seed(seed % 2**63))}

    spec = dataclasses.replace(toy.SPEC, operation=copy, reference=lambda a: a.clone(), make_inputs=make_inputs)
    spec = dataclasses.replace(spec, small=(Shape("rows", {}),))
    assert check(spec)["verdict"].startswith(verdict)


def test_an_operation_that_breaks_does_not_hide_the_others(toy):
    def operation(a, b):
        raise RuntimeError("illegal address\nin a kernel")

    assert check(dataclasses.replace(toy.SPEC, operation=operation))["verdict"] == "error: illegal address"


def test_verify_multiplies_float32_exactly():
    with torch.backends.cudnn.flags(allow_tf32=True):
        with exact_float32():
            assert causal_conv3d_launch.precision() == "ieee"
        assert causal_conv3d_launch.precision() == "tf32"


def run(pairs, monkeypatch, **options):
    """`run_verify` on the CPU without its models."""
    monkeypatch.setattr(verify, "InProcess", functools.partial(InProcess, limits=H100))
    return verify.run_verify(pairs, False, "cpu", **options)


def off_in_outputs(x):
    return x + 0.01 * x.detach()


def off_in_gradients(x):
    return x + 0.01 * (x - x.detach())


@pytest.mark.parametrize("spoil, wrong", [(off_in_outputs, ("out0", "out1")), (off_in_gradients, ("dqkv",))])
def test_a_real_operation_that_is_off_by_a_hundredth_fails(spoil, wrong, monkeypatch, tmp_path, capsys):
    right = SPECS["rope3d"]

    def operation(**inputs):
        return tuple(spoil(x) for x in right.operation(**inputs))

    planted = dataclasses.replace(right, operation=operation, variants={})
    assert run([(planted, right.small[0])], monkeypatch, json_folder=tmp_path) == 1
    said = capsys.readouterr().out
    assert "1 checks, 1 failed" in said and f"FAILED rope3d {right.small[0].name} float32: {wrong[0]}" in said
    (row,) = read_result(tmp_path / "cpu/verify-001.json").rows
    assert not row.ok and row.ms is None and row.vs == {} and row.role == "ours" and row.impl == "osp_fast"
    assert 0.005 < row.rel_err < 0.02 and all(f"{name} " in row.note for name in wrong)
    assert all(f"{name} " not in row.note for name in {"out0", "out1", "dqkv"} - set(wrong))


def test_a_right_one_passes_with_its_variants(monkeypatch, tmp_path, capsys):
    spec = SPECS["rope3d"]
    spec = dataclasses.replace(spec, variants={"choosy": refuse, **spec.variants})
    assert run([(spec, spec.small[2])], monkeypatch, seeds=2, json_folder=tmp_path) == 0
    assert "6 checks, 0 failed, 2 refused by a variant" in capsys.readouterr().out
    rows = read_result(tmp_path / "cpu/verify-001.json").rows
    names = ["osp_fast"] * 2 + ["osp_fast choosy", "osp_fast in place"] * 2
    assert [row.impl for row in rows] == names and [row.role for row in rows] == ["ours"] * 2 + ["variant"] * 4
    assert all(row.ok == (row.impl != "osp_fast choosy") and row.dtype == "float32" for row in rows)
    assert rows[0].rel_err != rows[1].rel_err  # of inputs drawn anew
    assert rows[2].note == "refused: not mine" and rows[2].rel_err is None


def refuse(**inputs):
    raise UnsupportedCall("not mine")


def test_a_variant_may_refuse_and_may_not_break(toy, monkeypatch, capsys):
    def breaks(a, b):
        raise ValueError("too many values to unpack")

    spec = dataclasses.replace(toy.SPEC, variants={"broken": breaks})
    assert run([(spec, spec.small[0])], monkeypatch) == 1
    assert "FAILED toy tiny float32, broken: error: too many values to unpack" in capsys.readouterr().out


def test_all_calls_refused_are_no_success(toy, monkeypatch):
    assert run([(dataclasses.replace(toy.SPEC, operation=refuse), toy.SPEC.small[0])], monkeypatch) == 1


def test_memory_that_is_too_small_is_no_mistake(toy, monkeypatch, capsys):
    def hungry(a, b):
        raise torch.OutOfMemoryError("CUDA out of memory")

    spec = dataclasses.replace(toy.SPEC, variants={"hungry": hungry})
    assert run([(spec, spec.small[0])], monkeypatch) == 0
    assert "2 checks, 0 failed, 0 refused by a variant, 1 not made" in capsys.readouterr().out


def test_what_is_asked_for_must_be_there(toy, monkeypatch):
    with pytest.raises(UserError, match="nothing to check in float16"):
        run([(toy.SPEC, toy.SPEC.small[0])], monkeypatch, types=["float16"])
    monkeypatch.setattr(verify, "interpreting", lambda: False)
    with pytest.raises(UserError, match="set TRITON_INTERPRET=1"):
        run([(toy.SPEC, toy.SPEC.small[0])], monkeypatch)


def test_the_jobs_of_a_gpu_are_the_same_in_its_process():
    pairs = [(spec, shape) for spec in SPECS.values() for shape in spec.shapes]
    jobs = verify.jobs(Options("cuda"), pairs)
    cases = [job.case for job in jobs]
    assert len(set(cases)) == len(cases) and {job.suite for job in jobs} == {"verify"}
    assert all(0 < job.seconds < 60 for job in jobs)
    kinds = ["variant" if job.case.rsplit(", ")[-1] in SPECS[job.case.split()[0]].variants else "op"
             for job in jobs if job.case.split()[0] in SPECS]  # fmt: skip
    assert kinds == sorted(kinds) and "whole DiT 93x352x640" in cases
    types = ("bfloat16",)
    names = tuple((spec.name, shape.name) for spec, shape in pairs)
    again = functools.partial(verify._jobs_by_name, names=names, models=True, types=types, seeds=1)
    assert [job.case for job in pickle.loads(pickle.dumps(again))(("verify",), Options("cuda"))] == cases


def test_the_command_interprets_on_a_cpu(bench):
    done = bench("verify", "--device", "cpu", "--op", "toy")
    assert done.returncode == 0, done.stderr
    assert "toy tiny float32" in done.stdout and "checks, 0 failed" in done.stdout


@pytest.fixture
def by_references(monkeypatch):
    """The paths of models as a GPU takes them, with references in place of kernels, compilers and graphs."""

    class Graph:
        size = 1

        def __init__(self, call):
            self.replay = lambda: setattr(self, "result", call())
            self.replay()

    class Machine:
        def __init__(self, device):
            self.capture, self.peak_bytes, self.available_bytes = Graph, lambda call: 1, lambda: 2

        def seconds(self, call):
            return 1.0

    @contextmanager
    def same_path(path):
        yield

    choose = DiT.use_attention
    monkeypatch.setattr(DiT, "use_attention", lambda dit, name, *place: choose(dit, "reference"))
    monkeypatch.setattr(verify_models, "kernels_path", same_path)
    monkeypatch.setattr(verify_models, "CudaMachine", Machine)
    monkeypatch.setattr(verify_models, "compile_blocks", lambda dit, buckets: dit)
    config = dataclasses.replace(DIT_CONFIGS["tiny"], num_layers=4)
    clips = verify_models.Case(Bucket(5, 48, 96), 2, 16)
    small = dataclasses.replace(clips, clips=1)
    checks = {
        "blocks": functools.partial(verify_models.blocks_errors, config, clips, False, False),
        "padded": functools.partial(verify_models.blocks_errors, config, clips, True, False),
        "compiled": functools.partial(verify_models.blocks_errors, config, clips, False, True),
        "graph": functools.partial(verify_models.graph_errors, config, clips),
        "step": functools.partial(verify_models.step_errors, config, small),
        "whole": functools.partial(verify_models.whole_errors, config, small),
    }
    for direction in ("encode", "decode"):
        tilings = ((2, None, None), (2, 4, 4))
        checks[direction] = functools.partial(verify_models.vae_errors, "tiny", direction, (3, 6, 5), tilings)
    return checks


def test_the_paths_of_models_agree(by_references):
    found = {name: check(CPU, lambda line: None) for name, check in by_references.items()}
    for name, errors in found.items():
        assert verify.worst(errors) < (0.02 if name == "whole" else 1e-5), (name, errors)  # which is in bfloat16
    assert len(found["blocks"]) > 70 and "dtransformer_blocks.3.self_attention.qkv.weight" in found["blocks"]
    assert set(found["graph"]) == {"out0", "out1", "out2"} and len(found["encode"]) == 2


@pytest.mark.parametrize("name", ["blocks", "padded"])
def test_a_wrong_model_path_is_caught(name, by_references, monkeypatch):
    """Attention that is off by a hundredth, and one that does not know of padding."""

    def off(q, k, v, mode, sparse_n, key_mask=None, key_lengths=None):
        if name == "padded":
            return skiparse_attention_ref(q, k, v, mode, sparse_n)
        return 1.01 * skiparse_attention_ref(q, k, v, mode, sparse_n, key_mask, key_lengths)

    def choose(dit, attention, *place):
        function = off if attention == "triton" else skiparse_attention_ref
        backend = AttentionBackend(attention, function, lambda mode, sparse_n: "")
        for block in dit.transformer_blocks:
            block.self_attention.backend = block.cross_attention.backend = backend
        return dit

    monkeypatch.setattr(DiT, "use_attention", choose)
    (row,) = verify_models._measure(name, verify_models.EXACT, by_references[name], "float32", SETTING)
    assert not row.ok and row.rel_err > 1e-3 and "out " in row.note and "dtransformer_blocks.0" in row.note


def test_a_model_path_runs_interpreted():
    config = DiTConfig(
        num_layers=4,
        num_attention_heads=1,
        attention_head_dim=24,
        caption_channels=8,
        cross_attention_dim=24,
        sparse_n=2,
    )
    case = verify_models.Case(Bucket(1, 32, 80), 1, 3)
    check = functools.partial(verify_models.blocks_errors, config, case, True, False)
    (row,) = verify_models._measure("blocks", verify_models.EXACT, check, "float32", SETTING)
    assert row.note == "ok" and 0 < row.rel_err < 1e-5  # 0: no kernel would have run


def test_the_models_of_a_cpu_are_tiny_and_those_of_a_gpu_in_bfloat16():
    cases = [job.case for job in verify_models.model_jobs("cpu", ["float32"])]
    assert cases and all("tiny" in case for case in cases)
    assert verify_models.model_jobs("cuda", ["float32"]) == verify_models.model_jobs("cpu", ["bfloat16"]) == []
