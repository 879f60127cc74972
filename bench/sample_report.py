"""What `bench sample` makes of its measurements: rates, whole clips, predictions, tables."""

from collections.abc import Sequence
from typing import Any

import torch

from bench.results import OURS
from bench.sample_steps import WITHIN, guided_flops
from bench.table import format_table, percent
from bench.train_steps import Case
from osp_fast.engine.cost import Workload
from osp_fast.engine.devices import H100, find_device
from osp_fast.engine.forward_peak import dit_on_meta, weight_bytes
from osp_fast.engine.sampling_cost import Streaming, step_seconds
from osp_fast.models.dit import DiTConfig
from osp_fast.models.wfvae_plan import gib

# Seconds of a clip of 100 steps on one H100: what is to be reached, and what upstream tells of itself.
TARGETS = {"93x640x640": "115", "93x352x640": "50", "93x480x640": "150 (upstream)"}
HEADERS = ("case", "implementation", "s/step", "spread", "times ours", "predicted s/step", "TFLOP/s", "of matmul")
WHOLE_CLIP = ("peak memory", "{steps} steps", "with decoding", "target")


def complete(
    rows: Sequence[dict[str, Any]],
    config: DiTConfig,
    case: Case,
    device: torch.device,
    limits: dict[str, float] | None,
    steps: int,
    decoding: float | None,
) -> None:
    """Fill in rates, the whole clip and, for ours on a GPU, the prediction.

    limits: ceilings of the same run; decoding: seconds, with all of the GPU, and so not of rows of a budget
    """
    flops = guided_flops(config, case)
    for row in rows:
        seconds = row["seconds"]
        rate = None if seconds is None else flops / seconds
        row["flops_per_second"] = rate
        row["of_matmul"] = rate / limits["matmul_flops_per_second"] if rate and limits else None
        row["decode_seconds"] = None if row["implementation"].startswith(WITHIN) else decoding
        row["clip_seconds"] = steps * seconds + decoding if seconds and row["decode_seconds"] else None
        row["target"] = TARGETS.get(row["case"])
        row.setdefault("predicted_seconds", None)
        if row["implementation"] == OURS and device.type == "cuda":
            row["predicted_seconds"] = predicted_seconds(config, case, torch.cuda.get_device_name(device))


def predicted_seconds(config: DiTConfig, case: Case, gpu: str) -> float:
    """Of the engine's step; at an H100's rates where the GPU's are not known."""
    workload = Workload(2, case.latent_size, case.text_tokens, weight_dtype=torch.bfloat16)
    block = weight_bytes(dit_on_meta(config, torch.bfloat16).transformer_blocks[0])
    return step_seconds(config, workload, 1, Streaming(block_bytes=block), find_device(gpu) or H100)


def sample_table(rows: Sequence[dict[str, Any]], steps: int) -> str:
    """A case's implementations, and their times over ours; of whole clips where decoding was measured."""
    ours = next(row["seconds"] for row in rows if row["implementation"] == OURS)
    whole = any(row["clip_seconds"] for row in rows)
    lines = []
    for row in rows:
        seconds = row["seconds"]
        line = [
            row["case"],
            row["implementation"],
            _figure(seconds, ".4g"),
            percent(row["spread"]),
            _figure(seconds and ours and seconds / ours, ".2f"),
            _figure(row["predicted_seconds"], ".4g"),
            _figure(seconds and row["flops_per_second"] / 1e12, ".4g"),
            percent(row["of_matmul"]),
        ]
        if whole:
            line += [
                gib(row["peak_bytes"]) if row["peak_bytes"] else None,
                _figure(seconds and steps * seconds, ".1f"),
                _figure(row["clip_seconds"], ".1f"),
                row["target"],
            ]
        lines.append([*line, _figure(row["rel_err"], ".1e"), row["note"]])
    clip = [header.format(steps=steps) for header in WHOLE_CLIP] if whole else []
    return format_table([*HEADERS, *clip, "error", ""], lines)


def shares(rows: Sequence[dict[str, Any]]) -> str:
    """In words: how much of a plain loop's step what is computed once saves, by times of the same turns."""
    ratios = {row["implementation"]: row["of_last"] for row in rows}
    if None in ratios.values():
        return "what is computed once was not compared: a row is wrong"

    def saved(name: str) -> str:
        median, low, high = (100 * (1 - ratio) for ratio in ratios[name])
        return f"{median:.1f} % ({high:.1f} to {low:.1f})"

    return (
        f"of a plain loop's step, text keys once save {saved('text keys once')}, time vectors once "
        f"{saved('time vectors once')}, both {saved(OURS)}"
    )


def _figure(value: float | None, form: str) -> str | None:
    return None if value is None else format(value, form)
