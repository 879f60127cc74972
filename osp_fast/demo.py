"""`make demo`: generate a data set, train on its mp4 files, resume once, sample three prompts, show the result.

Each stage is the command that a user would type; this file only types them, in a folder of its own.
"""

import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from osp_fast.cli import SentenceParser
from osp_fast.config import SAMPLE_PRESETS, TINY_FOLDER
from osp_fast.errors import UserError, run_entry_point

PROMPTS = (
    "a red circle moves to the right on a dark blue background",
    "a yellow square moves up on a black background",
    "a green triangle stays still on a grey background",
)
STEPS = 800


def run_command(module: str, arguments: list[str], folder: Path) -> None:
    """Type `python -m module arguments` in folder. Raises `UserError` if it fails."""
    print(f"\n$ python -m {module} {shlex.join(arguments)}", flush=True)
    done = subprocess.run([sys.executable, "-m", module, *arguments], cwd=folder)
    if done.returncode:
        raise UserError(f"python -m {module} ended with code {done.returncode}: its message stands above")


def clear(out: Path) -> None:
    """Make the demo's folder, without an earlier demo's results. Raises `UserError` if it is another's."""
    mark = out / ".osp_fast_demo"
    try:
        if out.exists() and any(out.iterdir()) and not mark.exists():
            raise UserError(f"--out {out} holds files that are not the demo's: name a new folder")
        shutil.rmtree(out / TINY_FOLDER, ignore_errors=True)
        out.mkdir(parents=True, exist_ok=True)
        mark.touch()
    except OSError as error:
        raise UserError(f"--out {out} cannot be used ({error}): name another folder") from None


def read_samples(folder: Path) -> list[Path]:
    """The sampled videos in order of their index, without the grid."""
    return sorted(path for path in folder.glob("*.mp4") if "grid" not in path.name)


def main(argv: list[str] | None = None) -> None:
    """Run the demo. `--out` is the folder (default demo); an earlier run's results in it are replaced."""
    parser = SentenceParser(prog="osp_fast.demo", description="Train and sample on generated video.")
    parser.add_argument("--out", default="demo", help="folder of everything that the demo writes (default: demo)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"optimizer steps (default: {STEPS})")
    options = parser.parse_args(argv)
    if options.steps < 2:
        raise UserError(f"--steps {options.steps} is too few: the demo trains, then resumes, so give at least 2")
    out = Path(options.out)
    clear(out)
    start = time.monotonic()
    train = ["--preset", "tiny", "--max_train_steps"]
    run_command("osp_fast.train", [*train, str(options.steps // 2)], out)
    run_command("osp_fast.train", [*train, str(options.steps), "--resume_from_checkpoint", "latest"], out)
    run_command("osp_fast.sample", ["--preset", "tiny", "--text_prompt", *PROMPTS], out)
    samples = out / SAMPLE_PRESETS["tiny"]["save_img_path"]
    sheet = samples / "contact_sheet.png"
    write_contact_sheet(read_samples(samples), sheet)
    print(f"\ndone in {time.monotonic() - start:.0f} s")
    for path in (*read_samples(samples), sheet):
        print(path)


def write_contact_sheet(videos: list[Path], sheet: Path) -> None:
    """Five frames of each video beside each other, its prompt above."""
    from osp_fast.data.decode import read_video
    from osp_fast.data.write import contact_sheet

    contact_sheet(sheet, [read_video(path) for path in videos], list(PROMPTS))


if __name__ == "__main__":
    run_entry_point(main)
