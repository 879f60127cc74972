"""The spec of `adaln.py`: the forms that the released model calls, what they cost, and what is compiled for them.

Predicted on one H100 SXM before any measurement, at a copy rate of 3.0 TB/s (13 bytes a clock and multiprocessor). A
row of 2304 channels of the fused form needs 516 instructions of 4 warps forward: 516 clocks of issue on a
multiprocessor's four schedulers, where its 18 KB take 1,420 to move; backward 482 of 8 warps, 964 clocks, where 27 KB
take 2,130. The plain norm is closest to its limit: 327 clocks of issue to 710 of memory forward. So memory binds, and
what is lost are the starts and ends of programs and the row sums, where only the prefetched loads keep the memory busy:
92 % of the copy rate forward; 85 % backward, where one or two programs fill a multiprocessor.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
from osp_fast.kernels import adaln, adaln_launch
from osp_fast.kernels.adaln_kernels import adaln_bwd_kernel, adaln_bwd_sums_kernel, adaln_fwd_kernel
from osp_fast.kernels.spec import COPY_RATE, LAUNCH_SECONDS, REACHED, TRITON_TYPE, KernelBuild, OpSpec, Shape, Tunable
from torch import Tensor

EPS = 1e-6
# form -> whether it adds y, gates it, normalises and modulates
FORMS = {
    "norm": (False, False, True),
    "gate": (True, True, False),
    "gate norm": (True, True, True),
    "add norm": (True, False, True),
}
# Rows that must move, each once: (forward, backward)
ROW_PASSES = {"norm": (2, 3), "gate": (3, 3), "gate norm": (4, 6), "add norm": (4, 4)}
CLIPS = {"93x352x640": 21120, "93x480x640": 28800, "93x640x640": 38400, "93x720x1280": 86400, "29x352x640": 7040}


def _sizes(batch: int, tokens: int, form: str, **other: Any) -> dict[str, Any]:
    return {"batch": batch, "tokens": tokens, "width": 2304, "form": form, **other}


SHAPES = (
    *(Shape(f"{clip} {form}", _sizes(1, tokens, form)) for clip, tokens in CLIPS.items() for form in FORMS),
    *(Shape(f"16 images 640x640 {form}", _sizes(16, 1600, form)) for form in FORMS),
    Shape("93x640x640 norm, weights", _sizes(1, 38400, "norm", weighted=True)),
    Shape("93x640x640 norm, RMS", _sizes(1, 38400, "norm", norm="rms")),
)
# 35 rows of 100 channels end inside a block, and inside a vector of 128.
SMALL = (
    *(Shape(f"2 of 35 x 100 {form}", _sizes(2, 35, form) | {"width": 100}) for form in FORMS),
    Shape("2 of 35 x 100 norm, weights", _sizes(2, 35, "norm", weighted=True) | {"width": 100}),
    Shape("2 of 35 x 100 norm, RMS", _sizes(2, 35, "norm", norm="rms") | {"width": 100}),
)


def make_inputs(
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    seed: int,
    batch: int,
    tokens: int,
    width: int,
    form: str,
    norm: str = "layer",
    weighted: bool = False,
) -> dict[str, Any]:
    """Tensors as a block has them: vectors of samples are rows of a (B, 6, d) tensor, tables of a (6, d) parameter."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    adds, gated, modulates = FORMS[form]
    time, table = normal(batch, 6, width), normal(6, width)
    inputs: dict[str, Any] = {"x": normal(batch, tokens, width)}
    if adds:
        inputs["y"] = normal(batch, tokens, width)
    if gated:
        inputs |= {"gate": time[:, 2], "gate_table": table[2]}
    if modulates:
        inputs |= {"shift": time[:, 0], "scale": time[:, 1], "shift_table": table[0], "scale_table": table[1]}
    if weighted:
        inputs |= {"weight": normal(width), "bias": normal(width)}
    inputs = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    return inputs | ({"eps": EPS, "norm": norm} if modulates else {})


def operation(**inputs: Any) -> Tensor | tuple[Tensor, Tensor]:
    """The public function for the form that the inputs are of."""
    return _call(adaln.norm_modulate, adaln.gate_residual, adaln.gate_residual_norm_modulate, inputs)


def reference(**inputs: Any) -> Tensor | tuple[Tensor, Tensor]:
    """The reference of the same."""
    functions = (adaln.norm_modulate_ref, adaln.gate_residual_ref, adaln.gate_residual_norm_modulate_ref)
    return _call(*functions, inputs)


def _call(modulate: Callable, add: Callable, both: Callable, inputs: dict[str, Any]) -> Tensor | tuple[Tensor, Tensor]:
    if "y" not in inputs:
        return modulate(**inputs)
    return both(**{"gate": None, **inputs}) if "shift" in inputs else add(**inputs)


def flops(direction: str, *, batch: int, tokens: int, width: int, form: str, **_: Any) -> float:
    """About: 2 to add with a gate, 8 to normalise and modulate, and as much again and half for the gradients."""
    adds, gated, modulates = FORMS[form]
    each = adds + gated + 8 * modulates
    return batch * tokens * width * each * (1 if direction == "forward" else 2.5)


def moved_bytes(
    direction: str, *, batch: int, tokens: int, width: int, form: str, norm: str = "layer", weighted: bool = False,
    element: int = 2,
) -> float:  # fmt: skip
    """Rows, statistics of rows, and vectors, each read or written once; `element` is the bytes of a number."""
    forward = direction == "forward"
    _, gated, modulates = FORMS[form]
    rows = ROW_PASSES[form][0 if forward else 1] * batch * tokens * width * element
    statistics = modulates * (4 if norm == "rms" else 8) * batch * tokens
    # forward reads all vectors; backward all but shift and bias, and writes a gradient for each
    per_sample = gated + 2 * modulates
    shared = per_sample + 2 * weighted
    vectors = (per_sample * batch + shared) * width * element
    if not forward:
        read = gated * (batch + 1) + modulates * (batch + 1) + 2 * weighted
        vectors += read * width * element
    return rows + statistics + vectors


def predicted(direction: str, **sizes: Any) -> float:
    """Seconds on one H100 SXM; see the module's docstring."""
    launches = 1 if direction == "forward" else 2
    return moved_bytes(direction, **sizes) / (COPY_RATE * REACHED[direction]) + launches * LAUNCH_SECONDS


FLOAT32 = ("means", "inverses", "partial")
KERNELS = {"forward": adaln_fwd_kernel, "backward": adaln_bwd_kernel, "sums": adaln_bwd_sums_kernel}


def kernel_build(
    name: str, arch: int, dtype: torch.dtype, form: str, width: int = 2304, norm: str = "layer", weighted: bool = False
) -> KernelBuild:
    """One of `KERNELS` as the launcher compiles it for a form, with tables, in one type."""
    kernel = KERNELS[name]
    adds, gated, modulates = FORMS[form]
    constants: dict[str, Any] = dict(D=width, GATED=gated, GATE_TABLE=gated, MODULATES=modulates, TABLE=modulates)
    constants |= dict(WEIGHTED=weighted, BIASED=weighted, RMS=norm == "rms", ADDS=adds)
    if name == "sums":
        config, label = tuning_of_sums(), f"{adaln_launch.SUM_ROWS}x{adaln_launch.SUM_COLUMNS}"
        constants |= dict(ROWS=adaln_launch.SUM_ROWS, COLUMNS=adaln_launch.SUM_COLUMNS, STAGES=adaln_launch.SUM_STAGES)
    else:
        wanted = dict(adds=adds if name == "forward" else gated, modulates=modulates, width=width, dtype=dtype)
        config = adaln_launch.candidates(f"adaln {name}", arch, **wanted)[0]
        label = str(config)
        constants |= dict(BLOCK=triton.next_power_of_2(width), ROWS=config.rows, STAGES=config.num_stages)
        constants |= dict(FROM_RESIDUAL=adds)
    absent = [] if weighted else ["weight", "bias"]
    absent += [] if gated else ["gate", "gate_table"]
    absent += [] if modulates else ["shift", "scale", "shift_table", "scale_table", "modulated_grad"]
    absent += [] if adds else ["residual_grad"]
    absent += [] if (adds if name == "forward" else gated) else ["y"]
    constants |= dict.fromkeys(absent)
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    signature = {}
    for argument in kernel.arg_names:
        if argument in constants:
            continue
        if argument in ("tokens", "batch", "programs") or argument.endswith(("_batch", "_token")):
            signature[argument] = "i32"
        elif argument == "eps":
            signature[argument] = "fp32"
        else:
            signature[argument] = "*fp32" if argument in FLOAT32 else "*" + TRITON_TYPE[dtype]
    aligned = [key for key, kind in signature.items() if kind.startswith("*") or key.endswith(("_batch", "_token"))]
    # Narrow are the statistics of rows, each in as many places as there are stages, and the vectors of the small sum.
    narrow = {"forward": 2 * modulates, "backward": 6 * modulates, "sums": None}[name]
    return KernelBuild(
        kernel=kernel,
        arch=arch,
        config=f"{form}{', RMS' if norm == 'rms' else ''}{', weights' if weighted else ''} {name} d{width}"
        f" {TRITON_TYPE[dtype]} {label}",
        signature=signature,
        constants=constants,
        aligned=tuple(aligned),
        num_warps=config.num_warps,
        num_stages=3,
        expects=() if name == "sums" else ("LDGSTS",),
        narrow=narrow,
        programs=None if name == "sums" else config.programs,
    )


def tuning_of_sums() -> adaln_launch.RowConfig:
    """The small sum has one configuration."""
    return adaln_launch.RowConfig(adaln_launch.SUM_ROWS, 4)


def builds(arch: int) -> list[KernelBuild]:
    """Every form in bf16; the fused one in float16 and float32 too, the norm also with weights and as RMSNorm."""
    found = [kernel_build(name, arch, torch.bfloat16, form) for form in FORMS for name in KERNELS]
    for dtype in (torch.float16, torch.float32):
        found += [kernel_build(name, arch, dtype, "gate norm") for name in KERNELS]
    found += [kernel_build(name, arch, torch.bfloat16, "norm", weighted=True) for name in KERNELS]
    return found + [kernel_build(name, arch, torch.bfloat16, "norm", norm="rms") for name in ("forward", "backward")]


def tune_candidates(inputs: dict[str, Any], arch: int) -> Iterator[tuple[str, Any]]:
    """(kernel, configuration) for the form of these inputs."""
    x = inputs["x"]
    shared = dict(modulates="scale" in inputs, width=x.shape[2], dtype=x.dtype)
    for kernel, adds in (("adaln forward", "y" in inputs), ("adaln backward", "gate" in inputs)):
        for config in adaln_launch.candidates(kernel, arch, adds=adds, **shared):
            yield kernel, config


def tune_call(inputs: dict[str, Any], kernel: str) -> Callable[[], Any]:
    """The forward or backward operation itself."""
    names = ("x", "y", "gate", "gate_table", "shift", "scale", "shift_table", "scale_table", "weight", "bias")
    tensors = [inputs[name].detach() if name in inputs else None for name in names]
    options = (inputs.get("eps", 0.0), inputs.get("norm") == "rms", tensors[0].dtype)
    if kernel == "adaln forward":
        return lambda: torch.ops.osp_fast.adaln(*tensors, *options)
    residual, modulated, means, inverses = torch.ops.osp_fast.adaln(*tensors, *options)
    grads = [torch.randn_like(out) if out.numel() else None for out in (residual, modulated)]
    saved = [residual if residual.numel() else tensors[0], tensors[1] if "gate" in inputs else None, *tensors[2:]]
    return lambda: torch.ops.osp_fast.adaln_backward(*grads, *saved, means, inverses, options[1])


SPEC = OpSpec(
    name="adaln",
    operation=operation,
    reference=reference,
    make_inputs=make_inputs,
    shapes=SHAPES,
    small=SMALL,
    tolerances={torch.float32: (1e-6, 1e-5), torch.bfloat16: (4e-3, 8e-3), torch.float16: (5e-4, 1e-3)},
    flops=flops,
    bytes=functools.partial(moved_bytes, element=2),
    predicted=predicted,
    builds=builds,
    tunable=Tunable(tune_candidates, tune_call),
)
