"""The count of interpreted kernels' traffic, on kernels whose traffic is known."""

import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit
def copy_kernel(source, target, length, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + place, tl.load(source + place, place < length, other=0), place < length)


@triton.jit
def greedy_kernel(source, target, BLOCK: tl.constexpr):
    """Every program reads all of the source, twice, and writes one element; no mask."""
    place = tl.arange(0, BLOCK)
    total = tl.sum(tl.load(source + place)) + tl.sum(tl.load(source + place))
    tl.store(target + tl.program_id(0), total)


@triton.jit
def box_kernel(source, target, ROWS: tl.constexpr):
    row = tl.program_id(0) * ROWS
    target.store([row, 0], source.load([row, 0]))


@triton.jit
def add_kernel(values, total, BLOCK: tl.constexpr):
    tl.atomic_add(total, tl.sum(tl.load(values + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))))


@triton.jit
def two_sizes_kernel(words, halves):
    """words and halves are the same memory: four words, of which the halves overlap two."""
    tl.load(words + tl.arange(0, 4))
    tl.load(halves + tl.arange(0, 8) + 4)


@pytest.mark.parametrize("dtype, size", [(torch.float32, 4), (torch.float16, 2), (torch.bfloat16, 2), (torch.uint8, 1)])
@pytest.mark.parametrize("length", [1, 16, 37])
def test_a_copy_is_counted_exactly(count_traffic, dtype, size, length):
    source, target = torch.arange(40).to(dtype), torch.zeros(40, dtype=dtype)
    with count_traffic() as moved:
        copy_kernel[(4,)](source, target, length, BLOCK=16)
    assert torch.equal(target[:length], source[:length]) and not target[length:].any()
    assert (moved.loaded, moved.stored) == (size * length, size * length)
    (launch,) = moved.launches
    assert launch.kernel == "copy_kernel"


def test_what_is_touched_again_counts_once_within_a_launch(count_traffic):
    source, target = torch.ones(8), torch.zeros(3)
    with count_traffic() as moved:
        greedy_kernel[(3,)](source, target, BLOCK=8)
        assert (moved.loaded, moved.stored) == (32, 12)
        greedy_kernel[(3,)](source, target, BLOCK=8)
    assert (moved.loaded, moved.stored) == (64, 24) and len(moved.launches) == 2
    assert target.tolist() == [16.0] * 3


def test_boxes_end_at_the_edge_of_their_tensor(count_traffic):
    source, target = torch.randn(5, 8), torch.zeros(5, 8)
    views = (TensorDescriptor(x, [5, 8], [8, 1], [2, 8]) for x in (source, target))
    with count_traffic() as moved:
        box_kernel[(3,)](*views, ROWS=2)
    assert torch.equal(source, target) and (moved.loaded, moved.stored) == (160, 160)


def test_an_atomic_addition_loads_and_stores(count_traffic):
    total = torch.zeros(1)
    with count_traffic() as moved:
        add_kernel[(2,)](torch.ones(16), total, BLOCK=8)
    assert total.item() == 16 and (moved.loaded, moved.stored) == (64 + 4, 4)


def test_items_of_two_sizes_that_overlap_count_once(count_traffic):
    words = torch.zeros(6, dtype=torch.int32)
    with count_traffic() as moved:
        two_sizes_kernel[(1,)](words, words.view(torch.int16))
    assert moved.loaded == 16 + 8 and moved.stored == 0


def test_nothing_is_counted_outside(count_traffic):
    source, target = torch.ones(8), torch.zeros(3)
    with count_traffic() as moved:
        pass
    greedy_kernel[(3,)](source, target, BLOCK=8)
    assert moved.launches == [] and moved.loaded == 0
