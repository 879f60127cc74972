"""The Hopper kernel in the simulator against float64, the simulator against broken kernels, and the compiled binary.

Run as a script on a Hopper GPU it proves the kernel itself: `prove_on_gpu`.
"""

import functools
import importlib.util
import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st
from osp_fast.kernels import skiparse_attention_hopper as hopper

SIMULATOR = Path(__file__).with_name("gluon_simulator.py")
ROW_TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 1e-3}  # of a row's norm: weights and outputs are rounded


def load_file(path: Path, name: str) -> ModuleType:
    """The module in `path`, under a name of its own."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


simulator = load_file(SIMULATOR, "gluon_simulator")


def make_inputs(batch, tokens, heads, head_dim, dtype, seed, device="cpu"):
    """q, k, v: slices of one projection, whose memory holds NaN wherever the kernel has no business."""
    generator = torch.Generator(device).manual_seed(seed)
    fused = torch.full((batch, tokens + 5, 3, heads, head_dim), torch.nan, dtype=dtype, device=device)
    drawn = torch.randn((batch, tokens, 3, heads, head_dim), generator=generator, device=device)
    fused[:, :tokens] = drawn.to(dtype)
    return fused[:, :tokens].unbind(2)


def sets_of(token, mode, sparse_n):
    """The number of each token's set."""
    return {"full": token * 0, "single": token % sparse_n, "group": token // sparse_n % sparse_n}[mode]


def expected(q, k, v, mode, sparse_n, key_lengths):
    """out (B, N, H, D) and the log-sum-exp (B, H, S, longest set) in float64, by the definition of the sets."""
    token = torch.arange(q.shape[1], device=q.device)
    sets = sets_of(token, mode, sparse_n)
    seen = (sets[:, None] == sets[None, :]).expand(len(q), -1, -1)
    if key_lengths is not None:
        seen = seen & (token < key_lengths[:, None])[:, None, :]
    q, k, v = (x.double() for x in (q, k, v))
    scores = torch.einsum("bnhd,bmhd->bnhm", q, k) / q.shape[3] ** 0.5
    scores = scores.masked_fill(~seen[:, :, None, :], -torch.inf)
    by_token = scores.logsumexp(-1)
    members = [by_token[:, sets == number].transpose(1, 2) for number in range(1 if mode == "full" else sparse_n)]
    longest = members[0].shape[2]
    lse = [torch.nn.functional.pad(of_set, (0, longest - of_set.shape[2]), value=-torch.inf) for of_set in members]
    weights = torch.nan_to_num(scores.softmax(-1), 0.0)
    return torch.einsum("bnhm,bmhd->bnhd", weights, v), torch.stack(lse, 2)


def compare(out, lse, reference, reference_lse):
    """Every row of out within rounding of its reference's norm; lse to float32."""
    error = (out.double() - reference).norm(dim=-1)
    assert (error <= ROW_TOLERANCE[out.dtype] * reference.norm(dim=-1)).all(), f"worst row off by {error.max():.2g}"
    torch.testing.assert_close(lse.double(), reference_lse, rtol=1e-5, atol=1e-5)


def check(
    module, mode, sparse_n, batch, tokens, heads, head_dim, key_lengths=None, dtype=torch.bfloat16, seed=0, **plan
):
    """Simulate one call and compare; `plan` has block sizes, by default small ones."""
    q, k, v = make_inputs(batch, tokens, heads, head_dim, dtype, seed)
    key_lengths = None if key_lengths is None else torch.tensor(key_lengths, dtype=torch.int32)
    sizes = replace(module.make_plan(head_dim, mode, sparse_n), **{"rows": 16, "keys": 32, **plan})
    arguments = module.kernel_arguments(q, k, v, key_lengths, sizes)
    out, lse = arguments["out"].fill_(torch.nan), arguments["lse"]
    assert (lse == -torch.inf).all()  # what stays past the end of a shorter set
    first = lse[:, :, 0].fill_(torch.nan)  # set 0 is the longest: all of its rows are written
    simulator.simulate(module.skiparse_attention_hopper_fwd_kernel, 2, arguments, seed)
    assert not first.isnan().any()
    compare(out, lse, *expected(q, k, v, mode, sparse_n, key_lengths))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("mode", "sparse_n", "tokens"), [("full", 1, 150), ("single", 3, 301), ("group", 4, 596)])
def test_every_interleaving_gives_the_same_result(mode, sparse_n, tokens, seed):
    check(hopper, mode, sparse_n, 1, tokens, 2, 96, seed=seed, stages=1 + seed % 3)


@settings(max_examples=60)
@given(
    mode=st.sampled_from(["full", "single", "group"]),
    sparse_n=st.integers(1, 7),
    size=st.integers(1, 260),
    batch=st.integers(1, 2),
    head_dim=st.sampled_from([64, 96, 128]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**32),
    data=st.data(),
)
def test_matches_float64(mode, sparse_n, size, batch, head_dim, dtype, seed, data):
    if mode == "group":
        sparse_n = 2 ** (sparse_n // 3)
        size = -(-size // sparse_n) * sparse_n
    bounded = data.draw(st.booleans())
    lengths = [data.draw(st.integers(-1, size + 1)) for _ in range(batch)] if bounded else None
    assert hopper.supports(dtype, head_dim, mode, sparse_n, size)
    check(hopper, mode, sparse_n, batch, size, 2, head_dim, lengths, dtype, seed, stages=data.draw(st.integers(1, 4)))


@pytest.mark.parametrize(("mode", "sparse_n"), [("full", 1), ("single", 2), ("group", 4)])
@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_real_block_sizes(mode, sparse_n, head_dim):
    check(hopper, mode, sparse_n, 1, 388 * sparse_n, 1, head_dim, [385 * sparse_n - 3], rows=64, keys=128)


def test_empty_sets_and_single_tokens():
    check(hopper, "single", 7, 2, 5, 1, 64)
    check(hopper, "group", 4, 1, 4, 2, 64)
    check(hopper, "full", 1, 1, 1, 1, 128)
    check(hopper, "group", 2, 3, 26, 1, 96, [0, 1, 3])


LOOP_SCORES = "            s = hopper.warpgroup_mma_wait(len(v), deps=(s,))  # all but the groups of p v\n"
LOOP_K_FREE = "            hopper.mbarrier.arrive(k_empty.index(next_slot), count=1)\n"
LOOP_VALUES = "            o, total = _finish_values(o, total)\n"
LOOP_V_FREE = "            hopper.mbarrier.arrive(v_empty.index(slot), count=1)\n"
# What is broken: the lines, what takes their place, and what is said if it is the same in every interleaving.
BROKEN = {
    "slots are not waited for": ("    hopper.mbarrier.wait(empty.index(slot), step // slots & 1 ^ 1)\n", "", None),
    "K is not waited for": ("pred=block + 1 < blocks", "pred=False", None),
    "V is not waited for": ("hopper.mbarrier.wait(v_full.index(slot), step // plan.stages & 1)", "pass", None),
    "Q is not waited for": ("hopper.mbarrier.wait(q_full.index(consumer), q_phase)", "pass", None),
    "scores are waited for too little": ("hopper.warpgroup_mma_wait(len(v)", "hopper.warpgroup_mma_wait(3", None),
    "K is freed too early": (LOOP_SCORES + LOOP_K_FREE, LOOP_K_FREE + LOOP_SCORES, "overwritten"),
    "V is freed too early": (LOOP_VALUES + LOOP_V_FREE, LOOP_V_FREE + LOOP_VALUES, "overwritten"),
    "Q is never freed": ("hopper.mbarrier.arrive(q_empty.index(consumer), count=1)", "pass", "deadlock"),
    "both warpgroups wait for their turn": ("turn_phase = consumer ^ 1", "turn_phase = 0", "deadlock"),
    "bytes never arrive": ("views[0].block_type.nbytes * plan", "2 * views[0].block_type.nbytes * plan", "deadlock"),
    "one arrival frees K and V": ("_barriers(stages, 2)", "_barriers(stages, 1)", None),
    "barriers are not fenced": ("    hopper.fence_async_shared()", "    pass", "fenced"),
    "the last box is not shifted": (
        "last_block = gl.cdiv(visible, plan.unit) * plan.unit - plan.keys",
        "last_block = (blocks - 1) * plan.keys",
        "past the end",
    ),
    "repeated columns count twice": ("(column >= (blocks - 1) * plan.keys) & ", "", "worst row"),
    "repeated rows are stored twice": ("mask=(row >= own)[:, None]", "mask=(row >= 0)[:, None]", "stored twice"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_the_simulator_catches_a_broken_kernel(fault, tmp_path):
    old, new, message = BROKEN[fault]
    source = Path(hopper.__file__).read_text()
    assert old in source
    path = tmp_path / "broken.py"
    path.write_text(source.replace(old, new))
    broken = load_file(path, "broken_hopper_kernel")
    with pytest.raises((simulator.SimulatorError, AssertionError), match=message):
        for seed in range(12):
            check(broken, "single", 3, 1, 301, 2, 96, seed=seed, stages=2)


def test_unfit_calls_are_refused():
    x = torch.zeros(1, 12, 2, 96, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="no Hopper kernel"):
        hopper.hopper_forward(x[:, :10], x[:, :10], x[:, :10], "group", 4)
    with pytest.raises(ValueError, match="differ"):
        hopper.hopper_forward(x, x[:, :10], x, "full")
    with pytest.raises(ValueError, match="contiguous"):
        wide = torch.zeros(1, 12, 2, 192, dtype=torch.bfloat16)[..., ::2]
        hopper.hopper_forward(wide, wide, wide, "full")
    with pytest.raises(ValueError, match="16 bytes"):
        odd = torch.zeros(1, 12, 2 * 96 + 4, dtype=torch.bfloat16)[..., : 2 * 96].unflatten(2, (2, 96))
        hopper.hopper_forward(odd, odd, odd, "full")
    with pytest.raises(ValueError, match="int32"):
        hopper.hopper_forward(x, x, x, "full", 1, torch.tensor([3, 4], dtype=torch.int32))
    assert not hopper.supports(torch.float32, 96, "full", 1, 10)
    assert not hopper.supports(torch.bfloat16, 48, "full", 1, 10)
    assert not hopper.supports(torch.bfloat16, 96, "group", 3, 9)


COMPILE = """
import json, re, subprocess, sys
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from osp_fast.kernels.skiparse_attention_hopper import builds
build = next(build for build in builds(90) if "D96 group" in build.config)
constants = {(build.kernel.arg_names.index(name),): value for name, value in build.constants.items()}
attributes = {(build.kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in build.aligned}
source = GluonASTSource(build.kernel, build.signature, constants, attributes)
binary = triton.compile(source, target=GPUTarget("cuda", build.arch, 32), options=dict(num_warps=build.num_warps))
path = Path(sys.argv[1]) / "kernel.cubin"
path.write_bytes(binary.asm["cubin"])
tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
sass = subprocess.run([tool, "-c", path], capture_output=True, text=True, check=True).stdout
steps = re.findall(r"(HGMMA|UTMALDG|USETMAXREG|STL|LDL|MUFU.EX2|WARPGROUP.DEPBAR.LE gsb0, \\w+)", sass)
print(json.dumps(dict(steps=steps, expects=build.expects, shared=binary.metadata.shared)))
"""


def test_compiles_for_hopper_without_spills(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    command = [sys.executable, "-c", COMPILE, str(tmp_path)]
    report = json.loads(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    steps = report["steps"]
    assert set(report["expects"]) <= set(steps) and not {"STL", "LDL"} & set(steps)
    assert report["shared"] <= simulator.ALLOCATION_LIMIT
    # 6 + 12 products of q k^T and p v in flight, then wait for the scores, the softmax, and only then for p v.
    waits = [i for i, step in enumerate(steps) if step.endswith("gsb0, 0x2")]
    for wait in waits:
        after = steps[wait + 1 :]
        end = next(i for i, step in enumerate(after) if step.startswith("WARPGROUP"))
        assert after[end].endswith("gsb0, 0x0") and after[:end].count("MUFU.EX2") >= 64
    assert len(waits) == 2  # one loop for each warpgroup


CLIPS = (21_120, 28_800, 38_400, 86_400)  # tokens: 93x352x640, 93x480x640, 93x640x640, 93x720x1280
SKIPS = (("full", 1), ("single", 4), ("group", 4))


def run_poisoned(*call):
    """`hopper_forward`, its outputs likely in memory that held NaN: the allocator hands a freed block out again."""
    torch.full_like(call[0], torch.nan, memory_format=torch.contiguous_format)
    return hopper.hopper_forward(*call)


def prove_on_gpu(device: str = "cuda", clips: tuple[int, ...] = CLIPS, heads: int = 24) -> None:
    """Small calls against float64; on the model's clips sampled rows, ten equal repetitions, and times beside SDPA."""
    for (mode, sparse_n), head_dim in itertools.product((*SKIPS, ("single", 3), ("group", 2)), hopper.HEAD_DIMS):
        for size, dtype in itertools.product((1, 60, 389, 2053), hopper.DTYPES):
            tokens = -(-size // sparse_n) * sparse_n if mode == "group" else size
            q, k, v = make_inputs(2, tokens, 2, head_dim, dtype, seed=size, device=device)
            for lengths in (None, torch.tensor([tokens // 2 + 1, 0], dtype=torch.int32, device=device)):
                compare(
                    *run_poisoned(q, k, v, mode, sparse_n, lengths),
                    *expected(q, k, v, mode, sparse_n, lengths),
                )
    print("small calls agree with float64")
    for tokens, (mode, sparse_n) in itertools.product(clips, SKIPS):
        q, k, v = make_inputs(1, tokens, heads, 96, torch.bfloat16, seed=tokens, device=device)
        out, lse = run_poisoned(q, k, v, mode, sparse_n)
        for _ in range(10):
            again = run_poisoned(q, k, v, mode, sparse_n)
            assert torch.equal(out, again[0]) and torch.equal(lse, again[1]), "a second run differs: a race"
        numbers = sets_of(torch.arange(tokens, device=device), mode, sparse_n)
        for row in (0, 1, tokens // 2 + 3, tokens - 2, tokens - 1):
            members = numbers == numbers[row]
            scores = torch.einsum("hd,mhd->hm", q[0, row].double(), k[0, members].double()) / 96**0.5
            reference = torch.einsum("hm,mhd->hd", scores.softmax(-1), v[0, members].double())
            error = (out[0, row].double() - reference).norm(dim=-1) / reference.norm(dim=-1)
            assert (error < ROW_TOLERANCE[out.dtype]).all(), f"{mode} {tokens}: row {row} off by {error.max():.2g}"
        order = torch.argsort(numbers, stable=True)
        gathered = [x[0, order].unflatten(0, (sparse_n, -1)).transpose(1, 2).contiguous() for x in (q, k, v)]
        flops = 4 * heads * 96 * tokens * tokens / sparse_n
        ours = triton.testing.do_bench(
            functools.partial(hopper.hopper_forward, q, k, v, mode, sparse_n), quantiles=[0.5]
        )
        sdpa = triton.testing.do_bench(
            functools.partial(torch.nn.functional.scaled_dot_product_attention, *gathered), quantiles=[0.5]
        )
        rates = f"{flops / ours / 1e9:.0f} TFLOP/s, SDPA on gathered inputs {flops / sdpa / 1e9:.0f}"
        print(f"{tokens} tokens, {mode}: {ours:.3f} ms, {rates}")


if __name__ == "__main__":
    prove_on_gpu()
