"""What a run's flags make of each bucket: the micro-batch that one GPU computes, and what its blocks keep of it."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch

from osp_fast.config import ModelConfig, TrainConfig
from osp_fast.data.buckets import Bucket
from osp_fast.engine.activations import ActivationPlan, most_demanding, plan_activations, recompute_everything
from osp_fast.engine.cost import Workload
from osp_fast.engine.devices import H100, DeviceModel
from osp_fast.models.attention_backends import resolve_attention
from osp_fast.models.dit import DiTConfig
from osp_fast.training.build import compute_dtype
from osp_fast.training.place import latent_size, micro_batch_clips


def make_workloads(
    config: TrainConfig, buckets: Iterable[Bucket], ranks: int, device: torch.device
) -> dict[Bucket, Workload]:
    """The micro-batch of each bucket on one of `ranks` GPUs, as `device` would compute it.

    Without `--group_data` clips of all buckets meet in a batch, padded to the largest in each direction: then that size
    is the only one. Raises `UserError` if `OSP_FAST_KERNELS` asks for what is not there.
    """
    model, buckets = config.model, list(buckets)
    masked = not config.data.group_data and len(buckets) > 1
    if masked:
        buckets = [Bucket(*map(max, zip(*buckets, strict=True)))]
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
        masked=masked,
    )
    return {
        bucket: replace(common, clips=micro_batch_clips(config, bucket), latent_size=latent_size(bucket))
        for bucket in buckets
    }


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
