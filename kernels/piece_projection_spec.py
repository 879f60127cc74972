"""The spec of the projection from pieces: the calls of the released model, what they cost, what is compiled for them.

Predicted on one H100 SXM before any measurement, as the causal convolution is, from 132 multiprocessors of 1.755 GHz,
4,096 operations a clock, and 36 bytes a clock and multiprocessor from L2. A step of a tile of 128 rows and 256 output
channels, over one head of 96 channels, takes the tensor cores 1,536 clocks and L2 2,048: L2 binds. Barriers, and the
wait between the two products of a step, cost 200 more. A tile fills its pipeline in 2,500 clocks and stores in 3,500;
what is added takes 3,000. One program is on a multiprocessor, so nothing hides these; at 4,800 rows a third round of
tiles is 59 % full. Gradients are batched products of cuBLAS, put at 500 TFLOP/s; with several samples the output's
gradient is copied first, and the bias' gradient reads it once more.
"""

import functools
import math
from typing import Any

import torch
from osp_fast.kernels import piece_projection_launch as launch
from osp_fast.kernels.piece_projection import project_pieces, project_pieces_ref, project_pieces_triton
from osp_fast.kernels.piece_projection_kernels import piece_projection_fwd_kernel
from osp_fast.kernels.piece_projection_launch import ProductConfig, candidates, choose_version
from osp_fast.kernels.rope3d_spec import CLIPS
from osp_fast.kernels.sequence_pack_layout import SequenceLayout
from osp_fast.kernels.skiparse_sets import split_head_dim
from osp_fast.kernels.spec import COPY_RATE, LAUNCH_SECONDS, REACHED, TRITON_TYPE, KernelBuild, OpSpec, Shape, Tunable
from torch import Tensor

CLOCK = 1.755e9
MULTIPROCESSORS = 132
OPERATIONS_PER_CLOCK = 4096  # of a multiprocessor's tensor cores, in 16 bits
L2_BYTES_PER_CLOCK = 36
STEP_CLOCKS, FILL_CLOCKS, STORE_CLOCKS, ADD_CLOCKS = 200, 2500, 3500, 3000
BACKWARD_RATE = 500e12
FEATURES = 2304


def _sizes(size: tuple[int, int, int], ranks: int, heads: int = 24, **other: Any) -> dict[str, Any]:
    sizes = {"ranks": ranks, "rank": 0, "batch": 1, "size": size, "heads": heads, "all_heads": 24, "head_dim": 96}
    return {**sizes, "features": FEATURES, "add": False, **other}


SHAPES = (
    Shape("93x640x640, 8 ranks", _sizes(CLIPS["93x640x640"], 8)),
    Shape("93x640x640, 8 ranks, 16 of 24 heads", _sizes(CLIPS["93x640x640"], 8, 16)),
    Shape("93x640x640, 8 ranks, 8 of 24 heads, added", _sizes(CLIPS["93x640x640"], 8, 8, add=True)),
    Shape("93x640x640, 2 ranks", _sizes(CLIPS["93x640x640"], 2)),
    Shape("93x640x640, 7 ranks, uneven", _sizes(CLIPS["93x640x640"], 7)),
    Shape("93x352x640, 8 ranks", _sizes(CLIPS["93x352x640"], 8)),
    Shape("2 of 93x352x640, 8 ranks", _sizes(CLIPS["93x352x640"], 8, batch=2)),
    Shape("93x720x1280, 8 ranks", _sizes(CLIPS["93x720x1280"], 8)),
)
_SMALL = {"all_heads": 3, "head_dim": 24, "features": 40}
SMALL = (
    Shape("3x5x5, 2 ranks, uneven", _sizes((3, 5, 5), 2, 3, batch=2) | _SMALL),
    Shape("3x5x5, 2 ranks, 2 of 3 heads, added", _sizes((3, 5, 5), 2, 2, add=True) | _SMALL),
    Shape("3x5x5, 3 ranks", _sizes((3, 5, 5), 3, 3) | _SMALL),
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
    all_heads: int,
    head_dim: int,
    features: int,
    add: bool,
) -> dict[str, Any]:
    """A rank's buffer, its heads' columns of the weight of all heads, and the bias, or what another round has given."""
    generator = torch.Generator(device).manual_seed(seed)
    normal = functools.partial(torch.randn, generator=generator, device=device, dtype=dtype)
    layout = SequenceLayout(ranks, rank, math.prod(size), heads, head_dim, batch)
    tokens, width = layout.tokens_of(rank), heads * head_dim
    weight = normal((features, all_heads * head_dim)) * width**-0.5
    inputs = {
        "buffer": normal(batch * tokens * width).requires_grad_(),
        "weight": weight[:, (all_heads - heads) * head_dim :].requires_grad_(),
        "bias": None if add else normal(features).requires_grad_(),
        "layout": layout,
    }
    if add:
        inputs["add"] = normal((batch, tokens, features)).requires_grad_()
    return inputs


def _product(ranks, rank, batch, size, heads, all_heads, head_dim, features, add) -> tuple[int, int, int]:
    """Rows, output channels and what is summed over."""
    tokens = SequenceLayout(ranks, rank, math.prod(size), heads, head_dim).tokens_of(rank)
    return batch * tokens, features, heads * head_dim


def flops(direction: str, **sizes: Any) -> float:
    """One product; backward two, for the buffer and for the weight."""
    return 2 * math.prod(_product(**sizes)) * (1 if direction == "forward" else 2)


def moved_bytes(direction: str, **sizes: Any) -> float:
    """In 16 bits: the buffer, the weight and the output, or the bias and what is added, once each.

    Backward: the output's gradient, the buffer and the weight read, the gradients of both and of the bias written; that
    of what is added is the output's own.
    """
    rows, features, width = _product(**sizes)
    bias = 0 if sizes["add"] else features
    buffer, weight, out = rows * width, features * width, rows * features
    if direction == "backward":
        return 2 * (2 * buffer + 2 * weight + out + bias)
    return 2 * (buffer + weight + out + bias + (out if sizes["add"] else 0))


def predicted(direction: str, **sizes: Any) -> float:
    """Seconds on one H100 SXM; see the module's docstring."""
    rows, features, _ = _product(**sizes)
    if direction == "backward":
        moved, kinds = 2 * rows * features, 2 if sizes["heads"] % sizes["ranks"] else 1
        copies = 2 * moved * (sizes["batch"] > 1) + moved * (not sizes["add"])
        launches = 2 * kinds + (sizes["batch"] > 1) + (not sizes["add"])
        return (
            flops(direction, **sizes) / BACKWARD_RATE
            + copies / (COPY_RATE * REACHED[direction])
            + (launches * LAUNCH_SECONDS)
        )
    config = candidates(90, torch.bfloat16, sizes["head_dim"], True)[0]
    products = 2 * config.block_m * config.block_n * sizes["head_dim"] / OPERATIONS_PER_CLOCK
    brought = 2 * (config.block_m + config.block_n) * sizes["head_dim"] / L2_BYTES_PER_CLOCK
    clocks = sizes["heads"] * (max(products, brought) + STEP_CLOCKS) + FILL_CLOCKS + STORE_CLOCKS
    clocks += ADD_CLOCKS * sizes["add"]
    tiles = math.ceil(rows / config.block_m) * math.ceil(features / config.block_n)
    return math.ceil(tiles / MULTIPROCESSORS) * clocks / CLOCK + LAUNCH_SECONDS


MORE_VIEWS, VIEWS = ("more_low_view", "more_high_view"), ("low_view", "high_view")
WEIGHT_VIEWS = ("weight_low_view", "weight_high_view")
NARROW_BIAS = 16  # accesses of the bias, a few values for each program, at most


def kernel_build(
    arch: int,
    dtype: torch.dtype,
    heads: int = 24,
    head_dim: int = 96,
    ranks: int = 8,
    bias: bool = True,
    add: bool = False,
    descriptors: bool = False,
    precision: str = "ieee",
    config: ProductConfig | None = None,
) -> KernelBuild:
    """What the launcher compiles for such a call; `config` is the table's unless given."""
    config = config or candidates(arch, dtype, head_dim, descriptors)[0]
    low, high = split_head_dim(head_dim)
    constants = dict(H=heads, D=head_dim, RANKS=ranks, OUT=FEATURES, LOW=low, HIGH=high)
    constants |= dict(BLOCK_M=config.block_m, BLOCK_N=config.block_n, HAS_BIAS=bias, HAS_ADD=add)
    constants |= dict(DESCRIPTORS=descriptors, PRECISION=precision)
    present = (*(("bias",) if bias else ()), *(("add",) if add else ()))
    if descriptors:
        present += (MORE_VIEWS if heads % ranks else ()) + (VIEWS if heads >= ranks else ()) + WEIGHT_VIEWS
    optional = ("bias", "add", *MORE_VIEWS, *VIEWS, *WEIGHT_VIEWS)
    absent = [name for name in optional if name not in present or (name.endswith("high_view") and not high)]
    constants |= dict.fromkeys(absent)
    signature = {}
    for name in piece_projection_fwd_kernel.arg_names:
        if name in constants:
            continue
        if name.endswith("_view"):
            rows = config.block_n if name in WEIGHT_VIEWS else config.block_m
            signature[name] = f"tensordesc<{TRITON_TYPE[dtype]}{[rows, high if 'high' in name else low]}>"
        else:
            pointer = name in ("buffer", "weight", "bias", "add", "out")
            signature[name] = f"*{TRITON_TYPE[dtype]}" if pointer else "i32"
    multiplied = dtype != torch.float32 or precision == "tf32"
    expects = ({80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}[arch],) if multiplied else ()
    how = f"{'descriptor' if descriptors else 'pointer'}{' bias' if bias else ''}{' add' if add else ''}"
    kind = f"{TRITON_TYPE[dtype]}{' tf32' if precision == 'tf32' else ''} {how}"
    return KernelBuild(
        kernel=piece_projection_fwd_kernel,
        arch=arch,
        config=f"{heads} heads D{head_dim} {ranks} ranks {kind} {config}",
        signature=signature,
        constants=constants,
        aligned=tuple(name for name, type_ in signature.items() if type_.startswith("*") or "_stride_" in name),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        expects=(*expects, "UTMALDG") if descriptors else expects,
        narrow=NARROW_BIAS,
    )


def builds(arch: int) -> list[KernelBuild]:
    """The released model in one round and in two, unevenly shared; other types, heads and ways to read once each."""
    half = torch.bfloat16
    descriptors = choose_version(arch, half, 96) == "descriptor"
    build = functools.partial(kernel_build, arch, half, descriptors=descriptors)
    found = [
        build(),
        build(heads=16),
        build(heads=8, bias=False, add=True),
        build(ranks=7),
        build(ranks=7, add=True),
        build(heads=5, bias=False),
        build(head_dim=64, add=True),
        build(head_dim=128, add=True),
        kernel_build(arch, torch.float16, descriptors=descriptors),
        *(kernel_build(arch, torch.float32, precision=precision) for precision in ("ieee", "tf32")),
    ]
    return [*found, kernel_build(arch, half, ranks=7, add=True)] if descriptors else found


def _tuned(inputs: dict[str, Any], arch: int):
    """The configurations of a call, wherever its tensors lie."""
    dtype, head_dim = inputs["buffer"].dtype, inputs["layout"].head_dim
    for config in candidates(arch, dtype, head_dim, choose_version(arch, dtype, head_dim) == "descriptor"):
        yield launch.FORWARD, config


def _bind(inputs: dict[str, Any], kernel: str):
    inputs = {name: x.detach() if isinstance(x, Tensor) else x for name, x in inputs.items()}
    return functools.partial(project_pieces_triton, **inputs)


SPEC = OpSpec(
    name="piece_projection",
    operation=project_pieces,
    reference=project_pieces_ref,
    make_inputs=make_inputs,
    shapes=SHAPES,
    small=SMALL,
    tolerances={torch.float32: (5e-6, 1e-5), torch.bfloat16: (4e-3, 8e-3), torch.float16: (5e-4, 1e-3)},
    flops=flops,
    bytes=moved_bytes,
    predicted=predicted,
    builds=builds,
    variants={"pointer": functools.partial(project_pieces_triton, version="pointer")},
    tunable=Tunable(_tuned, _bind),
)
