"""What the stages of sampling need of memory, whatever the budget: their weights, and their work beside these."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from osp_fast.engine.cost import Workload
from osp_fast.engine.forward_peak import (
    DenoisingBytes,
    denoising_bytes,
    dit_on_meta,
    refiner_bytes,
    text_encoder_bytes,
    weight_bytes,
)
from osp_fast.engine.sampling_cost import Streaming
from osp_fast.engine.sampling_plan import SamplingFacts
from osp_fast.engine.stream_blocks import bytes_when_streamed
from osp_fast.errors import UserError
from osp_fast.models.prompt_refiner import decoder_layers
from osp_fast.models.quantize import Int8Linear
from osp_fast.models.text_encoder import encoder_layers
from osp_fast.models.wfvae_plan import LEAST_TILE, Predictor, gib, make_plan
from osp_fast.models.wfvae_stream import Plan

REFINER, ENCODER = "prompt refiner", "text encoder"
LIBRARIES = 64 * 2**20  # bytes of a GPU that cuBLAS keeps to work in: 32 MiB on Hopper for each of two streams


def spread(count: int, blocks: int) -> tuple[int, ...]:
    """Numbers of `count` blocks of so many, evenly over them.

    The first one is among them only where all are: with a step cache it runs in every step, the others do not.
    """
    return tuple(-(-(index + 1) * blocks // count) - 1 for index in range(count))


@dataclass(frozen=True)
class StreamedWeights:
    """A network's weights: blocks that may be streamed, and bytes outside of them that stay."""

    blocks: Sequence[nn.Module]
    outside: int

    def resident(self, streamed: Sequence[int], slots: int) -> int:
        """Bytes of weights on the device."""
        return self.outside + bytes_when_streamed(self.blocks, streamed, slots)

    @property
    def least(self) -> int:
        """`resident` where all is streamed."""
        return min(self.resident((), 1), self.resident(range(len(self.blocks)), 1))

    def streaming(self, streamed: tuple[int, ...], slots: int) -> Streaming:
        """For predictions of seconds."""
        return Streaming(streamed, slots, bytes_when_streamed(self.blocks[-1:], (), 1))

    def fewest(self, slots: int, may_stream: bool, fits: Callable[[int], bool]) -> tuple[int, ...] | None:
        """The fewest blocks to stream so that what is resident fits; None if it never does."""
        most = len(self.blocks) if may_stream else 0
        for count in (0, *range(slots + 1, most + 1)):  # as many as there are slots would save nothing
            streamed = spread(count, len(self.blocks))
            if fits(self.resident(streamed, slots)):
                return streamed
        return None

    def words(self, streamed: Sequence[int], slots: int, kind: str) -> str:
        """Where the weights are."""
        resident = f"weights {gib(self.resident(streamed, slots))}"
        if not streamed:
            return resident
        pinned = bytes_when_streamed([self.blocks[number] for number in streamed], (), slots)
        through = f"{slots} slot{'s' * (slots > 1)}"
        return (
            f"{resident}, {len(streamed)} of {len(self.blocks)} {kind} streamed through {through} from {gib(pinned)} of"
            " CPU memory"
        )


@dataclass(frozen=True)
class TextStage:
    """The refiner or the text encoder. work: bytes beside weights; a text's tokens, and those of its answer."""

    name: str
    network: StreamedWeights
    work: int
    tokens: int
    new_tokens: int
    per: str
    advice: str


class SamplingNeeds:
    """What the stages need on a device.

    leaves: networks leave the device after use; overhead: bytes that libraries keep; vae_weights: 0 where they leave
    dit: its weights; denoising: its work for each way to compute guidance; texts: the stages before it
    """

    def __init__(self, facts: SamplingFacts, device: torch.device):
        self.facts, self.device = facts, device
        self.on_gpu = device.type == "cuda"
        self.overhead = LIBRARIES if self.on_gpu else 0
        self.leaves = facts.save_memory and self.on_gpu  # on a CPU there is nowhere to go
        self.vae_weights = 0 if self.leaves else weight_bytes(facts.vae)
        dit = dit_on_meta(facts.dit, facts.dtype)
        self.dit = StreamedWeights(dit.transformer_blocks, weight_bytes(dit) - weight_bytes(dit.transformer_blocks))
        self.denoising = {batch: self._denoising_bytes(*batch) for batch in facts.batches}
        self.texts = [
            *([] if facts.refiner is None else [self._refiner(facts.refiner)]),
            *([] if facts.text_encoder is None else [self._encoder(facts.text_encoder)]),
        ]
        self._decoder = Predictor(facts.vae, facts.decode, device)

    def _denoising_bytes(self, clips: int, turns: int) -> DenoisingBytes:
        facts = self.facts
        return denoising_bytes(facts.dit, self.workload(clips), turns, facts.calls, facts.step_cache)

    def workload(self, clips: int) -> Workload:
        """One call of the DiT."""
        facts = self.facts
        tensors = (facts.dtype, facts.dtype, facts.attention, facts.path)
        return Workload(clips, facts.latent_size, facts.text_tokens, *tensors, compiled=False, sequence=facts.sequence)

    def _refiner(self, network: nn.Module) -> TextStage:
        facts, layers = self.facts, decoder_layers(network)
        work = refiner_bytes(network, facts.refiner_tokens, facts.refiner_new_tokens)
        held = StreamedWeights(layers, weight_bytes(network) - weight_bytes(layers))
        advice = "use a smaller --caption_refiner" if _in_8_bits(network) else "add --text_8bit"
        return TextStage(REFINER, held, work, facts.refiner_tokens, facts.refiner_new_tokens, "a prompt", advice)

    def _encoder(self, network: nn.Module) -> TextStage:
        facts, layers = self.facts, encoder_layers(network)
        outside = weight_bytes(network) - weight_bytes(layers)
        if not self.on_gpu:  # where the vocabulary is in any case
            config = network.config
            outside += config.vocab_size * config.d_model * facts.dtype.itemsize
        work = text_encoder_bytes(network, facts.text_tokens)
        advice = "use a smaller text encoder" if _in_8_bits(network) else "add --text_8bit"
        return TextStage(ENCODER, StreamedWeights(layers, outside), work, facts.text_tokens, 0, "a text", advice)

    def decodes(self, room: int) -> bool:
        """Whether a clip can be decoded in so many bytes."""
        return room >= self.frame_by_frame or room >= self.least_decoding

    @cached_property
    def frame_by_frame(self) -> int:
        """Bytes that decoding takes with one whole latent frame at once."""
        return self._decoder.predicted(Plan(1)).peak_bytes

    @cached_property
    def least_decoding(self) -> int:
        """Bytes with which decoding can do, if it is cut finely enough. It takes some seconds to find out."""
        facts = self.facts
        least, tile = self.frame_by_frame, facts.decode.cells
        while max(tile) > LEAST_TILE:
            tile = (max(LEAST_TILE, -(-tile[0] // 2)), max(LEAST_TILE, -(-tile[1] // 2)))
            cuts = (Plan(1, tile, outside) for outside in (False, True))
            least = min(least, *(self._decoder.predicted(cut).peak_bytes for cut in cuts))
        while True:
            try:
                make_plan(facts.vae, facts.decode, least, self.device)
                return least
            except UserError:  # its tiles are others
                least += least // 20

    def smallest(self, network: StreamedWeights) -> int:
        """The fewest bytes of its weights that the device can do with."""
        return network.least if self.on_gpu else network.resident((), 1)

    def kept(self, work: DenoisingBytes) -> int:
        """Bytes that denoising leaves behind while its clip is decoded."""
        return 0 if self.leaves else work.text_keys


def _in_8_bits(network: nn.Module) -> bool:
    return any(isinstance(module, Int8Linear) for module in network.modules())
