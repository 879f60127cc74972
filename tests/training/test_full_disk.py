"""A disk that is full while a checkpoint is written: the older one stays, the run goes on, the next one is written."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

from osp_fast.training.checkpoint import verify

HERE = Path(__file__).parent
SPEC = importlib.util.spec_from_file_location("small_run", HERE / "small_run.py")
small = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(small)
# As root a mount namespace is to be had at once, else with a user namespace around it.
NAMESPACE = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--mount"]


def test_a_full_disk_loses_neither_the_old_checkpoint_nor_the_run(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    data, text_encoder = small.write_data(tmp_path / "data", 6, 3), small.write_text_encoder(tmp_path / "text_encoder")
    settings = dict(max_train_steps=6, checkpointing_steps=2, checkpoints_total_limit=1, use_ema=True, report_to="none")
    flags = small.flags(data, text_encoder, disk / "run", **settings)
    script = [sys.executable, str(HERE / "full_disk_run.py"), str(disk), "8", "7.0", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])}
    run = subprocess.run([*NAMESPACE, *script], env=environment, stderr=subprocess.PIPE, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert "checkpoint-4 could not be written (" in run.stderr and "No space left on device" in run.stderr
    assert "training goes on" in run.stderr
    assert "then there were ['checkpoint-2'], and now there is room" in run.stderr
    kept = Path(f"{disk}.kept") / "run"
    lines = [json.loads(line)["step"] for line in (kept / "metrics.jsonl").read_text().splitlines()]
    assert lines == list(range(1, 7))
    assert sorted(path.name for path in kept.iterdir() if path.is_dir()) == ["checkpoint-6"]
    verify(kept / "checkpoint-6")
