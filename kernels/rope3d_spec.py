"""The spec of 3D RoPE: the calls of the released model, what they cost, and what is compiled for them.

Predicted on one H100 SXM before any measurement: bytes over 92 % (forward) and 85 % (backward) of a device copy's
3.0 TB/s, and 5 us for the launch. Instructions do not bind: a warp of the forward issues some 340 for 3 KiB in and out
(6 of 8 lanes at work), a third of what a multiprocessor can issue while memory moves that much; backward it is a
quarter, with norm a third. Backward is given less for its six streams rather than four, and for rows of 192 bytes that
three tensors give in turn.
"""

import functools
from typing import Any

import torch
from osp_fast.kernels import rope3d_launch
from osp_fast.kernels.rope3d import Rope3D, make_rope3d, rope3d, rope3d_ref
from osp_fast.kernels.rope3d_kernels import rope3d_bwd_kernel, rope3d_fwd_kernel
from osp_fast.kernels.spec import COPY_RATE, LAUNCH_SECONDS, REACHED, TRITON_TYPE, KernelBuild, OpSpec, Shape, Tunable
from torch import Tensor

# Tokens of a clip as (latent frames, height / 16, width / 16); 93 frames are 24 latent frames.
CLIPS = {"93x352x640": (24, 22, 40), "93x640x640": (24, 40, 40), "93x720x1280": (24, 45, 80), "29x352x640": (8, 22, 40)}


def _sizes(size: tuple[int, int, int], **other: Any) -> dict[str, Any]:
    return {"batch": 1, "size": size, "heads": 24, "head_dim": 96, "norm": False, **other}


SHAPES = (
    *(Shape(clip, _sizes(size)) for clip, size in CLIPS.items()),
    Shape("16 images 640x640", _sizes((1, 40, 40), batch=16)),
    Shape("93x640x640, with norm", _sizes(CLIPS["93x640x640"], norm=True)),
    Shape("93x640x640, in any order", _sizes(CLIPS["93x640x640"], positions=True)),
)
SMALL = (
    Shape("2 of 3x5x7", _sizes((3, 5, 7), batch=2, heads=3, head_dim=24)),
    Shape("3x5x7, with norm", _sizes((3, 5, 7), heads=3, head_dim=24, norm=True)),
    Shape("3x5x7, in any order", _sizes((3, 5, 7), heads=3, head_dim=24, positions=True)),
)


def make_inputs(
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    seed: int,
    batch: int,
    size: tuple[int, int, int],
    heads: int,
    head_dim: int,
    norm: bool,
    positions: bool = False,
) -> dict[str, Any]:
    """qkv as the projection writes it, the clip's table and, if asked for, positions and float32 weights around one."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    tokens = size[0] * size[1] * size[2]
    qkv = normal(batch, tokens, 3, heads, head_dim, dtype=dtype).requires_grad_()
    inputs = {"qkv": qkv, "rope": make_rope3d(size, head_dim, device=device)}
    if positions:
        order = torch.randperm(tokens, generator=generator, device=device).int()
        inputs["rope"] = inputs["rope"]._replace(positions=order)
    if norm:
        for name in ("q_weight", "k_weight"):
            inputs[name] = (1 + 0.1 * normal(head_dim, dtype=torch.float32)).requires_grad_()
    return inputs


def flops(direction: str, *, batch, size, heads, head_dim, norm, positions=False) -> float:
    """Six for each pair of channels; with norm 8 more forward and 22 backward."""
    pairs = batch * size[0] * size[1] * size[2] * heads * head_dim  # of q and of k, D/2 each
    return pairs * (6 + norm * (8 if direction == "forward" else 22))


def moved_bytes(direction: str, *, batch, size, heads, head_dim, norm, positions=False) -> float:
    """In 16 bits: q and k read and written; backward three gradients read, three written, with norm q and k again.

    Positions are four bytes for each token. The table (8 D/6 (T + H + W) bytes), the weights and the sums for their
    gradients are small and left out.
    """
    tokens = size[0] * size[1] * size[2]
    tensor = 2 * batch * tokens * heads * head_dim
    return (4 if direction == "forward" else 6 + 2 * norm) * tensor + 4 * tokens * positions


def predicted(direction: str, **sizes: Any) -> float:
    """Seconds on one H100 SXM; see the module's docstring. The weights' gradients are one small reduction more."""
    launches = 2 if direction == "backward" and sizes["norm"] else 1
    return moved_bytes(direction, **sizes) / (COPY_RATE * REACHED[direction]) + launches * LAUNCH_SECONDS


def in_place(qkv: Tensor, rope: Rope3D, **weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The variant in place. Where gradients are taken, and results checked, it works on a copy: `qkv` is a leaf."""
    return rope3d(qkv.clone() if torch.is_grad_enabled() else qkv, rope, **weights, inplace=True)


FLOAT32_POINTERS = ("axes", "q_weight", "k_weight", "weight_sums")
INT_ARGUMENTS = ("batches", "tokens", "start", "frames", "height", "width", "blocks")


def row_kernel_build(
    kernel: Any,
    arch: int,
    dtype: torch.dtype,
    label: str,
    config: Any,
    constants: dict[str, Any],
    absent: tuple[str, ...],
    narrow: int,
) -> KernelBuild:
    """A kernel over the tile of `rope3d_kernels` as it is launched, its `absent` pointers being None."""
    absent += () if constants["POSITIONS"] else ("positions",)
    constants = {**constants, "ROWS": config.rows, **dict.fromkeys(absent)}
    signature = {}
    for argument in kernel.arg_names:
        if argument in constants:
            continue
        if "_stride_" in argument or argument in INT_ARGUMENTS:
            signature[argument] = "i32"
        elif argument == "eps":
            signature[argument] = "fp32"
        elif argument == "positions":
            signature[argument] = "*i32"
        else:
            signature[argument] = "*fp32" if argument in FLOAT32_POINTERS else f"*{TRITON_TYPE[dtype]}"
    return KernelBuild(
        kernel=kernel,
        arch=arch,
        config=f"{label} {TRITON_TYPE[dtype]} D{constants['D']}{_extras(constants)}, {config}",
        signature=signature,
        constants=constants,
        aligned=tuple(name for name, kind in signature.items() if kind.startswith("*") or "_stride_" in name),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        # The gradient with norm in float32: four instructions on sm_80, under Triton 3.6.0 alone.
        may_spill=kernel is rope3d_bwd_kernel and arch == 80 and dtype == torch.float32 and constants["NORM"],
        narrow=narrow,
        programs=config.programs if "weight_sums" in signature else None,  # with sums programs walk over rows
    )


def builds(arch: int) -> list[KernelBuild]:
    """Both kernels for the released model, with positions, with norm, in the other types; and for a smaller head."""
    found = []
    for dtype, heads, head_dim, norm, positions in (
        (torch.bfloat16, 24, 96, False, False),
        (torch.bfloat16, 24, 96, False, True),
        (torch.bfloat16, 24, 96, True, False),
        (torch.float16, 24, 96, False, False),
        (torch.float32, 24, 96, False, False),
        (torch.float32, 24, 96, True, False),
        (torch.bfloat16, 3, 48, False, False),
    ):
        shared = dict(H=heads, **rope3d_launch.tile_constants(head_dim), POSITIONS=positions, NORM=norm)
        weights, places = () if norm else ("q_weight", "k_weight"), NARROW_POSITIONS if positions else 0
        forward, backward = (
            rope3d_launch.candidates(name, arch, dtype, head_dim, norm)[0] for name in rope3d_launch.KERNELS
        )
        found.append(row_kernel_build(rope3d_fwd_kernel, arch, dtype, "q and k", forward, shared, weights, places))
        absent = () if norm else ("q", "k", *weights, "weight_sums")
        narrow = NARROW_WEIGHT_SUMS if norm else places
        constants = {**shared, "HAS_V": True}
        found.append(row_kernel_build(rope3d_bwd_kernel, arch, dtype, "q, k, v", backward, constants, absent, narrow))
    return found


def _extras(constants: dict[str, Any]) -> str:
    return f"{' positions' if constants['POSITIONS'] else ''}{' norm' if constants['NORM'] else ''}"


NARROW_POSITIONS = 1  # four bytes for each row
NARROW_WEIGHT_SUMS = 4  # the sums of a program, stored once at its end


def tuning_candidates(inputs: dict[str, Any], arch: int):
    """Every configuration of both kernels."""
    qkv = inputs["qkv"]
    for name in rope3d_launch.KERNELS:
        norm = "q_weight" in inputs
        for config in rope3d_launch.candidates(name, arch, qkv.dtype, qkv.shape[4], norm):
            yield name, config


def tuning_call(inputs: dict[str, Any], kernel: str):
    """A call that launches one of the kernels in the thread that makes it."""
    qkv, rope = inputs["qkv"].detach(), inputs["rope"]
    q, k, v = qkv.unbind(2)
    weights = [inputs[name].detach() if name in inputs else None for name in ("q_weight", "k_weight")]
    if kernel == "rope3d forward":
        return functools.partial(torch.ops.osp_fast.rope3d, q, k, *rope, *weights, 1e-6)
    normed = (q, k) if weights[0] is not None else (None, None)
    grads = (torch.randn_like(q), torch.randn_like(k), torch.randn_like(v))
    return functools.partial(torch.ops.osp_fast.rope3d_backward, *grads, *rope, *normed, *weights, 1e-6)


SPEC = OpSpec(
    name="rope3d",
    operation=rope3d,
    reference=rope3d_ref,
    make_inputs=make_inputs,
    shapes=SHAPES,
    small=SMALL,
    tolerances={torch.float32: (1e-6, 1e-6), torch.bfloat16: (4e-3, 4e-3), torch.float16: (5e-4, 5e-4)},
    flops=flops,
    bytes=moved_bytes,
    predicted=predicted,
    builds=builds,
    variants={"in place": in_place},
    tunable=Tunable(tuning_candidates, tuning_call),
)
