"""What a training step costs: FLOPs counted exactly, bytes by the table below, seconds by the rates of `devices.py`.

Memory-bound passes over a tensor of (B, N, d), each a read or a write, in a block of the Triton path:

| | forward | backward |
|---|---|---|
| add, norm, modulate | 4 | 6 |
| gate, add | 3 | 3 |
| add without gate, norm, modulate | 4 | 4 |
| rotation of q and k | 4 | 6 |
| GELU, on 4 d channels | 8 | 12 |
| sums for the biases' gradients | | 11 |

A step is taken to be products + attention + passes + updates, one after the other, and what communication does not
overlap with them. Not in it: VAE and text encoder, which run beside it on a stream of their own, and waits for data.
The rates are those of 16-bit products.
"""

from dataclasses import dataclass

import torch

from osp_fast.engine.devices import NODE, DeviceModel
from osp_fast.kernels.skiparse_attention import attention_flops
from osp_fast.models.dit import DiTConfig
from osp_fast.models.time_embedding import TIME_CHANNELS
from osp_fast.parallel.sequence_plan import SequencePlan

FORWARD_PASSES, BACKWARD_PASSES = 23, 42
FINISH_PASSES = 3  # a recomputed block adds its feed-forward's part in a pass of its own
ROTATION_PASSES = 4  # of the forward's
ATTENTION_BACKWARD = 2.5  # products of attention's backward for one of its forward: five for two
# Bytes for each weight and micro-batch where weights are float32 and products bf16: cast forward (4 read, 2 written),
# gradient cast (2, 4) and added (8, 4).
CAST_BYTES = 24


@dataclass(frozen=True)
class Workload:
    """One micro-batch of one GPU, and how the DiT computes it.

    clips: B; latent_size: (T, H, W) in latent cells; text_tokens: L
    dtype: of products and attention; weight_dtype: of the weights as blocks have them: float32 with autocast in a
    single process, `dtype` where FSDP gathers them in it
    attention: a resolved `--attention`; path: triton or reference, what serves all other operations
    compiled: whether blocks are
    lora_rank: adapters train instead of the weights
    masked: clips of several sizes are padded to the largest
    sequence: how GPUs share the clips; None: each has its own
    """

    clips: int
    latent_size: tuple[int, int, int]
    text_tokens: int
    dtype: torch.dtype = torch.bfloat16
    weight_dtype: torch.dtype = torch.float32
    attention: str = "triton"
    path: str = "triton"
    compiled: bool = True
    lora_rank: int | None = None
    masked: bool = False
    sequence: SequencePlan | None = None


def tokens_of(config: DiTConfig, latent_size: tuple[int, int, int]) -> int:
    """N, the tokens of a clip."""
    frames, rows, columns = (length // patch for length, patch in zip(latent_size, config.patch, strict=True))
    return frames * rows * columns


@dataclass(frozen=True)
class BlockFlops:
    """Of one block's forward for a micro-batch.

    products: all linear layers; narrow: those that `Level.NARROW` keeps; widening: that `Level.PRODUCTS` does not
    """

    products: int
    narrow: int
    widening: int
    self_attention: int
    cross_attention: int

    @property
    def attention(self) -> int:
        return self.self_attention + self.cross_attention

    @property
    def total(self) -> int:
        return self.products + self.attention


def block_flops(config: DiTConfig, mode: str, workload: Workload) -> BlockFlops:
    """28 d^2 for each token, 4 d^2 for each of the text; attention 4 d for each pair of a query and a key."""
    clips, width = workload.clips, config.width
    tokens, text = tokens_of(config, workload.latent_size), workload.text_tokens
    heads = config.num_attention_heads, config.attention_head_dim
    products, narrow = clips * (28 * tokens + 4 * text) * width**2, 8 * clips * tokens * width**2
    widening = 0
    if workload.lora_rank is not None:
        # An adapter's first product narrows, from the width that goes in; its second leads to the width that goes out.
        adapter = 2 * clips * width * workload.lora_rank
        narrow += adapter * (9 * tokens + text)
        widening = adapter * (11 * tokens + 2 * text)
        products += adapter * (20 * tokens + 3 * text)
    return BlockFlops(
        products=products,
        narrow=narrow,
        widening=widening,
        self_attention=attention_flops(clips, tokens, tokens, *heads, mode, config.sparse_n),
        cross_attention=attention_flops(clips, tokens, text, *heads, "full", 1),
    )


def outer_flops(config: DiTConfig, workload: Workload) -> int:
    """Of the forward outside of the blocks: patches in and out, text and time embeddings."""
    width, cells = config.width, config.patch_size_t * config.patch_size**2
    per_token = 2 * width * cells * (config.in_channels + config.out_channels)
    per_text = 2 * width * (config.caption_channels + width)
    per_clip = 2 * width * (TIME_CHANNELS + 7 * width)
    tokens = tokens_of(config, workload.latent_size)
    return workload.clips * (tokens * per_token + workload.text_tokens * per_text + per_clip)


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of one micro-batch. products, attention: of forward; trained: whether weights train, or adapters alone."""

    products: int
    attention: int
    trained: bool

    @property
    def model(self) -> int:
        """What the mathematics needs, the numerator of MFU: three times forward; twice where weights are frozen, as
        their gradients are not needed."""
        return (3 if self.trained else 2) * (self.products + self.attention)

    @property
    def hardware(self) -> int:
        """What runs, without what is recomputed: attention's backward makes its probabilities again."""
        return round(self.model + (ATTENTION_BACKWARD - (2 if self.trained else 1)) * self.attention)


def step_flops(config: DiTConfig, workload: Workload) -> StepFlops:
    """Of one micro-batch of one GPU."""
    blocks = [block_flops(config, config.attention_mode(index), workload) for index in range(config.num_layers)]
    return StepFlops(
        products=sum(block.products for block in blocks) + outer_flops(config, workload),
        attention=sum(block.attention for block in blocks),
        trained=workload.lora_rank is None,
    )


def pass_bytes(config: DiTConfig, workload: Workload) -> int:
    """Of one read or write of a tensor of (B, N, d)."""
    return workload.clips * tokens_of(config, workload.latent_size) * config.width * workload.dtype.itemsize


def recompute_seconds(
    config: DiTConfig, workload: Workload, device: DeviceModel, products: int, attention: int, passes: int
) -> float:
    """Of running these FLOPs and passes of a block's forward once more."""
    seconds = products / device.matmul_flops + attention / device.attention_forward
    return seconds + passes * pass_bytes(config, workload) / device.copy_bytes


@dataclass(frozen=True)
class Sharding:
    """How the weights are spread, and what an update touches. Bytes and numbers of one rank.

    gpus, shard_size: all, and those that share one copy of the weights
    weights: parameters of the whole DiT; trained: those of them that train; local_trained: this rank's part of them
    optimizer_bytes: what an update reads and writes for each of them; offloaded_bytes: for each, over the host's link
    accumulation: micro-batches of a step
    """

    gpus: int
    shard_size: int
    weights: int
    trained: int
    local_trained: int
    optimizer_bytes: float
    offloaded_bytes: float = 0.0
    accumulation: int = 1


@dataclass(frozen=True)
class StepSeconds:
    """Predicted seconds of an optimizer step on each GPU, by what they go to."""

    products: float
    attention: float
    memory_bound: float
    recompute: float
    update: float
    communication: float

    @property
    def total(self) -> float:
        return self.products + self.attention + self.memory_bound + self.recompute + self.update + self.communication


def link_bytes(device: DeviceModel, ranks: int, stride: int = 1) -> float:
    """Bytes/s that each of `ranks` GPUs, every `stride`-th one, receives in a collective.

    On one machine over NVLink. Between machines each GPU has a port, and a ring passes a machine's border once for all
    of a group's GPUs there, by all of their ports together.
    """
    if (ranks - 1) * stride < NODE:
        return device.nvlink_bytes
    return min(device.nvlink_bytes, max(1, NODE // stride) * device.network_bytes)


def exposed_communication(
    config: DiTConfig,
    sharding: Sharding,
    weight_dtype: torch.dtype,
    forward: float,
    backward: float,
    device: DeviceModel,
) -> float:
    """Seconds of a step that FSDP2's (HSDP's) collectives are waited for.

    forward, backward: seconds of computing a micro-batch. Weights are gathered block by block, one block ahead, in
    forward and again in backward; gradients are summed in float32 behind each block's backward, and over copies of the
    weights in the last micro-batch. Of a block only what takes longer than its own computing is exposed; so are the
    first gather and the last sum.
    """
    ranks, copies = sharding.shard_size, sharding.gpus // sharding.shard_size
    layers = max(config.num_layers, 1)
    share = (ranks - 1) / ranks / link_bytes(device, ranks)
    gather = sharding.weights / layers * weight_dtype.itemsize * share
    scatter = sharding.trained / layers * 4 * share
    reduce = 0.0
    if copies > 1:
        part = sharding.trained / layers / ranks * 4
        reduce = 2 * part * (copies - 1) / copies / link_bytes(device, copies, stride=ranks)
    ends = gather + scatter
    per_forward = layers * max(0.0, gather - forward / layers)
    per_backward = layers * max(0.0, gather + scatter - backward / layers)
    last = layers * max(0.0, gather + scatter + reduce - backward / layers) + reduce
    times = sharding.accumulation
    return times * (ends + per_forward) + (times - 1) * per_backward + last
