"""The spec of the Haar wavelets: the calls of the released VAE, what they cost, and what is compiled for them.

Predicted on one H100 SXM before any measurement: bytes over 93 % of a device copy's 3.0 TB/s, and 5 us for the launch,
in both directions, as each is the other's kernel. Why the memory should bind: in 3D from bf16 to bf16 a warp has 128
positions, 6 KB in and 6 KB out, which at 23 GB/s and multiprocessor is 950 clocks of its share of the memory. Its 1,160
instructions take 290 clocks of the four schedulers; the exchange, 128 rows of 128 bytes through shared memory and back,
a quarter of them padding, and the loads and stores take 220 clocks of the load and store unit, if no banks conflict.
The 16 warps of a multiprocessor have 96 KB of loads in flight. From uint8 it is 9 KB and 720, 300 and 200 clocks, with
48 KB in flight, twice what a latency of 1 us needs.
"""

import functools
from typing import Any

import torch
from osp_fast.kernels import haar, haar_launch
from osp_fast.kernels.haar_kernels import haar_analysis_kernel, haar_synthesis_kernel
from osp_fast.kernels.spec import COPY_RATE, LAUNCH_SECONDS, TRITON_TYPE, KernelBuild, OpSpec, Shape, Tunable
from torch import Tensor

REACHED = 0.93
OPERATIONS = {
    "haar3d": (haar.haar3d, haar.haar3d_ref),
    "haar2d": (haar.haar2d, haar.haar2d_ref),
    "inverse_haar3d": (haar.inverse_haar3d, haar.inverse_haar3d_ref),
    "inverse_haar2d": (haar.inverse_haar2d, haar.inverse_haar2d_ref),
}


def _sizes(transform: str, frames: int, height: int, width: int, pixels: str = "same", low: bool = True) -> dict:
    return {
        "transform": transform,
        "batch": 1,
        "frames": frames,
        "height": height,
        "width": width,
        "pixels": pixels,
        "low": low,
    }


def _pyramid(height: int, width: int) -> tuple[Shape, ...]:
    """What the encoder and the decoder call for 93 frames; later levels have as many frames as come out before."""
    clip, types = f"93x{height}x{width}", {"uint8": "uint8", "float32": "float32", "same": "bf16"}
    analyses = (
        Shape(f"{clip} {name} to bf16", _sizes("haar3d", 93, height, width, pixels)) for pixels, name in types.items()
    )
    syntheses = (
        Shape(f"{clip} bf16 to {types[pixels]}", _sizes("inverse_haar3d", 93, height, width, pixels))
        for pixels in ("float32", "uint8")
    )
    return (
        *analyses,
        Shape(f"{clip} level 2", _sizes("haar2d", 47, height // 2, width // 2)),
        Shape(f"{clip} level 3", _sizes("haar3d", 47, height // 4, width // 4, low=False)),
        *syntheses,
        Shape(f"{clip} inverse level 2", _sizes("inverse_haar2d", 47, height // 2, width // 2)),
        Shape(f"{clip} inverse level 3", _sizes("inverse_haar3d", 47, height // 4, width // 4, low=False)),
    )


SHAPES = (
    *_pyramid(768, 768),
    *_pyramid(352, 640),
    Shape("16 images 640x640 uint8 to bf16", _sizes("haar3d", 1, 640, 640, "uint8") | {"batch": 16}),
)
SMALL = (
    Shape("5x6x22 uint8 to bands", _sizes("haar3d", 5, 6, 22, "uint8")),
    Shape("5x6x22 float32 to bands", _sizes("haar3d", 5, 6, 22, "float32")),
    Shape("5x6x22 to bands, no low", _sizes("haar3d", 5, 6, 22, low=False)),
    Shape("2 of 3x6x22 by frames", _sizes("haar2d", 3, 6, 22) | {"batch": 2}),
    Shape("bands to 5x6x22 uint8", _sizes("inverse_haar3d", 5, 6, 22, "uint8")),
    Shape("bands to 5x6x22 float32", _sizes("inverse_haar3d", 5, 6, 22, "float32")),
    Shape("bands to 5x6x22, no low", _sizes("inverse_haar3d", 5, 6, 22, low=False)),
    Shape("2 of bands to 3x6x22 by frames", _sizes("inverse_haar2d", 3, 6, 22) | {"batch": 2}),
)


def make_inputs(
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    seed: int,
    transform: str,
    batch: int,
    frames: int,
    height: int,
    width: int,
    pixels: str,
    low: bool,
) -> dict[str, Any]:
    """Arguments of `call`. Sizes are the pixels', which are uint8, float32 or, "same", of the bands' dtype.

    Pixels of another dtype than the bands are normalised on the way. uint8 takes and gives no gradients.
    """
    generator = torch.Generator(device).manual_seed(seed)
    normal = functools.partial(torch.randn, generator=generator, device=device, dtype=dtype)
    differentiable = pixels != "uint8"
    inverse, count = transform.startswith("inverse"), 8 if transform.endswith("3d") else 4
    scaled = pixels != "same"
    if not inverse:
        shape = (batch, 3, frames, height, width)
        if pixels == "uint8":
            x = torch.randint(0, 256, shape, generator=generator, device=device, dtype=torch.uint8)
        elif pixels == "float32":
            x = torch.rand(shape, generator=generator, device=device)
        else:
            x = normal(shape)
        options = {"dtype": dtype, "normalize": scaled, "with_low": low}
        return {"transform": transform, "x": x.requires_grad_(differentiable), **options}
    sizes = (batch, (frames + 1) // 2 if count == 8 else frames, height // 2, width // 2)
    x = normal((sizes[0], *sizes[1:], count * 3)).movedim(-1, 1).requires_grad_(differentiable)
    options = {"dtype": {"uint8": torch.uint8, "float32": torch.float32}.get(pixels, dtype), "denormalize": scaled}
    if low:
        options["low"] = normal((batch, 3, *sizes[1:])).requires_grad_(differentiable)
    return {"transform": transform, "x": x, **options}


def call(transform: str, x: Tensor, **options: Any) -> Tensor | tuple[Tensor, Tensor]:
    """One of `OPERATIONS`."""
    return OPERATIONS[transform][0](x, **options)


def call_ref(transform: str, x: Tensor, **options: Any) -> Tensor | tuple[Tensor, Tensor]:
    """Its reference."""
    return OPERATIONS[transform][1](x, **options)


def _values(transform: str, batch: int, frames: int, height: int, width: int) -> tuple[int, int]:
    """(values of the pixels, values of the bands)"""
    boxes = 2 * ((frames + 1) // 2) if transform.endswith("3d") else frames
    return batch * 3 * frames * height * width, batch * 3 * boxes * height * width


def flops(direction: str, *, transform, batch, frames, height, width, pixels, low) -> float:
    """Additions, and the coefficient, of every value; the same in both directions."""
    return _values(transform, batch, frames, height, width)[1] * (4 if transform.endswith("3d") else 3)


def moved_bytes(direction: str, *, transform, batch, frames, height, width, pixels, low, element: int = 2) -> float:
    """Pixels, bands and low (of `element` bytes, as pixels "same") once each; gradients have the same sizes."""
    values, bands = _values(transform, batch, frames, height, width)
    pixel_bytes = {"uint8": 1, "float32": 4, "same": element}[pixels]
    return values * pixel_bytes + element * bands + low * element * bands / (8 if transform.endswith("3d") else 4)


def predicted(direction: str, **sizes: Any) -> float:
    """Seconds on one H100 SXM; see the module's docstring."""
    return moved_bytes(direction, **sizes) / (COPY_RATE * REACHED) + LAUNCH_SECONDS


MODES = {"haar3d": "repeat", "haar2d": "frames", "inverse_haar3d": "zero", "inverse_haar2d": "frames"}
LAYOUTS = ("planar", "interleaved", "strided")  # by number
INTEGERS = ("colours", "frames", "height")  # not specialised
SPILLING = ("inverse_haar3d", torch.uint8, torch.bfloat16, False)  # on sm_100 four instructions, by Triton 3.6.0


def kernel_build(
    transform: str,
    arch: int,
    pixels: torch.dtype,
    bands: torch.dtype,
    low: bool = False,
    layout: int = haar_launch.PLANAR,
    packed: bool = True,
    mode: str | None = None,
) -> KernelBuild:
    """What the launcher compiles for such a call, of three colours; `packed` bands are channels-last, others planar."""
    inverse, mode = transform.startswith("inverse"), mode or MODES[transform]
    kernel = haar_synthesis_kernel if inverse else haar_analysis_kernel
    config = haar_launch.candidates(arch, max(pixels.itemsize, bands.itemsize))[0]
    constants = dict(MODE=haar_launch.MODES[mode], PACKED=packed, WITH_LOW=low, ROWS=config.rows)
    constants |= dict(COLUMNS=haar_launch.columns(arch))
    if not inverse:
        constants |= dict(LAYOUT=layout)
    ones = ("low_column", "pixel_column" if layout == haar_launch.PLANAR else "", "" if packed else "band_column")
    signature = {}
    for name in kernel.arg_names:
        if name in ones or (name == "low" and not low):
            constants[name] = 1 if name in ones else None
        elif name not in constants:
            types = {"pixels": pixels, "bands": bands, "low": bands}
            signature[name] = f"*{TRITON_TYPE[types[name]]}" if name in types else "i32"
            if name in ("scale", "offset"):
                signature[name] = "fp32"
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    unaligned = (*INTEGERS, "scale", "offset")
    if layout != haar_launch.PLANAR:
        unaligned += ("pixel_colour", "pixel_column")
    return KernelBuild(
        kernel=kernel,
        arch=arch,
        config=f"{transform} {mode} {TRITON_TYPE[pixels]} pixels {LAYOUTS[layout]}, {TRITON_TYPE[bands]} bands "
        f"{'channels-last' if packed else 'planar'}{', low' if low else ''}, {config}",
        signature=signature,
        constants=constants,
        aligned=tuple(name for name in signature if name not in unaligned),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        maxnreg=haar_launch.registers(packed, layout).get("maxnreg"),
        may_spill=arch == 100 and (transform, pixels, bands, low) == SPILLING,
        narrow=_narrow(mode, pixels, bands, low, layout, packed),
    )


def _narrow(mode: str, pixels: torch.dtype, bands: torch.dtype, low: bool, layout: int, packed: bool) -> int:
    """Accesses of less than 16 bytes a thread: narrow pixels, pixels one at a time, low, planar bands."""
    colours, rows, count = 3 if packed else 1, 2 if mode == "frames" else 4, 4 if mode == "frames" else 8
    positions = 2 if max(pixels.itemsize, bands.itemsize) == 4 else 4  # of a thread
    others = colours * low + (0 if packed else count)
    if layout == haar_launch.STRIDED:
        return others + colours * rows * 2 * positions
    return others + colours * rows * (2 * positions * pixels.itemsize < 16)


def builds(arch: int) -> list[KernelBuild]:
    """Every call of the VAE in bf16 and the gradients of each; other types, layouts and fewer colours once."""
    half, single, byte = torch.bfloat16, torch.float32, torch.uint8
    build = functools.partial(kernel_build, arch=arch)
    found = []
    for pixels in (byte, single, half):
        found.append(build("haar3d", pixels=pixels, bands=half, low=True))
        found.append(build("inverse_haar3d", pixels=pixels, bands=half, low=True))
    for transform in ("haar2d", "inverse_haar2d"):
        found += [build(transform, pixels=pixels, bands=pixels, low=True) for pixels in (half, single)]
    for transform in ("haar3d", "inverse_haar3d"):
        found += [build(transform, pixels=half, bands=half, mode=mode) for mode in ("pairs", "repeat", "zero")]
        found += [build(transform, pixels=pixels, bands=single, low=True) for pixels in (byte, single)]
        found.append(build(transform, pixels=torch.float16, bands=torch.float16))
        found.append(build(transform, pixels=half, bands=half, packed=False))
        found.append(build(transform, pixels=byte, bands=half))
    for transform in ("haar3d", "haar2d"):
        found.append(build(transform, pixels=byte, bands=half, low=True, layout=haar_launch.INTERLEAVED))
        found.append(build(transform, pixels=half, bands=half, layout=haar_launch.STRIDED))
    return found


def _tuned(inputs: dict[str, Any], arch: int):
    """The kernel of the forward direction and its configurations."""
    inverse = inputs["transform"].startswith("inverse")
    widest = max(inputs["x"].dtype.itemsize, inputs["dtype"].itemsize)
    for config in haar_launch.candidates(arch, widest):
        yield "haar synthesis" if inverse else "haar analysis", config


def _bind(inputs: dict[str, Any], kernel: str):
    inputs = {name: x.detach() if isinstance(x, Tensor) else x for name, x in inputs.items()}
    return lambda: call(**inputs)


SPEC = OpSpec(
    name="haar",
    operation=call,
    reference=call_ref,
    make_inputs=make_inputs,
    shapes=SHAPES,
    small=SMALL,
    # To uint8 a value within 1e-5 of a tie may be rounded the other way; all else is within 1e-6 in float32.
    tolerances={torch.float32: (5e-5, 1e-6), torch.bfloat16: (4e-3, 4e-3), torch.float16: (5e-4, 5e-4)},
    flops=flops,
    bytes=moved_bytes,
    predicted=predicted,
    builds=builds,
    tunable=Tunable(_tuned, _bind),
)
