"""`bench run parallel`: one clip that several processes share, forward and backward, beside other ways to share it.

A block of each kind (single skip, group skip, full), of the released size in bfloat16 on all GPUs of this machine, two
of them at least; of four small heads in float32 in two processes on a CPU. All use the same kernels: what differs is
the exchange:

- osp_fast: as `--sp_mode auto` divides the clip, which on GPUs that divide the skip sets moves tokens between blocks
- reference: upstream's scheme, `upstream_exchange.py`
- strong: our Ulysses, `--sp_mode ulysses`: q, k and v in one message that attention reads in place

Before it is timed prediction and gradients are held against one process, and the bytes that every rank sends, counted
around the collectives, against `osp_fast/parallel/exchange_bytes.py`: where they differ the row is wrong. A run begins
when all ranks are there and lasts as long as the slowest one's. `exposed_share` is the part of it that computing waits
for the exchange, measured by runs in which nothing is sent.
"""

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import bench
from bench.measure import Timing
from bench.results import OURS, REFERENCE, STRONG, Row
from bench.suites import Job, Options, Setting
from bench.suites.parallel_ranks import (
    CONFIGS,
    DTYPE,
    TEXT_TOKENS,
    TOLERANCE,
    SharingTask,
    latent_size,
    write_task,
)
from osp_fast.data.buckets import Bucket
from osp_fast.data.rgb import usable_cores
from osp_fast.engine.cost import Workload, step_flops
from osp_fast.errors import UserError

SUITE = "parallel"
ROLES = {OURS: "ours", REFERENCE: "reference", STRONG: "strong"}
SIZES = {"cuda": (Bucket(93, 480, 640), Bucket(93, 640, 640)), "cpu": (Bucket(17, 256, 256),)}
CHECKED = {"cuda": Bucket(29, 352, 640), "cpu": Bucket(5, 128, 128)}
CPU_RANKS = 2
SECONDS = {"cuda": 60.0, "cpu": 25.0}
LIMIT_S = {"cuda": 300.0, "cpu": 120.0}
POLL_S, GRACE_S = 0.1, 3.0
RANK_MODULE = "bench.suites.parallel_ranks"


class RanksFailed(Exception):
    """Ranks that did not end well; the message says which and why."""


def jobs(options: Options) -> list[Job]:
    """A case for each clip. Raises `UserError` for a size that does not divide into tokens."""
    found = []
    for size in options.sizes or SIZES[options.device]:
        if (size.frames - 1) % 4 or size.height % 16 or size.width % 16:
            raise UserError(f"--size {size}: T must be 4n+1, H and W multiples of 16: name such a clip")
        measure = functools.partial(measure_sharing, options.device, size)
        found.append(Job(SUITE, f"{size} shared", SECONDS[options.device], measure))
    return found


def measure_sharing(device: str, size: Bucket, setting: Setting, module: str = RANK_MODULE) -> list[Row]:
    """A row for each way to share; ours alone, with a note, where there are no two GPUs or a rank fails.

    module: that ranks run
    """
    ranks = CPU_RANKS if device == "cpu" else torch.cuda.device_count()
    case, shape = f"{size} shared", dict(zip(("frames", "height", "width"), size, strict=True))
    blank = Row(SUITE, case, OURS, "ours", str(DTYPE[device]).removeprefix("torch."), shape)
    if ranks < 2:
        blank.note = "not measured: it needs two GPUs, and this machine has one"
        return [blank]
    task = SharingTask(device, tuple(size), tuple(CHECKED[device]), limit_s=LIMIT_S[device])
    try:
        found = run_ranks(ranks, task, module)
    except RanksFailed as error:
        blank.note = f"FAILED: {error}"
        return [blank]
    rows = [_row(name, facts, ranks, device, size) for name, facts in found.items()]
    setting.say(f"parallel {case}: {ranks} ranks, {rows[0].note}")
    return rows


def run_ranks(ranks: int, task: SharingTask, module: str = RANK_MODULE) -> dict[str, Any]:
    """Run `task` in processes of their own, which are all ended with the first that fails or at `task.limit_s`.

    Returns what rank 0 found, ours first. Raises `RanksFailed`.
    """
    with tempfile.TemporaryDirectory(prefix="osp_fast_bench") as folder:
        write_task(Path(folder), task)
        started = [_start(rank, ranks, Path(folder), module) for rank in range(ranks)]
        try:
            _await(started, Path(folder), task.limit_s)
        finally:
            for process in started:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        found = json.loads((Path(folder) / "result.json").read_text())
    return {name: found[name] for name in sorted(found, key=lambda name: name != OURS)}


def _start(rank: int, ranks: int, folder: Path, module: str) -> subprocess.Popen:
    """A rank, in torchrun's environment; what it prints goes to FOLDER/rank-N."""
    if rank == 0:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            (folder / "port").write_text(str(probe.getsockname()[1]))
    paths = [str(Path(bench.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": (folder / "port").read_text()}
    names |= {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": max(1, usable_cores() // ranks)}
    with (folder / f"rank-{rank}").open("w") as printed:
        return subprocess.Popen(
            [sys.executable, "-m", module, str(folder)],
            env={**os.environ, **{name: str(value) for name, value in names.items()}},
            stdout=printed,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _await(started: Sequence[subprocess.Popen], folder: Path, limit_s: float) -> None:
    """Wait until all have ended well. Raises `RanksFailed` soon after the first that has not, or at the limit."""
    deadline = time.monotonic() + limit_s
    while True:
        codes = [process.poll() for process in started]
        failed = [rank for rank, code in enumerate(codes) if code]
        if failed:
            rank, code = failed[0], codes[failed[0]]
            # Killed by a signal it says nothing; the others say that they have lost it, which is no news.
            words = (folder / f"rank-{rank}").read_text(errors="replace").strip().rsplit("\n", 1)[-1]
            how = signal.Signals(-code).name if code < 0 else words or f"code {code}"
            raise RanksFailed(f"rank {rank} of {len(started)} ended: {how[:200]}")
        if all(code == 0 for code in codes):
            return
        if time.monotonic() > deadline:
            waiting = ", ".join(str(rank) for rank, code in enumerate(codes) if code is None)
            raise RanksFailed(f"ranks {waiting} of {len(started)} did not end within {limit_s:.0f} s")
        time.sleep(POLL_S)


def _row(name: str, facts: dict[str, Any], ranks: int, device: str, size: Bucket) -> Row:
    """Of what rank 0 found of a way to share."""
    dtype, config = DTYPE[device], CONFIGS[device]
    shape = dict(zip(("frames", "height", "width"), size, strict=True))
    row = Row(SUITE, f"{size} shared", name, ROLES.get(name, "peer"), str(dtype).removeprefix("torch."), shape)
    workload = Workload(1, latent_size(tuple(size)), TEXT_TOKENS[device], dtype, dtype)
    row.flops = step_flops(config, workload).model / ranks
    row.note = facts["plan"]
    if isinstance(facts["error"], str):
        row.note = f"{facts['error']}"
        return row
    row.rel_err = facts["error"]
    if not row.rel_err <= TOLERANCE[dtype]:
        row.note = f"WRONG, not timed: off by {row.rel_err:.1e} from one process"
        return row
    blocks = config.num_layers
    row.figures = {
        "ranks": ranks,
        "bytes_sent_per_block": facts["sent"][0] / blocks,
        "messages_per_block": facts["times"] / blocks,
    }
    row.ok = facts["sent"] == facts["expected"]
    if not row.ok:
        row.note = f"WRONG, not timed: ranks send {facts['sent']} bytes, not the predicted {facts['expected']}"
        return row
    for field, value in Timing(turns=facts["turns"], peak_mib=facts.get("peak_mib")).fields().items():
        setattr(row, field, value)
    row.figures["exposed_share"] = max(0.0, 1 - facts["silent_ms"] / row.ms)
    return row
