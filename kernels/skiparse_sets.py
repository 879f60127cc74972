"""Where the tokens of a skip set lie, for the Triton kernels: sets are walked in memory, never gathered.

Position i of set s is token i (full), i k + s (single skip) or (i div k) k^2 + s k + i mod k (group skip); tokens grow
with i, so that a bound on tokens, the end of the clip or of a text, is a bound on i. Rows are loaded in two parts of
the head dimension, LOW + HIGH channels wide (64 + 32 for 96; HIGH may be 0), as blocks must be powers of two.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

MODE_NUMBER = {"full": 0, "single": 1, "group": 2}
FULL, SINGLE, GROUP = (tl.constexpr(number) for number in MODE_NUMBER.values())


def split_head_dim(head_dim: int) -> tuple[int, int]:
    """LOW, HIGH: powers of two of at least 16 that hold `head_dim` channels. 96 -> (64, 32), 64 -> (64, 0).

    The second part covers more than is left where less than 16 are: 24 -> (16, 16), with 8 channels masked.
    """
    low = max(16, 1 << (head_dim.bit_length() - 1))
    rest = head_dim - low
    return (low, 0) if rest <= 0 else (low, max(16, triton.next_power_of_2(rest)))


def count_sets(mode: str, sparse_n: int) -> int:
    """S, the number of sets."""
    return 1 if mode == "full" else sparse_n


def longest_set(tokens: int, mode: str, sparse_n: int) -> int:
    """Tokens of set 0, which no other set exceeds. Works on symbolic `tokens`."""
    if mode == "full" or sparse_n == 1:
        return tokens
    if mode == "single":
        return (tokens + sparse_n - 1) // sparse_n
    rest = tokens % (sparse_n * sparse_n)
    return tokens // (sparse_n * sparse_n) * sparse_n + torch.sym_min(rest, sparse_n)


@triton.jit
def set_length(tokens, skip_set, MODE: tl.constexpr, K: tl.constexpr):
    """How many of the first `tokens` tokens are in set `skip_set`."""
    if MODE == FULL:
        return tokens
    if MODE == SINGLE:
        return (tokens - skip_set + K - 1) // K
    rest = tokens % (K * K) - skip_set * K
    return tokens // (K * K) * K + tl.minimum(tl.maximum(rest, 0), K)


@triton.jit
def token_of(position, skip_set, MODE: tl.constexpr, K: tl.constexpr):
    """The tokens at `position` (a vector) of set `skip_set`."""
    if MODE == FULL:
        return position
    if MODE == SINGLE:
        return position * K + skip_set
    unsigned = position.to(tl.uint32)  # division is a shift without a correction for negative numbers
    return position + (unsigned // K * (K * K - K)).to(tl.int32) + skip_set * K


@triton.jit
def _part(base, tokens, visible, token_stride, START: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """Pointers to channels START .. START + WIDTH of the rows at `tokens`, and which of them may be touched."""
    channels = START + tl.arange(0, WIDTH)
    where = base + tokens.to(tl.int64)[:, None] * token_stride + channels[None, :]
    mask = visible[:, None]
    if START + WIDTH > D:
        mask = mask & (channels < D)[None, :]
    return where, mask


@triton.jit
def load_rows(base, tokens, visible, token_stride, LOW: tl.constexpr, HIGH: tl.constexpr, D: tl.constexpr):
    """The rows at `tokens`, in two parts; zero where not `visible` or past D. Without a HIGH part it repeats LOW."""
    where, mask = _part(base, tokens, visible, token_stride, 0, LOW, D)
    low = tl.load(where, mask=mask, other=0.0)
    high = low
    if HIGH:
        where, mask = _part(base, tokens, visible, token_stride, LOW, HIGH, D)
        high = tl.load(where, mask=mask, other=0.0)
    return low, high


@triton.jit
def store_rows(base, tokens, visible, token_stride, low, high, LOW: tl.constexpr, HIGH: tl.constexpr, D: tl.constexpr):
    """The inverse of `load_rows`; values are cast to the type that `base` points to."""
    where, mask = _part(base, tokens, visible, token_stride, 0, LOW, D)
    tl.store(where, low.to(base.dtype.element_ty), mask=mask)
    if HIGH:
        where, mask = _part(base, tokens, visible, token_stride, LOW, HIGH, D)
        tl.store(where, high.to(base.dtype.element_ty), mask=mask)


@triton.jit
def add_rows(base, tokens, visible, token_stride, low, high, LOW: tl.constexpr, HIGH: tl.constexpr, D: tl.constexpr):
    """Adds to float32 rows, atomically; otherwise as `store_rows`."""
    where, mask = _part(base, tokens, visible, token_stride, 0, LOW, D)
    tl.atomic_add(where, low, mask=mask, sem="relaxed")
    if HIGH:
        where, mask = _part(base, tokens, visible, token_stride, LOW, HIGH, D)
        tl.atomic_add(where, high, mask=mask, sem="relaxed")


@triton.jit
def _load_box(
    view, batch, skip_set, start, column, MODE: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    if MODE == GROUP:
        box = view.load([batch, start // K, skip_set, 0, column])
    else:
        box = view.load([batch, start, skip_set, column])
    return tl.reshape(box, (ROWS, WIDTH))


@triton.jit
def load_boxes(
    low_view, high_view, batch, skip_set, head, start,
    MODE: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Like `load_rows` through views made by `skip_view`: ROWS rows from position `start`, all of them in the set."""
    low = _load_box(low_view, batch, skip_set, start, head * D, MODE, K, ROWS, LOW)
    high = low
    if HIGH:
        high = _load_box(high_view, batch, skip_set, start, head * D + LOW, MODE, K, ROWS, HIGH)
    return low, high


@triton.jit
def _add_box(
    view, batch, skip_set, start, column, value,
    MODE: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    if MODE == GROUP:
        view.atomic_add([batch, start // K, skip_set, 0, column], tl.reshape(value, (1, ROWS // K, 1, K, WIDTH)))
    else:
        view.atomic_add([batch, start, skip_set, column], tl.reshape(value, (1, ROWS, 1, WIDTH)))


@triton.jit
def add_boxes(
    low_view, high_view, batch, skip_set, head, start, low, high,
    MODE: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Adds to the float32 rows that `load_boxes` would load, atomically: a reduction by the TMA unit."""
    _add_box(low_view, batch, skip_set, start, head * D, low, MODE, K, ROWS, LOW)
    if HIGH:
        _add_box(high_view, batch, skip_set, start, head * D + LOW, high, MODE, K, ROWS, HIGH)


@triton.jit
def product(a_low, a_high, b_low, b_high, HIGH: tl.constexpr, PRECISION: tl.constexpr):
    """a b^T over the channels of both parts: (rows of a, rows of b), float32."""
    result = tl.dot(a_low, tl.trans(b_low), input_precision=PRECISION)
    if HIGH:
        result = tl.dot(a_high, tl.trans(b_high), result, input_precision=PRECISION)
    return result


@triton.jit
def add_product(weights, x_low, x_high, sum_low, sum_high, HIGH: tl.constexpr, PRECISION: tl.constexpr):
    """sum + weights x, in both parts: weights (rows, rows of x), sum (rows, channels) float32."""
    sum_low = tl.dot(weights, x_low, sum_low, input_precision=PRECISION)
    if HIGH:
        sum_high = tl.dot(weights, x_high, sum_high, input_precision=PRECISION)
    return sum_low, sum_high


def skip_view(x: Tensor, mode: str, sparse_n: int, rows: int, width: int) -> TensorDescriptor:
    """A descriptor of x (B, N, H, D) whose boxes are `rows` tokens of one set by `width` channels of one head.

    Where N is not a multiple of the period, the view ends after the memory does: load whole boxes of a set only.
    """
    batch, tokens, heads, head_dim = x.shape
    batch_stride, token_stride = x.stride()[:2]
    sets = count_sets(mode, sparse_n)
    period = sets * sets if mode == "group" else sets
    periods = triton.cdiv(tokens, period)
    if batch == 1:  # PyTorch leaves this stride undefined, the hardware wants a multiple of 16 bytes
        batch_stride = periods * period * token_stride
    if mode == "group":
        shape = [batch, periods, sparse_n, sparse_n, heads * head_dim]
        strides = [batch_stride, period * token_stride, sparse_n * token_stride, token_stride, 1]
        return TensorDescriptor(x, shape, strides, [1, rows // sparse_n, 1, sparse_n, width])
    shape = [batch, periods, sets, heads * head_dim]
    strides = [batch_stride, sets * token_stride, token_stride, 1]
    return TensorDescriptor(x, shape, strides, [1, rows, 1, width])
