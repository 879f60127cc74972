"""What a run's flags make of each bucket: the micro-batch that one GPU computes, and what its blocks keep of it."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch

from osp_fast.config import ModelConfig, TrainConfig
from osp_fast.data.buckets import Bucket
from osp_fast.data.order import ranks_per_clip
from osp_fast.engine.activations import ActivationPlan, most_demanding, plan_activations, recompute_everything
from osp_fast.engine.cost import Workload
from osp_fast.engine.devices import H100, DeviceModel
from osp_fast.engine.exchange_cost import choose_plan, describe_choice
from osp_fast.models.attention_backends import resolve_attention
from osp_fast.models.dit import DiTConfig
from osp_fast.parallel.sequence_plan import SequencePlan, plan_of_mode
from osp_fast.training.build import compute_dtype
from osp_fast.training.place import latent_size, micro_batch_clips, video_tokens


def make_workloads(
    config: TrainConfig,
    buckets: Iterable[Bucket],
    ranks: int,
    device: torch.device,
    sequence: SequencePlan | None = None,
) -> dict[Bucket, Workload]:
    """The micro-batch of each bucket on one of `ranks` GPUs, as `device` would compute it; sequence: how they share it.

    Without `--group_data` clips of all buckets meet in a batch, padded to the largest in each direction: then that size
    is the only one. Raises `UserError` if `OSP_FAST_KERNELS` asks for what is not there.
    """
    model, buckets = config.model, list(buckets)
    dtype = compute_dtype(model)
    path = resolve_attention("auto", device, dtype)  # the other operations go the way that attention would
    common = Workload(
        clips=1,
        latent_size=(1, 1, 1),
        text_tokens=model.model_max_length,
        dtype=dtype,
        weight_dtype=torch.float32 if ranks == 1 else dtype,
        attention=path if model.attention == "auto" else model.attention,
        path=path,
        compiled=device.type == "cuda" if model.compile is None else model.compile,
        lora_rank=model.lora_rank,
        masked=not config.data.group_data and len(buckets) > 1,
    )

    def shared(bucket: Bucket) -> bool:
        return ranks_per_clip(bucket, config.run.sp_size, config.data.group_data) > 1

    return {
        bucket: replace(
            common,
            clips=micro_batch_clips(config, bucket),
            latent_size=latent_size(bucket),
            sequence=sequence if shared(bucket) else None,
        )
        for bucket in computed_sizes(config, buckets)
    }


def computed_sizes(config: TrainConfig, buckets: Iterable[Bucket]) -> list[Bucket]:
    """The sizes of micro-batches: without `--group_data` one, the largest of all in each direction."""
    buckets = list(buckets)
    return buckets if config.data.group_data else [Bucket(*map(max, zip(*buckets, strict=True)))]


def choose_sequence(
    config: TrainConfig, dit: DiTConfig, buckets: Iterable[Bucket], report: Callable[[str], None]
) -> SequencePlan | None:
    """How `--sp_size` ranks share a clip, told to `report`; None: each has clips of its own.

    There is one way for all of a run, chosen for the shared clips with the most tokens. Raises `UserError` if
    `--sp_mode` does not go with the number of ranks.
    """
    run, sizes = config.run, computed_sizes(config, buckets)
    if run.sp_size == 1:
        return None
    shared = [size for size in sizes if ranks_per_clip(size, run.sp_size, config.data.group_data) > 1]
    largest = max(shared or sizes, key=lambda size: video_tokens(size, config.model.model))
    work = video_tokens(largest, config.model.model), micro_batch_clips(config, largest), compute_dtype(config.model)
    plan = plan_of_mode(run.sp_mode, run.sp_size, dit.sparse_n if dit.sparse1d else 1)
    if plan is None:
        plan = choose_plan(dit, run.sp_size, *work, training=True)
    for line in describe_choice(dit, plan, *work, training=True):
        report(line)
    return plan


def plan_run(
    dit: DiTConfig,
    model: ModelConfig,
    workloads: Mapping[Bucket, Workload],
    free: int | None,
    device: DeviceModel = H100,
) -> ActivationPlan:
    """What blocks keep: as `--activation_memory` says, else nothing with `--gradient_checkpointing`, else what fits.

    free: bytes for activations on a GPU; None on a CPU, where everything is kept. Raises `UserError` if the budget does
    not suffice.
    """
    workload = most_demanding(dit, list(workloads.values()))
    if model.activation_memory is None and model.gradient_checkpointing:
        return recompute_everything(dit, workload, device)
    if model.activation_memory is None:
        return plan_activations(dit, workload, free, device, source="--activation_memory auto:")
    return plan_activations(dit, workload, model.activation_memory, device)
