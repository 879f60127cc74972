"""`bench predict parallel`: what sharing a clip among 1 to 64 GPUs costs; docs/parallel.md says what it means.

The released model in bf16 at an H100's rates. A training step is forward, backward and update on one clip that all GPUs
share, its weights spread over them, nothing recomputed. A sampling step predicts with and without the prompt: an even
number of GPUs splits into a half for each, and half of them share its tokens.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bench.results import write_json
from bench.suites.parallel_ranks import latent_size
from bench.table import MISSING, format_table, markdown_table, percent
from osp_fast.config import OptimizerConfig
from osp_fast.data.buckets import Bucket
from osp_fast.engine.cost import Sharding, Workload, tokens_of
from osp_fast.engine.devices import H100
from osp_fast.engine.exchange_cost import (
    TEXT_TOKENS,
    Seconds,
    SharedWork,
    choose_plan,
    collective_seconds,
    predict_step,
)
from osp_fast.engine.forward_peak import dit_on_meta, weight_bytes
from osp_fast.models.dit import DIT_CONFIGS, DiTConfig
from osp_fast.parallel.exchange_bytes import ClipExchange
from osp_fast.parallel.sequence_plan import SequencePlan
from osp_fast.training.footprint import optimizer_bytes

MODEL = "OpenSoraT2V_v1_3-2B/122"
CLIPS = ("93x352x640", "93x480x640", "93x640x640", "93x720x1280")
GPUS = (1, 2, 3, 4, 6, 8, 16, 32, 64)
TARGET, TARGET_GPUS = 0.03, 8  # of a step, exposed
HEADERS = (
    "GPUs", "train: plan", "sent, skip", "sent, all", "s/step", "speed", "exposed", "recomputing", "weights",
    "sample: plan", "s/step", "speed", "exposed",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A clip on so many GPUs; plans are groups x GPUs of each.

    sent_skip, sent_all: bytes that a GPU sends, forward, in a block that skips and on average of all blocks, over
    upstream's; None for one GPU
    exposed, recomputing, weights: shares of a training step that wait for the clip's exchange, the same where every
    block is recomputed, and for the exchange of weights and gradients
    sampling_exposed: share of a sampling step
    """

    clip: str
    gpus: int
    plan: str
    sent_skip: float | None
    sent_all: float | None
    seconds: float
    exposed: float
    recomputing: float
    weights: float
    sampling_plan: str
    sampling_seconds: float
    sampling_exposed: float


def run_predict_parallel(json_file: Path | None, as_markdown: bool = False) -> int:
    """Print the tables, optionally write the rows as JSON. Raises `UserError` for a file that cannot be written."""
    rows = predict()
    if json_file is not None:
        write_json(json_file, {"kind": "parallel", "device": H100.name, "rows": [asdict(row) for row in rows]})
    if as_markdown:
        print(markdown(rows))
        return 0
    print(f"predicted for {H100.name}, not yet measured on a GPU; what it means: docs/parallel.md")
    for clip in CLIPS:
        print(f"\n{clip}\n" + format_table(HEADERS, cells([row for row in rows if row.clip == clip])))
    print("\n" + "\n".join(verdicts(rows)))
    return 0


def markdown(rows: Sequence[Row]) -> str:
    """The predicted part of docs/parallel.md."""
    parts = ["\n".join(f"- {line}" for line in verdicts(rows))]
    for clip in CLIPS:
        parts.append(f"### {clip}\n" + markdown_table(HEADERS, cells([row for row in rows if row.clip == clip])))
    return "\n\n".join(parts)


def verdicts(rows: Sequence[Row]) -> list[str]:
    """Where the target for exposed communication is met."""
    of_eight = [row for row in rows if row.gpus == TARGET_GPUS]
    training = {row.clip: row.exposed + row.weights for row in of_eight}
    sampling = {row.clip: row.sampling_exposed for row in of_eight}
    lines = []
    for step, found in (("training", training), ("sampling", sampling)):
        met = [f"{clip} ({percent(share)})" for clip, share in found.items() if share <= TARGET]
        missed = [f"{clip} ({percent(share)})" for clip, share in found.items() if share > TARGET]
        words = [f"{verb} {', '.join(clips)}" for verb, clips in (("met for", met), ("missed for", missed)) if clips]
        lines.append(f"at most {TARGET:.0%} exposed in a {step} step on {TARGET_GPUS} GPUs: {'; '.join(words)}")
    return lines


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """Of one clip, one GPU first."""
    alone, lines = rows[0], []
    for row in rows:
        lines.append(
            [str(row.gpus), row.plan, *(MISSING if x is None else f"{x:.2f}" for x in (row.sent_skip, row.sent_all))]
            + [f"{row.seconds:.3f}", f"{alone.seconds / row.seconds:.1f}"]
            + [percent(share) for share in (row.exposed, row.recomputing, row.weights)]
            + [row.sampling_plan, f"{row.sampling_seconds:.3f}"]
            + [f"{alone.sampling_seconds / row.sampling_seconds:.1f}", percent(row.sampling_exposed)]
        )
    return lines


def predict() -> list[Row]:
    """All rows, the largest clip last."""
    config = DIT_CONFIGS[MODEL]
    weights = sum(parameter.numel() for parameter in dit_on_meta(config, torch.bfloat16).parameters())
    return [predict_row(config, weights, clip, gpus) for clip in CLIPS for gpus in GPUS]


def predict_row(config: DiTConfig, weights: int, clip: str, gpus: int) -> Row:
    """weights: how many numbers the model has."""
    size = latent_size(Bucket.parse(clip))
    tokens = tokens_of(config, size)
    plan = choose_plan(config, gpus, tokens, training=True, device=H100)
    exchange = ClipExchange(config, plan, tokens)
    skips = [config.attention_mode(index) != "full" for index in range(config.num_layers)]
    sent = [attention.forward + moved for attention, moved in exchange.blocks(0)]
    of_skips = [each for each, skip in zip(sent, skips, strict=True) if skip]
    upstream = exchange.upstream()
    # FSDP gathers weights in the products' type; one GPU has them in float32 and casts them.
    dtype = torch.float32 if gpus == 1 else torch.bfloat16
    workload = Workload(1, size, TEXT_TOKENS, weight_dtype=dtype, sequence=plan)
    _, moved, over_host = optimizer_bytes(OptimizerConfig())
    sharding = Sharding(gpus, gpus, weights, weights, -(-weights // gpus), moved, over_host)
    work = SharedWork(config, workload, H100)
    usual, recomputed = work.training(), work.training(recompute_all=True)
    again = recomputed.computing - usual.computing
    step = predict_step(config, workload, sharding, 0.0, H100)
    slower = predict_step(config, workload, sharding, again, H100, range(config.num_layers)).total
    sampling_plan, sampling = predict_sampling(config, size, tokens, TEXT_TOKENS, gpus)
    return Row(
        clip,
        gpus,
        plan=name(plan),
        sent_skip=sum(of_skips) / len(of_skips) / upstream if gpus > 1 else None,
        sent_all=sum(sent) / len(sent) / upstream if gpus > 1 else None,
        seconds=step.total,
        exposed=usual.exposed / step.total,
        recomputing=recomputed.exposed / slower,
        weights=(step.communication - usual.exposed) / step.total,
        sampling_plan=sampling_plan,
        sampling_seconds=sampling.total,
        sampling_exposed=sampling.exposed_share,
    )


def predict_sampling(
    config: DiTConfig, size: tuple[int, int, int], tokens: int, text_tokens: int, gpus: int
) -> tuple[str, Seconds]:
    """The plan in words, and a step with guidance; an even number of GPUs is two halves, of a prediction each."""
    halves = gpus % 2 == 0
    length, clips = (gpus // 2, 1) if halves else (gpus, 2)
    plan = choose_plan(config, length, tokens, clips, device=H100)
    workload = Workload(clips, size, text_tokens, weight_dtype=torch.bfloat16, sequence=plan)
    reading = weight_bytes(dit_on_meta(config, torch.bfloat16).transformer_blocks) / H100.copy_bytes
    seconds = [SharedWork(config, workload, H100, prepared=True).forward(), Seconds(memory_bound=reading)]
    if halves:
        cells_of_clip = size[0] * size[1] * size[2] * config.out_channels
        seconds_apart = collective_seconds(4 * cells_of_clip, (0, length), H100)
        seconds.append(Seconds(exchange=seconds_apart, exposed=seconds_apart))
    return f"2 halves of {name(plan)}" if halves else name(plan), Seconds.sum(seconds)


def name(plan: SequencePlan) -> str:
    """As `--sp_mode` has it."""
    return f"{plan.scope}x{plan.heads}"
