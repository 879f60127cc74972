"""What makes a run's steps fast, settled before the first: what blocks keep for backward, which graphs there are."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import noop_context_fn

from osp_fast.config import ModelConfig, TrainConfig
from osp_fast.data.buckets import Bucket, Plan
from osp_fast.device import memory_allowance
from osp_fast.engine.compile import RecompileCounter, WarmUpBucket, check_compiler, compile_blocks, warm_up
from osp_fast.engine.cuda_graphs import CudaMachine, GraphedBuckets, Inputs, check_cuda_graphs
from osp_fast.engine.devices import H100, find_device
from osp_fast.errors import UserError
from osp_fast.models.dit import DiT
from osp_fast.parallel.sequence_plan import SequencePlan
from osp_fast.training.build import compute_dtype
from osp_fast.training.footprint import VAE_SHARE
from osp_fast.training.loop import Trainer
from osp_fast.training.place import BatchSizes, latent_size, video_tokens
from osp_fast.training.prepare import BatchMaker
from osp_fast.training.step import DenoisingLoss, MicroBatch, add_gradients
from osp_fast.training.workload import make_workloads, plan_run


def bound_vae(model: ModelConfig, device: torch.device) -> None:
    """Name what the VAE may hold on a GPU where `--vae_memory` does not.

    It works while the batch before is trained, so "what is free" would be what training is about to need; it gets a
    fixed share.
    """
    if device.type == "cuda" and model.vae_memory is None:
        model.vae_memory = torch.cuda.get_device_properties(device).total_memory // VAE_SHARE


def compiles(config: TrainConfig, plan: Plan, device: torch.device) -> bool:
    """Whether blocks are compiled: `--compile`; by default on a GPU, where batches have few sizes.

    Raises `UserError` where they cannot be.
    """
    few, wanted = has_few_sizes(config, plan), config.model.compile
    if wanted and not few:
        raise UserError("--compile makes a graph for each size of batch: add --group_data, so that there are few")
    compiled = device.type == "cuda" and few if wanted is None else wanted
    if compiled:
        check_compiler(device)
    return compiled


def has_few_sizes(config: TrainConfig, plan: Plan) -> bool:
    """Whether all micro-batches of a bucket have one size, and so there are no more sizes than buckets."""
    return config.data.group_data or len(plan.buckets) == 1


@dataclass(frozen=True)
class Rehearsal:
    """What is needed to run any bucket once: forward and backward of a micro-batch without meaning."""

    maker: BatchMaker
    loss: DenoisingLoss
    sizes: BatchSizes
    text_width: int
    text_dtype: torch.dtype

    def example(self, bucket: Bucket) -> MicroBatch:
        """The same on all ranks."""
        clips, ranks = self.sizes.micro[bucket], self.sizes.together.get(bucket, 1)
        return self.maker.example(latent_size(bucket), clips, self.text_width, self.text_dtype, ranks)

    def __call__(self, bucket: Bucket) -> None:
        """Gradients are left behind."""
        add_gradients(self.loss, self.example(bucket), self.sizes.micro[bucket])


def set_up(
    config: TrainConfig,
    trainer: Trainer,
    maker: BatchMaker,
    plan: Plan,
    sizes: BatchSizes,
    compiled: bool,
    sequence: SequencePlan | None,
    report: Callable[[str], None],
) -> tuple[RecompileCounter, GraphedBuckets | None]:
    """Choose what blocks keep, compile them, run every bucket once, and capture those as CUDA graphs that gain by it.

    Returns the counter of what is compiled from then on, and the CUDA graphs, if there are any. To be called by all
    ranks, when all that lives as long as the run is in memory, but gradients. sequence: how ranks share clips

    Raises `UserError` where a bucket does not fit.
    """
    world, dit = trainer.world, trainer.loss.dit
    device = world.device
    rehearsal = Rehearsal(maker, trainer.loss, sizes, dit.config.caption_channels, compute_dtype(config.model))
    if device.type == "cpu" and config.model.activation_memory is None:
        dit.recompute_blocks(noop_context_fn if config.model.gradient_checkpointing else None)
    else:
        workloads = make_workloads(config, plan.buckets, world.size, device, sequence)
        model = find_device(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        free = None
        if device.type == "cuda":
            vae = config.model.vae_memory if config.data.latent_cache is None else 0
            free = memory_allowance(device) - sum(local.nbytes for local in trainer.shards.local) - vae
        with world.together():
            planned = plan_run(dit.config, config.model, workloads, free, model or H100)
        report(str(planned))
        planned.apply(dit)
    counter = RecompileCounter()
    if compiled:
        compile_blocks(dit, len(sizes.micro))
        buckets = {
            WarmUpBucket(str(bucket), clips, video_tokens(bucket, config.model.model)): bucket
            for bucket, clips in sizes.micro.items()
        }
        warm_up(dit, list(buckets), lambda bucket: rehearsal(buckets[bucket]), report)
        counter.reset()
    graphs = None
    if config.model.cuda_graphs and not has_few_sizes(config, plan):
        raise UserError("--cuda_graphs makes a graph for each size of batch: add --group_data, so that there are few")
    if check_cuda_graphs(config.model.cuda_graphs, device, world.size) and has_few_sizes(config, plan):
        graphs = capture(dit, rehearsal, config.model.cuda_graphs is True, report)
    return counter, graphs


def capture(dit: DiT, rehearsal: Rehearsal, always: bool, report: Callable[[str], None]) -> GraphedBuckets | None:
    """CUDA graphs of forward and backward of the buckets that gain by it, or of all. Raises `UserError`."""

    def run(inputs: Inputs) -> Tensor:
        batch = MicroBatch(*inputs)
        return add_gradients(rehearsal.loss, batch, len(batch.timesteps) * rehearsal.sizes.accumulation)

    trained = [parameter for parameter in dit.parameters() if parameter.requires_grad]
    graphs = GraphedBuckets(run, trained, CudaMachine(trained[0].device))
    examples = [(str(bucket), rehearsal.example(bucket).values()) for bucket in rehearsal.sizes.micro]
    choices = graphs.choose(examples, always, report)
    return graphs if any(choice.kept for choice in choices) else None
