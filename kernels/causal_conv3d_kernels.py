"""The causal convolution as an implicit matrix product, in Triton.

Rows are the pixels of a BLOCK_H x BLOCK_W patch of one output frame, columns are output channels, and what is summed
over is (tap, input channel). One loop walks over taps and blocks of channels, so that it fills its pipeline once per
tile. A tap adds the same step in time, rows and columns to every pixel of the patch: with descriptors its pixels are a
TMA box, which may begin before the frame or end after it and holds zeros there; with pointers a mask does the same. The
frame is a number, not a vector, so that an earlier chunk's frame is another descriptor, or another pointer, chosen by
two selects; and the first frame is repeated by not counting below it.

With descriptors the product is transposed, weights on the left: pixels on the left would go through registers, as their
boxes have five dimensions, and 128 channels by 256 pixels then suit both 128 output channels and Hopper's products.
"""

import triton
import triton.language as tl


@triton.jit
def _load_box(
    view, sample, frame, frames, row, column, step_h, step_w, channel, x_column,
    STRIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The pixels that one tap sees, (BLOCK_M, BLOCK_K); row and column are those of the patch in the output.

    With a stride of 2 a view is (frames of all samples, H / 2, 2, W / 2, channels of two pixels).
    """
    if STRIDE == 1:
        box = view.load([sample, frame, row + step_h, column + step_w, channel])
    else:
        image, channel = sample * frames + frame, step_w % 2 * x_column + channel
        box = view.load([image, row + step_h // 2, step_h % 2, column + step_w // 2, channel])
    return tl.reshape(box, (BLOCK_M, BLOCK_K))


@triton.jit
def _load_pixels(
    base, row, column, height, width, to_row, to_column, first_channel, CHANNELS: tl.constexpr, BLOCK_K: tl.constexpr
):
    """The pixels at these rows and columns of a frame, BLOCK_K channels of each; zero outside of the frame."""
    channel = first_channel + tl.arange(0, BLOCK_K)
    mask = ((row >= 0) & (row < height) & (column >= 0) & (column < width))[:, None]
    if CHANNELS % BLOCK_K:
        mask = mask & (channel < CHANNELS)[None, :]
    return tl.load(base + (row * to_row + column * to_column)[:, None] + channel[None, :], mask=mask, other=0.0)


@triton.jit
def _load_taps(
    base, out_channel, first_channel, TAPS: tl.constexpr, CHANNELS: tl.constexpr, OUT_CHANNELS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tap of the weights from `base` on, (BLOCK_N, BLOCK_K)."""
    channel = first_channel + tl.arange(0, BLOCK_K)
    mask = tl.full((BLOCK_N, BLOCK_K), True, tl.int1)
    if CHANNELS % BLOCK_K:
        mask = mask & (channel < CHANNELS)[None, :]
    if OUT_CHANNELS % BLOCK_N:
        mask = mask & (out_channel < OUT_CHANNELS)[:, None]
    return tl.load(base + (out_channel * (TAPS * CHANNELS))[:, None] + channel[None, :], mask=mask, other=0.0)


SIZES = ["past", "frames", "height", "width", "out_frames", "out_height", "out_width", "out_batch"]
STRIDES = ["x_batch", "x_frame", "x_row", "x_column", "earlier_batch", "previous_batch"]
STRIDES += ["residual_batch", "residual_frame", "residual_row", "residual_column"]


@triton.jit(do_not_specialize=SIZES + STRIDES)
def causal_conv3d_fwd_kernel(
    x, earlier, previous, weight, bias, residual, out,
    x_view, earlier_view, previous_view, weight_view,
    x_batch, x_frame, x_row, x_column, earlier_batch, previous_batch,
    residual_batch, residual_frame, residual_row, residual_column,
    past, frames, height, width, out_frames, out_height, out_width, out_batch,
    CHANNELS: tl.constexpr, OUT_CHANNELS: tl.constexpr, KERNEL_T: tl.constexpr, KERNEL: tl.constexpr,
    STRIDE_T: tl.constexpr, STRIDE: tl.constexpr, HAS_CACHE: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, ALIGNED: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out (B, T', H', W', C_out) dense, but for samples out_batch pixels apart; weight (C_out, taps, C) dense; channels
    of x, the cache and residual adjacent.

    past: frames before x: those of the cache, or as many times x's first frame. earlier and previous: the frames two
    and one before x, in x's strides but for the batch's. All strides come divided by ALIGNED, so that the compiler
    knows them for multiples of it.
    """
    BLOCK_M: tl.constexpr = BLOCK_H * BLOCK_W
    BLOCKS_K: tl.constexpr = (CHANNELS + BLOCK_K - 1) // BLOCK_K
    BLOCKS_N: tl.constexpr = (OUT_CHANNELS + BLOCK_N - 1) // BLOCK_N
    TAPS: tl.constexpr = KERNEL_T * KERNEL * KERNEL
    PADDING: tl.constexpr = KERNEL // 2 if STRIDE == 1 else 0

    x_row, x_column = x_row * ALIGNED, x_column * ALIGNED
    residual_row, residual_column = residual_row * ALIGNED, residual_column * ALIGNED
    x_batch, x_frame = x_batch.to(tl.int64) * ALIGNED, x_frame.to(tl.int64) * ALIGNED
    earlier_batch, previous_batch = earlier_batch.to(tl.int64) * ALIGNED, previous_batch.to(tl.int64) * ALIGNED
    residual_batch, residual_frame = residual_batch.to(tl.int64) * ALIGNED, residual_frame.to(tl.int64) * ALIGNED

    # Programs that run together share pixels: first in output channels, then along a band of rows, then in time.
    work = tl.program_id(0)
    first_channel = work % BLOCKS_N * BLOCK_N
    work = work // BLOCKS_N
    patches = tl.cdiv(out_width, BLOCK_W)
    first_column = work % patches * BLOCK_W
    work = work // patches
    frame = work % out_frames
    work = work // out_frames
    bands = tl.cdiv(out_height, BLOCK_H)
    first_row = work % bands * BLOCK_H
    sample = work // bands

    pixel = tl.arange(0, BLOCK_M)
    row = first_row + pixel // BLOCK_W
    column = first_column + pixel % BLOCK_W
    out_channel = first_channel + tl.arange(0, BLOCK_N)
    kept = out_channel < OUT_CHANNELS
    mask = ((row < out_height) & (column < out_width))[:, None]
    if OUT_CHANNELS % BLOCK_N:
        mask = mask & kept[None, :]
    # What is added is where the sums begin: at their end it would want registers that they hold.
    sums = tl.zeros((BLOCK_N, BLOCK_M) if DESCRIPTORS else (BLOCK_M, BLOCK_N), tl.float32)
    if HAS_RESIDUAL:
        base = residual + sample * residual_batch + frame * residual_frame
        where = base + (row * residual_row + column * residual_column)[:, None] + out_channel[None, :]
        added = tl.load(where, mask=mask, other=0.0)
        if DESCRIPTORS:
            added = tl.trans(added)
        sums += added.to(tl.float32)
    if HAS_BIAS:
        added_bias = tl.load(bias + out_channel, mask=kept, other=0.0).to(tl.float32)
        sums += added_bias[:, None] if DESCRIPTORS else added_bias[None, :]
    for step in tl.range(0, TAPS * BLOCKS_K):
        tap = step // BLOCKS_K
        channel = step % BLOCKS_K * BLOCK_K
        step_h = tap // KERNEL % KERNEL - PADDING
        step_w = tap % KERNEL - PADDING
        source = frame * STRIDE_T + tap // (KERNEL * KERNEL) - past  # a frame of x, or before it
        inside = tl.maximum(source, 0)
        if DESCRIPTORS:
            view = x_view
            count = frames
            if HAS_CACHE:
                if source == -1:
                    view = previous_view
                    count = 1
                if source == -2:
                    view = earlier_view
                    count = 1
            pixels = _load_box(
                view, sample, inside, count, first_row, first_column, step_h, step_w, channel, x_column,
                STRIDE, BLOCK_M, BLOCK_K,
            )  # fmt: skip
            taps = tl.reshape(weight_view.load([tap, first_channel, channel]), (BLOCK_N, BLOCK_K))
        else:
            base = x + sample * x_batch + inside * x_frame
            if HAS_CACHE:
                if source == -1:
                    base = previous + sample * previous_batch
                if source == -2:
                    base = earlier + sample * earlier_batch
            pixels = _load_pixels(
                base, row * STRIDE + step_h, column * STRIDE + step_w, height, width, x_row, x_column, channel,
                CHANNELS, BLOCK_K,
            )  # fmt: skip
            tap_weight = weight + tap * CHANNELS
            taps = _load_taps(tap_weight, out_channel, channel, TAPS, CHANNELS, OUT_CHANNELS, BLOCK_N, BLOCK_K)
        if DESCRIPTORS:
            sums = tl.dot(taps, tl.trans(pixels), sums, input_precision=PRECISION)
        else:
            sums = tl.dot(pixels, tl.trans(taps), sums, input_precision=PRECISION)

    if DESCRIPTORS:
        sums = tl.trans(sums)
    base = out + (sample * out_batch.to(tl.int64) + frame.to(tl.int64) * out_height * out_width) * OUT_CHANNELS
    where = base + ((row * out_width + column) * OUT_CHANNELS)[:, None] + out_channel[None, :]
    tl.store(where, sums.to(out.dtype.element_ty), mask=mask)
