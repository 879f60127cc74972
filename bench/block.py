"""`bench block`: kernels and bytes of one DiT block, by its references in eager mode, by our operations, by Inductor.

A DiT is run on fake tensors with `FEWER` blocks and with one more; the difference is a block inside the model, as what
happens at its ends and at its edges is the same in both. Nothing is computed and no GPU is needed.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from osp_fast.kernels.launch import forced_path
from osp_fast.kernels.skiparse_attention import skiparse_attention_triton
from osp_fast.kernels.spec import DIRECTIONS
from torch import Tensor
from torch._subclasses import FakeTensorMode

from bench.counting import KINDS, MEMORY, Traffic
from bench.inductor import block_schedules, has_compiler
from bench.results import H100, write_json
from bench.table import format_table, milliseconds
from osp_fast.errors import UserError

DTYPE = torch.bfloat16
FEWER = 2  # blocks: the one counted is number 2, the first with skiparse attention
TEXT_TOKENS = 512
TIME_STRIDE, SPACE_STRIDE = 4, 8  # pixels of a latent cell
EAGER, OURS, COMPILED = "eager references", "osp_fast", "torch.compile of the references"
PATHS = {EAGER: "reference", OURS: "triton"}


def run_block(size: str, clip: str, inductor: bool, json_file: Path | None) -> int:
    """Print the tables, optionally write the rows as JSON. Raises UserError on a size or clip that cannot be."""
    from osp_fast.models.dit import DIT_CONFIGS

    if size not in DIT_CONFIGS:
        raise UserError(f"--size {size!r} is not a known model: choose from {', '.join(DIT_CONFIGS)}")
    config = DIT_CONFIGS[size]
    latent_size = parse_clip(clip, config)
    tokens = latent_size[0] * latent_size[1] * latent_size[2] // (config.patch_size_t * config.patch_size**2)
    rows = [row for name, path in PATHS.items() for row in block_rows(config, latent_size, name, path)]
    notes = []
    if inductor and has_compiler():
        print("Inductor compiles two small models, which takes a minute", flush=True)
        rows += inductor_rows(config, tokens)
        notes.append(f"{COMPILED}: Inductor's schedule on a CPU at a small size, bytes scaled to this one")
    elif inductor:
        notes.append(f"{COMPILED}: not counted, as Inductor needs a C++ compiler and there is none")
    result = {"kind": "block", "size": size, "clip": clip, "tokens": tokens, "width": config.width}
    result |= {"dtype": str(DTYPE).removeprefix("torch."), "torch": torch.__version__, "rows": rows}
    if json_file is not None:
        write_json(json_file, result)
    print(f"one block of {size} at {clip}: {tokens} tokens of {config.width} channels, {result['dtype']}")
    print("\n\n".join([ops_table(rows), totals_table(rows), *notes]))
    return 0


def parse_clip(clip: str, config: Any) -> tuple[int, int, int]:
    """FRAMESxHEIGHTxWIDTH in pixels -> (frames, rows, columns) of latents. Raises UserError."""
    match = re.fullmatch(r"(\d+)x(\d+)x(\d+)", clip)
    frames, height, width = map(int, match.groups()) if match else (0, 0, 0)
    step = SPACE_STRIDE * config.patch_size
    if frames % TIME_STRIDE != 1 or not height or not width or height % step or width % step:
        raise UserError(f"--clip {clip!r} must be FRAMESxHEIGHTxWIDTH, 4n+1 frames, sides multiples of {step}")
    return (frames - 1) // TIME_STRIDE + 1, height // SPACE_STRIDE, width // SPACE_STRIDE


def block_rows(config: Any, latent_size: tuple[int, int, int], name: str, path: str) -> list[dict[str, Any]]:
    """What one block adds on one path of the kernels: a row per direction and operation, the largest first."""
    fewer, more = (count_model(config, layers, latent_size, path) for layers in (FEWER, FEWER + 1))
    rows = []
    for direction, first, second in zip(DIRECTIONS, fewer, more, strict=True):
        for key in {**first.kernels, **second.kernels}:
            kernels, moved = (after[key] - before[key] for before, after in _counters(first, second))
            if kernels or moved:
                rows.append(_row(name, direction, key.kind, key.op, kernels, moved))
    return sorted(rows, key=lambda row: (DIRECTIONS.index(row["direction"]), KINDS.index(row["kind"]), -row["bytes"]))


def count_model(config: Any, layers: int, latent_size: tuple[int, int, int], path: str) -> tuple[Traffic, Traffic]:
    """The forward and the backward pass of a DiT of `layers` blocks. Attention is our operation on every path."""
    from osp_fast.models.attention_backends import AttentionBackend
    from osp_fast.models.dit import DiT

    backend = AttentionBackend("ours", _attend, lambda mode, sparse_n: "skiparse")
    with FakeTensorMode(), forced_path(path), _default_dtype(DTYPE):
        model = DiT(dataclasses.replace(config, num_layers=layers))
        for block in model.transformer_blocks:
            block.self_attention.backend = block.cross_attention.backend = backend
        latents = torch.empty(1, config.in_channels, *latent_size)
        text = torch.empty(1, TEXT_TOKENS, config.caption_channels)
        with Traffic() as forward:
            out = model(latents, torch.zeros(1, dtype=torch.long), text, torch.ones(1, TEXT_TOKENS, dtype=torch.bool))
        cotangent = torch.empty_like(out)
        with Traffic() as backward:
            torch.autograd.grad(out, list(model.parameters()), cotangent)
    return forward, backward


def inductor_rows(config: Any, tokens: int) -> list[dict[str, Any]]:
    """A row per direction: Inductor's fused kernels, scaled to `tokens`."""
    moved = 2 * tokens * config.width
    return [
        _row(COMPILED, direction, MEMORY, "fused", schedule.kernels, round(schedule.passes * moved))
        for direction, schedule in block_schedules(config, FEWER).items()
    ]


def ops_table(rows: Sequence[dict[str, Any]]) -> str:
    """Every operation that is bound by memory."""
    lines = [
        [row["implementation"], row["direction"], row["op"], row["kernels"], _gigabytes(row["bytes"])]
        for row in rows
        if row["kind"] == MEMORY
    ]
    return format_table(["implementation", "direction", "memory-bound operation", "kernels", "GB"], lines)


def totals_table(rows: Sequence[dict[str, Any]]) -> str:
    """Kernels and bytes of each kind, and how long the memory-bound ones take at the speed of a copy."""
    headers = ["implementation", "kind"]
    headers += [f"{direction} {figure}" for direction in DIRECTIONS for figure in ("kernels", "GB", "at 3.0 TB/s")]
    lines = []
    for name, kind in dict.fromkeys((row["implementation"], row["kind"]) for row in rows):
        line = [name, kind]
        for direction in DIRECTIONS:
            found = [
                row for row in rows if (row["implementation"], row["kind"], row["direction"]) == (name, kind, direction)
            ]
            moved = sum(row["bytes"] for row in found)
            seconds = moved / H100.copy_bytes if kind == MEMORY else None
            line += [sum(row["kernels"] for row in found), _gigabytes(moved), milliseconds(seconds)]
        lines.append(line)
    return format_table(headers, lines)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Modules are made in this type within it: parameters of fake tensors cannot be converted afterwards."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _attend(*arguments: Any) -> Tensor:
    with forced_path("triton"):
        return skiparse_attention_triton(*arguments)


def _counters(first: Traffic, second: Traffic) -> Iterator[tuple[Any, Any]]:
    yield first.kernels, second.kernels
    yield first.bytes, second.bytes


def _row(name: str, direction: str, kind: str, op: str, kernels: int, moved: int) -> dict[str, Any]:
    return {
        "implementation": name,
        "direction": direction,
        "kind": kind,
        "op": op,
        "kernels": kernels,
        "bytes": moved,
    }


def _gigabytes(moved: int) -> str:
    return f"{moved / 1e9:.3f}"
