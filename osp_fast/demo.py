"""`make demo`: sample five prompts from the embedded model, train it further on generated mp4 files, sample again.

Each stage is the command that a user would type; this file only types them, in a folder of its own.
"""

import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from osp_fast.cli import SentenceParser
from osp_fast.config import EMBEDDED_MODEL, TINY_FOLDER, TRAIN_PRESETS
from osp_fast.errors import UserError, run_entry_point

# One of each motion; the model was trained on none of these combinations.
PROMPTS = (
    "a red circle moves to the right on a dark blue background",
    "a yellow ring moves to the left on a grey background",
    "a white ring moves up on a dark blue background",
    "a blue bar moves down on a grey background",
    "a green bar stays still on a dark blue background",
)
STEPS = 40
LEARNING_RATE = 1e-4  # of a model that knows its subject already


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
        for part in (TINY_FOLDER, "before", "after"):
            shutil.rmtree(out / part, ignore_errors=True)
        out.mkdir(parents=True, exist_ok=True)
        mark.touch()
    except OSError as error:
        raise UserError(f"--out {out} cannot be used ({error}): name another folder") from None


def read_samples(folder: Path) -> list[Path]:
    """The sampled videos in order of their index, without the grid."""
    return sorted(path for path in folder.glob("*.mp4") if "grid" not in path.name)


def main(argv: list[str] | None = None) -> None:
    """Run the demo. `--out` is the folder (default demo); an earlier run's results in it are replaced."""
    parser = SentenceParser(prog="osp_fast.demo", description="Sample from the embedded model, train it, sample again.")
    parser.add_argument("--out", default="demo", help="folder of everything that the demo writes (default: demo)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"optimizer steps (default: {STEPS})")
    options = parser.parse_args(argv)
    if options.steps < 2:
        raise UserError(f"--steps {options.steps} is too few: the demo trains, then resumes, so give at least 2")
    out = Path(options.out)
    clear(out)
    start = time.monotonic()
    sample = ["--preset", "tiny", "--text_prompt", *PROMPTS, "--save_img_path"]
    run_command("osp_fast.sample", [*sample, "before"], out)
    made = written(out / "before", start)
    train = ["--preset", "tiny", "--pretrained", str(EMBEDDED_MODEL / "dit"), "--learning_rate", str(LEARNING_RATE)]
    run_command("osp_fast.train", [*train, "--max_train_steps", str(options.steps // 2)], out)
    train += ["--resume_from_checkpoint", "latest"]
    run_command("osp_fast.train", [*train, "--max_train_steps", str(options.steps)], out)
    run_command("osp_fast.sample", [*sample, "after", "--model_path", TRAIN_PRESETS["tiny"]["output_dir"]], out)
    made += written(out / "after", start)
    print()
    for path in made:
        print(path)


def written(samples: Path, start: float) -> list[Path]:
    """The videos in a folder, and a contact sheet of them, which it writes; says how long it took since `start`."""
    videos, sheet = read_samples(samples), samples / "contact_sheet.png"
    write_contact_sheet(videos, sheet)
    print(f"\n{len(videos)} videos after {time.monotonic() - start:.0f} s: {sheet}", flush=True)
    return [*videos, sheet]


def write_contact_sheet(videos: list[Path], sheet: Path) -> None:
    """Five frames of each video beside each other, its prompt above."""
    from osp_fast.data.decode import read_video
    from osp_fast.data.write import contact_sheet

    contact_sheet(sheet, [read_video(path) for path in videos], list(PROMPTS))


if __name__ == "__main__":
    run_entry_point(main)
