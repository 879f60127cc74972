"""What the ranks of `test_health.py` and `test_hangs.py` run."""

import os
import re
import signal
import time
from pathlib import Path

TIMEOUT_S = 20.0


def meet(timeout_s: float = TIMEOUT_S):
    """Rank, size, store, hosts; the process group is there."""
    import torch.distributed as dist

    from osp_fast.parallel.health import await_ranks, open_store

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = open_store(rank, size, timeout_s)
    hosts = await_ranks(store, rank, size, timeout_s, f"node-{rank}")
    dist.init_process_group("gloo", store=dist.PrefixStore("group", store), rank=rank, world_size=size)
    return rank, size, store, hosts


def steps(folder: str, trouble: str) -> None:
    """Steps of a training that consists of an all-reduce; rank 1 hangs in the sixth as `trouble` says."""
    import torch
    import torch.distributed as dist

    from osp_fast.parallel.heartbeats import WAITING_FOR_RANKS, Heartbeats
    from osp_fast.training import watchdog as module

    module.ANSWER_S = module.MARGIN_S = 1.0  # of the timer for Python that does not run
    rank, size, store, hosts = meet()
    heartbeats = Heartbeats(store.clone(), rank, size, hosts[rank])
    with module.Watchdog(Path(folder), rank, 5.0, 1.0, heartbeats=heartbeats, beat_s=0.1) as watchdog:
        for step in range(1, 8):
            if rank == 1 and step == 6 and trouble == "data":
                wait_for_a_clip()
            with watchdog.within(WAITING_FOR_RANKS):
                dist.all_reduce(torch.ones(1))
            watchdog.step_started(step, [f"clip-{step}-{rank}.mp4"])
            if rank == 1 and step == 6:
                {"computing": wait_for_a_clip, "no Python": hold_python, "stopped": stop}[trouble]()
            dist.all_reduce(torch.ones(1))
            time.sleep(0.05)
            watchdog.step_done()


def wait_for_a_clip() -> None:
    time.sleep(60)


def hold_python() -> None:
    """Code in C that does not let any other thread run Python, for much longer than the test."""
    re.match(r"(a+)+$", "a" * 60 + "b")


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def time_them(trouble: str) -> None:
    """The check before a start; rank 1 multiplies slowly, or stops before the all-reduce."""
    import torch
    import torch.distributed as dist

    from osp_fast.errors import run_entry_point
    from osp_fast.parallel import health

    rank, size, store, hosts = meet()
    health.LINGER_S, health.PATIENCE = 1.0, 0.3
    if rank == 1:
        if trouble == "slow":
            honest = health._product_seconds
            health._product_seconds = lambda device: 10 * honest(device)
        elif trouble == "stopped":
            health._all_reduce_seconds = lambda *arguments: stop()
        elif trouble == "killed":
            health._all_reduce_seconds = lambda *arguments: os._exit(9)

    def run() -> None:
        timeout_s = TIMEOUT_S if trouble == "slow" else 3.0
        report = health.timed_all_reduce(rank, size, torch.device("cpu"), store, hosts, timeout_s)
        print("\n".join(report.lines()))
        dist.barrier()  # rank 0, which hosts the store, is not to end first

    run_entry_point(run)


def come_or_not(absent: int) -> None:
    """All ranks but one come."""
    from osp_fast.errors import run_entry_point

    if os.environ["RANK"] != str(absent):
        run_entry_point(lambda: meet(2.0))
