"""`--dry_run 1 8 64`: what a run would need and how fast it should be on so many GPUs, without building it.

Weights are counted on real shards of a model on the meta device (`footprint.py`), activations on fake tensors
(`engine/activations.py`), seconds by the cost model (`engine/cost.py`): predictions, to choose flags and machines by.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from osp_fast.config import TrainConfig
from osp_fast.data.buckets import Bucket
from osp_fast.engine.activations import ActivationPlan, PlanCost, most_demanding, recompute_everything, sharing_gpus
from osp_fast.engine.cost import Sharding, Workload, step_flops
from osp_fast.engine.devices import H100, DeviceModel, find_device
from osp_fast.engine.exchange_cost import predict_step
from osp_fast.engine.levels import Level
from osp_fast.errors import UserError
from osp_fast.models.dit import DiTConfig
from osp_fast.models.wfvae_plan import Task, gib
from osp_fast.parallel.mesh import check_sp_size
from osp_fast.training.build import compute_dtype
from osp_fast.training.footprint import Footprint, frozen_bytes, measure_footprint, resolve_dit
from osp_fast.training.place import encoded_at_once, video_tokens
from osp_fast.training.workload import choose_sequence, make_workloads, plan_run

MOST_BUCKETS = 8  # shown: those with the most tokens
HEADERS = (
    "bucket", "clips", "weights", "gradients", "optimizer", "EMA", "gathered", "VAE+text", "activations", "total",
    "of GPU", "s/step", "tokens/s", "MFU",
)  # fmt: skip


WAYS_OUT = (
    "take more GPUs, or a larger --sp_size, a smaller --train_batch_size or --tokens_per_batch, --mixed_precision bf16,"
    " --offload_ema, --use_8bit_adam or --offload_optimizer"
)


@dataclass(frozen=True)
class Machine:
    """The kind of GPU that is predicted for: its bytes, and its rates, None where they are not known."""

    name: str
    memory: int
    rates: DeviceModel | None


NOTES = (
    "GiB of one GPU, without what CUDA and NCCL take for themselves; clips of a micro-batch; tokens/s of all GPUs"
    " together. s/step is predicted, without VAE and text encoder, which run beside it, and without waits for data"
)


def dry_run(config: TrainConfig, buckets: Mapping[Bucket, int] | None, report: Callable[[str], None]) -> None:
    """Tell `report`, line by line, of memory and speed on each number of GPUs in `--dry_run`.

    buckets: clips of each bucket of the data; None without data: then the flags must name one size. Nothing is
    allocated and nobody else is talked to; it must come before the process group is made.

    Raises:
        UserError: the flags name no size, or a budget that does not suffice, or a folder that is broken.
    """
    machine, dit_config = this_machine(), resolve_dit(config)
    sizes = list(buckets) if buckets else [size_of_flags(config)]
    device = torch.device("cuda")
    alone = make_workloads(config, sizes, 1, device)
    encoded = {bucket: encoded_at_once(config, bucket) for bucket in alone}
    largest = max(alone, key=lambda bucket: encoded[bucket] * video_tokens(bucket, config.model.model))
    frozen = frozen_bytes(config, Task("encode", *largest, batch=encoded[largest]), machine.memory, device)
    report(heading(config, machine))
    sequence = choose_sequence(config, dit_config, sizes, report)
    for gpus in config.run.dry_run or [int(os.environ.get("WORLD_SIZE", "1"))]:
        try:
            check_sp_size(config.run.sp_size, gpus)
            footprint, sharding = measure_footprint(config, dit_config, gpus, frozen)
        except UserError as error:
            report(f"{gpus} GPUs: {error}")
            continue
        workloads = make_workloads(config, sizes, gpus, device, sequence)
        plan = fitting_plan(config, dit_config, workloads, machine, footprint)
        report(f"{gpus} GPU{'s' * (gpus > 1)}; {plan}")
        prediction = Prediction(config.model.model, dit_config, machine, footprint, sharding)
        rows = [prediction.row(bucket, workloads[bucket], plan) for bucket in shown(workloads, config.model.model)]
        for line in aligned([HEADERS, *rows]):
            report(line)
        if footprint.total + plan.peak > machine.memory:
            report(f"does not fit into {gib(machine.memory)}: {WAYS_OUT}")
    if len(alone) > MOST_BUCKETS:
        report(f"{len(alone) - MOST_BUCKETS} smaller buckets are not shown")
    report(NOTES)


def this_machine() -> Machine:
    """The GPU that is here; an H100 where none is."""
    if not torch.cuda.is_available():
        return Machine(f"{H100.name}, as there is no GPU here", H100.memory, H100)
    properties = torch.cuda.get_device_properties(0)
    return Machine(properties.name, properties.total_memory, find_device(properties.name))


def heading(config: TrainConfig, machine: Machine) -> str:
    """What is predicted, and for what."""
    precision = "bf16" if compute_dtype(config.model) == torch.bfloat16 else "float32"
    unknown = "" if machine.rates else "; its rates are not known, so neither are times"
    if compute_dtype(config.model) != torch.bfloat16:
        unknown = "; times are known for --mixed_precision bf16 only"
    return f"dry run of {config.model.model} in {precision} on {machine.name}, {gib(machine.memory)}{unknown}"


def size_of_flags(config: TrainConfig) -> Bucket:
    """The one size of a run whose data are not named. Raises `UserError` unless the flags name it."""
    data = config.data
    if data.max_height is None or data.max_width is None:
        raise UserError("--dry_run without --data needs one size: give --max_height, --max_width and --num_frames")
    return Bucket(data.num_frames, data.max_height, data.max_width)


def shown(workloads: Mapping[Bucket, Workload], model: str) -> list[Bucket]:
    """The buckets that get a line: those with the most tokens, the largest first."""
    return sorted(workloads, key=lambda bucket: (-video_tokens(bucket, model), bucket))[:MOST_BUCKETS]


def fitting_plan(
    config: TrainConfig,
    dit_config: DiTConfig,
    workloads: Mapping[Bucket, Workload],
    machine: Machine,
    footprint: Footprint,
) -> ActivationPlan:
    """What the run's blocks would keep; the least there is if even that does not fit beside all else."""
    free = (machine.memory - footprint.total) * 9 // 10  # as `memory_allowance` leaves a margin
    rates = machine.rates or H100
    try:
        return plan_run(dit_config, config.model, workloads, free, rates)
    except UserError:
        if config.model.activation_memory is not None:
            raise
        return recompute_everything(dit_config, most_demanding(dit_config, list(workloads.values())), rates)


@dataclass(frozen=True)
class Prediction:
    """Makes a table's rows for one number of GPUs."""

    model: str
    dit_config: DiTConfig
    machine: Machine
    footprint: Footprint
    sharding: Sharding

    def row(self, bucket: Bucket, workload: Workload, plan: ActivationPlan) -> list[str]:
        """One bucket's line, as `HEADERS` has it."""
        rates, held = self.machine.rates, self.footprint
        here = PlanCost(self.dit_config, workload, rates or H100).plan(plan.levels, plan.budget)
        total = held.total + here.peak
        memory = [held.weights, held.gradients, held.optimizer, held.average, held.gathered, held.frozen, here.peak]
        cells = [str(bucket), str(workload.clips)]
        cells += ["cached" if size is None else f"{size / 2**30:.2f}" for size in (*memory, total)]
        cells.append(f"{total / self.machine.memory:.0%}")
        if rates is None or workload.dtype != torch.bfloat16:
            return [*cells, "-", "-", "-"]
        ranks = sharing_gpus(workload)
        again = [index for index, level in enumerate(plan.levels) if level < Level.EVERYTHING]
        step = predict_step(self.dit_config, workload, self.sharding, here.recompute_seconds, rates, again)
        seconds = step.total
        each = workload.clips * video_tokens(bucket, self.model) * self.sharding.accumulation / ranks
        flops = step_flops(self.dit_config, workload).model * self.sharding.accumulation / ranks
        speed = [f"{seconds:.3g}", f"{each * self.sharding.gpus / seconds:,.0f}"]
        return [*cells, *speed, f"{flops / seconds / rates.peak_flops:.1%}"]


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines, the first column to the left and all others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    return lines
