"""The spec of the causal convolution: layers of the released VAE, what they cost, and what is compiled for them.

Predicted on one H100 SXM before any measurement, from 132 multiprocessors of 1.755 GHz and 4,096 operations a clock.
A step of the main loop, 128 output channels by 256 pixels by 64 input channels, takes the tensor cores 1,024 clocks.
Shared memory serves 80 bytes of its 128 a clock to them (2 KiB of weights and 8 KiB of pixels in 128 clocks) and takes
48 from TMA; L2 must give these 48 KiB a step, and at 36 bytes a clock and multiprocessor, 8.3 TB/s in all, needs 1,365
clocks: it binds. Barriers and the wait for the products before cost 200 more. A tile fills its pipeline in 2,500 clocks
and stores in 3,500, a residual takes 3,000; one program is on a multiprocessor, so nothing hides these. 3x3x3 with 128
channels has 54 steps a tile, 1x3x3 only 18: hence 570 and 460 TFLOP/s. What the library serves is put at 250 TFLOP/s or
2.4 TB/s, copies counted; gradients, all by PyTorch, at 300 TFLOP/s or 2.4 TB/s.
"""

import functools
import math
from typing import Any

import torch
from osp_fast.kernels import causal_conv3d_launch as conv_launch
from osp_fast.kernels.causal_conv3d import (
    causal_conv3d,
    causal_conv3d_ref,
    causal_conv3d_triton,
    conv_flops,
    serving_row,
    steps_of,
)
from osp_fast.kernels.causal_conv3d_kernels import causal_conv3d_fwd_kernel
from osp_fast.kernels.causal_conv3d_launch import ConvCall, ConvConfig
from osp_fast.kernels.spec import LAUNCH_SECONDS, TRITON_TYPE, KernelBuild, OpSpec, Shape, Tunable
from torch import Tensor

CLOCK = 1.755e9
MULTIPROCESSORS = 132
OPERATIONS_PER_CLOCK = 4096  # of a multiprocessor's tensor cores, in 16 bits
L2_BYTES_PER_CLOCK = 36
STEP_CLOCKS, FILL_CLOCKS, STORE_CLOCKS, RESIDUAL_CLOCKS = 200, 2500, 3500, 3000
LIBRARY_RATE, BACKWARD_RATE, LIBRARY_BANDWIDTH = 250e12, 300e12, 2.4e12
ONE, TWO, TWO_IN_SPACE = (1, 1, 1), (2, 2, 2), (1, 2, 2)


def _sizes(
    channels: int,
    out_channels: int,
    frames: int,
    height: int,
    width: int,
    kernel: tuple[int, int, int] = (3, 3, 3),
    stride: tuple[int, int, int] = ONE,
    residual: bool = False,
    cached: bool = True,
    batch: int = 1,
) -> dict[str, Any]:
    return {
        "batch": batch,
        "channels": channels,
        "out_channels": out_channels,
        "frames": frames,
        "height": height,
        "width": width,
        "kernel": kernel,
        "stride": stride,
        "cached": cached and kernel[0] > 1,
        "residual": residual,
    }


FRAME, POINT = (1, 3, 3), (1, 1, 1)
# Chunks of a 93x640x640 decode and, where rows are 384, 192 or 96, of a 93x768x768 encode.
SHAPES = (
    Shape("decode 128 17x320x320", _sizes(128, 128, 17, 320, 320, residual=True)),
    Shape("decode 128 17x320x320, first chunk", _sizes(128, 128, 17, 320, 320, cached=False)),
    Shape("decode 256->128 9x320x320", _sizes(256, 128, 9, 320, 320)),
    Shape("decode 256 9x320x320 per frame", _sizes(256, 256, 9, 320, 320, FRAME)),
    Shape("decode 256 9x160x160", _sizes(256, 256, 9, 160, 160, residual=True)),
    Shape("decode 512->256 9x160x160", _sizes(512, 256, 9, 160, 160)),
    Shape("decode 512->640 5x160x160", _sizes(512, 640, 5, 160, 160)),
    Shape("decode 512 5x80x80", _sizes(512, 512, 5, 80, 80, residual=True)),
    Shape("decode 512 1x80x80", _sizes(512, 512, 1, 80, 80, residual=True)),
    Shape("decode 512 1x44x80", _sizes(512, 512, 1, 44, 80, residual=True)),
    Shape("decode 8->512 5x80x80", _sizes(8, 512, 5, 80, 80)),
    Shape("decode 512->640 5x80x80 point", _sizes(512, 640, 5, 80, 80, POINT)),
    Shape("decode 128->24 17x320x320 per frame", _sizes(128, 24, 17, 320, 320, FRAME)),
    Shape("encode 24->128 9x384x384 per frame", _sizes(24, 128, 9, 384, 384, FRAME)),
    Shape("encode 128 9x384x384 per frame", _sizes(128, 128, 9, 384, 384, FRAME, residual=True)),
    Shape("encode 128 9x384x384 per frame, halved", _sizes(128, 128, 9, 384, 384, FRAME, TWO_IN_SPACE)),
    Shape("encode 192->256 9x192x192 per frame", _sizes(192, 256, 9, 192, 192, FRAME)),
    Shape("encode 256 8x192x192", _sizes(256, 256, 8, 192, 192, residual=True)),
    Shape("encode 256 8x192x192, halved", _sizes(256, 256, 8, 192, 192, stride=TWO)),
    Shape("encode 320->512 4x96x96", _sizes(320, 512, 4, 96, 96)),
    Shape("encode 512->16 4x96x96", _sizes(512, 16, 4, 96, 96)),
    Shape("encode 128 16 images 192x192 per frame", _sizes(128, 128, 1, 192, 192, FRAME, residual=True, batch=16)),
)
SMALL = (
    Shape("8->12 2x5x9, residual", _sizes(8, 12, 2, 5, 9, residual=True)),
    Shape("8->12 2x5x9, first chunk", _sizes(8, 12, 2, 5, 9, cached=False)),
    Shape("12->8 4x6x9, halved", _sizes(12, 8, 4, 6, 9, stride=TWO)),
    Shape("2 of 12->8 2x5x9 per frame", _sizes(12, 8, 2, 5, 9, FRAME, batch=2)),
    Shape("12->8 2x8x10 per frame, halved", _sizes(12, 8, 2, 8, 10, FRAME, TWO_IN_SPACE)),
    Shape("12->20 2x5x9 point", _sizes(12, 20, 2, 5, 9, POINT)),
)


def make_inputs(
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    seed: int,
    batch: int,
    channels: int,
    out_channels: int,
    frames: int,
    height: int,
    width: int,
    kernel: tuple[int, int, int],
    stride: tuple[int, int, int],
    cached: bool,
    residual: bool,
) -> dict[str, Any]:
    """x, cache, residual and weight in channels-last memory; the cache is as many frames as the layer keeps."""
    generator = torch.Generator(device).manual_seed(seed)
    normal = functools.partial(torch.randn, generator=generator, device=device, dtype=dtype)

    def video(features: int, *sizes: int) -> Tensor:
        return normal((batch, *sizes, features)).movedim(-1, 1).requires_grad_()

    scale = (channels * math.prod(kernel)) ** -0.5
    weight = (normal((out_channels, *kernel, channels)) * scale).movedim(-1, 1)
    inputs = {
        "x": video(channels, frames, height, width),
        "weight": weight.requires_grad_(),
        "bias": normal(out_channels).requires_grad_(),
        "stride": stride,
    }
    if cached:
        inputs["cache"] = video(channels, kernel[0] - stride[0], height, width)
    if residual:
        past = kernel[0] - (stride[0] if cached else 1)
        size = conv_launch.output_size((frames, height, width), kernel, steps_of(stride), past)
        inputs["residual"] = video(out_channels, *size)
    return inputs


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int, int] = 1,
    cache: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """`causal_conv3d_ref` with the residual, without the next chunk's cache."""
    out, _ = causal_conv3d_ref(x, weight, bias, stride, cache)
    return out if residual is None else out + residual


def _geometry(batch, channels, out_channels, frames, height, width, kernel, stride, cached, residual):
    """(output's size, frames before x, of them those that are not x's own)"""
    past = kernel[0] - (stride[0] if cached else 1)
    size = conv_launch.output_size((frames, height, width), kernel, steps_of(stride), past)
    return size, past, past if cached else 0


def flops(direction: str, **sizes: Any) -> float:
    """Products with every weight at every position; backward twice as many, for pixels and for weights."""
    size, *_ = _geometry(**sizes)
    weight_shape = (sizes["out_channels"], sizes["channels"], *sizes["kernel"])
    return conv_flops(sizes["batch"], *size, weight_shape) * (1 if direction == "forward" else 2)


def moved_bytes(direction: str, *, element: int = 2, **sizes: Any) -> float:
    """x, the cache, weights, bias, the residual and the output once each, of `element` bytes.

    Backward: the output's gradient, x, the cache and the weights read, and the gradients of all that is read forward.
    """
    size, _, cached = _geometry(**sizes)
    pixels = sizes["batch"] * sizes["height"] * sizes["width"] * (sizes["frames"] + cached)
    read = pixels * sizes["channels"]
    weights = math.prod(sizes["kernel"]) * sizes["channels"] * sizes["out_channels"]
    out = sizes["batch"] * math.prod(size) * sizes["out_channels"]
    added = out if sizes["residual"] else 0
    forward = read + weights + sizes["out_channels"] + out + added
    return element * (forward if direction == "forward" else forward + read + weights)


def predicted(direction: str, **sizes: Any) -> float:
    """Seconds on one H100 SXM; see the module's docstring."""
    size, past, _ = _geometry(**sizes)
    work, moved = flops(direction, **sizes), moved_bytes(direction, **sizes)
    channels, out_channels, kernel = (sizes[name] for name in ("channels", "out_channels", "kernel"))
    copies = 0.0
    if past:  # as the library lays frames, or outputs, one after the other
        frame = 2 * 2 * sizes["batch"] * sizes["height"] * sizes["width"]
        copies = frame * min(channels, out_channels) * (sizes["frames"] + past)
    if direction == "backward":
        return max(work / BACKWARD_RATE, moved / LIBRARY_BANDWIDTH) + copies / LIBRARY_BANDWIDTH + 3 * LAUNCH_SECONDS
    row = serving_row(90, torch.bfloat16, channels, out_channels, kernel)
    if row.path == "library":
        return max(work / LIBRARY_RATE, moved / LIBRARY_BANDWIDTH) + copies / LIBRARY_BANDWIDTH + 2 * LAUNCH_SECONDS
    config = _config(90, torch.bfloat16, (sizes["batch"], out_channels, *size), channels)
    pixels = config.block_h * config.block_w
    products = 2 * pixels * config.block_n * config.block_k / OPERATIONS_PER_CLOCK
    brought = 2 * (pixels + config.block_n) * config.block_k / L2_BYTES_PER_CLOCK
    steps = math.prod(kernel) * math.ceil(channels / config.block_k)
    share = pixels * config.block_n / 32768  # of the largest block's stores
    clocks = steps * (max(products, brought) + STEP_CLOCKS) + FILL_CLOCKS
    clocks += (STORE_CLOCKS + (RESIDUAL_CLOCKS if sizes["residual"] else 0)) * share
    patches = math.ceil(size[1] / config.block_h) * math.ceil(size[2] / config.block_w)
    tiles = sizes["batch"] * size[0] * patches * math.ceil(out_channels / config.block_n)
    return math.ceil(tiles / MULTIPROCESSORS) * clocks / CLOCK + LAUNCH_SECONDS


def _config(arch: int, dtype: torch.dtype, shape: tuple[int, ...], channels: int) -> ConvConfig:
    """What the launcher chooses for an output of this shape where descriptors fit."""
    return _candidates(arch, dtype, shape, channels)[0]


def _candidates(arch: int, dtype: torch.dtype, shape: tuple[int, ...], channels: int) -> list[ConvConfig]:
    descriptors = conv_launch.choose_version(arch, dtype, channels) == "descriptor"
    call = ConvCall(arch, dtype, channels, shape[1], descriptors)
    return conv_launch.candidates(conv_launch.choose_patch(call, shape, MULTIPROCESSORS))


VIEWS = ("x_view", "earlier_view", "previous_view", "weight_view")
NARROW_BIAS = 16  # accesses of the bias, a few values for each program, at most


def kernel_build(
    arch: int,
    dtype: torch.dtype,
    channels: int,
    out_channels: int,
    kernel: int = 3,
    kernel_t: int = 3,
    stride: tuple[int, int, int] = ONE,
    descriptors: bool = False,
    cached: bool = True,
    residual: bool = True,
    pixels: int = 256,
    precision: str = "ieee",
    config: ConvConfig | None = None,
) -> KernelBuild:
    """What the launcher compiles for such a call, with a bias; `config` is the table's unless given."""
    call = ConvCall(arch, dtype, channels, out_channels, descriptors, pixels if descriptors else min(pixels, 128))
    config = config or conv_launch.candidates(call)[0]
    blocks = conv_launch.blocks_of(config)
    options = {name: blocks.pop(name) for name in ("num_warps", "num_stages")}
    cached = cached and kernel_t > 1
    constants = dict(CHANNELS=channels, OUT_CHANNELS=out_channels, KERNEL_T=kernel_t, KERNEL=kernel)
    steps = steps_of(stride)
    constants |= dict(STRIDE_T=steps.time, STRIDE=steps.space, HAS_CACHE=cached, HAS_BIAS=True, HAS_RESIDUAL=residual)
    constants |= dict(ALIGNED=math.gcd(8, channels, out_channels if residual else 0))
    constants |= dict(DESCRIPTORS=descriptors, PRECISION=precision, **blocks)
    absent = [] if cached else ["earlier", "previous", "earlier_view", "previous_view"]
    absent += [] if residual else ["residual"]
    absent += [] if descriptors else VIEWS
    constants |= dict.fromkeys(absent)
    box = [1, 1, config.block_h, config.block_w, config.block_k]
    if steps.space == 2:
        box = [1, config.block_h, 1, config.block_w, config.block_k]
    signature = {}
    for name in causal_conv3d_fwd_kernel.arg_names:
        if name in constants:
            continue
        if name in VIEWS:
            shape = [1, config.block_n, config.block_k] if name == "weight_view" else box
            signature[name] = f"tensordesc<{TRITON_TYPE[dtype]}{shape}>"
        elif name in ("x", "earlier", "previous", "weight", "bias", "residual", "out"):
            signature[name] = f"*{TRITON_TYPE[dtype]}"
        else:
            signature[name] = "i32"
    layer = f"{channels}->{out_channels} {kernel_t}x{kernel}x{kernel}"
    how = f"{'descriptor' if descriptors else 'pointer'}{' cached' if cached else ''}{' residual' if residual else ''}"
    multiplied = dtype != torch.float32 or precision == "tf32"
    expects = ({80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}[arch],) if multiplied else ()
    return KernelBuild(
        kernel=causal_conv3d_fwd_kernel,
        arch=arch,
        config=f"{layer}/{steps.space} {TRITON_TYPE[dtype]}{' tf32' if precision == 'tf32' else ''} {how} {config}",
        signature=signature,
        constants=constants,
        aligned=tuple(name for name, kind in signature.items() if kind.startswith("*")),
        expects=(*expects, "UTMALDG") if descriptors else expects,
        may_spill=arch == 100,
        narrow=NARROW_BIAS if channels % 8 == out_channels % 8 == 0 else None,
        **options,
    )


# Layers of the released VAE: (channels, output channels, frames and width of the kernel, stride, cached, residual,
# pixels of a patch)
LAYERS = (
    (128, 128, 3, 3, ONE, True, True, 256),
    (128, 128, 3, 3, ONE, False, False, 256),
    (128, 128, 1, 3, ONE, False, True, 256),
    (192, 256, 1, 3, ONE, False, False, 256),
    (256, 256, 3, 3, ONE, True, True, 256),
    (320, 512, 3, 3, ONE, True, False, 256),
    (512, 640, 3, 3, ONE, True, True, 256),
    (512, 512, 3, 3, ONE, True, True, 64),
    (512, 512, 3, 3, ONE, True, True, 128),
    (512, 512, 1, 1, ONE, False, True, 256),
    (128, 128, 1, 3, TWO_IN_SPACE, False, False, 256),
    (256, 256, 3, 3, TWO, True, False, 256),
    (24, 128, 1, 3, ONE, False, False, 256),
    (128, 24, 1, 3, ONE, False, False, 256),
    (8, 512, 3, 3, ONE, True, False, 64),
    (512, 16, 3, 3, ONE, True, False, 64),
)


def builds(arch: int) -> list[KernelBuild]:
    """Every kind of layer in bf16, as it is read there; one of each other type, and of each other way to read."""
    found = []
    half = torch.bfloat16
    for channels, out_channels, kernel_t, kernel, stride, cached, residual, pixels in LAYERS:
        descriptors = conv_launch.choose_version(arch, half, channels) == "descriptor"
        found.append(
            kernel_build(
                arch, half, channels, out_channels, kernel, kernel_t, stride, descriptors, cached, residual, pixels
            )
        )
    build = functools.partial(kernel_build, arch, channels=128, out_channels=128)
    found.append(build(torch.float16, descriptors=arch >= 90))
    found += [build(torch.float32, precision=precision) for precision in ("ieee", "tf32")]
    if arch >= 90:
        found.append(build(half))
        found.append(kernel_build(arch, half, 12, 64, 3, 1))
    return found


def _tuned(inputs: dict[str, Any], arch: int):
    """The configurations of a call, wherever its tensors lie."""
    x, weight = inputs["x"], inputs["weight"]
    kernel, cache = tuple(weight.shape[2:]), inputs.get("cache")
    past = kernel[0] - 1 if cache is None else cache.shape[2]
    size = conv_launch.output_size(x.shape[2:], kernel, steps_of(inputs["stride"]), past)
    for config in _candidates(arch, x.dtype, (x.shape[0], weight.shape[0], *size), x.shape[1]):
        yield conv_launch.FORWARD, config


def _bind(inputs: dict[str, Any], kernel: str):
    inputs = {name: x.detach() if isinstance(x, Tensor) else x for name, x in inputs.items()}
    return functools.partial(causal_conv3d_triton, **inputs)


SPEC = OpSpec(
    name="causal_conv3d",
    operation=causal_conv3d,
    reference=reference,
    make_inputs=make_inputs,
    shapes=SHAPES,
    small=SMALL,
    tolerances={torch.float32: (1e-5, 1e-4), torch.bfloat16: (4e-3, 8e-3), torch.float16: (5e-4, 1e-3)},
    flops=flops,
    bytes=moved_bytes,
    predicted=predicted,
    builds=builds,
    variants={"triton": causal_conv3d_triton, "library": functools.partial(causal_conv3d, path="library")},
    tunable=Tunable(_tuned, _bind),
)
