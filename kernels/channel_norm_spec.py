"""The spec of `channel_norm.py`: the norms of the released WF-VAE, what they cost, and what is compiled for them.

Predicted on one H100 SXM before any measurement, at a copy rate of 3.0 TB/s: 13 bytes a clock and multiprocessor, which
issues 128 lane instructions a clock. Forward moves 4 bytes an element in 0.31 clocks, in which 39 instructions fit; 128
channels with SiLU take 18 (320 channels, padded to 512, take 28), two of them on the special-function units, which are
16 lanes wide: 0.13 clocks. Backward moves 6 bytes in 0.46 clocks: 59 fit, 34 are needed (52 of 320 channels). So memory
binds, and what is lost are starts, ends and the means, where only prefetched loads keep the memory busy: 92 % of the
copy rate forward; 85 % backward, where fewer programs fit a multiprocessor. Each launch costs 5 us. Left out of
`bytes` and so of the prediction: the two float32 sums of C channels that each program of backward writes and the small
sum reads, 16 C bytes a program.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
from osp_fast.kernels import channel_norm_launch as launch
from osp_fast.kernels.channel_norm import channel_norm, channel_norm_ref
from osp_fast.kernels.channel_norm_kernels import (
    channel_norm_bwd_kernel,
    channel_norm_bwd_sums_kernel,
    channel_norm_fwd_kernel,
)
from osp_fast.kernels.spec import COPY_RATE, LAUNCH_SECONDS, REACHED, TRITON_TYPE, KernelBuild, OpSpec, Shape, Tunable

EPS = 1e-6


def _sizes(frames: int, rows: int, channels: int, **other: Any) -> dict[str, Any]:
    return {"batch": 1, "frames": frames, "rows": rows, "columns": rows, "channels": channels, **other}


# Of a clip of 93x640x640: 47 frames of 320 x 320 behind the outer wavelet, 160 x 160 inside, 24 of 80 x 80 latents.
SHAPES = (
    Shape("47x320x320, 128", _sizes(47, 320, 128)),
    Shape("47x160x160, 256", _sizes(47, 160, 256)),
    Shape("47x160x160, 512 of 640", _sizes(47, 160, 512, width=640)),
    Shape("47x160x160, 192", _sizes(47, 160, 192)),
    Shape("24x80x80, 640", _sizes(24, 80, 640)),
    Shape("24x80x80, 320", _sizes(24, 80, 320)),
    Shape("24x80x80, 512, no SiLU", _sizes(24, 80, 512, silu=False)),
    Shape("16 images of 320x320, 128", _sizes(1, 320, 128, batch=16)),
)
SMALL = (
    Shape("3x5x5, 24", _sizes(3, 5, 24)),
    Shape("2 of 1x5x5, 24 of 40, no SiLU", _sizes(1, 5, 24, width=40, silu=False, batch=2)),
)


def make_inputs(
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    seed: int,
    batch: int,
    frames: int,
    rows: int,
    columns: int,
    channels: int,
    width: int | None = None,
    silu: bool = True,
) -> dict[str, Any]:
    """x in channels-last memory; the first channels of a wider tensor if that has `width`."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    x = normal(batch, frames, rows, columns, width or channels).movedim(-1, 1)[:, :channels]
    inputs = {"x": x, "weight": normal(channels), "bias": normal(channels)}
    return {name: x.detach().requires_grad_() for name, x in inputs.items()} | {"eps": EPS, "silu": silu}


def flops(
    direction: str, *, batch: int, frames: int, rows: int, columns: int, channels: int, silu: bool = True, **_: Any
) -> float:
    """About: 7 operations an element to normalise, 3 for SiLU; for the gradients as much again and half."""
    each = 10 if silu else 7
    return batch * frames * rows * columns * channels * each * (1 if direction == "forward" else 2.5)


def moved_bytes(
    direction: str, *, batch: int, frames: int, rows: int, columns: int, channels: int, element: int = 2, **_: Any
) -> float:
    """x and out, or both gradients and x; beside them weight and bias, or these and their gradients.

    element: bytes of a number
    """
    passes, vectors = (2, 2) if direction == "forward" else (3, 4)
    return element * (passes * batch * frames * rows * columns * channels + vectors * channels)


def predicted(direction: str, **sizes: Any) -> float:
    """Seconds on one H100 SXM; see the module's docstring."""
    launches = 1 if direction == "forward" else 2
    return moved_bytes(direction, **sizes) / (COPY_RATE * REACHED[direction]) + launches * LAUNCH_SECONDS


KERNELS = {
    "forward": channel_norm_fwd_kernel,
    "backward": channel_norm_bwd_kernel,
    "sums": channel_norm_bwd_sums_kernel,
}


def kernel_build(
    name: str, arch: int, dtype: torch.dtype, channels: int, width: int | None = None, silu: bool = True
) -> KernelBuild:
    """One of `KERNELS` as the launcher compiles it; width: of the tensor whose first channels x is."""
    kernel = KERNELS[name]
    if name == "sums":
        config, label = launch.RowConfig(launch.SUM_ROWS, launch.SUM_WARPS), f"{launch.SUM_ROWS}x{launch.SUM_COLUMNS}"
        constants: dict[str, Any] = dict(C=channels, ROWS=launch.SUM_ROWS, COLUMNS=launch.SUM_COLUMNS)
    else:
        config = launch.candidates(f"channel_norm {name}", arch, channels, dtype.itemsize)[0]
        label = str(config)
        constants = dict(C=channels, PIXEL=width or channels, BLOCK=triton.next_power_of_2(channels), SILU=silu)
        constants |= dict(ROWS=config.rows, STAGES=config.num_stages, GRAD_PIXEL=channels)
    signature = {}
    for argument in kernel.arg_names:
        if argument == "partial":
            signature[argument] = "*fp32"
        elif argument in ("pixels", "programs") or argument.endswith("_batch"):
            signature[argument] = "i32"
        elif argument not in constants:
            signature[argument] = "fp32" if argument == "eps" else "*" + TRITON_TYPE[dtype]
    aligned = [key for key, kind in signature.items() if kind.startswith("*") or key.endswith("_batch")]
    slice_label, silu_label = f" of {width}" if width else "", " SiLU" if silu and name != "sums" else ""
    return KernelBuild(
        kernel=kernel,
        arch=arch,
        config=f"{name} C{channels}{slice_label} {TRITON_TYPE[dtype]}{silu_label} {label}",
        signature=signature,
        constants={key: value for key, value in constants.items() if key in kernel.arg_names},
        aligned=tuple(aligned),
        num_warps=config.num_warps,
        num_stages=3,
        expects=() if name == "sums" else ("LDGSTS",),
        may_spill=arch == 100 and name == "backward" and channels == 24,  # two instructions, by Triton 3.7.1
        narrow=_narrow(name, channels, dtype.itemsize, 32 * config.num_warps),
        programs=None if name == "sums" else config.programs,
    )


def _narrow(name: str, channels: int, element: int, threads: int) -> int:
    """Accesses of less than 16 bytes a thread, all of them to vectors of C channels, once in a program.

    Forward and backward load weight and bias; backward stores two float32 sums. A vector is spread over all threads, so
    that each has its share of the padded channels, at least one. Vectors with fewer channels than threads are loaded as
    the pixels are, 16 bytes a thread. The small sum stores one vector, a channel a thread.
    """
    if name == "sums":
        return 1
    share = triton.next_power_of_2(channels) // threads
    loads = 2 * (0 < share * element < 16)
    return loads + 2 * (name == "backward" and 4 * max(1, share) < 16)


# (type, channels, width, SiLU): those of the released VAE, of the tiny one, and the other types once.
BUILT = (
    *((torch.bfloat16, channels, None, True) for channels in (128, 192, 256, 320, 512, 640, 8, 24, 48)),
    (torch.bfloat16, 512, 640, True),
    (torch.bfloat16, 128, 640, True),
    (torch.bfloat16, 512, None, False),
    (torch.float16, 128, None, True),
    (torch.float32, 128, None, True),
    (torch.float32, 512, None, True),
)


def builds(arch: int) -> list[KernelBuild]:
    """Forward and backward of every norm of `BUILT`, the small sum once per type."""
    found = [kernel_build(name, arch, *built) for built in BUILT for name in ("forward", "backward")]
    return found + [kernel_build("sums", arch, dtype, 128) for dtype in (torch.bfloat16, torch.float32)]


def tune_candidates(inputs: dict[str, Any], arch: int) -> Iterator[tuple[str, Any]]:
    """(kernel, configuration) for these inputs."""
    x = inputs["x"]
    for kernel in ("channel_norm forward", "channel_norm backward"):
        for config in launch.candidates(kernel, arch, x.shape[1], x.element_size()):
            yield kernel, config


def tune_call(inputs: dict[str, Any], kernel: str) -> Callable[[], Any]:
    """The forward or backward operation itself."""
    tensors = [inputs[name].detach() for name in ("x", "weight", "bias")]
    options = inputs["eps"], inputs["silu"]
    if kernel == "channel_norm forward":
        return lambda: torch.ops.osp_fast.channel_norm(*tensors, *options)
    out_grad = torch.randn_like(torch.ops.osp_fast.channel_norm(*tensors, *options))
    return lambda: torch.ops.osp_fast.channel_norm_backward(out_grad, *tensors, *options)


SPEC = OpSpec(
    name="channel_norm",
    operation=channel_norm,
    reference=channel_norm_ref,
    make_inputs=make_inputs,
    shapes=SHAPES,
    small=SMALL,
    tolerances={torch.float32: (1e-6, 1e-5), torch.bfloat16: (4e-3, 8e-3), torch.float16: (5e-4, 1e-3)},
    flops=flops,
    bytes=moved_bytes,
    predicted=predicted,
    builds=builds,
    tunable=Tunable(tune_candidates, tune_call),
)
