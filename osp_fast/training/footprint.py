"""Bytes of a GPU that a run holds from its start to its end: weights, gradients, optimizer, average, frozen networks.

What a rank has of the weights is counted on the very shards: FSDP2 is applied to a model on the meta device, in a
process group that talks to nobody, as the first of as many ranks as there are to be.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from osp_fast.config import OptimizerConfig, TrainConfig
from osp_fast.engine.cost import Sharding
from osp_fast.models.dit import DIT_CONFIGS, DiT, DiTConfig
from osp_fast.models.lora import add_lora
from osp_fast.models.text_encoder import find_folder, text_encoder_on_meta
from osp_fast.models.wfvae import WFVAE, WFVAE_CONFIGS
from osp_fast.models.wfvae_plan import Task, make_plan
from osp_fast.parallel.apply import shard_dit
from osp_fast.parallel.mesh import make_mesh
from osp_fast.parallel.shards import local_part
from osp_fast.training.build import OVERRIDES, TILING_FRAMES, compute_dtype, lora_alpha, naming, vae_dtype

FLOAT = 4  # bytes of a weight, of its gradient, of each of its moments and of its average
# torchao's 8-bit moments have a float32 scale for each block of this many.
BLOCK_8BIT = 256
# What an update reads and writes for each weight: the norm reads the gradient and clipping rewrites it; AdamW reads the
# gradient and rewrites weight and moments; the average reads the weight and is rewritten.
CLIP_BYTES, ADAMW_BYTES, ADAMW_8BIT_BYTES, AVERAGE_BYTES = 12, 28, 16, 12
VAE_SHARE = 8  # without --vae_memory the VAE is given this part of a GPU's memory


@dataclass(frozen=True)
class Footprint:
    """Bytes on one GPU, of the rank that has the most. gathered: FSDP's whole blocks and gradients while they are used;
    frozen: VAE at work and text encoder, None if a latent cache stands for them."""

    weights: int
    gradients: int
    optimizer: int
    average: int
    gathered: int
    frozen: int | None

    @property
    def total(self) -> int:
        return sum((self.weights, self.gradients, self.optimizer, self.average, self.gathered, self.frozen or 0))


def resolve_dit(config: TrainConfig) -> DiTConfig:
    """The architecture that a run trains. Raises `UserError` if the folder of `--pretrained` does not say."""
    model = config.model
    base = DIT_CONFIGS[model.model] if model.pretrained is None else DiT.read_config(Path(model.pretrained))
    return replace(base, **{name: getattr(model, name) for name in OVERRIDES if getattr(model, name) is not None})


def make_meta_dit(config: TrainConfig, dit_config: DiTConfig) -> DiT:
    """The model with its adapters, if it is to have them, without memory."""
    with torch.device("meta"):
        dit = DiT(dit_config)
    rank = config.model.lora_rank
    return dit if rank is None else add_lora(dit, rank, lora_alpha(config.model), config.run.seed)


@contextmanager
def fake_world(size: int) -> Iterator[None]:
    """Within it this process is rank 0 of `size` ranks that need not exist: collectives do nothing.

    Raises ValueError if there is a real process group.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend "fake"

    if dist.is_initialized():
        raise ValueError("a dry run must come before the process group is made")
    dist.init_process_group(backend="fake", store=FakeStore(), rank=0, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def shard(dit: DiT, gpus: int, shard_size: int | None, dtype: torch.dtype) -> None:
    """Spread a model on the meta device over so many GPUs, as training does; to be called in a `fake_world`.

    Raises `UserError` if `shard_size` does not divide their number.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shard_dit(dit, make_mesh("cpu", gpus, shard_size), dtype)


def numbers(parameters: Iterator[nn.Parameter], trained: bool = False) -> int:
    """How many numbers this rank has of the parameters, or of those of them that train."""
    return sum(local_part(one).numel() for one in parameters if one.requires_grad or not trained)


def measure_footprint(
    config: TrainConfig, dit_config: DiTConfig, gpus: int, frozen: int | None
) -> tuple[Footprint, Sharding]:
    """What one of `gpus` GPUs holds, and what the cost model must know of it; frozen: as `frozen_bytes` has it.

    The first rank has as much as any: shards are rounded up. Raises `UserError` if `--shard_size` does not divide them.
    """
    dit = make_meta_dit(config, dit_config)
    whole, trained = numbers(dit.parameters()), numbers(dit.parameters(), trained=True)
    gathered = 0
    if gpus == 1:
        local, local_trained = whole, trained
    else:
        gathered = _gathered(dit, compute_dtype(config.model))
        with fake_world(gpus):
            shard(dit, gpus, config.run.shard_size, compute_dtype(config.model))
            local, local_trained = numbers(dit.parameters()), numbers(dit.parameters(), trained=True)
    moments, moved, over_host = optimizer_bytes(config.optimizer)
    run = config.run
    if run.use_ema and run.offload_ema:
        over_host += FLOAT
    elif run.use_ema:
        moved += AVERAGE_BYTES
    footprint = Footprint(
        weights=local * FLOAT,
        gradients=local_trained * FLOAT,
        optimizer=round(local_trained * moments),
        average=local_trained * FLOAT if run.use_ema and not run.offload_ema else 0,
        gathered=gathered,
        frozen=frozen,
    )
    sharding = Sharding(
        gpus=gpus,
        shard_size=run.shard_size or gpus,
        weights=whole,
        trained=trained,
        local_trained=local_trained,
        optimizer_bytes=moved,
        offloaded_bytes=over_host,
        accumulation=config.optimizer.gradient_accumulation_steps,
    )
    return footprint, sharding


def _gathered(dit: DiT, dtype: torch.dtype) -> int:
    """Bytes of whole parameters and gradients that FSDP2 holds at most: in a block's backward.

    What is outside of the blocks stays gathered; so are the block at work and the next one. The block's gradients are
    there in the products' type, and once more in float32, to be summed.
    """
    block = dit.transformer_blocks[0]
    outside = numbers(dit.parameters()) - numbers(dit.transformer_blocks.parameters())
    weights = (outside + 2 * numbers(block.parameters())) * dtype.itemsize
    return weights + numbers(block.parameters(), trained=True) * (dtype.itemsize + FLOAT)


def optimizer_bytes(config: OptimizerConfig) -> tuple[float, float, float]:
    """Of each weight that trains: AdamW's state on the GPU; what clipping and update move there; what they send to the
    CPU and back."""
    if config.offload_optimizer:
        return 0.0, CLIP_BYTES, 2 * FLOAT
    if config.use_8bit_adam:
        return 2 * (1 + FLOAT / BLOCK_8BIT), CLIP_BYTES + ADAMW_8BIT_BYTES, 0.0
    return 2.0 * FLOAT, CLIP_BYTES + ADAMW_BYTES, 0.0


def frozen_bytes(config: TrainConfig, largest: Task, memory: int, device: torch.device) -> int | None:
    """Bytes of text encoder and VAE, and of the VAE's work on `largest`; None with a latent cache.

    A network whose folder is not named is taken to be the released one. memory: of the GPU. Raises `UserError` for
    broken folders, or if `--vae_memory` does not suffice.
    """
    model = config.model
    if config.data.latent_cache is not None:
        return None
    vae_config = WFVAE_CONFIGS[model.ae]
    if model.ae_path is not None:
        with naming("--ae_path"):
            vae_config = WFVAE.read_config(find_folder(model.ae_path, model.cache_dir))
    with torch.device("meta"):
        vae = WFVAE(vae_config).to(vae_dtype(model))
    most_frames = TILING_FRAMES if model.enable_tiling else None
    plan = make_plan(vae, largest, model.vae_memory or memory // VAE_SHARE, device, most_frames)
    return plan.peak_bytes + text_encoder_numbers(model.text_encoder_name_1, model.cache_dir) * (
        compute_dtype(model).itemsize
    )


def text_encoder_numbers(name: str | None, cache_dir: str | None) -> int:
    """How many numbers of a text encoder a GPU holds, by its config.json; of mT5-XXL without a name.

    The vocabulary is not among them: it stays in CPU memory. Raises `UserError`.
    """
    folder = None
    if name is not None:
        with naming("--text_encoder_name_1"):
            folder = find_folder(name, cache_dir)
    return sum(weight.numel() for weight in text_encoder_on_meta(folder, torch.float32).parameters())
