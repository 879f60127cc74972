"""Compile one kernel ahead of time, for an architecture that need not be here, and read its binary.

The types in a `KernelBuild`'s signature are those that Triton's own launch writes: "tensordesc<bf16[1, 64, 1, 64]>"
for a host descriptor of a Triton kernel; a Gluon kernel's has the shared layout's repr after the block,
"tensordesc<bf16[64, 64],NVMMASharedLayout(swizzle_byte_width=128, ...)>". Triton 3.6.0 and 3.7.1 write the same.
"""

import re
import subprocess
import tempfile
from collections.abc import Sequence
from typing import Any

import triton
from osp_fast.kernels.spec import KernelBuild
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import ASTSource, CompiledKernel
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction
from triton.runtime.jit import JITFunction

from bench import sass
from osp_fast.errors import UserError

WARP_SIZE = 32


def check_compilable() -> None:
    """Raises UserError where kernels cannot be compiled: in a process whose Triton is its interpreter."""
    if triton.knobs.runtime.interpret:
        raise UserError(
            "TRITON_INTERPRET is set, and interpreted kernels cannot be compiled: unset it for bench static"
        )


def compile_build(build: KernelBuild) -> CompiledKernel:
    """Compile `build` with its own options. Raises ValueError if its signature does not name each argument once."""
    kernel = build.kernel
    if not isinstance(kernel, JITFunction):
        raise ValueError(f"{type(kernel).__name__} is no @triton.jit or @gluon.jit function")
    named = {**build.signature, **dict.fromkeys(build.constants, "constexpr")}
    unlike = set(named) ^ set(kernel.arg_names) | set(build.aligned) - set(named)
    if unlike:
        raise ValueError(f"signature and arguments of {kernel.__name__} differ in {sorted(unlike)}")
    source = (GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource)(
        fn=kernel,
        signature={name: named[name] for name in kernel.arg_names},
        constexprs=build.constants,
        attrs={(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in build.aligned},
    )
    options = {"num_warps": build.num_warps, "num_stages": build.num_stages}
    if build.maxnreg is not None:
        options["maxnreg"] = build.maxnreg
    return triton.compile(source, target=GPUTarget("cuda", build.arch, WARP_SIZE), options=options)


def empty_row(op: str, build: KernelBuild) -> dict[str, Any]:
    """What is known of a build before it is compiled: the keys of `static_row`, without figures."""
    return {
        "op": op,
        "kernel": build.kernel.__name__,
        "arch": f"sm_{build.arch}",
        "config": build.config,
        "registers": None,
        "spills": None,
        "shared": None,
        "instructions": {},
        "loop_instructions": {},
        "access_widths": {},
        "narrow": build.narrow,
        "programs": build.programs,
        "num_warps": build.num_warps,
        "num_stages": build.num_stages,
        "may_spill": build.may_spill,
        "triton": triton.__version__,
    }


def static_row(op: str, build: KernelBuild) -> dict[str, Any]:
    """Compile `build` and read what the GPU would run.

    registers: per thread at launch; `register_splits` has what warp-specialised groups set later
    spills: instructions that load from or store to local memory; stack: bytes of it per thread
    shared: bytes of shared memory per block
    instructions: per class of `sass.CLASSES`; loop_instructions: those in innermost loops; loops: for each of them
    access_widths: bytes that one thread moves -> accesses to global memory that do, see `sass.access_widths`
    warps: per block, with those that warp specialisation adds
    tensor_memory: columns of it that a block needs on sm_100; with too many Triton compiles a trap and nothing else
    missing: opcodes of `build.expects` that the binary does not have
    """
    compiled = compile_build(build)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _cuobjdump("--dump-resource-usage", file.name)
        functions = sass.parse_functions(_cuobjdump("-sass", file.name))
    instructions = [instruction for function in functions for instruction in function]
    if not instructions:
        raise RuntimeError("cuobjdump printed no instructions for the binary")
    loops = [sass.count_classes(loop) for function in functions for loop in sass.innermost_loops(function)]
    counts = sass.count_classes(instructions)
    return empty_row(op, build) | {
        "registers": _resource(usage, "REG"),
        "spills": counts["LDL"] + counts["STL"],
        "shared": compiled.metadata.shared,
        "instructions": counts,
        "loop_instructions": {name: sum(loop[name] for loop in loops) for name in counts},
        "loops": loops,
        "access_widths": sass.access_widths(instructions),
        "stack": _resource(usage, "STACK"),
        "register_splits": sass.register_splits(instructions),
        "warps": compiled.metadata.num_warps,
        "tensor_memory": compiled.metadata.tmem_size,
        "missing": [name for name in build.expects if not sass.count_named(instructions, (name,))],
    }


def _resource(usage: str, name: str) -> int:
    """The largest value of one resource over the functions of a binary."""
    return max(int(value) for value in re.findall(rf"\b{name}:(\d+)", usage))


def _cuobjdump(*arguments: str) -> str:
    command: Sequence[str] = (triton.knobs.nvidia.cuobjdump.path, *arguments)
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
