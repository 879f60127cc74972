"""A matrix product as an operation of the bench: small kernels to compile, a spec whose calls run on any device."""

import dataclasses

import torch
import triton
import triton.language as tl
from osp_fast.kernels import skiparse_attention_spec as attention
from osp_fast.kernels.spec import KernelBuild, OpSpec, Shape
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

BLOCKS = {"BM": 128, "BN": 64, "BK": 64}
BOXES = {"a": "tensordesc<bf16[128, 64]>", "b": "tensordesc<bf16[64, 64]>", "c": "tensordesc<bf16[128, 64]>"}
SIZES = {"rows": "i32", "columns": "i32", "inner": "i32"}


@triton.jit
def product_kernel(a, b, c, rows, columns, inner, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, inner, BK):
        left = tl.load(a + m[:, None] * inner + start + k[None, :])
        right = tl.load(b + (start + k[:, None]) * columns + n[None, :])
        total = tl.dot(left, right, total)
    tl.store(c + m[:, None] * columns + n[None, :], tl.exp2(total).to(tl.bfloat16))


@triton.jit
def box_product_kernel(a, b, c, rows, columns, inner, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    m, n = tl.program_id(0) * BM, tl.program_id(1) * BN
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, inner, BK):
        total = tl.dot(a.load([m, start]), b.load([start, n]), total)
    c.store([m, n], total.to(tl.bfloat16))


@gluon.jit
def copy_kernel(source, target, rows, BLOCK: gl.constexpr):
    """On sm_80, which has no TMA, this makes LLVM abort the process."""
    barrier = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(barrier, count=1)
    held = gl.allocate_shared_memory(source.dtype, source.block_type.shape, source.layout)
    phase = 0
    for row in range(0, rows, BLOCK):
        mbarrier.expect(barrier, source.block_type.nbytes)
        tma.async_copy_global_to_shared(source, [row, 0], barrier, held)
        mbarrier.wait(barrier, phase)
        phase ^= 1
        tma.async_copy_shared_to_global(target, [row, 0], held)
        tma.store_wait(0)
    mbarrier.invalidate(barrier)


@triton.jit
def rows_kernel(source, target, rows, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """A copy whose mask is of whole rows, so that every access is as wide as its row's alignment allows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    place = row[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    tl.store(target + place, tl.load(source + place, (row < rows)[:, None]), (row < rows)[:, None])


@triton.jit
def broken_kernel(a):
    tl.store(a, tl.load(a + tl.arange(0, 3)))  # three is no power of two


def pointer_build(arch, expects):
    signature = {"a": "*bf16", "b": "*bf16", "c": "*bf16", **SIZES}
    aligned = ("a", "b", "c", "columns", "inner")
    return KernelBuild(product_kernel, arch, "pointers", signature, BLOCKS, aligned, 4, 3, expects)


def box_build(arch, expects=()):
    return KernelBuild(
        box_product_kernel, arch, "boxes", {**BOXES, **SIZES}, BLOCKS, ("columns", "inner"), 4, 3, expects
    )


def gluon_build(arch):
    layout = gl.NVMMASharedLayout.get_default_for([64, 64], gl.bfloat16)
    box = f"tensordesc<bf16[64, 64],{layout!r}>"
    signature = {"source": box, "target": box, "rows": "i32"}
    return KernelBuild(copy_kernel, arch, "gluon", signature, {"BLOCK": 64}, ("rows",), 4, 3, ("UTMALDG", "UTMASTG"))


def sound_builds(arch):
    if arch == 80:
        return [pointer_build(80, ("HMMA", "LDGSTS"))]
    return [pointer_build(arch, ("LDGSTS", "MUFU.EX2")), box_build(arch, ("UTMALDG",)), gluon_build(arch)]


def faulty_builds(arch):
    """One that spills and lacks what it should have, two that do not compile, one that kills the compiler, one too
    large for its architecture."""
    if arch != 80:
        return []
    broken = KernelBuild(broken_kernel, 80, "broken", {"a": "*fp32"}, {}, (), 4, 3)
    capped = dataclasses.replace(pointer_build(80, ("HGMMA",)), config="capped", maxnreg=32)
    sound = pointer_build(80, ())
    signature = {name: kind for name, kind in sound.signature.items() if name != "inner"}
    short = dataclasses.replace(sound, config="short", signature=signature)
    large = dataclasses.replace(sound, config="large", num_stages=9)
    return [capped, broken, short, gluon_build(80), large]


def copy_builds(arch):
    """The same copy from pointers that are known to be aligned, and from pointers that are not."""
    signature = {"source": "*bf16", "target": "*bf16", "rows": "i32"}
    wide = KernelBuild(
        rows_kernel, arch, "wide", signature, {"ROWS": 8, "WIDTH": 128}, ("source", "target"), 4, 1, narrow=0
    )
    narrow = dataclasses.replace(wide, config="narrow", aligned=(), narrow=15)
    return [wide, narrow, dataclasses.replace(narrow, config="not counted", narrow=None)]


def make_inputs(device, dtype, seed, rows, columns, inner):
    generator = torch.Generator(device).manual_seed(seed % 2**63)
    left = torch.randn(rows, inner, generator=generator, device=device).to(dtype)
    right = torch.randn(inner, columns, generator=generator, device=device).to(dtype)
    return {"a": left.requires_grad_(), "b": right.requires_grad_()}


def flops(direction, rows, columns, inner):
    return 2.0 * rows * columns * inner * (1 if direction == "forward" else 2)


def moved(direction, rows, columns, inner):
    return 2.0 * (rows * inner + inner * columns + rows * columns) * (1 if direction == "forward" else 2)


SPEC = OpSpec(
    name="toy",
    operation=lambda a, b: a @ b,
    reference=lambda a, b: a @ b,
    make_inputs=make_inputs,
    shapes=(
        Shape("square", {"rows": 96, "columns": 96, "inner": 96}),
        Shape("tall", {"rows": 200, "columns": 16, "inner": 33}),
    ),
    small=(Shape("tiny", {"rows": 9, "columns": 5, "inner": 7}),),
    tolerances={torch.float32: (1e-5, 1e-5), torch.bfloat16: (1e-2, 1e-2)},
    flops=flops,
    bytes=moved,
    predicted=lambda direction, **sizes: flops(direction, **sizes) / 5e11,
    builds=sound_builds,
)
FAULTY = dataclasses.replace(SPEC, name="faulty", builds=faulty_builds)
COPIES = dataclasses.replace(SPEC, name="copies", builds=copy_builds)


def model_attention_builds(arch):
    """The kernels of the released model's group skip, and the same at D = 128."""
    wanted = (" D96 bf16 group ", " D128 bf16 group ")
    unwanted = ("masked", "gluon")
    found = [build for build in attention.builds(arch) if any(words in build.config for words in wanted)]
    return [build for build in found if not any(words in build.config for words in unwanted)]


MODEL_ATTENTION = dataclasses.replace(attention.SPEC, name="model_attention", builds=model_attention_builds)


def load():
    return {"toy": SPEC, "faulty": FAULTY, "copies": COPIES, "model_attention": MODEL_ATTENTION}
