"""What one rank of the suite `parallel` runs: `python -m bench.suites.parallel_ranks FOLDER` in torchrun's environment.

FOLDER/task.json says what is measured; rank 0 writes FOLDER/result.json. All ranks do the same in the same order: each
run begins when all are there and lasts as long as the slowest rank's.
"""

import contextlib
import itertools
import json
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from osp_fast.kernels.launch import forced_path
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.accuracy import relative_error
from bench.results import MIB, OURS, REFERENCE, STRONG
from bench.suites.upstream_exchange import UpstreamExchange
from osp_fast.data.buckets import Bucket
from osp_fast.engine.cost import tokens_of
from osp_fast.engine.exchange_cost import choose_plan
from osp_fast.errors import UserError, run_entry_point
from osp_fast.models.dit import DiT, DiTConfig
from osp_fast.models.token_exchange import TokenExchange
from osp_fast.parallel import collectives
from osp_fast.parallel.exchange_bytes import ClipExchange
from osp_fast.parallel.mesh import SequenceGroup
from osp_fast.parallel.sequence_plan import SequencePlan
from osp_fast.parallel.world import World, open_world

DTYPE = {"cuda": torch.bfloat16, "cpu": torch.float32}
TOLERANCE = {torch.bfloat16: 0.05, torch.float32: 1e-4}  # of prediction and gradients against one process
RUN_SECONDS = 0.2  # of running that each implementation gets in each of its turns


class Triple(DiTConfig):
    """A block of each kind: single skip, group skip, full."""

    def attention_mode(self, block: int) -> str:
        """How block number `block` attends."""
        return ("single", "group", "full")[block]


CONFIGS = {
    "cuda": Triple(num_layers=3),
    "cpu": Triple(
        num_layers=3, num_attention_heads=4, attention_head_dim=36, caption_channels=64, cross_attention_dim=144
    ),
}
TEXT_TOKENS = {"cuda": 512, "cpu": 16}


@dataclass(frozen=True)
class SharingTask:
    """What ranks measure.

    device: cuda or cpu; size: the clip that is timed; checked: the clip that is held against one process, in pixels
    rounds: turns of each implementation; limit_s: after which a rank ends itself; collective_s: of waiting for another
    """

    device: str
    size: tuple[int, int, int]
    checked: tuple[int, int, int]
    rounds: int = 4
    limit_s: float = 120.0
    collective_s: float = 30.0


def latent_size(size: tuple[int, int, int]) -> tuple[int, int, int]:
    """Of a clip in pixels."""
    frames, height, width = Bucket(*size)
    return (frames - 1) // 4 + 1, height // 8, width // 8


@dataclass
class Sharing:
    """A way to share: exchange; plan in words; sent: bytes that each rank should send, forward and backward."""

    exchange: TokenExchange
    plan: str
    sent: list[int]


def schemes(group: SequenceGroup, config: DiTConfig, tokens: int, itemsize: int) -> dict[str, Sharing]:
    """The implementations by name; all ranks must call it."""
    ranks, chosen = group.size, choose_plan(config, group.size, tokens, training=True)
    found = {}
    for name, plan in ((OURS, chosen), (STRONG, SequencePlan(group.size))):
        predicted = ClipExchange(config, plan, tokens, itemsize=itemsize)
        totals = [predicted.total(rank) for rank in range(ranks)]
        sent = [total.forward + total.backward for total in totals]
        found[name] = Sharing(group.exchange(plan, config.sparse_n), plan.describe(), sent)
    everyone = found[STRONG].exchange.everyone
    predicted = ClipExchange(config, SequencePlan(ranks), tokens, itemsize=itemsize)
    sent = [round(2 * config.num_layers * predicted.upstream()) + predicted.gather(rank) for rank in range(ranks)]
    upstream = UpstreamExchange(ranks, group.rank, config.sparse_n, everyone)
    found[REFERENCE] = Sharing(upstream, "q, k, v and output each for itself", sent)
    return found


def drawn_model(config: DiTConfig, device: torch.device, dtype: torch.dtype) -> DiT:
    """Random weights, away from the zeros that a fresh model has, the same on every rank."""
    with torch.device("meta"):
        dit = DiT(config)
    dit.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in dit.parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else config.width
            parameter.copy_(torch.randn(parameter.shape, generator=generator, device=device) / fan_in**0.5)
    return dit.to(dtype)


def drawn_inputs(config: DiTConfig, size: tuple[int, int, int], like: Tensor, text_tokens: int) -> dict[str, Tensor]:
    """What the DiT is given of a clip, and `weights` of the loss."""
    generator = torch.Generator(like.device).manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=like.device, dtype=torch.float32).to(like.dtype)

    latents = draw(1, config.in_channels, *latent_size(size))
    text = draw(1, text_tokens, config.caption_channels)
    timestep = torch.tensor([500], device=like.device)
    return dict(latents=latents, timestep=timestep, text=text, weights=draw(*latents.shape))


def step(dit: DiT, inputs: dict[str, Tensor]) -> Tensor:
    """Forward and backward; the prediction."""
    dit.zero_grad(set_to_none=True)
    given = {name: x for name, x in inputs.items() if name != "weights"}
    prediction = dit(**given)
    (prediction * inputs["weights"]).sum().backward()
    return prediction.detach()


def gradients(dit: DiT) -> Tensor:
    """All in one, float32."""
    return torch.cat([parameter.grad.float().flatten() for parameter in dit.parameters()])


class Counted(TorchDispatchMode):
    """Within it: bytes that this rank sends to others, and in how many all-to-alls, backward too."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.times = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops._c10d_functional.all_to_all_single.default:
            x, _, sent, group = args
            place = dist.get_rank(dist.distributed_c10d._resolve_process_group(group))
            self.bytes += (sum(sent) - sent[place]) * x.element_size()
            self.times += 1
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Within it nothing is sent: what would come is a copy of what goes. Results are wrong, times are of computing."""
    begin = collectives._begin

    def copied(x: Tensor, sent: list[int], received: list[int], group: str) -> Tensor:
        total = sum(received)
        return x.repeat(-(-total // max(1, x.numel())))[:total].clone()

    collectives._begin = copied
    try:
        yield
    finally:
        collectives._begin = begin


def errors(world: World, every: dict[str, Sharing], config: DiTConfig, task: SharingTask) -> dict[str, float | str]:
    """Scheme -> error of prediction and gradients against one process in float32, or why it does not serve."""
    dtype, found = DTYPE[task.device], {}
    dit = drawn_model(config, world.device, dtype)
    inputs = drawn_inputs(config, task.checked, dit.proj_out.weight, TEXT_TOKENS[task.device])
    expected = None
    if world.is_first:
        exact = drawn_model(config, world.device, dtype).float()
        with forced_path("reference"):
            expected = step(exact, {name: x.float() if x.is_floating_point() else x for name, x in inputs.items()})
            expected = expected, gradients(exact)
        del exact
    for name, sharing in every.items():
        try:
            prediction = step(dit.share_tokens(sharing.exchange), inputs)
        except collectives.RankLost:
            raise
        except UserError as error:  # the same on all ranks, and before anything is sent
            found[name] = str(error)
            continue
        whole = gradients(dit)
        dist.all_reduce(whole)
        if expected is not None:
            found[name] = max(relative_error(x, y) for x, y in zip((prediction, whole), expected, strict=True))
    return found


def measure(world: World, task: SharingTask) -> dict[str, Any]:
    """Scheme -> what rank 0 writes of it."""
    config, dtype = CONFIGS[task.device], DTYPE[task.device]
    group = SequenceGroup.of(world, world.size, task.collective_s)
    tokens = tokens_of(config, latent_size(task.size))
    every = schemes(group, config, tokens, dtype.itemsize)
    found: dict[str, Any] = {name: dict(plan=sharing.plan, expected=sharing.sent) for name, sharing in every.items()}
    for name, error in errors(world, every, config, task).items():
        found[name]["error"] = error
    dit = drawn_model(config, world.device, dtype)
    inputs = drawn_inputs(config, task.size, dit.proj_out.weight, TEXT_TOKENS[task.device])
    right = []
    for name, sharing in every.items():
        verdict = found[name].get("error", 0.0)
        fits = not isinstance(verdict, str)
        if world.greatest(not (fits and verdict <= TOLERANCE[dtype]))[0]:
            continue
        with Counted() as counted:
            step(dit.share_tokens(sharing.exchange), inputs)
        found[name] |= dict(sent=world.gather(counted.bytes), times=counted.times)
        if found[name]["sent"] == sharing.sent:
            right.append(name)
    _time(world, dit, inputs, {name: every[name] for name in right}, found, task.rounds)
    return found


def _time(
    world: World,
    dit: DiT,
    inputs: dict[str, Tensor],
    every: dict[str, Sharing],
    found: dict[str, Any],
    rounds: int,
) -> None:
    """Turns of all that are right, with all that is sent and with nothing sent."""
    contestants = {
        (name, quiet): (sharing, silent if quiet else contextlib.nullcontext)
        for name, sharing in every.items()
        for quiet in (False, True)
    }
    turns: dict[Any, list[list[float]]] = {key: [] for key in contestants}
    peaks: dict[Any, float] = dict.fromkeys(contestants, 0.0)

    def turn(key: Any, runs: int) -> list[float]:
        sharing, around = contestants[key]
        dit.share_tokens(sharing.exchange)
        with around():
            if world.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(world.device)
            taken = [_timed(world, lambda: step(dit, inputs)) for _ in range(runs)]
            if world.device.type == "cuda":
                peaks[key] = max(peaks[key], torch.cuda.max_memory_allocated(world.device) / MIB)
        return taken

    once = {key: turn(key, 2)[1] for key in contestants}
    runs = {key: world.greatest(max(1, round(1e3 * RUN_SECONDS / ms)))[0] for key, ms in once.items()}
    for number in range(rounds):
        for key in contestants if number % 2 == 0 else reversed(contestants):
            turns[key].append(turn(key, runs[key]))
    for name in every:
        heard, alone = (_slowest(world, turns[name, quiet]) for quiet in (False, True))
        found[name]["turns"] = heard
        found[name]["silent_ms"] = statistics.median(itertools.chain(*alone))
        if world.device.type == "cuda":
            found[name]["peak_mib"] = max(world.gather(peaks[name, False]))


def _timed(world: World, call: Callable[[], Any]) -> float:
    """Milliseconds of a call that all ranks begin together."""
    wait = (lambda: torch.cuda.synchronize(world.device)) if world.device.type == "cuda" else (lambda: None)
    wait()
    world.greatest(0)
    start = time.perf_counter()
    call()
    wait()
    return 1e3 * (time.perf_counter() - start)


def _slowest(world: World, turns: list[list[float]]) -> list[list[float]]:
    """Of each run the slowest rank's."""
    every = world.gather(turns)
    return [[max(runs) for runs in zip(*of_turn, strict=True)] for of_turn in zip(*every, strict=True)]


def main() -> None:
    """Run as FOLDER/task.json says."""
    folder = Path(sys.argv[1])
    task = SharingTask(**json.loads((folder / "task.json").read_text()))
    signal.alarm(round(task.limit_s) + 5)  # should nobody be left to end this process

    def run() -> None:
        with open_world(task.device, task.limit_s, task.collective_s, lambda line: None) as world:
            found = measure(world, task)
            if world.is_first:
                (folder / "result.part").write_text(json.dumps(found))
                (folder / "result.part").rename(folder / "result.json")

    run_entry_point(run)


def write_task(folder: Path, task: SharingTask) -> None:
    """What `main` reads."""
    (folder / "task.json").write_text(json.dumps(asdict(task)))


if __name__ == "__main__":
    main()
