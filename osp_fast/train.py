"""Training from the command line: python -m osp_fast.train --preset tiny, or upstream's flags; several GPUs: torchrun.

The run's settings, history and checkpoints go to `--output_dir`; `osp_fast/training` does the work.
"""

import json
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch.distributed.device_mesh import DeviceMesh

from osp_fast.assets.shapes import ensure_data
from osp_fast.cli import parse_train
from osp_fast.config import RunConfig, TrainConfig, as_dict
from osp_fast.data.buckets import Plan, load_plan
from osp_fast.data.dataset import ClipLoader
from osp_fast.data.latent_cache import LatentCache
from osp_fast.data.rejects import RejectLog
from osp_fast.diffusion.schedule import DiffusionObjective
from osp_fast.errors import UserError, run_entry_point
from osp_fast.models.attention_backends import resolve_attention
from osp_fast.models.dit import DiT
from osp_fast.models.text_encoder import TextEncoder
from osp_fast.models.wfvae import WFVAE
from osp_fast.parallel.apply import shard_dit
from osp_fast.parallel.collectives import all_answering
from osp_fast.parallel.heartbeats import Heartbeats
from osp_fast.parallel.mesh import SequenceGroup, check_sp_size, make_mesh
from osp_fast.parallel.sequence_plan import SequencePlan
from osp_fast.parallel.world import Ranks, World, open_world
from osp_fast.progress import Progress, say
from osp_fast.training.build import (
    build_dit,
    build_vae,
    check_folders,
    check_text_encoder,
    compute_dtype,
    load_text_encoder,
    set_determinism,
    set_precision,
)
from osp_fast.training.cached import open_cache
from osp_fast.training.dry_run import dry_run
from osp_fast.training.guards import StopSignals
from osp_fast.training.loop import Trainer
from osp_fast.training.metrics import MetricsLog
from osp_fast.training.output import check_same, check_shared, lock_output, prepare_output
from osp_fast.training.place import BatchSizes, batch_sizes, plan_summary, starting_point, steps_per_epoch
from osp_fast.training.prepare import BatchFeed, BatchMaker
from osp_fast.training.shared_clips import ClipSharing, describe_groups
from osp_fast.training.speed import bound_vae, compiles, set_up
from osp_fast.training.state import TrainerState
from osp_fast.training.step import DenoisingLoss
from osp_fast.training.watchdog import PHASE_FACTOR, Watchdog
from osp_fast.training.workload import choose_sequence
from osp_fast.validation import ValidationSampler, add_to_board

FOR_EVER_S = 7 * 86_400.0
Tell = Callable[[str], None]


def main(argv: Sequence[str] | None = None) -> None:
    """Train as the flags say. Raises `UserError`, and SystemExit when a signal ended the run (128 + its number)."""
    config, _ = parse_train(argv)
    if config.run.dry_run is not None:
        if Ranks.from_environment().rank == 0:
            plan = load_plan(config.data, config.run.seed, say) if config.data.data else None
            dry_run(config, None if plan is None else {b: len(clips) for b, clips in plan.buckets.items()}, say)
        return
    check_sp_size(config.run.sp_size, Ranks.from_environment().size)
    with open_world(config.run.device, config.run.start_timeout, longest_wait(config.run), say) as world:
        with world.together():
            if world.ranks.local_rank == 0:
                ensure_data(config.data.data)
        code = train(config, world)
    if code:
        sys.exit(code)


@dataclass(frozen=True)
class Start:
    """Where a run starts and ends: its clips and batches, its place, the checkpoint that it goes on from, if any."""

    plan: Plan
    sizes: BatchSizes
    cache: LatentCache | None
    state: TrainerState
    checkpoint: Path | None
    total_steps: int


def train(config: TrainConfig, world: World) -> int:
    """A training run from beginning to end, as one of its ranks. Returns the exit code: 0, or 128 + a signal's number.

    Raises:
        UserError: anything that the user has to mend.
    """
    tell = say if world.is_first else lambda line: None
    with ExitStack() as held:
        with world.together():
            if world.is_first:
                held.enter_context(lock_output(config, tell))
        start = find_start(config, world, tell)
        if start.state.step >= start.total_steps:
            done = f"{start.checkpoint} is already at step {start.state.step} of {start.total_steps}"
            tell(f"{done}: raise --max_train_steps to train further")
            return 0
        return run_steps(config, world, start, tell)


def find_start(config: TrainConfig, world: World, tell: Tell) -> Start:
    """Look at everything that is cheap to look at, so that what is wrong is told at once. Raises `UserError`."""
    run = config.run
    with world.together():
        check_folders(config.model)
        resolve_attention(config.model.attention, world.device, compute_dtype(config.model))
    with world.together():
        checkpoint = prepare_output(config, tell) if world.is_first else None
    checkpoint = world.gather(checkpoint)[0]
    check_shared(Path(run.output_dir), world)
    for group, values in as_dict(config).items():
        tell(f"{group}: " + ", ".join(f"{name}={value}" for name, value in values.items()))
    with world.together():
        plan = load_plan(config.data, run.seed, tell)
        tell(plan_summary(plan))
        sizes = batch_sizes(plan, config, world.size)
        cache = None if config.data.latent_cache is None else open_cache(config, plan, tell)
        state = starting_point(config, plan, sizes, checkpoint, tell)
    with world.together():
        check_same(config, state.data_fingerprint, world)
        if world.is_first:
            save_settings(config)
    steps = run.max_train_steps or run.num_train_epochs * steps_per_epoch(plan, sizes, config.data.group_data)
    return Start(plan, sizes, cache, state, checkpoint, steps)


@dataclass(frozen=True)
class Networks:
    """The DiT's loss, its weights spread over the ranks of `cpu_mesh`, how ranks share clips, the frozen networks."""

    loss: DenoisingLoss
    cpu_mesh: DeviceMesh | None
    sequence: SequencePlan | None
    vae: WFVAE
    text_encoder: TextEncoder | None
    chinese: bool


def build_networks(config: TrainConfig, world: World, group: SequenceGroup, start: Start, tell: Tell) -> Networks:
    """Load or make all networks of a run; group: who shares clips. Raises `UserError`."""
    device, cached = world.device, start.cache is not None
    with world.together():
        dit = build_dit(config, start.checkpoint, device)
        vae = build_vae(config.model, dit, device, weights=not cached)
        text = check_text_encoder(config.model, dit)
        text_encoder = None if cached else load_text_encoder(config.model, device)
    size = sum(parameter.numel() for parameter in dit.parameters()) / 1e6
    tell(f"{size:.1f} M parameters on {world.size} x {device.type}, {start.total_steps} steps")
    tell(f"attention: {dit.attention_summary()}")
    with world.together():
        if group.size > 1:
            tell(describe_groups(group, images_apart=config.data.group_data))
        sequence = choose_sequence(config, dit.config, start.plan.buckets, tell)
    exchange = None if sequence is None else group.exchange(sequence, dit.config.sparse_n)
    cpu_mesh = spread(dit, config, world)
    objective = DiffusionObjective(config.diffusion, device)
    loss = DenoisingLoss(dit, objective, compute_dtype(config.model) == torch.bfloat16, exchange)
    return Networks(loss, cpu_mesh, sequence, vae, text_encoder, text.is_multilingual)


def run_steps(config: TrainConfig, world: World, start: Start, tell: Tell) -> int:
    """Build the networks and train to the end. Returns the exit code. Raises `UserError`."""
    run, state, device = config.run, start.state, world.device
    output_dir = Path(run.output_dir)
    set_precision(config.model)
    set_determinism(run.deterministic, device)
    compiled = compiles(config, start.plan, device)
    bound_vae(config.model, device)
    group = SequenceGroup.of(world, run.sp_size, longest_wait(run))
    networks = build_networks(config, world, group, start, tell)
    stop = StopSignals()
    progress = Progress(start.total_steps, first=state.step, quiet=not world.is_first)
    goes_on = start.checkpoint is not None and start.checkpoint.resolve().parent == output_dir.resolve()
    with world.together():
        metrics = MetricsLog(run, state.step if goes_on else 0, progress.message) if world.is_first else None
    with world.together():
        validate = None
        if run.validation_steps is not None:
            validate = validation(config, world, start.plan, networks, metrics, progress, stop)
        trainer = Trainer(
            config,
            world,
            networks.loss,
            state,
            start.total_steps,
            progress,
            networks.cpu_mesh,
            validate,
        )
    if start.checkpoint is not None:
        with world.together():
            trainer.load(start.checkpoint)
    maker = BatchMaker(networks.vae, networks.text_encoder, networks.loss.objective, config, device, tell)
    trainer.recompiled, trainer.graphs = set_up(
        config, trainer, maker, start.plan, start.sizes, compiled, networks.sequence, tell
    )
    loader = make_loader(config, world, start, networks.chinese, stop)
    sharing = ClipSharing(group, device) if group.size > 1 else None
    feed = BatchFeed(loader, maker, state.step, start.sizes.accumulation, sharing)
    heartbeats = None if world.alone else Heartbeats(world.store.clone(), world.rank, world.size)
    watchdog = Watchdog(
        output_dir,
        world.rank,
        run.hang_factor,
        run.hang_seconds,
        loader.describe,
        heartbeats,
        waits_for_ranks=lambda: sharing is not None and sharing.waiting,
        step=state.step,
    )
    try:
        with all_answering(), stop, watchdog:
            last = trainer.run(feed, metrics, stop, watchdog)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"step {state.step + 1} does not fit into the memory of {device}: use --gradient_checkpointing,"
            " --activation_memory, --vae_memory, --mixed_precision bf16 or a smaller --train_batch_size"
        ) from error
    finally:
        trainer.close()
        progress.close()
        if metrics is not None:
            metrics.close()
        loader.close()
        feed.close()
    if state.step < start.total_steps:
        tell(f"{stop.received.name}: stopped after step {state.step}; go on with --resume_from_checkpoint {last}")
        return stop.exit_code
    tell(f"trained {state.step} steps: {last}\nsample from it: {sample_command(config, start.plan, last)}")
    return 0


def make_loader(config: TrainConfig, world: World, start: Start, chinese: bool, stop: StopSignals) -> ClipLoader:
    """This rank's clips, from the start's place on."""
    rejects = Path(config.run.output_dir) / rank_file("rejects", world)
    return ClipLoader(
        start.plan,
        config.data,
        seed=config.run.seed,
        global_batch_size=start.sizes.for_order,
        drop_caption=config.diffusion.cfg,
        chinese=chinese,
        rejects=RejectLog(rejects, config.data.max_bad_samples),
        cache=start.cache,
        rank=world.rank,
        world_size=world.size,
        sp_size=config.run.sp_size,
        epoch=start.state.epoch,
        first_batch=start.state.batch,
        # With others about, all decide together, before a step.
        stopped=lambda: world.alone and stop.received is not None,
    )


def validation(
    config: TrainConfig,
    world: World,
    plan: Plan,
    networks: Networks,
    metrics: MetricsLog | None,
    progress: Progress,
    stop: StopSignals,
) -> ValidationSampler:
    """What samples for `--validation_steps`; the first rank writes. Raises `UserError`."""
    board = metrics.board if metrics is not None else None
    return ValidationSampler(
        config,
        plan,
        world.device,
        networks.vae,
        networks.text_encoder,
        writes=world.is_first,
        report=progress.message,
        on_clip=partial(add_to_board, board) if board is not None else lambda *clip: None,
        stopped=lambda: world.greatest(stop.received or 0)[0] > 0,
    )


def spread(dit: DiT, config: TrainConfig, world: World) -> DeviceMesh | None:
    """Spread the weights over the ranks; returns their mesh as CPUs, None in one process. Raises `UserError`."""
    if world.alone:
        return None
    mesh = make_mesh(world.device.type, world.size, config.run.shard_size)
    shard_dit(dit, mesh, compute_dtype(config.model))
    return mesh if world.device.type == "cpu" else make_mesh("cpu", world.size, config.run.shard_size)


def longest_wait(run: RunConfig) -> float:
    """Seconds that a collective may take: so long that the watchdog, which names the rank, comes first."""
    return max(run.start_timeout, 2 * PHASE_FACTOR * run.hang_seconds) if run.hang_factor > 0 else FOR_EVER_S


def rank_file(stem: str, world: World) -> str:
    """The name of a file of JSON lines that each rank writes for itself."""
    return f"{stem}.jsonl" if world.alone else f"{stem}-r{world.rank}.jsonl"


def save_settings(config: TrainConfig) -> None:
    """Save the resolved settings as `output_dir/settings.json`. Raises `UserError`."""
    file = Path(config.run.output_dir) / "settings.json"
    try:
        file.write_text(json.dumps(as_dict(config), indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{file} cannot be written ({error}): make room or choose another --output_dir") from error


def sample_command(config: TrainConfig, plan: Plan, checkpoint: Path) -> str:
    """The command that samples from a checkpoint at the size that most clips have."""
    bucket = max(plan.buckets, key=lambda bucket: len(plan.buckets[bucket]))
    caption = plan.clips[plan.buckets[bucket][0]].entry.captions[0]
    words = ["python", "-m", "osp_fast.sample"]
    suffix = "_ema" if config.run.use_ema else ""
    if config.model.lora_rank is None:
        words += ["--model_path", str(checkpoint / f"model{suffix}")]
    else:
        words += ["--model_path", str(config.model.pretrained), "--lora", str(checkpoint / f"lora{suffix}")]
    if config.run.preset is not None:
        words += ["--preset", config.run.preset]
    else:
        words += ["--ae", config.model.ae, "--ae_path", config.model.ae_path]
        words += ["--text_encoder_name_1", config.model.text_encoder_name_1]
        words += ["--max_sequence_length", str(config.model.model_max_length)]
        if config.model.cache_dir is not None:
            words += ["--cache_dir", config.model.cache_dir]
    if config.diffusion.rf_scheduler:
        words += ["--sample_method", "FlowMatchEulerDiscrete"]
    elif config.diffusion.prediction_type == "sample":
        words += ["--sample_method", "DDIM"]
    words += ["--num_frames", str(bucket.frames), "--height", str(bucket.height), "--width", str(bucket.width)]
    return shlex.join([*words, "--text_prompt", caption])


if __name__ == "__main__":
    run_entry_point(main)
