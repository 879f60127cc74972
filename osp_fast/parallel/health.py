"""Before the start: whether all ranks are there, and whether one of them is slow.

A collective with a rank that is missing waits for its timeout, and then names nobody. So ranks meet at a store first,
where each one can be counted.
"""

import json
import os
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from osp_fast.errors import UserError
from osp_fast.parallel.deadline import in_time
from osp_fast.parallel.heartbeats import ranges

SLOW_FACTOR = 1.5  # a rank whose products take so many times the median is slow
LATE_S = 10.0  # a rank that comes so much after the first one is late
LINGER_S = 5.0  # a rank that gives up stays so long, so that the others hear why
FIRST_POLL_S, LAST_POLL_S = 0.01, 0.5
MEBIBYTE = 2**20
GPU_MIB, CPU_MIB = 64, 1  # of the all-reduce
PATIENCE = 0.8  # with the all-reduce, in timeouts
WARM_UPS, REPETITIONS = 2, 7


def open_store(rank: int, size: int, timeout_s: float) -> dist.Store:
    """Connect to the store of the run, at MASTER_ADDR and MASTER_PORT, without waiting for other ranks.

    torchrun's agent is its host, or rank 0 without torchrun. Give it to `init_process_group` under a prefix of its own,
    and `clone()` it for each thread that uses it beside the main one: connections are not to be shared by calls that
    wait.

    Raises:
        UserError: the variables are missing, or the host does not answer within `timeout_s`.
    """
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
    if not address or not port.isdigit():
        raise UserError("MASTER_ADDR and MASTER_PORT must name where the ranks meet: start with torchrun")
    hosted_by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
    try:
        store = dist.TCPStore(
            address,
            int(port),
            size,
            is_master=rank == 0 and not hosted_by_agent,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except (RuntimeError, ValueError) as error:
        host = "torchrun's agent" if hosted_by_agent else "rank 0"
        raise UserError(
            f"rank {rank} on {socket.gethostname()} cannot meet the others at MASTER_ADDR {address}, MASTER_PORT"
            f" {port}, where {host} is to listen ({_first_line(error)}): check that it runs, that the port is free, and"
            " that the network lets this machine through"
        ) from error
    return dist.PrefixStore("osp_fast", store)


def await_ranks(store: dist.Store, rank: int, world: int, timeout_s: float, hostname: str | None = None) -> list[str]:
    """Wait until all `world` ranks are there. Returns their machines' names, by rank; all ranks must call it.

    Raises:
        UserError: on every rank that is there, naming those that are not after `timeout_s`.
    """
    return exchange(store, "start", rank, world, hostname or socket.gethostname(), timeout_s, "report")


def exchange(
    store: dist.Store,
    name: str,
    rank: int,
    world: int,
    value: Any,
    timeout_s: float,
    deed: str,
    hosts: Sequence[str] | None = None,
) -> list[Any]:
    """What each rank gives, by rank: small plain data, by the store. Only once for each `name`.

    Rank 0 counts, so that the store is not asked by every rank about every other.

    Args:
        deed: what a rank does by this, "report", for the error.
        hosts: the machines' names; None: they are the values.

    Raises:
        UserError: on every rank that is there, naming those that are not after `timeout_s`.
    """
    store = dist.PrefixStore(name, store)
    try:
        store.set(f"of/{rank}", json.dumps(value))
        store.add("present", 1)
        values, missing = _count(store, world, timeout_s) if rank == 0 else _hear(store, timeout_s)
    except RuntimeError as error:
        raise UserError(
            f"rank {rank} on {socket.gethostname()} has lost the store where the ranks meet ({_first_line(error)}):"
            " see what the other ranks say, and start all again"
        ) from error
    if missing:
        raise UserError(_absent(missing, hosts or values, deed, world, timeout_s))
    return values


def _count(store: dist.Store, world: int, timeout_s: float) -> tuple[list[Any], list[int]]:
    """As rank 0: wait for all, and tell them what each gave, or who is missing."""
    _poll(lambda: store.add("present", 0) == world, timeout_s)
    given = [store.get(f"of/{rank}") if store.check([f"of/{rank}"]) else None for rank in range(world)]
    values = [None if value is None else json.loads(value) for value in given]
    missing = [rank for rank, value in enumerate(given) if value is None]
    store.set("found", json.dumps([values, missing]))
    if missing:  # this process ends, and with it the store, if it is its host: the others are to hear why before
        _poll(lambda: store.add("heard", 0) >= world - len(missing) - 1, LINGER_S)
    return values, missing


def _hear(store: dist.Store, timeout_s: float) -> tuple[list[Any], list[int]]:
    """As any other rank: wait for what rank 0 tells, which may have come later and has a `timeout_s` of its own."""
    if not _poll(lambda: store.check(["of/0"]), timeout_s):
        return [], [0]
    if not _poll(lambda: store.check(["found"]), timeout_s + LINGER_S):
        raise RuntimeError("rank 0 does not say who is there")
    values, missing = json.loads(store.get("found"))
    store.add("heard", 1)
    return values, missing


def _poll(there: Callable[[], bool], timeout_s: float) -> bool:
    """Wait until `there()`, asking less and less often. Returns whether it came in time."""
    deadline, pause = time.monotonic() + timeout_s, FIRST_POLL_S
    while not there():
        left = deadline - time.monotonic()
        if left <= 0:
            return False
        time.sleep(min(pause, left))
        pause = min(1.5 * pause, LAST_POLL_S)
    return True


def _absent(missing: Sequence[int], hosts: Sequence[str | None], deed: str, world: int, timeout_s: float) -> str:
    """The sentence on ranks that are not there; `hosts` of those that are known."""
    there = [rank for rank, host in enumerate(hosts) if host is not None and rank not in missing]
    seen = f"{_where(there, hosts)} did" if there else "the others wait for it"
    plural = "s" if len(missing) > 1 else ""
    return (
        f"rank{plural} {_where(missing, hosts)} of {world} did not {deed} within --start_timeout {timeout_s:g} s"
        f" ({seen}): see what its process printed and whether its machine is up, and start all again"
    )


def _where(ranks: Sequence[int], hosts: Sequence[str | None]) -> str:
    """ "3 to 7 on node-a, node-b"; without the machines that are not known."""
    machines = sorted({hosts[rank] for rank in ranks if rank < len(hosts) and hosts[rank] is not None})
    return ranges(ranks) + (f" on {', '.join(machines)}" if machines else "")


@dataclass(frozen=True)
class RankTimes:
    """What a rank measured: seconds of its product, of the all-reduce, and that it waited for the last rank."""

    rank: int
    host: str
    product_s: float
    all_reduce_s: float
    waited_s: float


@dataclass(frozen=True)
class HealthReport:
    """What all ranks measured. `size` is that of the all-reduce, bytes."""

    ranks: list[RankTimes]
    size: int

    @property
    def all_reduce_s(self) -> float:
        """Seconds of the all-reduce, of the slowest rank."""
        return max(times.all_reduce_s for times in self.ranks)

    @property
    def bus_bandwidth(self) -> float:
        """Bytes per second through each rank's link: 2 (n - 1) / n of the data pass it, as nccl-tests define busbw."""
        return 2 * (len(self.ranks) - 1) / len(self.ranks) * self.size / self.all_reduce_s

    def slow(self, factor: float = SLOW_FACTOR) -> list[str]:
        """A sentence for each rank whose products are slow, or that came late."""
        usual = statistics.median_low(times.product_s for times in self.ranks)
        longest = max(times.waited_s for times in self.ranks)  # of the rank that came first
        found = []
        for times in self.ranks:
            name = f"rank {times.rank} (host {times.host})"
            if times.product_s > factor * usual:
                found.append(
                    f"{name} is slow: a product takes it {1e3 * times.product_s:.2f} ms, {times.product_s / usual:.1f}"
                    " times the median of the ranks; see its clocks, its temperature and who else uses it (nvidia-smi)"
                )
            if longest - times.waited_s > LATE_S:
                found.append(f"{name} came {longest - times.waited_s:.0f} s after the first rank")
        return found

    def lines(self) -> list[str]:
        """For the user."""
        products = [1e3 * times.product_s for times in self.ranks]
        facts = (
            f"all-reduce of {self.size / MEBIBYTE:g} MiB over {len(self.ranks)} ranks: {1e3 * self.all_reduce_s:.2f}"
            f" ms, bus bandwidth {self.bus_bandwidth / 1e9:.2f} GB/s; a product on each: {min(products):.2f} to"
            f" {max(products):.2f} ms"
        )
        return [facts, *self.slow()]


def timed_all_reduce(
    rank: int,
    world: int,
    device: torch.device,
    store: dist.Store,
    hosts: Sequence[str],
    timeout_s: float,
    group: dist.ProcessGroup | None = None,
) -> HealthReport:
    """Time a product on each rank, and an all-reduce over all; all ranks must call it, once.

    64 MiB and a product of 4096 x 4096 bfloat16 on a GPU; 1 MiB and 256 x 256 float32 on a CPU. Medians of 7, after 2
    that do not count. A slow link slows all ranks alike and cannot be told from them; a slow GPU is named.

    Args:
        hosts: from `await_ranks`.
        timeout_s: of each of the three meetings.
        group: the default group if None; its collectives must work on `device`.

    Raises:
        UserError: a rank does not get through; it names which.
    """
    try:
        product_s = in_time(lambda: _product_seconds(device), timeout_s)
    except TimeoutError as error:
        raise UserError(
            f"rank {rank} on {hosts[rank]}: a product on {device} does not end ({error}): restart the machine's GPU"
        ) from error
    began = time.monotonic()
    exchange(store, "product", rank, world, None, timeout_s, "multiply two matrices", hosts)
    waited_s = time.monotonic() - began
    size = (GPU_MIB if device.type == "cuda" else CPU_MIB) * MEBIBYTE
    met = dist.PrefixStore("all_reduce", store)
    try:
        # NCCL's own timeout, which ends the process without naming a rank, is not to come first.
        all_reduce_s = in_time(lambda: _all_reduce_seconds(size, device, group), PATIENCE * timeout_s)
        met.set(f"out/{rank}", "")
    except (RuntimeError, TimeoutError) as error:
        raise UserError(_stuck(met, rank, world, hosts, error)) from error
    times = asdict(RankTimes(rank, hosts[rank], product_s, all_reduce_s, waited_s))
    gathered = exchange(store, "times", rank, world, times, timeout_s, "get through the all-reduce", hosts)
    return HealthReport([RankTimes(**each) for each in gathered], size)


def _stuck(store: dist.Store, rank: int, world: int, hosts: Sequence[str], error: Exception) -> str:
    """The sentence on an all-reduce that fails: it names the ranks that do not even say so."""
    trouble = f"an all-reduce over {world} ranks does not get through ({_first_line(error)})"
    try:
        store.set(f"out/{rank}", "")
        _poll(lambda: all(store.check([f"out/{other}"]) for other in range(world)), LINGER_S)
        silent = [other for other in range(world) if not store.check([f"out/{other}"])]
    except RuntimeError:
        return f"{trouble}, and the store where the ranks meet has gone: see what the other ranks print"
    if silent:
        return f"{trouble}, and of rank {_where(silent, hosts)} nothing is heard: see what its process printed"
    return (
        f"{trouble}, though every rank answers: check the network between {', '.join(sorted(set(hosts)))}"
        " (NCCL_DEBUG=INFO says what NCCL uses, NCCL_SOCKET_IFNAME chooses)"
    )


def _product_seconds(device: torch.device) -> float:
    """Median seconds of one product."""
    on_gpu = device.type == "cuda"
    side, dtype = (4096, torch.bfloat16) if on_gpu else (256, torch.float32)
    factor = torch.ones((side, side), dtype=dtype, device=device)
    return _median_seconds(lambda: factor @ factor, device)


def _all_reduce_seconds(size: int, device: torch.device, group: dist.ProcessGroup | None) -> float:
    """Median seconds of an all-reduce of `size` bytes."""
    tensor = torch.zeros(size // 4, device=device)
    return _median_seconds(lambda: dist.all_reduce(tensor, group=group), device)


def _median_seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Median seconds of `work()` on the device, after calls that do not count."""
    if device.type == "cuda":
        torch.cuda.set_device(device)  # of this thread
    seconds = []
    for _ in range(WARM_UPS + REPETITIONS):
        _finish(device)
        began = time.perf_counter()
        work()
        _finish(device)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[WARM_UPS:])


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
