"""A small training whose `--output_dir` is a disk of few megabytes that is full for a while.

    python tests/training/full_disk_run.py DISK MEGABYTES BALLAST_MEGABYTES <training flags>

mounts a tmpfs on the folder DISK, with a ballast file on it that goes away when the run first says that something could
not be written, and copies what is on the disk in the end to DISK.kept. Needs a mount namespace of its own (`unshare`).
"""

import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from small_run import use_small_model

from osp_fast.errors import run_entry_point
from osp_fast.progress import Progress
from osp_fast.train import main


def run() -> None:
    disk, size, ballast, *flags = sys.argv[1:]
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}m", "none", disk], check=True)
    weight = Path(disk, "ballast")
    weight.write_bytes(bytes(int(float(ballast) * 1e6)))
    honest = Progress.message

    def message(self: Progress, text: str) -> None:
        honest(self, text)
        if "could not be written" in text and weight.exists():
            present = sorted(path.name for path in Path(disk, "run").glob("checkpoint-*"))
            honest(self, f"then there were {present}, and now there is room")
            weight.unlink()

    Progress.message = message
    use_small_model()
    try:
        run_entry_point(lambda: main(flags))
    finally:
        shutil.copytree(disk, f"{disk}.kept")


if __name__ == "__main__":
    run()
