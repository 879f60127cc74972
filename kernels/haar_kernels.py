"""The Haar wavelets in Triton: one kernel of analysis, one of synthesis, each the other's transpose.

A program takes ROWS x COLUMNS positions of one frame of bands: 2 ROWS x 2 COLUMNS pixels of two frames (of one in 2D).
Rows of pixels are accessed 2 COLUMNS wide and split into even and odd columns, which stay in their thread. PACKED is
for three colours and dense channels-last bands: the 24 channels of a position (in 2D, of two positions beside each
other) are joined within the thread to three vectors of eight, and one exchange through shared memory brings them into
the order of memory. Otherwise a program takes one colour of bands in any strides.

Where pixels lie: PLANAR, columns side by side. INTERLEAVED, three colours side by side and then the next column, as
decoders of video give them: a thread takes eight columns as three vectors of eight. STRIDED, anywhere.
"""

import triton
import triton.language as tl

FRAMES, PAIRS, REPEAT, ZERO = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
PLANAR, INTERLEAVED, STRIDED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: a sum with it is rounded to an integer, whose low byte ends the float32


@triton.jit
def _even_odd(x):
    """(R, 2 W) -> (R, W) twice: even and odd columns."""
    return tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))


@triton.jit
def _interleave(even, odd):
    """The inverse of `_even_odd`."""
    return tl.reshape(tl.join(even, odd), (even.shape[0], even.shape[1] * 2))


@triton.jit
def _join8(e0, e1, e2, e3, e4, e5, e6, e7):
    """Eight (R, W) -> (R, W, 2, 2, 2), in this order."""
    even = tl.join(tl.join(e0, e4), tl.join(e2, e6))
    odd = tl.join(tl.join(e1, e5), tl.join(e3, e7))
    return tl.join(even, odd)


@triton.jit
def _split8(x):
    """The inverse of `_join8`."""
    even, odd = tl.split(x)
    e04, e26 = tl.split(even)
    e15, e37 = tl.split(odd)
    e0, e4 = tl.split(e04)
    e2, e6 = tl.split(e26)
    e1, e5 = tl.split(e15)
    e3, e7 = tl.split(e37)
    return e0, e1, e2, e3, e4, e5, e6, e7


@triton.jit
def _load24(start, inside):
    """Three vectors of eight that begin at the pointers (R, W, 1): (R, W, 2, 2, 2) each."""
    channel = tl.arange(0, 32)[None, None, :]
    x = tl.load(start + channel, inside & (channel < 24), other=0)
    x = tl.permute(tl.reshape(x, (x.shape[0], x.shape[1], 2, 2, 2, 2, 2)), (0, 1, 4, 5, 6, 2, 3))
    even, odd = tl.split(x)
    v0, v2 = tl.split(even)
    v1, _ = tl.split(odd)
    return v0, v1, v2


@triton.jit
def _store24(start, v0, v1, v2, inside):
    """The inverse of `_load24`."""
    x = tl.join(tl.join(v0, v2), tl.join(v1, v2))  # (R, W, 2, 2, 2, high, low): vector 2 high + low; 3 is of no use
    x = tl.reshape(tl.permute(x, (0, 1, 5, 6, 2, 3, 4)), (v0.shape[0], v0.shape[1], 32))
    channel = tl.arange(0, 32)[None, None, :]
    tl.store(start + channel, x, inside & (channel < 24))


@triton.jit
def _load8(start, inside):
    """Eight values from each of the pointers (R, W, 1), as eight (R, W)."""
    x = tl.load(start + tl.arange(0, 8)[None, None, :], inside, other=0)
    return _split8(tl.reshape(x, (x.shape[0], x.shape[1], 2, 2, 2)))


@triton.jit
def _join4(e0, e1, e2, e3):
    """Four (R, W) -> (R, 4 W) in this order."""
    x = tl.join(tl.join(e0, e2), tl.join(e1, e3))
    return tl.reshape(x, (e0.shape[0], e0.shape[1] * 4))


@triton.jit
def _place(colours, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PACKED: tl.constexpr):
    """(colour, rows (R, 1), first column) of this program."""
    place, colour = tl.program_id(0), 0
    if not PACKED:
        colour = (place % colours).to(tl.int64)
        place = place // colours
    across = tl.cdiv(width, COLUMNS)
    return colour, (place // across) * ROWS + tl.arange(0, ROWS)[:, None], (place % across) * COLUMNS


@triton.jit
def _load_row(row, column, valid, pixel_width, column_stride, LAYOUT: tl.constexpr, COLUMNS: tl.constexpr):
    """Even and odd pixels (R, COLUMNS) of one colour in rows that begin at the pointers (R, 1); zeros outside."""
    if LAYOUT == PLANAR:
        x = 2 * column + tl.arange(0, 2 * COLUMNS)[None, :]
        even, odd = _even_odd(tl.load(row + x, valid & (x < pixel_width), other=0))
    else:
        x = 2 * (column + tl.arange(0, COLUMNS)[None, :])
        even = row + x.to(tl.int64) * column_stride
        inside = valid & (x < pixel_width)
        even, odd = tl.load(even, inside, other=0), tl.load(even + column_stride, inside, other=0)
    return even, odd


@triton.jit
def _load_rows(
    row, column, valid, pixel_width, colour_stride, column_stride,
    PACKED: tl.constexpr, LAYOUT: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """`_load_row` of three colours, or three times that of one."""
    if LAYOUT == INTERLEAVED:
        eight = tl.arange(0, COLUMNS // 4)[None, :, None]
        inside = valid[:, :, None] & (2 * column + 8 * eight < pixel_width)
        start = row[:, :, None] + (6 * column + 24 * eight)
        a0, b0, c0, a1, b1, c1, a2, b2 = _load8(start, inside)
        c2, a3, b3, c3, a4, b4, c4, a5 = _load8(start + 8, inside)
        b5, c5, a6, b6, c6, a7, b7, c7 = _load8(start + 16, inside)
        even_a, odd_a = _join4(a0, a2, a4, a6), _join4(a1, a3, a5, a7)
        even_b, odd_b = _join4(b0, b2, b4, b6), _join4(b1, b3, b5, b7)
        even_c, odd_c = _join4(c0, c2, c4, c6), _join4(c1, c3, c5, c7)
    else:
        even_a, odd_a = _load_row(row, column, valid, pixel_width, column_stride, LAYOUT, COLUMNS)
        even_b, odd_b, even_c, odd_c = even_a, odd_a, even_a, odd_a
        if PACKED:
            row += colour_stride
            even_b, odd_b = _load_row(row, column, valid, pixel_width, column_stride, LAYOUT, COLUMNS)
            row += colour_stride
            even_c, odd_c = _load_row(row, column, valid, pixel_width, column_stride, LAYOUT, COLUMNS)
    return even_a, odd_a, even_b, odd_b, even_c, odd_c


@triton.jit
def _sums(even0, odd0, even1, odd1):
    """Sums and differences of 2 x 2 pixels: LL, LH, HL, HH, letter 1 rows, 2 columns."""
    even0, odd0, even1, odd1 = even0.to(tl.float32), odd0.to(tl.float32), even1.to(tl.float32), odd1.to(tl.float32)
    low0, low1, high0, high1 = even0 + odd0, even1 + odd1, even0 - odd0, even1 - odd1
    return low0 + low1, high0 + high1, low0 - low1, high0 - high1


@triton.jit
def _bands(first, second, third, fourth, scale, offset, COLOUR: tl.constexpr, MODE: tl.constexpr, DTYPE: tl.constexpr):
    """The eight bands of one colour of four rows, two of each frame; in 2D the four of two rows, and the same again."""
    x0, x1, x2, x3 = _sums(first[2 * COLOUR], first[2 * COLOUR + 1], second[2 * COLOUR], second[2 * COLOUR + 1])
    if MODE == FRAMES:
        b0, b1, b2, b3 = x0, x2, x1, x3
        b4, b5, b6, b7 = b0, b1, b2, b3
    else:
        y0, y1, y2, y3 = _sums(third[2 * COLOUR], third[2 * COLOUR + 1], fourth[2 * COLOUR], fourth[2 * COLOUR + 1])
        b0, b1, b2, b3 = x0 + y0, x1 + y1, x2 + y2, x3 + y3
        b4, b5, b6, b7 = x0 - y0, x1 - y1, x2 - y2, x3 - y3
    b0 = (b0 * scale + offset).to(DTYPE)
    b1, b2, b3 = (b1 * scale).to(DTYPE), (b2 * scale).to(DTYPE), (b3 * scale).to(DTYPE)
    b4, b5, b6, b7 = (b4 * scale).to(DTYPE), (b5 * scale).to(DTYPE), (b6 * scale).to(DTYPE), (b7 * scale).to(DTYPE)
    return b0, b1, b2, b3, b4, b5, b6, b7


@triton.jit
def _halves(x):
    """Four bands in even columns, then in odd columns."""
    e0, o0 = _even_odd(x[0])
    e1, o1 = _even_odd(x[1])
    e2, o2 = _even_odd(x[2])
    e3, o3 = _even_odd(x[3])
    return e0, e1, e2, e3, o0, o1, o2, o3


@triton.jit(do_not_specialize=["colours", "frames", "height"])
def haar_analysis_kernel(
    pixels, bands, low,
    pixel_batch, pixel_colour, pixel_frame, pixel_row, pixel_column,
    band_batch, band_channel, band_frame, band_row, band_column,
    colours, frames, height, width, pixel_width, scale, offset,
    MODE: tl.constexpr, PACKED: tl.constexpr, LAYOUT: tl.constexpr, WITH_LOW: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Bands (B, 8C or 4C, frames, height, width) of pixels, and low (B, C, ...) contiguous, their first C channels."""
    colour, rows, column = _place(colours, width, ROWS, COLUMNS, PACKED)
    t, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    valid = rows < height
    columns = column + tl.arange(0, COLUMNS)[None, :]
    inside = valid & (columns < width)
    first = t if MODE == FRAMES else 2 * t if MODE == PAIRS else 2 * t - 1
    row = pixels + batch * pixel_batch + colour * pixel_colour + tl.maximum(first, 0) * pixel_frame
    row += 2 * rows.to(tl.int64) * pixel_row
    present = valid & (first >= 0) if MODE == ZERO else valid
    w = _load_rows(row, column, present, pixel_width, pixel_colour, pixel_column, PACKED, LAYOUT, COLUMNS)
    row += pixel_row
    x = _load_rows(row, column, present, pixel_width, pixel_colour, pixel_column, PACKED, LAYOUT, COLUMNS)
    y, z = w, x
    if MODE != FRAMES:
        row = pixels + batch * pixel_batch + colour * pixel_colour + (first + 1) * pixel_frame
        row += 2 * rows.to(tl.int64) * pixel_row
        y = _load_rows(row, column, valid, pixel_width, pixel_colour, pixel_column, PACKED, LAYOUT, COLUMNS)
        row += pixel_row
        z = _load_rows(row, column, valid, pixel_width, pixel_colour, pixel_column, PACKED, LAYOUT, COLUMNS)
    DTYPE: tl.constexpr = bands.dtype.element_ty
    a = _bands(w, x, y, z, scale, offset, 0, MODE, DTYPE)
    plane = frames.to(tl.int64) * height * width  # positions of a clip
    if WITH_LOW:
        low_columns = low + (batch * colours + colour) * plane + (t * height + rows) * width + columns
        tl.store(low_columns, a[0], inside)
    if PACKED:
        b = _bands(w, x, y, z, scale, offset, 1, MODE, DTYPE)
        c = _bands(w, x, y, z, scale, offset, 2, MODE, DTYPE)
        if WITH_LOW:
            tl.store(low_columns + plane, b[0], inside)
            tl.store(low_columns + 2 * plane, c[0], inside)
        start = (batch * plane + (t * height + rows) * width + column)[:, :, None]
        if MODE == FRAMES:
            a0, a1, a2, a3, a4, a5, a6, a7 = _halves(a)
            b0, b1, b2, b3, b4, b5, b6, b7 = _halves(b)
            c0, c1, c2, c3, c4, c5, c6, c7 = _halves(c)
            place = tl.arange(0, COLUMNS // 2)[None, :, None]
            start = bands + start * 12 + place * 24
            within = valid[:, :, None] & (column + 2 * place < width)
        else:
            a0, a1, a2, a3, a4, a5, a6, a7 = a
            b0, b1, b2, b3, b4, b5, b6, b7 = b
            c0, c1, c2, c3, c4, c5, c6, c7 = c
            place = tl.arange(0, COLUMNS)[None, :, None]
            start = bands + start * 24 + place * 24
            within = valid[:, :, None] & (column + place < width)
        v0 = _join8(a0, b0, c0, a1, b1, c1, a2, b2)
        v1 = _join8(c2, a3, b3, c3, a4, b4, c4, a5)
        v2 = _join8(b5, c5, a6, b6, c6, a7, b7, c7)
        _store24(start, v0, v1, v2, within)
    else:
        out = bands + batch * band_batch + colour * band_channel + t * band_frame + rows.to(tl.int64) * band_row
        out += columns.to(tl.int64) * band_column
        step = colours.to(tl.int64) * band_channel
        for i in tl.static_range(4 if MODE == FRAMES else 8):
            tl.store(out + i * step, a[i], inside)


@triton.jit
def _to_pixels(x, scale, offset, dtype: tl.constexpr):
    """scale x + offset; clamped and rounded to nearest, ties to even, where pixels are uint8."""
    x = x * scale + offset
    if dtype == tl.uint8:
        x = tl.minimum(tl.maximum(x, 0.0), 255.0) + ROUND
        return x.to(tl.int32, bitcast=True).to(tl.uint8)
    return x.to(dtype)


@triton.jit
def _store_box(row, row_stride, ll, lh, hl, hh, column, valid, pixel_width, scale, offset, COLUMNS: tl.constexpr):
    """The transpose of `_sums`, into the rows that begin at the pointers (R, 1) and those below."""
    DTYPE: tl.constexpr = row.dtype.element_ty
    x = 2 * column + tl.arange(0, 2 * COLUMNS)[None, :]
    inside = valid & (x < pixel_width)
    low, high = ll + hl, lh + hh
    even, odd = _to_pixels(low + high, scale, offset, DTYPE), _to_pixels(low - high, scale, offset, DTYPE)
    tl.store(row + x, _interleave(even, odd), inside)
    low, high = ll - hl, lh - hh
    even, odd = _to_pixels(low + high, scale, offset, DTYPE), _to_pixels(low - high, scale, offset, DTYPE)
    tl.store(row + row_stride + x, _interleave(even, odd), inside)


@triton.jit
def _store_colour(
    out, row_stride, frame_stride, low, low_inside, b, t, column, valid, pixel_width, scale, offset,
    MODE: tl.constexpr, WITH_LOW: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One colour's pixels from its bands b; `out` points to rows of frame 0, `low` to what is added to b[0]."""
    b0, b1, b2, b3 = b[0].to(tl.float32), b[1].to(tl.float32), b[2].to(tl.float32), b[3].to(tl.float32)
    if WITH_LOW:
        b0 += tl.load(low, low_inside, other=0).to(tl.float32)
    if MODE == FRAMES:
        _store_box(
            out + t * frame_stride, row_stride, b0, b2, b1, b3, column, valid, pixel_width, scale, offset, COLUMNS
        )
    else:
        b4, b5, b6, b7 = b[4].to(tl.float32), b[5].to(tl.float32), b[6].to(tl.float32), b[7].to(tl.float32)
        first = 2 * t if MODE == PAIRS else 2 * t - 1
        out += first * frame_stride
        x0, x1, x2, x3 = b0 + b4, b1 + b5, b2 + b6, b3 + b7
        _store_box(out, row_stride, x0, x1, x2, x3, column, valid & (first >= 0), pixel_width, scale, offset, COLUMNS)
        y0, y1, y2, y3 = b0 - b4, b1 - b5, b2 - b6, b3 - b7
        if MODE == REPEAT:  # frame 0 stands twice in the first box: what belongs to both comes together
            y0, y1 = tl.where(first < 0, x0 + y0, y0), tl.where(first < 0, x1 + y1, y1)
            y2, y3 = tl.where(first < 0, x2 + y2, y2), tl.where(first < 0, x3 + y3, y3)
        out += frame_stride
        _store_box(out, row_stride, y0, y1, y2, y3, column, valid, pixel_width, scale, offset, COLUMNS)


@triton.jit(do_not_specialize=["colours", "frames", "height"])
def haar_synthesis_kernel(
    bands, low, pixels,
    band_batch, band_channel, band_frame, band_row, band_column,
    low_batch, low_colour, low_frame, low_row, low_column,
    pixel_batch, pixel_colour, pixel_frame, pixel_row,
    colours, frames, height, width, pixel_width, scale, offset,
    MODE: tl.constexpr, PACKED: tl.constexpr, WITH_LOW: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """PLANAR pixels of bands (B, 8C or 4C, frames, height, width), low (B, C, ...) added to their first C channels."""
    colour, rows, column = _place(colours, width, ROWS, COLUMNS, PACKED)
    t, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    valid = rows < height
    columns = column + tl.arange(0, COLUMNS)[None, :]
    inside = valid & (columns < width)
    out = pixels + batch * pixel_batch + colour * pixel_colour + 2 * rows.to(tl.int64) * pixel_row
    if WITH_LOW:
        low += batch * low_batch + colour * low_colour + t * low_frame
        low += rows.to(tl.int64) * low_row + columns.to(tl.int64) * low_column
    if PACKED:
        position = ((batch * frames + t) * height + rows) * width + column
        if MODE == FRAMES:
            place = tl.arange(0, COLUMNS // 2)[None, :, None]
            within = valid[:, :, None] & (column + 2 * place < width)
            v0, v1, v2 = _load24(bands + position[:, :, None] * 12 + place * 24, within)
        else:
            place = tl.arange(0, COLUMNS)[None, :, None]
            within = valid[:, :, None] & (column + place < width)
            v0, v1, v2 = _load24(bands + position[:, :, None] * 24 + place * 24, within)
        a0, b0, c0, a1, b1, c1, a2, b2 = _split8(v0)
        c2, a3, b3, c3, a4, b4, c4, a5 = _split8(v1)
        b5, c5, a6, b6, c6, a7, b7, c7 = _split8(v2)
        if MODE == FRAMES:
            a0, a1, a2, a3 = _interleave(a0, a4), _interleave(a1, a5), _interleave(a2, a6), _interleave(a3, a7)
            b0, b1, b2, b3 = _interleave(b0, b4), _interleave(b1, b5), _interleave(b2, b6), _interleave(b3, b7)
            c0, c1, c2, c3 = _interleave(c0, c4), _interleave(c1, c5), _interleave(c2, c6), _interleave(c3, c7)
        _store_colour(
            out, pixel_row, pixel_frame, low, inside, (a0, a1, a2, a3, a4, a5, a6, a7),
            t, column, valid, pixel_width, scale, offset, MODE, WITH_LOW, COLUMNS,
        )  # fmt: skip
        out += pixel_colour
        if WITH_LOW:
            low += low_colour
        _store_colour(
            out, pixel_row, pixel_frame, low, inside, (b0, b1, b2, b3, b4, b5, b6, b7),
            t, column, valid, pixel_width, scale, offset, MODE, WITH_LOW, COLUMNS,
        )  # fmt: skip
        out += pixel_colour
        if WITH_LOW:
            low += low_colour
        _store_colour(
            out, pixel_row, pixel_frame, low, inside, (c0, c1, c2, c3, c4, c5, c6, c7),
            t, column, valid, pixel_width, scale, offset, MODE, WITH_LOW, COLUMNS,
        )  # fmt: skip
    else:
        x = bands + batch * band_batch + colour * band_channel + t * band_frame
        x += rows.to(tl.int64) * band_row + columns.to(tl.int64) * band_column
        step = colours.to(tl.int64) * band_channel
        a0, a1 = tl.load(x, inside, other=0), tl.load(x + step, inside, other=0)
        a2, a3 = tl.load(x + 2 * step, inside, other=0), tl.load(x + 3 * step, inside, other=0)
        a4, a5, a6, a7 = a0, a1, a2, a3
        if MODE != FRAMES:
            a4, a5 = tl.load(x + 4 * step, inside, other=0), tl.load(x + 5 * step, inside, other=0)
            a6, a7 = tl.load(x + 6 * step, inside, other=0), tl.load(x + 7 * step, inside, other=0)
        _store_colour(
            out, pixel_row, pixel_frame, low, inside, (a0, a1, a2, a3, a4, a5, a6, a7),
            t, column, valid, pixel_width, scale, offset, MODE, WITH_LOW, COLUMNS,
        )  # fmt: skip
