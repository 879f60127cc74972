"""Streaming of weights, on a simulated device that copies as late as it may and spoils what must not be read."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from osp_fast.engine.stream_blocks import BlockStreamer, bytes_when_streamed
from osp_fast.errors import UserError
from osp_fast.models.dit import DiT, DiTConfig
from osp_fast.models.quantize import quantize_linear_weights

CPU = torch.device("cpu")
CONFIG = DiTConfig(
    num_layers=5, num_attention_heads=2, attention_head_dim=24, caption_channels=16, cross_attention_dim=48
)


@dataclass
class Ticket:
    time: int
    source: torch.Tensor | None = None
    slot: torch.Tensor | None = None


class LateMover:
    """A device whose copies are done when they are waited for, and whose slots hold rubbish until then."""

    def __init__(self):
        self.time = self.copies = self.unpinned = 0
        self.read_since: dict[int, int] = {}  # slot -> when its contents were last waited for

    def pin(self, size):
        return torch.empty(size, dtype=torch.uint8)

    def unpin(self, buffer):
        self.unpinned += buffer.numel()

    def slot(self, size):
        return torch.full((size,), 0xFF, dtype=torch.uint8)

    def copy(self, source, slot, after):
        assert after.time > self.read_since.get(id(slot), -1), "what the slot holds may still be read"
        slot.fill_(0xFF)  # as bfloat16, float32 and float64: not a number
        self.copies += 1
        return Ticket(self._tick(), source, slot)

    def wait(self, ticket):
        if ticket.source is not None:
            ticket.slot[: len(ticket.source)].copy_(ticket.source)
            self.read_since[id(ticket.slot)] = self._tick()

    def mark(self):
        return Ticket(self._tick())

    def _tick(self):
        self.time += 1
        return self.time


class Scale(nn.Module):
    """A block of its own size, with a buffer that is no float."""

    def __init__(self, number):
        super().__init__()
        self.weight = nn.Parameter(torch.full((number + 1, 3), 2.0 + number))
        self.register_buffer("steps", torch.tensor([number + 1]))
        self.bias = nn.Parameter(torch.tensor(0.5 * number, dtype=torch.float64))

    def forward(self, x):
        return self.other(x) + self.steps

    def other(self, x):
        return x * self.weight.sum() + self.bias


def blocks(count=6):
    return nn.ModuleList(Scale(number) for number in range(count))


def small_dit():
    dit = DiT.create(CONFIG, seed=0)
    with torch.no_grad():
        for parameter in dit.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.05)
    return dit.requires_grad_(False)


@torch.no_grad()
@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("streamed", [(0, 1, 2, 3, 4), (1, 3), (4,), (0, 2, 3)])
def test_a_dit_computes_the_same(streamed, slots):
    dit = small_dit()
    latents = torch.randn(1, 8, 2, 4, 4, generator=torch.Generator().manual_seed(2))
    text = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(3))

    def outputs():
        context = dit.text_context(text)
        return [dit(latents + step, torch.tensor([900 - step]), context) for step in range(3)]

    expected, state = outputs(), {name: tensor.clone() for name, tensor in dit.state_dict().items()}
    mover = LateMover()
    streamer = BlockStreamer(dit.transformer_blocks, streamed, CPU, slots, ("forward", "text_keys"), mover)
    assert streamer.bytes_on_device <= slots * streamer.bytes_pinned / len(streamed) + 1
    addresses = [parameter.data_ptr() for parameter in dit.parameters()]
    assert all(torch.equal(*pair) for pair in zip(outputs(), expected, strict=True))
    assert [parameter.data_ptr() for parameter in dit.parameters()] == addresses
    # Each pass copies each block once, but for those that have a slot of their own.
    count = len(streamed)
    sharing = sum(len(range(slot, count, slots)) for slot in range(slots) if len(range(slot, count, slots)) > 1)
    assert mover.copies == min(slots, count) + 4 * sharing
    pinned = streamer.bytes_pinned
    streamer.release()
    assert (mover.unpinned, streamer.bytes_pinned, streamer.bytes_on_device) == (pinned, 0, 0)
    assert all(torch.equal(*pair) for pair in zip(outputs(), expected, strict=True))
    assert all(torch.equal(tensor, state[name]) for name, tensor in dit.state_dict().items())
    assert "forward" not in dit.transformer_blocks[streamed[0]].__dict__


@given(
    streamed=st.sets(st.integers(0, 5), min_size=1),
    slots=st.integers(1, 4),
    calls=st.lists(st.tuples(st.integers(0, 5), st.sampled_from(["forward", "other"])), max_size=20),
)
def test_any_order_of_calls_gives_the_same(streamed, slots, calls):
    plain, streaming = blocks(), blocks()
    BlockStreamer(streaming, streamed, CPU, slots, ("forward", "other"), LateMover())
    x = torch.tensor([1.0, -2.0])
    for number, method in calls:
        expected = getattr(plain[number], method)(x)
        assert torch.equal(getattr(streaming[number], method)(x), expected)


def test_an_error_in_a_block_leaves_all_as_it_should_be():
    plain, streaming, x = blocks(), blocks(), torch.ones(2)
    BlockStreamer(streaming, range(6), CPU, 2, mover=LateMover())
    for number in range(3):
        streaming[number](x)
    with pytest.raises(TypeError):
        streaming[3](None)
    for number in (0, 1, 2, 3, 4, 5, 0, 1):  # a step begun anew
        assert torch.equal(streaming[number](x), plain[number](x))


def test_weights_are_aligned_and_keep_their_types():
    streaming = blocks(2)
    BlockStreamer(streaming, [0, 1], CPU, 1, mover=LateMover())
    start = streaming[0].weight.data_ptr()
    for tensor in (*streaming.parameters(), *streaming.buffers()):
        assert (tensor.data_ptr() - start) % 256 == 0
    assert streaming[0].bias.dtype == torch.float64 and streaming[0].steps.dtype == torch.int64


def test_what_wraps_a_block_already_stays_inside():
    streaming, said = blocks(2), []
    inner = streaming[0].forward
    streaming[0].forward = lambda x: said.append("inner") or inner(x)
    kept = streaming[0].forward
    streamer = BlockStreamer(streaming, [0], CPU, 1, mover=LateMover())
    streaming[0](torch.ones(2))
    assert said == ["inner"]
    streamer.release()
    assert streaming[0].forward is kept


def test_shared_tensors_and_nonsense_are_refused():
    shared = blocks(3)
    shared[2].weight = shared[0].weight
    with pytest.raises(ValueError, match="blocks 0 and 2 share a tensor"):
        BlockStreamer(shared, [1], CPU, mover=LateMover())
    for streamed, slots in (([], 2), ([7], 2), ([0], 0)):
        with pytest.raises(ValueError, match="slots for blocks"):
            BlockStreamer(blocks(), streamed, CPU, slots, mover=LateMover())


@torch.no_grad()
@pytest.mark.parametrize("slots", [1, 2])
def test_layers_of_a_text_encoder_in_8_bits(slots):
    """Its first layer has the biases of positions; numbers are of three types."""
    from transformers import MT5Config, MT5EncoderModel

    torch.manual_seed(0)
    config = MT5Config(vocab_size=11, d_model=16, d_kv=4, d_ff=32, num_layers=4, num_heads=4)
    network = MT5EncoderModel(config).bfloat16().eval().requires_grad_(False)
    quantize_linear_weights(network.encoder.block)
    tokens = torch.arange(8)[None]
    expected = network(input_ids=tokens).last_hidden_state
    BlockStreamer(network.encoder.block, [0, 1, 3], CPU, slots, mover=LateMover())
    for _ in range(2):
        assert torch.equal(network(input_ids=tokens).last_hidden_state, expected)


def test_what_it_takes_is_known_before():
    there = blocks()
    with torch.device("meta"):
        meta = blocks()
    for streamed, slots in (((0, 2, 3), 2), ((5,), 2), (range(6), 3)):
        streamer = BlockStreamer(there, streamed, CPU, slots, mover=LateMover())
        others = [block for number, block in enumerate(there) if number not in streamed]
        resident = sum(x.nbytes for block in others for x in (*block.parameters(), *block.buffers()))
        assert bytes_when_streamed(meta, streamed, slots) == streamer.bytes_on_device + resident
        streamer.release()


def test_weights_of_a_class_of_their_own_are_refused():
    class Quantized(torch.Tensor):
        pass

    odd = blocks(2)
    odd[1].weight = nn.Parameter(odd[1].weight.detach().as_subclass(Quantized))
    with pytest.raises(UserError, match=r"weights of class Quantized \(weight of a Scale\) cannot be streamed"):
        BlockStreamer(odd, [0, 1], CPU, mover=LateMover())
    assert "forward" not in odd[0].__dict__


def test_blocks_are_as_they_were_where_memory_cannot_be_pinned():
    class Full(LateMover):
        def pin(self, size):
            if self.time > 3:
                raise UserError("no more")
            self.time += 1
            return super().pin(size)

    plain, streaming, mover = blocks(), blocks(), Full()
    with pytest.raises(UserError, match="no more"):
        BlockStreamer(streaming, range(6), CPU, mover=mover)
    assert mover.unpinned > 0
    for before, after in zip(plain, streaming, strict=True):
        assert torch.equal(before(torch.ones(2)), after(torch.ones(2))) and "forward" not in after.__dict__


def test_the_simulated_device_finds_what_is_read_too_early():
    class Careless(LateMover):
        def wait(self, ticket):
            pass

    streaming = blocks()
    BlockStreamer(streaming, range(6), CPU, 2, mover=Careless())
    assert not torch.isfinite(streaming[0](torch.ones(2))).all()

    class Hasty(LateMover):
        def mark(self):
            return Ticket(0)

    streaming = blocks()
    BlockStreamer(streaming, range(6), CPU, 2, mover=Hasty())
    with pytest.raises(AssertionError, match="may still be read"):
        streaming[0](torch.ones(2))
