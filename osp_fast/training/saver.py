"""Writing checkpoints: a copy in CPU memory first, then files, while training goes on."""

import shutil
import threading
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from osp_fast.config import Recipe
from osp_fast.files import sync
from osp_fast.models.dit import DiT
from osp_fast.models.lora import has_lora, lora_size, lora_state, save_lora
from osp_fast.models.weights import SHARD_BYTES, plan_files, write_index, write_weights_file
from osp_fast.parallel.shards import LocalShards, gather_state, local_part, on_cpu
from osp_fast.parallel.world import World
from osp_fast.training.checkpoint import (
    OPTIMIZER_FOLDER,
    WRITING,
    list_checkpoints,
    remove_checkpoint,
    superfluous,
)
from osp_fast.training.ema import EMA
from osp_fast.training.manifest import hash_files, write_manifest
from osp_fast.training.optimizer import state_tensors, step_tensors
from osp_fast.training.state import FILE_NAME as STATE_FILE
from osp_fast.training.state import TrainerState, write_state

LEAST_FILE_BYTES = 256 << 20  # smaller files of weights are not worth a rank of their own
STATE_FILE_BYTES = 1 << 30  # of the optimizer's state: a file is made in memory before it is written


@dataclass
class ModelFiles:
    """This rank's files of a model folder: which tensors go where, and those that this rank writes."""

    weight_map: dict[str, str]
    total_size: int
    tensors: dict[str, dict[str, Tensor]]


@dataclass
class Snapshot:
    """What this rank writes of a checkpoint, in CPU memory: nothing in it changes any more.

    models, adapters: by the folder's name; optimizer: as a distributed checkpoint takes it
    """

    state: TrainerState
    models: dict[str, ModelFiles]
    adapters: dict[str, dict[str, Tensor]]
    optimizer: dict[str, Tensor]


@torch.no_grad()
def take_snapshot(
    state: TrainerState,
    dit: DiT,
    shards: LocalShards,
    optimizer: Optimizer,
    ema: EMA | None,
    world: World,
    cpu_mesh: DeviceMesh | None,
) -> Snapshot:
    """Copy all that a checkpoint holds; all ranks must call it. The GPU has finished the step when it returns."""
    sources = {"": {}} if ema is None else {"": {}, "_ema": ema.named_average()}
    models, adapters = {}, {}
    for suffix, replaced in sources.items():
        if has_lora(dit):
            adapters[f"lora{suffix}"] = _adapters(dit, shards, replaced, world)
        else:
            models[f"model{suffix}"] = _model_files(dit, replaced, world)
    tensors = {"step": step_tensors(optimizer)[0], **state_tensors(optimizer, shards)}
    return Snapshot(state, models, adapters, {name: on_cpu(tensor, cpu_mesh) for name, tensor in tensors.items()})


def _adapters(dit: DiT, shards: LocalShards, replaced: dict[str, Tensor], world: World) -> dict[str, Tensor]:
    """What the first rank writes of adapters; the others help to gather it and write nothing."""
    spread = {name: shards.like(shards.names.index(name), local) for name, local in replaced.items()}
    tensors = lora_state(dit, spread or None)
    return {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()} if world.is_first else {}


def _model_files(dit: DiT, replaced: dict[str, Tensor], world: World) -> ModelFiles:
    meta = {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in dit.state_dict().items()}
    shapes = dit.to_checkpoint(meta)
    total = sum(tensor.nbytes for tensor in shapes.values())
    # As many files as ranks, so that all of them write, but no more than are worth it.
    weight_map = plan_files(shapes, min(SHARD_BYTES, max(LEAST_FILE_BYTES, -(-total // world.size))))
    files = sorted(set(weight_map.values()))
    tensors: dict[str, dict[str, Tensor]] = {file: {} for file in files[world.rank :: world.size]}

    def take(name: str, whole: Tensor) -> None:
        for part_name, part in dit.to_checkpoint({name: whole}).items():
            mine = tensors.get(weight_map[part_name])
            if mine is not None:
                mine[part_name] = part.detach().to("cpu", copy=True)

    gather_state(dit, replaced, take)
    return ModelFiles(weight_map, total, tensors)


class Saver:
    """Writes snapshots as checkpoints, in a thread if `background`; one at a time.

    A checkpoint that cannot be written is a `fault`, no error: the older ones are as they were, and training goes on.

    limit, keep_every: which older ones stay, see `superfluous`
    """

    def __init__(
        self,
        output_dir: Path,
        dit: DiT,
        recipe: Recipe,
        world: World,
        *,
        limit: int | None = None,
        keep_every: int | None = None,
        background: bool = True,
    ):
        self._output_dir, self._dit, self._recipe, self._world = output_dir, dit, recipe, world
        self._limit, self._keep_every = limit, keep_every
        self._background = background
        self._thread: threading.Thread | None = None
        self._fault: str | None = None
        self._digests: dict[str, str] = {}
        self.saved: Path | None = None
        self.passed_over: set[int] = set()  # steps of damaged checkpoints, which count for nothing and stay

    def save(self, snapshot: Snapshot, prune: bool = True) -> None:
        """Write a snapshot; `fault` of the one before must have been asked for. prune: remove superfluous ones.

        All ranks must call it.
        """
        if not self._background:
            self._run(snapshot, prune)
            return
        self._thread = threading.Thread(target=self._run, args=(snapshot, prune), name="save", daemon=True)
        self._thread.start()

    def fault(self, wait: bool = True) -> str | None:
        """Why the last one could not be written, said once; None if it could, or is on its way and `wait` is false."""
        if self._thread is not None:
            if self._thread.is_alive() and not wait:
                return None
            self._thread.join()
            self._thread = None
        fault, self._fault = self._fault, None
        return fault

    def close(self, seconds: float) -> None:
        """Give what is being written so long to arrive; whether it did is not asked."""
        if self._thread is not None:
            self._thread.join(seconds)

    def _run(self, snapshot: Snapshot, prune: bool) -> None:
        if self._world.device.type == "cuda":  # a new thread's is the first one
            torch.cuda.set_device(self._world.device)
        final = self._output_dir / f"checkpoint-{snapshot.state.step}"
        writing = self._output_dir / (WRITING + final.name)
        self._fault = None
        try:
            for part in (self._begin, self._write_models, self._write_optimizer, self._hash):
                self._on_all_ranks(part, snapshot, writing)
            digests: dict[str, str] = {}
            for of_rank in self._world.gather(self._digests, self._world.files):
                digests.update(of_rank)
            self._on_first_rank(self._publish, snapshot.state, digests, writing, final)
            self.saved = final
            self.passed_over.discard(snapshot.state.step)
        except _Fault as fault:
            self._fault = f"{final} could not be written ({fault}): make room or choose another --output_dir" + (
                "; the older checkpoints are intact" if self.saved is not None else ""
            )
            if self._world.is_first:
                shutil.rmtree(writing, ignore_errors=True)
            return
        try:
            if prune:
                self._on_first_rank(self._prune, snapshot.state.step)
        except _Fault as fault:
            self._fault = (
                f"an old checkpoint in {self._output_dir} could not be removed ({fault}): remove it by hand or raise"
                " --checkpoints_total_limit"
            )

    def _on_all_ranks(self, part: Callable, *arguments: object) -> None:
        """Do a part on every rank; if one fails, all raise `_Fault`."""
        fault = None
        try:
            part(*arguments)
        except (Exception, CheckpointException) as error:  # the latter is none; the others wait for this rank's word
            fault = (str(error).strip() or type(error).__name__).splitlines()[-1]
        for rank, found in enumerate(self._world.gather(fault, self._world.files)):
            if found is not None:
                raise _Fault(found if self._world.alone else f"rank {rank}: {found}")

    def _on_first_rank(self, part: Callable, *arguments: object) -> None:
        self._on_all_ranks(part if self._world.is_first else lambda *_: None, *arguments)

    def _begin(self, snapshot: Snapshot, writing: Path) -> None:
        if self._world.is_first:
            with suppress(FileNotFoundError):
                shutil.rmtree(writing)
            for name in (*snapshot.models, *snapshot.adapters, OPTIMIZER_FOLDER):
                (writing / name).mkdir(parents=True)

    def _write_models(self, snapshot: Snapshot, writing: Path) -> None:
        for name, model in snapshot.models.items():
            for file, tensors in model.tensors.items():
                write_weights_file(writing / name / file, tensors)
            if self._world.is_first:
                self._dit.save_config(writing / name, self._recipe)
                write_index(writing / name, model.weight_map, model.total_size)
        if self._world.is_first:
            for name, adapters in snapshot.adapters.items():
                save_lora(writing / name, adapters, *lora_size(self._dit), self._recipe)

    def _write_optimizer(self, snapshot: Snapshot, writing: Path) -> None:
        writer = dcp.HuggingFaceStorageWriter(
            str(writing / OPTIMIZER_FOLDER), _files_of(snapshot.optimizer), save_distributed=True
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that no other ranks are there
            dcp.save(
                snapshot.optimizer,
                storage_writer=writer,
                process_group=self._world.files,
                no_dist=self._world.alone,
            )

    def _hash(self, snapshot: Snapshot, writing: Path) -> None:
        """Of the files that this rank has written."""
        files = [writing / name / file for name, model in snapshot.models.items() for file in model.tensors]
        # As PyTorch names them.
        files += (writing / OPTIMIZER_FOLDER).glob(f"shard-{self._world.rank + 1:05d}-*.safetensors")
        if self._world.is_first:
            folders = [writing / name for name in (*snapshot.models, *snapshot.adapters)]
            files += [path for folder in folders for path in folder.iterdir() if path.suffix == ".json"]
            files += [path for name in snapshot.adapters for path in (writing / name).glob("*.safetensors")]
        self._digests = hash_files(writing, files)

    def _publish(self, state: TrainerState, digests: dict[str, str], writing: Path, final: Path) -> None:
        write_state(writing / STATE_FILE, state)
        unseen = [name for name in digests if not (writing / name).is_file()]
        if unseen:
            raise FileNotFoundError(f"{unseen[0]}, which another rank has written, is not to be seen here")
        write_manifest(writing, digests | hash_files(writing, [writing / STATE_FILE]))
        _sync_tree(writing)
        remove_checkpoint(final)  # only an incomplete folder can have this name: later checkpoints are refused
        writing.rename(final)
        sync(self._output_dir)

    def _prune(self, newest: int) -> None:
        present = {step: path for step, path in list_checkpoints(self._output_dir) if step not in self.passed_over}
        for step in superfluous(list(present), newest, self._limit, self._keep_every):
            remove_checkpoint(present[step])


class _FileNumbers(dict):
    """Tensor -> number of its file; 1 for those that other ranks alone have (`optimizer.state_tensors`)."""

    def __missing__(self, name: str) -> int:
        return 1


def _files_of(tensors: dict[str, Tensor]) -> _FileNumbers:
    """Files of about `STATE_FILE_BYTES` each. The first rank's word goes for all."""
    numbers, held = _FileNumbers(), 0
    for name, tensor in tensors.items():
        held += local_part(tensor).nbytes
        numbers[name] = held // STATE_FILE_BYTES + 1
    return numbers


class _Fault(Exception):
    """Why a checkpoint could not be written; known to all ranks."""


def _sync_tree(folder: Path) -> None:
    for path in _deepest_first(folder.rglob("*")):
        sync(path)
    sync(folder)


def _deepest_first(paths: Iterable[Path]) -> list[Path]:
    return sorted(paths, key=lambda path: len(path.parts), reverse=True)
