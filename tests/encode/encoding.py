"""What the tests of encoding share: a small run, what a cache holds, the program in a process of its own."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from osp_fast.data.cache_shards import ShardReader, read_records, shards
from osp_fast.data.latent_cache import SHARDS

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "training" / "small_run.py"
SPEC = importlib.util.spec_from_file_location("small_run", SCRIPT)
small = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(small)


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def contents(cache: Path) -> dict[str, torch.Tensor]:
    """Name -> tensor of all items."""
    reader = ShardReader()
    return {
        name: reader.tensor(shard, name)
        for shard in shards(cache / SHARDS)
        for name, record in read_records(shard).items()
        if "reject" not in record
    }


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    """Whether both hold the same; the VAE's sums are rounded otherwise in batches of another size."""
    return found.keys() == expected.keys() and all(
        torch.allclose(tensor, found[name], rtol=1e-4, atol=1e-5) for name, tensor in expected.items()
    )


def start(
    assets: dict[str, Path], cache: Path, items: int, environment: dict[str, str], **changed: object
) -> subprocess.Popen:
    """The program in a process of its own, which writes a shard for every few items."""
    code = (
        f"import sys, osp_fast.data.cache_shards as s; s.SHARD_ITEMS = {items}; from osp_fast.errors import *;"
        "import osp_fast.encode as e; run_entry_point(lambda: e.main(sys.argv[1:]))"
    )
    flags = small.flags(**assets, output=cache.parent / "none", latent_cache=cache, **changed)
    path = os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))
    return subprocess.Popen(
        [sys.executable, "-c", code, *flags],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **environment},
        stderr=subprocess.PIPE,
        text=True,
    )
