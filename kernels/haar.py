"""Haar wavelets of video: 3D over (time, rows, columns), causal, and 2D per frame; analysis and synthesis.

Kernel and stride are 2. In 3D every coefficient is +-0.3536 (that literal) and the eight bands are ordered LLL, LLH,
LHL, LHH, HLL, HLH, HHL, HHH: letter 1 time, 2 rows, 3 columns; high = first minus second. In 2D it is +-1/2, the bands
are low-low, row 0 - row 1, column 0 - column 1, both. Each band is C channels wide, band-major. Before the first frame
of a clip stands that frame once more (analysis), and synthesis drops the first frame it makes: T = 2m + 1 frames give
m + 1. Later chunks of a clip hold an even number of frames and neither repeat nor drop.

Pixels are (B, C, T, H, W), bands (B, 8C or 4C, T', H/2, W/2). Analysis takes pixels in any strides, uint8 or floating;
with `normalize` they go from [0, 255] or [0, 1] to [-1, 1] on the way. Synthesis writes planar pixels, floating or
uint8; with `denormalize` it is the inverse, and uint8 is always clamped and rounded, ties to even. Sums are in float32.
`low` is the low-pass band on its own, planar (B, C, T', H/2, W/2): analysis gives it beside the bands, so that the next
level of a pyramid need not read a slice of them (3 channels of 24 cost the traffic of most of them); synthesis adds it
to the first C channels. Gradients of either direction are the other: each is the transpose of its namesake, behind the
repeated frame, a frame of zeros (which drops what belongs to it) or none, so that both can be differentiated again.

One pass moves each pixel once in and once out: a clip of n values costs n (bytes of a pixel + bytes of a band value),
and n / 8 (3D) or n / 4 (2D) values more with low. Four additions a value in 3D, three in 2D: nothing beside the memory.
The kernels (`haar_kernels.py`, launched by `haar_launch.py`) access 16 bytes a thread on both sides in bf16 and
float32, for three colours and channels-last bands. Narrower are: uint8 pixels, 8 bytes (16 would take 192 band values
a thread, more than it has registers for; a warp still covers pieces of 128 bytes); low and planar bands, half of what
pixels have; pixels neither side by side nor dense (T, H, W, 3), one at a time; rows of pixels that are no multiple of
16 long. A slice of three channels of channels-last bands is read one at a time too.
"""

import torch
from osp_fast.kernels.haar_launch import analyse, empty_bands, empty_pixels, synthesise
from osp_fast.kernels.launch import constant_path
from torch import Tensor

COEFFICIENT_3D = 0.3536
COEFFICIENT_2D = 0.5


def haar3d(
    video: Tensor,
    first_chunk: bool = True,
    dtype: torch.dtype | None = None,
    normalize: bool = False,
    with_low: bool = False,
    channels_last: bool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Analysis: (B, C, T, H, W) -> (B, 8C, T', H/2, W/2), T' = (T + 1) / 2 in the first chunk, T / 2 after it.

    dtype: of the bands, by default the pixels' own, float32 for uint8; with_low: (bands, low) are returned;
    channels_last: in memory, by default so by Triton and planar by the reference.
    Raises ValueError on sizes that cannot be halved and on dtypes that are not floating.
    """
    if constant_path(video.device) == "triton":
        return haar_triton(video, "repeat" if first_chunk else "pairs", dtype, normalize, with_low, channels_last)
    return haar3d_ref(video, first_chunk, dtype, normalize, with_low, channels_last)


def haar2d(
    frames: Tensor,
    dtype: torch.dtype | None = None,
    normalize: bool = False,
    with_low: bool = False,
    channels_last: bool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Analysis per frame: (B, C, T, H, W) -> (B, 4C, T, H/2, W/2); options as in `haar3d`."""
    if constant_path(frames.device) == "triton":
        return haar_triton(frames, "frames", dtype, normalize, with_low, channels_last)
    return haar2d_ref(frames, dtype, normalize, with_low, channels_last)


def inverse_haar3d(
    bands: Tensor,
    first_chunk: bool = True,
    dtype: torch.dtype | None = None,
    low: Tensor | None = None,
    denormalize: bool = False,
) -> Tensor:
    """Synthesis: (B, 8C, T, H, W) -> (B, C, T', 2H, 2W), T' = 2T - 1 in the first chunk, 2T after it.

    dtype: of the pixels, floating or uint8, by default the bands' own; low (B, C, T, H, W) is added to the first C
    channels. Raises ValueError on sizes that do not fit.
    """
    if constant_path(bands.device) == "triton":
        return inverse_haar_triton(bands, "zero" if first_chunk else "pairs", dtype, low, denormalize)
    return inverse_haar3d_ref(bands, first_chunk, dtype, low, denormalize)


def inverse_haar2d(
    bands: Tensor, dtype: torch.dtype | None = None, low: Tensor | None = None, denormalize: bool = False
) -> Tensor:
    """Synthesis per frame: (B, 4C, T, H, W) -> (B, C, T, 2H, 2W); options as in `inverse_haar3d`."""
    if constant_path(bands.device) == "triton":
        return inverse_haar_triton(bands, "frames", dtype, low, denormalize)
    return inverse_haar2d_ref(bands, dtype, low, denormalize)


def haar3d_ref(
    video: Tensor,
    first_chunk: bool = True,
    dtype: torch.dtype | None = None,
    normalize: bool = False,
    with_low: bool = False,
    channels_last: bool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The reference of `haar3d`; computes in at least float32."""
    dtype = _check_pixels(video, "repeat" if first_chunk else "pairs", dtype)
    x = _pixel_values(video, dtype, normalize)
    if first_chunk:
        x = torch.cat((x[:, :, :1], x), dim=2)
    bands = [x]
    for dim in (2, 3, 4):
        bands = [half for band in bands for half in _split(band, dim)]
    return _finish(torch.cat(bands, dim=1) * COEFFICIENT_3D, dtype, with_low, channels_last, video.shape[1])


def haar2d_ref(
    frames: Tensor,
    dtype: torch.dtype | None = None,
    normalize: bool = False,
    with_low: bool = False,
    channels_last: bool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The reference of `haar2d`; computes in at least float32."""
    dtype = _check_pixels(frames, "frames", dtype)
    low, high = _split(_pixel_values(frames, dtype, normalize), 3)
    (low_low, low_high), (high_low, high_high) = _split(low, 4), _split(high, 4)
    bands = torch.cat((low_low, high_low, low_high, high_high), dim=1) * COEFFICIENT_2D
    return _finish(bands, dtype, with_low, channels_last, frames.shape[1])


def inverse_haar3d_ref(
    bands: Tensor,
    first_chunk: bool = True,
    dtype: torch.dtype | None = None,
    low: Tensor | None = None,
    denormalize: bool = False,
) -> Tensor:
    """The reference of `inverse_haar3d`; computes in at least float32."""
    dtype = _check_bands(bands, 8, dtype, low)
    parts = _band_values(bands, 8, low, COEFFICIENT_3D)
    for dim in (4, 3, 2):
        parts = [_merge(first, second, dim) for first, second in zip(parts[0::2], parts[1::2], strict=True)]
    return _to_pixels(parts[0][:, :, 1:] if first_chunk else parts[0], dtype, denormalize)


def inverse_haar2d_ref(
    bands: Tensor, dtype: torch.dtype | None = None, low: Tensor | None = None, denormalize: bool = False
) -> Tensor:
    """The reference of `inverse_haar2d`; computes in at least float32."""
    dtype = _check_bands(bands, 4, dtype, low)
    low_low, high_low, low_high, high_high = _band_values(bands, 4, low, COEFFICIENT_2D)
    return _to_pixels(_merge(_merge(low_low, low_high, 4), _merge(high_low, high_high, 4), 3), dtype, denormalize)


def _split(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Sums and differences of neighbours along dim."""
    first, second = x.unflatten(dim, (-1, 2)).unbind(dim + 1)
    return first + second, first - second


def _merge(low: Tensor, high: Tensor, dim: int) -> Tensor:
    """The transpose of `_split`."""
    return torch.stack((low + high, low - high), dim=dim + 1).flatten(dim, dim + 1)


def _at_least_float32(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype to compute in: the widest floating one of these and float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _pixel_values(x: Tensor, dtype: torch.dtype, normalize: bool) -> Tensor:
    values = x.to(_at_least_float32(x.dtype, dtype))
    if not normalize:
        return values
    return 2 * values - 1 if x.is_floating_point() else values / 127.5 - 1


def _band_values(bands: Tensor, count: int, low: Tensor | None, coefficient: float) -> list[Tensor]:
    parts = list(bands.to(_at_least_float32(bands.dtype)).chunk(count, dim=1))
    if low is not None:
        parts[0] = parts[0] + low
    return [part * coefficient for part in parts]


def _finish(bands: Tensor, dtype: torch.dtype, with_low: bool, channels_last: bool | None, colours: int):
    bands = bands.to(dtype)
    if channels_last:
        bands = bands.contiguous(memory_format=torch.channels_last_3d)
    return (bands, bands[:, :colours]) if with_low else bands


def _to_pixels(x: Tensor, dtype: torch.dtype, denormalize: bool) -> Tensor:
    if dtype.is_floating_point:
        return ((x + 1) / 2 if denormalize else x).to(dtype)
    return ((x + 1) * 127.5 if denormalize else x).clamp(0, 255).round().to(dtype)


def _check_pixels(x: Tensor, mode: str, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of the bands. Raises ValueError for pixels that analysis does not take."""
    if x.dim() != 5 or x.shape[3] % 2 or x.shape[4] % 2:
        raise ValueError(f"pixels {tuple(x.shape)} must be (B, C, T, H, W) with even H and W")
    if mode == "pairs" and x.shape[2] % 2:
        raise ValueError(f"a chunk after the first must have an even number of frames, not {x.shape[2]}")
    if mode == "repeat" and x.shape[2] % 2 == 0:
        raise ValueError(f"a clip's first chunk must have an odd number of frames, not {x.shape[2]}")
    if not x.is_floating_point() and x.dtype != torch.uint8:
        raise ValueError(f"pixels must be uint8 or floating, not {x.dtype}")
    dtype = dtype or (x.dtype if x.is_floating_point() else torch.float32)
    if not dtype.is_floating_point:
        raise ValueError(f"bands must be floating, not {dtype}")
    return dtype


def _check_bands(bands: Tensor, count: int, dtype: torch.dtype | None, low: Tensor | None) -> torch.dtype:
    """The dtype of the pixels. Raises ValueError for bands that synthesis does not take."""
    if bands.dim() != 5 or bands.shape[1] % count or not bands.is_floating_point():
        raise ValueError(f"bands {tuple(bands.shape)} {bands.dtype} must be floating (B, {count} C, T, H, W)")
    if low is not None:
        expected = (bands.shape[0], bands.shape[1] // count, *bands.shape[2:])
        if low.shape != expected or not low.is_floating_point() or low.device != bands.device:
            raise ValueError(
                f"low {tuple(low.shape)} {low.dtype} on {low.device} must be floating {expected} on {bands.device}"
            )
    dtype = dtype or bands.dtype
    if not dtype.is_floating_point and dtype != torch.uint8:
        raise ValueError(f"pixels must be uint8 or floating, not {dtype}")
    return dtype


def haar_triton(
    pixels: Tensor,
    mode: str,
    dtype: torch.dtype | None = None,
    normalize: bool = False,
    with_low: bool = False,
    channels_last: bool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Analysis by Triton alone: `haar2d` in mode "frames", `haar3d` in "repeat" (first chunk) and "pairs"."""
    dtype = _check_pixels(pixels, mode, dtype)
    count, scale = (4, COEFFICIENT_2D) if mode == "frames" else (8, COEFFICIENT_3D)
    offset = 0.0
    if normalize:
        offset = -count * scale
        scale *= 2 if pixels.is_floating_point() else 2 / 255
    bands, low = torch.ops.osp_fast.haar_analysis(
        pixels, mode, dtype, scale, offset, channels_last is not False, with_low
    )
    return (bands, low) if with_low else bands


def inverse_haar_triton(
    bands: Tensor,
    mode: str,
    dtype: torch.dtype | None = None,
    low: Tensor | None = None,
    denormalize: bool = False,
) -> Tensor:
    """Synthesis by Triton alone; the mode of a first chunk is "zero"."""
    dtype = _check_bands(bands, 4 if mode == "frames" else 8, dtype, low)
    scale, offset = COEFFICIENT_2D if mode == "frames" else COEFFICIENT_3D, 0.0
    if denormalize:
        offset = 0.5 if dtype.is_floating_point else 127.5
        scale *= offset
    return torch.ops.osp_fast.haar_synthesis(bands, low, mode, dtype, scale, offset)


@torch.library.custom_op("osp_fast::haar_analysis", mutates_args=())
def _analysis(
    pixels: Tensor, mode: str, dtype: torch.dtype, scale: float, offset: float, channels_last: bool, with_low: bool
) -> tuple[Tensor, Tensor]:
    """Bands of pixels behind what `mode` says, times scale, and offset added to their first C channels; and low."""
    return analyse(pixels, mode, dtype, scale, offset, channels_last, with_low)


@torch.library.custom_op("osp_fast::haar_synthesis", mutates_args=())
def _synthesis(bands: Tensor, low: Tensor | None, mode: str, dtype: torch.dtype, scale: float, offset: float) -> Tensor:
    """The transpose of `_analysis` in the same mode, low added to the first C channels, and offset to the pixels."""
    return synthesise(bands, low, mode, dtype, scale, offset)


@_analysis.register_fake
def _(pixels, mode, dtype, scale, offset, channels_last, with_low):
    return empty_bands(pixels, mode, dtype, channels_last, with_low)


@_synthesis.register_fake
def _(bands, low, mode, dtype, scale, offset):
    return empty_pixels(bands, mode, dtype)


def _save_for_synthesis(ctx, inputs, output) -> None:
    pixels, mode, _, scale, _, _, ctx.with_low = inputs
    ctx.set_materialize_grads(False)  # zeros for bands or low that nobody uses would be written and read
    ctx.options = (mode, pixels.dtype, scale, 0.0)


def _analysis_gradients(ctx, bands_grad, low_grad):
    low_grad = low_grad if ctx.with_low else None
    if bands_grad is None and low_grad is None:
        return (None,) * 7
    if bands_grad is None:  # one zero stands for all of them
        batch, colours, *sizes = low_grad.shape
        count = 4 if ctx.options[0] == "frames" else 8
        bands_grad = low_grad.new_zeros(()).expand(batch, colours * count, *sizes)
    return torch.ops.osp_fast.haar_synthesis(bands_grad, low_grad, *ctx.options), *(None,) * 6


def _save_for_analysis(ctx, inputs, output) -> None:
    bands, low, mode, _, scale, _ = inputs
    ctx.options = (mode, bands.dtype, scale, 0.0, bands.stride(1) == 1, low is not None)
    ctx.low_dtype = None if low is None else low.dtype


def _synthesis_gradients(ctx, grad):
    bands_grad, low_grad = torch.ops.osp_fast.haar_analysis(grad, *ctx.options)
    return bands_grad, None if ctx.low_dtype is None else low_grad.to(ctx.low_dtype), *(None,) * 4


_analysis.register_autograd(_analysis_gradients, setup_context=_save_for_synthesis)
_synthesis.register_autograd(_synthesis_gradients, setup_context=_save_for_analysis)
