"""The spec of skiparse attention: the calls of the released model, what they cost, and what is compiled for them.

Predicted on one H100 SXM before any measurement, from 132 multiprocessors and a matrix product of 798 TFLOP/s. Forward
at D = 96: a block of 128 x 128 takes 1,536 clocks of tensor cores, 1,024 of exp2 and about 700 of other arithmetic.
Two warpgroups of one program overlap these only as far as the hardware's scheduler lets them, hence 420 TFLOP/s.
Backward, fused: 3,840 clocks of products a block, 1,024 of exp2, about 1,500 of arithmetic and 48 KiB of additions to
L2 (1.2 GB/ms over the chip), hence 380 TFLOP/s. Every tile fills and drains its pipeline once, 2 us, and takes a step
of 1.5 us, a memory latency and a short product, for every `tail` rows that no full block holds. The host is left out:
a call costs it about 0.1 ms, which alone bounds calls that are shorter.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from osp_fast.kernels import tuning
from osp_fast.kernels.skiparse_attention import (
    attention_flops,
    skiparse_attention,
    skiparse_attention_ref,
    skiparse_attention_triton,
)
from osp_fast.kernels.skiparse_attention_backward import (
    skiparse_attention_bwd_keys_kernel,
    skiparse_attention_bwd_queries_kernel,
    skiparse_attention_bwd_rows_kernel,
)
from osp_fast.kernels.skiparse_attention_forward import skiparse_attention_fwd_kernel
from osp_fast.kernels.skiparse_attention_hopper import builds as hopper_builds
from osp_fast.kernels.skiparse_attention_launch import ROWS_BLOCK, choose_version
from osp_fast.kernels.skiparse_sets import MODE_NUMBER, count_sets, longest_set, split_head_dim
from osp_fast.kernels.spec import LAUNCH_SECONDS, TRITON_TYPE, KernelBuild, OpSpec, Shape, Tunable

MULTIPROCESSORS = 132
PREDICTED_RATE = {"forward": 420e12, "backward": 380e12}  # FLOP/s inside full tiles
PREDICTED_BANDWIDTH = 2.7e12  # bytes/s of the passes beside the products
FILL_SECONDS = 2e-6
TAIL_SECONDS = 1.5e-6

# Tokens of a clip: latent frames x (height / 16) x (width / 16); 93 frames are 24 latent frames.
CLIPS = {"93x352x640": 21120, "93x480x640": 28800, "93x640x640": 38400, "93x720x1280": 86400}


def _sizes(tokens: int, mode: str, **other: Any) -> dict[str, Any]:
    return {"batch": 1, "tokens": tokens, "heads": 24, "head_dim": 96, "mode": mode, "sparse_n": 4, **other}


SHAPES = (
    *(
        Shape(f"{clip} {mode}", _sizes(tokens, mode))
        for clip, tokens in CLIPS.items()
        for mode in ("single", "group", "full")
    ),
    Shape("93x640x640 cross, 300 of 512", _sizes(38400, "full", keys=512, length=300)),
    Shape("93x640x640 cross, masked", _sizes(38400, "full", keys=512, length=300, masked=True)),
    Shape("29x352x640 single", _sizes(7040, "single")),
    Shape("29x352x640 group", _sizes(7040, "group")),
    Shape("16 images 640x640 group", _sizes(1600, "group", batch=16)),
    Shape("16 images 480x480 group, uneven", _sizes(900, "group", batch=16)),
    Shape("16k full, 16 heads of 128", _sizes(16384, "full", heads=16, head_dim=128)),
)
_SMALL = {"heads": 2, "head_dim": 48}
SMALL = (
    Shape("90 full", _sizes(90, "full") | _SMALL),
    Shape("2 of 142 single", _sizes(142, "single", batch=2) | _SMALL | {"heads": 1}),
    Shape("142 group, uneven", _sizes(142, "group") | _SMALL),
    Shape("50 cross, 30 of 77", _sizes(50, "full", keys=77, length=30) | _SMALL),
    Shape("50 cross, masked", _sizes(50, "full", keys=77, length=30, masked=True) | _SMALL),
    Shape("142 group, masked", _sizes(142, "group", length=126, masked=True) | _SMALL),
    Shape("70 full, a head of 96", _sizes(70, "full") | {"heads": 1}),
)


def make_inputs(
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    seed: int,
    batch: int,
    tokens: int,
    heads: int,
    head_dim: int,
    mode: str,
    sparse_n: int,
    keys: int | None = None,
    length: int | None = None,
    masked: bool = False,
) -> dict[str, Any]:
    """q, k, v as the projections write them: slices of one tensor (of two, with other `keys`).

    length: real keys; masked: they are also given as a mask, as by the DiT, which is told of text by its mask.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(rows: int, parts: int) -> torch.Tensor:
        shape = (batch, rows, parts, heads, head_dim)
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    if keys is None:
        q, k, v = normal(tokens, 3).unbind(2)
    else:
        (q,), (k, v) = normal(tokens, 1).unbind(2), normal(keys, 2).unbind(2)
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    lengths = None if length is None else torch.full((batch,), length, dtype=torch.int32, device=device)
    inputs = {"q": q, "k": k, "v": v, "mode": mode, "sparse_n": sparse_n, "key_lengths": lengths}
    if masked:
        inputs["key_mask"] = (torch.arange(k.shape[1], device=device) < lengths[:, None]).contiguous()
    return inputs


def flops(direction: str, *, batch, tokens, heads, head_dim, mode, sparse_n, keys=None, length=None, **_) -> float:
    """Operations of the products alone: two forward, five backward (scores again, dP, dQ, dK, dV)."""
    forward = attention_flops(batch, tokens, length or keys or tokens, heads, head_dim, mode, sparse_n)
    return forward if direction == "forward" else 2.5 * forward


def moved_bytes(
    direction: str, *, batch, tokens, heads, head_dim, mode, sparse_n, keys=None, length=None, **_
) -> float:
    """Bytes of each input and output once, in 16 bits, and of the float32 row vectors."""
    row = 2 * batch * heads * head_dim
    queries, others = row * tokens, row * (length or keys or tokens)
    vector = 4 * batch * heads * tokens
    if direction == "forward":
        return 2 * queries + 2 * others + vector
    return 4 * queries + 4 * others + vector  # q, out, its gradient, dq; k, v, dk, dv


def predicted(
    direction: str, *, batch, tokens, heads, head_dim, mode, sparse_n, keys=None, length=None, masked=False
) -> float:
    """Seconds on one H100 SXM; see the module's docstring."""
    longest = longest_set(tokens, mode, sparse_n)
    other = length or keys or longest
    walked, held = (other, longest) if direction == "forward" else (longest, other)
    tiles = batch * heads * count_sets(mode, sparse_n) * math.ceil(held / 128)
    products = 4 if direction == "forward" else 10
    kernel = "forward" if direction == "forward" else "keys"
    config = tuning.choose(kernel, tuning.Call(90, torch.bfloat16, head_dim, mode, masked, True))
    tail_steps = math.ceil(walked % (config.block_n if direction == "forward" else config.block_m) / config.tail)
    tile = products * 128 * walked * head_dim / (PREDICTED_RATE[direction] / MULTIPROCESSORS)
    tile += FILL_SECONDS + TAIL_SECONDS * tail_steps
    seconds = math.ceil(tiles / MULTIPROCESSORS) * tile + LAUNCH_SECONDS
    if direction == "backward":  # out and its gradient read; the sum of dQ cleared, read and written in 16 bits
        seconds += batch * tokens * heads * head_dim * (2 + 2 + 4 + 4 + 2) / PREDICTED_BANDWIDTH + 3 * LAUNCH_SECONDS
    return seconds


KERNEL_FUNCTIONS = {
    "forward": skiparse_attention_fwd_kernel,
    "keys": skiparse_attention_bwd_keys_kernel,
    "keys, fused": skiparse_attention_bwd_keys_kernel,
    "queries": skiparse_attention_bwd_queries_kernel,
    "rows": skiparse_attention_bwd_rows_kernel,
}
FLOAT32_POINTERS = ("lse", "row_lse", "row_delta", "q_sum")
TENSOR_POINTERS = ("q", "k", "v", "out", "out_grad", "q_grad", "k_grad", "v_grad")
FLOAT_ARGUMENTS = ("scale", "scale_log2")


def kernel_build(
    name: str,
    arch: int,
    dtype: torch.dtype,
    head_dim: int,
    mode: str,
    sparse_n: int,
    masked: bool,
    descriptors: bool,
    bounded: bool = False,
) -> KernelBuild:
    """What the launcher compiles for such a call: one of `KERNEL_FUNCTIONS` with the configuration of the table.

    masked: with a key_mask and key_lengths, as from the DiT; bounded: with key_lengths.
    """
    kernel = KERNEL_FUNCTIONS[name]
    call = tuning.Call(arch, dtype, head_dim, mode, masked, descriptors)
    low, high = split_head_dim(head_dim)
    fused = name == "keys, fused"
    constants = dict(
        MODE=MODE_NUMBER[mode], K=sparse_n, SETS=count_sets(mode, sparse_n), D=head_dim, LOW=low, HIGH=high
    )
    if name == "rows":
        config, label = tuning.Config(ROWS_BLOCK, 0, 0, 4, 3), f"{ROWS_BLOCK} rows"
        constants |= dict(BLOCK_M=ROWS_BLOCK)
    else:
        config = tuning.choose(name.removesuffix(", fused"), call)
        label = str(config)
        constants |= dict(BLOCK_M=config.block_m, BLOCK_N=config.block_n, TAIL=config.tail, HAS_MASK=masked)
        constants |= dict(HAS_LENGTHS=masked or bounded, DESCRIPTORS=descriptors, FUSED=fused, PRECISION="ieee")
    streamed = config.block_m if name.startswith("keys") else config.block_n
    signature = {}
    for argument in kernel.arg_names:
        if argument in constants:
            continue
        if argument.endswith("_view"):
            width = high if "_high_" in argument else low
            if not descriptors or not width or (argument.startswith("sum_") and not fused):
                constants[argument] = None
                continue
            box = [1, streamed // sparse_n, 1, sparse_n, width] if mode == "group" else [1, streamed, 1, width]
            element = "fp32" if argument.startswith("sum_") else TRITON_TYPE[dtype]
            signature[argument] = f"tensordesc<{element}{box}>"
        elif argument == "key_mask" and masked:
            signature[argument] = "*u8"
        elif argument == "key_lengths" and (masked or bounded):
            signature[argument] = "*i32"
        elif argument in ("key_mask", "key_lengths") or (argument == "q_sum" and not fused):
            constants[argument] = None
        elif argument in FLOAT32_POINTERS:
            signature[argument] = "*fp32"
        elif argument in TENSOR_POINTERS:
            signature[argument] = "*" + TRITON_TYPE[dtype]
        else:
            signature[argument] = "fp32" if argument in FLOAT_ARGUMENTS else "i32"
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    strides = ("_batch", "_token", "_head") if head_dim % 16 == 0 else ("_batch", "_token")  # of a multiple of 16 heads
    aligned = [key for key in signature if key.endswith(strides)]
    unaligned = ("key_mask", "key_lengths")  # the kernels ask for no other compilation for them
    aligned += [key for key, kind in signature.items() if kind.startswith("*") and key not in unaligned]
    return KernelBuild(
        kernel=kernel,
        arch=arch,
        config=f"{name} D{head_dim} {TRITON_TYPE[dtype]} {mode}{' masked' if masked else ' bounded' if bounded else ''}"
        f" {'descriptor' if descriptors else 'pointer'} {label}",
        signature=signature,
        constants=constants,
        aligned=tuple(aligned),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        expects=_expected(name, arch, dtype, descriptors),
        may_spill=arch == 100,
    )


def _expected(name: str, arch: int, dtype: torch.dtype, descriptors: bool) -> tuple[str, ...]:
    if name == "rows" or dtype == torch.float32:
        return ()
    product = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}[arch]
    if not descriptors:
        return (product,)
    return (product, "UTMALDG", "UTMAREDG") if name == "keys, fused" else (product, "UTMALDG")


# (dtype, head dimension, mode, masked, bounded): the calls of the model and the bench in every mode, and every other
# head dimension, type and bound once.
BUILT = (
    *((torch.bfloat16, head_dim, mode, False, False) for head_dim in (96, 128, 64) for mode in MODE_NUMBER),
    *((torch.bfloat16, 96, mode, True, False) for mode in MODE_NUMBER),
    *((torch.bfloat16, head_dim, "group", True, False) for head_dim in (128, 64, 48)),
    *((torch.bfloat16, head_dim, "group", False, False) for head_dim in (48, 32, 24)),
    (torch.bfloat16, 96, "full", False, True),
    (torch.float16, 96, "group", False, False),
    (torch.float32, 96, "group", False, False),
    (torch.float32, 128, "group", False, False),
)


def builds(arch: int) -> list[KernelBuild]:
    """What to compile ahead of time for sm_80, sm_90 or sm_100: the calls of `BUILT`, and the kernels beside them."""
    found = []
    for dtype, head_dim, mode, masked, bounded in BUILT:
        descriptors = choose_version(arch, dtype, head_dim, mode, 4) == "descriptor"
        names = ("forward", "keys, fused", "keys", "queries") if descriptors else ("forward", "keys", "queries")
        found += [kernel_build(name, arch, dtype, head_dim, mode, 4, masked, descriptors, bounded) for name in names]
    if arch == 90:  # what serves there where a tensor cannot be read through descriptors
        names = ("forward", "keys", "queries")
        found += [kernel_build(name, arch, torch.bfloat16, 96, "group", 4, False, False) for name in names]
    return [*found, kernel_build("rows", arch, torch.bfloat16, 96, "group", 4, False, False), *hopper_builds(arch)]


def tuning_candidates(inputs: dict[str, Any], arch: int) -> Iterator[tuple[str, tuning.Config]]:
    """Every configuration of every kernel of the version that serves these inputs."""
    q, mode = inputs["q"], inputs["mode"]
    head_dim = q.shape[-1]
    descriptors = choose_version(arch, q.dtype, head_dim, mode, inputs["sparse_n"]) == "descriptor"
    call = tuning.Call(arch, q.dtype, head_dim, mode, inputs.get("key_mask") is not None, descriptors)
    for kernel in tuning.KERNELS:
        yield from ((kernel, config) for config in tuning.candidates(kernel, call))


def tuning_call(inputs: dict[str, Any], kernel: str) -> Callable[[], Any]:
    """The forward or backward operation; "queries" is part of the deterministic backward only."""
    q, k, v = (inputs[name].detach() for name in ("q", "k", "v"))
    masks = inputs.get("key_mask"), inputs.get("key_lengths")
    mode = inputs["mode"]
    options = (*masks, mode, 1 if mode == "full" else inputs["sparse_n"], kernel == "queries", "auto")
    if kernel == "forward":
        return lambda: torch.ops.osp_fast.skiparse_attention(q, k, v, *options)
    out, lse = torch.ops.osp_fast.skiparse_attention(q, k, v, *options)
    cotangent = torch.randn_like(out)
    return lambda: torch.ops.osp_fast.skiparse_attention_backward(cotangent, q, k, v, out, lse, *options)


SPEC = OpSpec(
    name="skiparse_attention",
    operation=skiparse_attention,
    reference=skiparse_attention_ref,
    make_inputs=make_inputs,
    shapes=SHAPES,
    small=SMALL,
    tolerances={torch.float32: (1e-5, 1e-4), torch.bfloat16: (5e-3, 1e-2), torch.float16: (1e-3, 2e-3)},
    flops=flops,
    bytes=moved_bytes,
    predicted=predicted,
    builds=builds,
    tunable=Tunable(tuning_candidates, tuning_call),
    variants={
        "deterministic": functools.partial(skiparse_attention_triton, deterministic=True),
        "warp_specialized": functools.partial(skiparse_attention_triton, version="warp_specialized"),
    },
)
