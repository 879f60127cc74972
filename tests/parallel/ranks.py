"""Runs of several ranks on the CPU: processes that are forked from a server which has imported everything once."""

import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "torch",
        "diffusers.optimization",
        "osp_fast.train",
        "torch.distributed.fsdp",
        "transformers.models.t5.modeling_t5",
        "transformers.models.auto.tokenization_auto",
    ]
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def enter(rank: int, size: int, port: int, log: Path, path: Sequence[str], target: Callable, arguments: tuple) -> None:
    """What a process of `start_ranks` runs: torchrun's environment, its output into a file, `target`, its exit code."""
    with log.open("w") as opened:
        for stream in (1, 2):
            os.dup2(opened.fileno(), stream)
    sys.path[:] = path
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    import torch

    torch.set_num_threads(1)
    code = 1
    try:
        target(*arguments)
        code = 0
    except SystemExit as error:
        code = error.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # no clean-up may hide how the target ended


class RankProcesses:
    """Started ranks; `codes` waits for them, kills them all after `timeout` seconds."""

    def __init__(self, size: int, folder: Path, target: Callable, arguments: tuple):
        folder.mkdir(parents=True, exist_ok=True)
        self.logs = [folder / f"rank-{rank}.log" for rank in range(size)]
        port = free_port()
        self.processes = [
            CONTEXT.Process(target=enter, args=(rank, size, port, self.logs[rank], list(sys.path), target, arguments))
            for rank in range(size)
        ]
        for process in self.processes:
            process.start()

    def codes(self, timeout: float = 60.0) -> list[int]:
        for process in self.processes:
            process.join(timeout)
        hanging = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        for process in self.processes:
            process.kill()
            process.join()
        assert not hanging, f"ranks {hanging} hang:\n{self.printed()}"
        return [process.exitcode for process in self.processes]

    def printed(self, rank: int | None = None) -> str:
        logs = self.logs if rank is None else [self.logs[rank]]
        return "\n".join(log.read_text() for log in logs if log.exists())


def run_ranks(size: int, folder: Path, target: Callable, *arguments: object) -> RankProcesses:
    """Run `target(*arguments)` as `size` ranks and wait; `target` must be importable."""
    ranks = RankProcesses(size, folder, target, arguments)
    assert ranks.codes() == [0] * size, ranks.printed()
    return ranks
