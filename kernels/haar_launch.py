"""How the Haar kernels are launched: layouts, blocks, outputs."""

import torch
import triton
from osp_fast.kernels import haar_kernels, tuning
from osp_fast.kernels.launch import DTYPES, architecture, check_triton, current
from torch import Tensor

# What stands before the first frame, frames being taken in pairs; "frames" takes them one by one, in 2D.
MODES = {"frames": 0, "pairs": 1, "repeat": 2, "zero": 3}
PLANAR, INTERLEAVED, STRIDED = range(3)
COLUMNS = 64  # positions of a block beside each other
REGISTERS = 128
COLOURS = 3  # what the fast path is for


def analyse(
    pixels: Tensor, mode: str, dtype: torch.dtype, scale: float, offset: float, channels_last: bool, with_low: bool
) -> tuple[Tensor, Tensor]:
    """Bands of pixels behind what `mode` says, times scale, offset added to their first C channels; low, or nothing.

    Raises ValueError where Triton cannot serve them.
    """
    _check_device(dtype, pixels)
    bands, low = empty_bands(pixels, mode, dtype, channels_last, with_low)
    batch, colours, frames, height, width = (bands.shape[0], pixels.shape[1], *bands.shape[2:])
    packed = is_packed(bands, colours, mode)
    layout = pixel_layout(pixels, packed)
    arch = architecture(pixels.device)
    config = tuning.pick("haar analysis", candidates(arch, max(pixels.element_size(), bands.element_size())))
    block = columns(arch)
    blocks = triton.cdiv(height, config.rows) * triton.cdiv(width, block) * (1 if packed else colours)
    if bands.numel():
        with current(pixels.device):
            haar_kernels.haar_analysis_kernel[blocks, frames, batch](
                pixels, bands, low if with_low else None,
                *pixels.stride(), *_strides(None if packed else bands),
                colours, frames, height, width, 2 * width, scale, offset,
                MODE=MODES[mode], PACKED=packed, LAYOUT=layout, WITH_LOW=with_low,
                ROWS=config.rows, COLUMNS=block, num_warps=config.num_warps, **registers(packed, layout),
            )  # fmt: skip
    return bands, low


def synthesise(bands: Tensor, low: Tensor | None, mode: str, dtype: torch.dtype, scale: float, offset: float) -> Tensor:
    """The transpose of `analyse` in the same mode; low is added to the first C channels, offset to the pixels.

    Raises ValueError where Triton cannot serve them.
    """
    _check_device(dtype, *(x for x in (bands, low) if x is not None))
    pixels = empty_pixels(bands, mode, dtype)
    batch, colours, frames, height, width = (bands.shape[0], pixels.shape[1], *bands.shape[2:])
    packed = is_packed(bands, colours, mode)
    arch = architecture(bands.device)
    config = tuning.pick("haar synthesis", candidates(arch, max(pixels.element_size(), bands.element_size())))
    block = columns(arch)
    blocks = triton.cdiv(height, config.rows) * triton.cdiv(width, block) * (1 if packed else colours)
    if pixels.numel():
        with current(bands.device):
            haar_kernels.haar_synthesis_kernel[blocks, frames, batch](
                bands, low, pixels,
                *_strides(None if packed else bands), *_strides(low), *pixels.stride()[:4],
                colours, frames, height, width, 2 * width, scale, offset,
                MODE=MODES[mode], PACKED=packed, WITH_LOW=low is not None,
                ROWS=config.rows, COLUMNS=block, num_warps=config.num_warps, **registers(packed, PLANAR),
            )  # fmt: skip
    return pixels


def _check_device(dtype: torch.dtype, *tensors: Tensor) -> None:
    dtypes = (*DTYPES, torch.uint8)
    check_triton("haar", *tensors, dtypes=dtypes)
    check_triton("haar", tensors[0].new_empty(0, dtype=dtype), dtypes=dtypes)


def empty_bands(
    pixels: Tensor, mode: str, dtype: torch.dtype, channels_last: bool, with_low: bool
) -> tuple[Tensor, Tensor]:
    """The bands and low of these pixels, not filled; sizes may be symbols."""
    batch, colours, frames, height, width = pixels.shape
    frames = {"frames": frames, "pairs": frames // 2}.get(mode, (frames + 1) // 2)
    shape = (batch, colours * (4 if mode == "frames" else 8), frames, height // 2, width // 2)
    layout = torch.channels_last_3d if channels_last else torch.contiguous_format
    bands = torch.empty(shape, dtype=dtype, device=pixels.device, memory_format=layout)
    return bands, bands.new_empty((batch, colours, *shape[2:]) if with_low else 0)


def empty_pixels(bands: Tensor, mode: str, dtype: torch.dtype) -> Tensor:
    """The pixels of these bands, planar, not filled."""
    batch, channels, frames, height, width = bands.shape
    frames = {"frames": frames, "pairs": 2 * frames}.get(mode, max(0, 2 * frames - 1))
    shape = (batch, channels // (4 if mode == "frames" else 8), frames, 2 * height, 2 * width)
    return bands.new_empty(shape, dtype=dtype)


def _strides(x: Tensor | None) -> tuple[int, ...]:
    return (0,) * 5 if x is None else x.stride()


def is_packed(bands: Tensor, colours: int, mode: str) -> bool:
    """Whether bands lie so that 24 channels of one or two positions are three vectors of eight."""
    dense = bands.is_contiguous(memory_format=torch.channels_last_3d)
    return colours == COLOURS and dense and (mode != "frames" or bands.shape[4] % 2 == 0)


def pixel_layout(pixels: Tensor, packed: bool) -> int:
    """How analysis loads these pixels: PLANAR, INTERLEAVED or STRIDED."""
    if pixels.stride(4) == 1:
        return PLANAR
    dense = pixels.stride(1) == 1 and pixels.stride(4) == COLOURS and pixels.shape[4] % 8 == 0
    return INTERLEAVED if packed and dense and pixels.element_size() <= 2 else STRIDED


def columns(arch: int) -> int:
    """Positions of a block beside each other, few in the interpreter."""
    return COLUMNS if arch else 16


def candidates(arch: int, widest: int) -> list[tuning.RowConfig]:
    """Blocks worth timing. A thread has four positions, 16 bytes of a row in bf16; two where pixels or bands, `widest`
    bytes a value, are float32."""
    if arch == 0:
        return [tuning.RowConfig(4, 1)]
    return [tuning.RowConfig((1 if widest == 4 else 2) * warps, warps) for warps in (4, 8, 2)]


def registers(packed: bool, layout: int) -> dict[str, int]:
    """The launch option that says how many registers a thread may have.

    Left to itself the compiler aims at 96 for some calls, and spills. Single loads need more for their addresses.
    """
    return {"maxnreg": REGISTERS} if packed and layout != STRIDED else {}
