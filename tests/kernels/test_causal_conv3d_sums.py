"""Sums over taps in chunks against the plain causal convolution."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from osp_fast.kernels.causal_conv3d import causal_conv3d_ref, steps_of
from osp_fast.kernels.causal_conv3d_sums import convolve_frames, sum_of_chunk

CHUNKS = {1: st.lists(st.integers(1, 4), min_size=1, max_size=4)}
CHUNKS[2] = st.tuples(st.sampled_from([1, 3, 5]), st.lists(st.sampled_from([2, 4]), max_size=3)).map(
    lambda sizes: [sizes[0], *sizes[1]]
)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@given(st.sampled_from([1, 2]).flatmap(lambda stride: st.tuples(st.just(stride), CHUNKS[stride])), st.integers(1, 2))
def test_chunks_equal_the_reference(strided_chunks, batch):
    stride, lengths = strided_chunks
    x = noise(batch, 3, sum(lengths), 4, 6).contiguous(memory_format=torch.channels_last_3d)
    weight, bias = noise(5, 3, 3, 3, 3, seed=1), noise(5, seed=2)
    before, outs, carry = x.clone(), [], None
    for number, part in enumerate(x.split(lengths, dim=2)):
        last = number == len(lengths) - 1
        out, carry = sum_of_chunk(part, weight, bias, steps_of(stride), carry, last)
        outs.append(out)
        assert (carry is None) == last
    torch.testing.assert_close(torch.cat(outs, dim=2), causal_conv3d_ref(x, weight, bias, stride)[0])
    assert torch.equal(x, before)


def test_what_is_carried_owns_its_memory():
    x = noise(1, 3, 8, 4, 6)
    _, carry = sum_of_chunk(x, noise(5, 3, 3, 3, 3), None, steps_of(1))
    assert len(carry) == 2
    assert all(part.untyped_storage().nbytes() == part.numel() * 8 for part in carry)


def test_autocast_changes_nothing():
    x, weight = noise(1, 3, 3, 4, 6).float(), noise(5, 3, 3, 3, 3, seed=1).float()
    expected, _ = sum_of_chunk(x, weight, None, steps_of(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sum_of_chunk(x, weight, None, steps_of(1))[0], expected)


def test_a_chunk_that_leaves_frames_over_is_refused():
    x, weight = noise(1, 3, 4, 4, 6), noise(5, 3, 3, 3, 3)
    with pytest.raises(ValueError, match="does not end where a stride of 2 does"):
        sum_of_chunk(x, weight, None, steps_of(2))
    assert sum_of_chunk(x, weight, None, steps_of(2), last=True)[0].shape[2] == 2


def test_a_chunk_that_gives_nothing_is_refused():
    x, weight = noise(1, 3, 3, 4, 6), noise(5, 3, 3, 3, 3)
    _, carry = sum_of_chunk(x, weight, None, steps_of(2))
    with pytest.raises(ValueError, match="1 frames is too short"):
        sum_of_chunk(x[:, :, :1], weight, None, steps_of(2), carry)


def test_gradients():
    x, weight, bias = noise(2, 3, 5, 4, 4), noise(2, 3, 3, 3, 3, seed=1), noise(2, seed=2)
    leaves = [part.requires_grad_() for part in (x, weight, bias)]

    def in_chunks(x, weight, bias, stride):
        first, carry = sum_of_chunk(x[:, :, :3], weight, bias, steps_of(stride))
        return torch.cat((first, sum_of_chunk(x[:, :, 3:], weight, bias, steps_of(stride), carry, True)[0]), dim=2)

    for stride in (1, 2):
        found = torch.autograd.grad(in_chunks(*leaves, stride).square().sum(), leaves)
        expected = torch.autograd.grad(causal_conv3d_ref(*leaves, stride)[0].square().sum(), leaves)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)


def test_convolutions_of_frames():
    x, weight, bias = noise(2, 3, 4, 6, 8), noise(5, 3, 3, 3, seed=1), noise(5, seed=2)
    for stride in (1, 2):
        expected = causal_conv3d_ref(x, weight[:, :, None], bias, 1)[0]
        if stride == 2:  # windows that begin at even rows and columns
            expected = expected[..., 1::2, 1::2]
        torch.testing.assert_close(convolve_frames(x, weight, bias, stride), expected)
