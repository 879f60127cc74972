"""The spec of the packing for an all-to-all: the calls of the released model, what they cost, what is compiled.

Predicted on one H100 SXM before any measurement: bytes over 92 % (forward) and 85 % (backward) of a device copy's
3.0 TB/s, and 5 us for the launch. Both ways a row is read in one place and written in another, 192 bytes at a time in
bf16: 16 bytes a thread, whole sectors. Forward reads q, k and v of a token as one run; backward writes it so.
At eight ranks a call takes some 50 us, of which the launch is a tenth.
"""

import functools
import math
from typing import Any

import torch
from osp_fast.kernels import sequence_pack_launch
from osp_fast.kernels.rope3d import make_rope3d
from osp_fast.kernels.rope3d_launch import tile_constants
from osp_fast.kernels.rope3d_spec import CLIPS, NARROW_POSITIONS, NARROW_WEIGHT_SUMS, row_kernel_build
from osp_fast.kernels.sequence_pack import SequenceLayout, deal_of, rope_place, sequence_pack, sequence_pack_ref
from osp_fast.kernels.sequence_pack_kernels import sequence_pack_kernel, sequence_unpack_kernel
from osp_fast.kernels.spec import COPY_RATE, LAUNCH_SECONDS, REACHED, KernelBuild, OpSpec, Shape, Tunable
from torch import Tensor


def _sizes(size: tuple[int, int, int], ranks: int, rank: int, **other: Any) -> dict[str, Any]:
    sizes = {"ranks": ranks, "rank": rank, "batch": 1, "size": size, "heads": 24, "head_dim": 96}
    return {**sizes, "rope": True, "norm": False, **other}


SHAPES = (
    Shape("93x640x640, 2 ranks", _sizes(CLIPS["93x640x640"], 2, 1)),
    Shape("93x640x640, 8 ranks", _sizes(CLIPS["93x640x640"], 8, 3)),
    Shape("93x352x640, 8 ranks", _sizes(CLIPS["93x352x640"], 8, 3)),
    Shape("93x720x1280, 8 ranks", _sizes(CLIPS["93x720x1280"], 8, 3)),
    Shape("93x640x640, 7 ranks, uneven", _sizes(CLIPS["93x640x640"], 7, 3)),
    Shape("93x640x640, 8 ranks, with norm", _sizes(CLIPS["93x640x640"], 8, 3, norm=True)),
    Shape("93x640x640, 8 ranks, copied", _sizes(CLIPS["93x640x640"], 8, 3, rope=False)),
    Shape("93x640x640, 16 ranks, 4 sets", _sizes(CLIPS["93x640x640"], 16, 3, sets=4)),
    Shape("16 images 640x640, 8 ranks", _sizes((1, 40, 40), 8, 3, batch=16)),
)
_SMALL = {"heads": 3, "head_dim": 24}
SMALL = (
    Shape("2 of 3x5x7, 2 ranks, uneven", _sizes((3, 5, 7), 2, 1, batch=2) | _SMALL),
    Shape("3x5x7, 2 ranks, with norm", _sizes((3, 5, 7), 2, 1, norm=True) | _SMALL),
    Shape("3x5x7, 3 ranks, copied", _sizes((3, 5, 7), 3, 2, rope=False) | _SMALL),
    Shape("3x4x8, 3 ranks, 4 sets", _sizes((3, 4, 8), 3, 1, sets=4) | _SMALL),
)


def make_inputs(
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    seed: int,
    ranks: int,
    rank: int,
    batch: int,
    size: tuple[int, int, int],
    heads: int,
    head_dim: int,
    rope: bool,
    norm: bool,
    sets: int = 1,
) -> dict[str, Any]:
    """One rank's qkv as the projection writes it, the layout and, if asked for, rope and float32 weights around one.

    Several sets are those of group skip, whole periods on each rank, whose tokens are told their positions.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    layout = SequenceLayout(ranks, rank, math.prod(size), heads, head_dim, batch, sets * sets, sets, sets)
    qkv = normal(batch, layout.tokens_of(rank), 3, heads, head_dim, dtype=dtype).requires_grad_()
    inputs = {"qkv": qkv, "layout": layout, "rope": make_rope3d(size, head_dim, device=device) if rope else None}
    if rope and sets > 1:
        first, last = layout.first_token(), layout.first_token() + layout.tokens_of(rank)
        places = torch.arange(first, last, dtype=torch.int32, device=device)
        inputs["rope"] = inputs["rope"]._replace(positions=places)
    if norm:
        for name in ("q_weight", "k_weight"):
            inputs[name] = (1 + 0.1 * normal(head_dim, dtype=torch.float32)).requires_grad_()
    return inputs


def _tokens(ranks: int, rank: int, size: tuple[int, int, int], sets: int = 1, **others: Any) -> int:
    """Of this rank."""
    return SequenceLayout(ranks, rank, math.prod(size), 1, 1, grain=sets * sets).tokens_of(rank)


def _elements(**sizes: Any) -> int:
    """Of q on this rank."""
    return sizes["batch"] * _tokens(**sizes) * sizes["heads"] * sizes["head_dim"]


def flops(direction: str, *, rope, norm, **sizes) -> float:
    """Six for each pair of channels of q and k; with norm 8 more forward and 22 backward."""
    return _elements(**sizes) * (6 * rope + norm * (8 if direction == "forward" else 22))


def moved_bytes(direction: str, *, rope, norm, **sizes) -> float:
    """In 16 bits: q, k, v read and written once each way; with norm q and k are read again backward.

    Positions, with several sets, are four bytes for each token.
    """
    positions = 4 * _tokens(**sizes) * (rope and sizes.get("sets", 1) > 1)
    return 2 * _elements(**sizes) * (6 if direction == "forward" else 6 + 2 * norm) + positions


def predicted(direction: str, **sizes: Any) -> float:
    """Seconds on one H100 SXM; see the module's docstring. The weights' gradients are one small reduction more."""
    launches = 2 if direction == "backward" and sizes["norm"] else 1
    return moved_bytes(direction, **sizes) / (COPY_RATE * REACHED[direction]) + launches * LAUNCH_SECONDS


def kernel_builds(
    arch: int,
    dtype: torch.dtype,
    label: str,
    heads: int,
    head_dim: int,
    ranks: int,
    parts: int,
    rope: bool,
    norm: bool,
    sets: int = 1,
) -> list[KernelBuild]:
    """Both kernels for q, k and v (parts = 3), or for one tensor. Several sets: in runs of as many, with positions."""
    constants = dict(H=heads, **tile_constants(head_dim, 3 if rope else 1), RANKS=ranks, SETS=sets, RUN=sets)
    constants |= dict(QK=parts == 3, ROPE=rope, POSITIONS=rope and sets > 1, NORM=norm)
    weights = () if norm else ("q_weight", "k_weight")
    axes = () if rope else ("axes",)
    configs = [
        sequence_pack_launch.candidates(name, arch, dtype, head_dim, parts, norm)[0]
        for name in sequence_pack_launch.KERNELS
    ]
    places = NARROW_POSITIONS if constants["POSITIONS"] else 0
    absent = (*axes, *weights, *(("q", "k") if parts == 1 else ()))
    found = [row_kernel_build(sequence_pack_kernel, arch, dtype, label, configs[0], constants, absent, places)]
    absent = (*axes, *weights, *(() if norm else ("q", "k", "weight_sums")))
    absent += ("q_out", "k_out") if parts == 1 else ()
    narrow = NARROW_WEIGHT_SUMS if norm else places
    return [*found, row_kernel_build(sequence_unpack_kernel, arch, dtype, label, configs[1], constants, absent, narrow)]


def builds(arch: int) -> list[KernelBuild]:
    """What the released model launches on 8 and 7 ranks, in sets, with norm, without rope, back; other types once."""
    half = torch.bfloat16
    return [
        build
        for arguments in (
            (half, "8 ranks", 24, 96, 8, 3, True, False),
            (half, "7 ranks", 24, 96, 7, 3, True, False),
            (half, "8 ranks, 16 heads", 16, 96, 8, 3, True, False),
            (half, "16 ranks, 4 sets", 24, 96, 16, 3, True, False, 4),
            (half, "output, 16 ranks, 4 sets", 24, 96, 16, 1, False, False, 4),
            (half, "8 ranks", 24, 96, 8, 3, True, True),
            (half, "received", 3, 96, 1, 3, False, False),
            (half, "output, 8 ranks", 24, 96, 8, 1, False, False),
            (torch.float16, "8 ranks", 24, 96, 8, 3, True, False),
            (torch.float32, "8 ranks", 24, 96, 8, 3, True, False),
        )
        for build in kernel_builds(arch, *arguments)
    ]


def tuning_candidates(inputs: dict[str, Any], arch: int):
    """Every configuration of both kernels, for q, k and v."""
    qkv, norm = inputs["qkv"], "q_weight" in inputs
    for name in sequence_pack_launch.KERNELS:
        for config in sequence_pack_launch.candidates(name, arch, qkv.dtype, qkv.shape[4], 3, norm):
            yield name, config


def tuning_call(inputs: dict[str, Any], kernel: str):
    """A call that launches one of the kernels in the thread that makes it."""
    detached = {name: x.detach() if isinstance(x, Tensor) else x for name, x in inputs.items()}
    if kernel == "sequence_pack forward":
        return functools.partial(sequence_pack, **detached)
    qkv, layout, rope = detached["qkv"], detached["layout"], detached["rope"]
    place = rope_place(rope, layout)
    weights = [detached.get(name) for name in ("q_weight", "k_weight")]
    saved = qkv if weights[0] is not None else None
    sizes = (*qkv.shape[:2], *qkv.shape[3:])
    buffer = torch.randn_like(qkv).flatten()
    operation = torch.ops.osp_fast.sequence_pack_backward
    return functools.partial(operation, buffer, sizes, *place, saved, *weights, 1e-6, deal_of(layout))


SPEC = OpSpec(
    name="sequence_pack",
    operation=sequence_pack,
    reference=sequence_pack_ref,
    make_inputs=make_inputs,
    shapes=SHAPES,
    small=SMALL,
    tolerances={torch.float32: (1e-6, 1e-6), torch.bfloat16: (4e-3, 4e-3), torch.float16: (5e-4, 5e-4)},
    flops=flops,
    bytes=moved_bytes,
    predicted=predicted,
    builds=builds,
    tunable=Tunable(tuning_candidates, tuning_call),
)
