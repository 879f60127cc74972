"""Make the embedded model from nothing: data, text encoder, VAE, latents, DiT, and the folder that holds the result.

    python -m osp_fast.assets.build [--work tiny_build] [--out osp_fast/assets/tiny]

A part that is finished is kept, and VAE and DiT go on from their newest state, so the same command goes on where it was
interrupted. Encoding and the DiT's training are the commands that a user would type.
"""

import dataclasses
import json
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from osp_fast.assets.shapes import FPS, HELD_OUT, TRAINED, Scene, captions, generate_shapes
from osp_fast.assets.text_training import TextRecipe, train_text_encoder
from osp_fast.assets.vae_training import VAERecipe, reconstruction_quality, train_vae
from osp_fast.cli import SentenceParser
from osp_fast.config import EMBEDDED_MODEL, TRAIN_PRESETS
from osp_fast.data.annotations import Entry, read_entries
from osp_fast.data.decode import read_video
from osp_fast.data.write import write_video
from osp_fast.errors import UserError, run_entry_point
from osp_fast.files import whole
from osp_fast.models.dit import DIT_CONFIGS, DiT
from osp_fast.models.weights import PretrainedModel, read_recipe
from osp_fast.models.wfvae import WFVAE, WFVAE_CONFIGS
from osp_fast.progress import duration, say

DRAWN_FRAMES, SIZE = 33, 64
LARGEST = 12_000_000  # bytes of the whole model, which lies in the repository
CARD = "card.json"
# How the DiT is trained, beside what --preset tiny says.
DIT_FLAGS = (
    "--cache_variants 4 --train_batch_size 16 --learning_rate 2e-3 --lr_scheduler cosine --lr_warmup_steps 200"
    " --cfg 0.2 --use_ema --ema_decay 0.999 --checkpointing_steps 500 --checkpoints_total_limit 2"
    " --report_to none"
)


@dataclass(frozen=True)
class Sizes:
    """How much is made: clips and images of the data set, and the steps of the three networks."""

    clips: int = 2400
    images: int = 480
    text_steps: int = TextRecipe.steps
    vae_steps: int = VAERecipe.steps
    dit_steps: int = 16000


def build(out: Path, work: Path, sizes: Sizes) -> None:
    """Make the model in `out`, with all that is in between in `work`. Raises `UserError`."""
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--work {work} cannot be written ({error.strerror}): name another folder") from error
    clocks = Clocks(work / "seconds.json")
    with clocks.timed("data"):
        generate_shapes(work / "data", sizes.clips, sizes.images, size=SIZE, frames=DRAWN_FRAMES)
    with clocks.timed("text encoder"):
        texts = sorted({text for kind in TRAINED for moving in (True, False) for text in captions(kind, moving)})
        width = DIT_CONFIGS["tiny"].caption_channels
        recipe = TextRecipe(steps=sizes.text_steps)
        _complete_or_absent(work / "text_encoder", partial(train_text_encoder, texts, width, recipe))
    with clocks.timed("vae"):
        _complete_or_absent(work / "vae", partial(_make_vae, work, VAERecipe(steps=sizes.vae_steps)))
    shared = ["--preset", "tiny", "--data", "data/data.txt", "--text_encoder_name_1", "text_encoder"]
    shared += ["--ae_path", "vae", "--latent_cache", "latents", *shlex.split(DIT_FLAGS)]
    with clocks.timed("latents"):
        _type("osp_fast.encode", shared, work)
    with clocks.timed("dit"):
        steps = ["--max_train_steps", str(sizes.dit_steps), "--output_dir", "dit", "--resume_from_checkpoint", "latest"]
        _type("osp_fast.train", [*shared, *steps], work)
    _pack(out, work, sizes, clocks.seconds)


class Clocks:
    """Seconds that each part took, all runs together, in a file."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.seconds: dict[str, float] = json.loads(file.read_text()) if file.exists() else {}

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Count what happens within, also if it is interrupted."""
        say(f"{part}:")
        begin = time.monotonic()
        try:
            yield
        finally:
            self.seconds[part] = round(self.seconds.get(part, 0.0) + time.monotonic() - begin, 1)
            with whole(self._file) as unfinished:
                unfinished.write_text(json.dumps(self.seconds))


def _type(module: str, arguments: Sequence[str], folder: Path) -> None:
    """`python -m module arguments` in folder. Raises `UserError` if it fails."""
    say(f"$ python -m {module} {shlex.join(arguments)}")
    done = subprocess.run([sys.executable, "-m", module, *arguments], cwd=folder)
    if done.returncode:
        raise UserError(f"python -m {module} ended with code {done.returncode}: its message stands above")


def _make_vae(work: Path, recipe: VAERecipe, out: Path) -> None:
    """Train the VAE on the clips and write it to `out`."""
    entries = read_entries(str(work / "data/data.txt"))
    clips = [read_video(entry.file) for entry in entries if isinstance(entry, Entry) and not entry.is_image]
    train_vae(clips, WFVAE_CONFIGS["tiny"], recipe, work).save_pretrained(out)


def _complete_or_absent(target: Path, make: Callable[[Path], None]) -> None:
    if target.exists():
        say(f"{target} is there")
        return
    unfinished = target.with_name(f".{target.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        make(unfinished)
        unfinished.rename(target)
    except OSError as error:
        raise UserError(f"{target} cannot be written ({error.strerror}): make room or name another --work") from error


def _pack(out: Path, work: Path, sizes: Sizes, seconds: dict[str, float]) -> None:
    """Write the three models to `out`, DiT and VAE in float16, with what is known of them. Raises `UserError`."""
    average = work / "dit" / f"checkpoint-{sizes.dit_steps}" / "model_ema"
    made = work / "tiny"
    shutil.rmtree(made, ignore_errors=True)
    _collect(work, average, made)
    vae = WFVAE.from_pretrained(made / "vae").requires_grad_(False)
    with TemporaryDirectory() as folder:
        quality = reconstruction_quality(vae, held_out_clips(Path(folder)))
    files = {part.name: _bytes(part) for part in sorted(made.iterdir()) if part.is_dir()}
    if sum(files.values()) > LARGEST:
        raise UserError(f"{made} has {sum(files.values())} bytes, more than {LARGEST}: make a smaller model")
    card = {
        "sizes": dataclasses.asdict(sizes),
        "bytes": files,
        "vae_psnr": round(quality.psnr, 2),
        "vae_ssim": round(quality.ssim, 4),
        "seconds": seconds,
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }
    (made / CARD).write_text(json.dumps(card, indent=2) + "\n")
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(made, out)
    say(f"{out}: {sum(files.values()) / 1e6:.1f} MB, VAE {quality.psnr:.1f} dB, {duration(sum(seconds.values()))}")


def _collect(work: Path, average: Path, out: Path) -> None:
    """The folder as `EMBEDDED_MODEL` is, of the parts and of the DiT's averaged weights."""
    shutil.copytree(work / "text_encoder", out / "text_encoder")
    for name, model in (("vae", WFVAE.from_pretrained(work / "vae")), ("dit", DiT.from_pretrained(average))):
        model.save_pretrained(out / name, read_recipe(average) if name == "dit" else None, _halves(model))


def _halves(model: PretrainedModel) -> dict[str, torch.Tensor]:
    return {name: tensor.half() for name, tensor in model.state_dict().items()}


def held_out_clips(folder: Path) -> list[np.ndarray]:
    """One clip of each kind that is held out, uint8 (17, H, W, 3), as training would see it; files go to `folder`."""
    clips = []
    for number in range(len(HELD_OUT)):
        file = folder / f"{number:02d}.mp4"
        write_video(file, Scene.draw(number, seed=1, kinds=HELD_OUT).frames(DRAWN_FRAMES, SIZE), FPS)
        clips.append(read_video(file)[:: round(FPS / TRAIN_PRESETS["tiny"]["train_fps"])])
    return clips


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def main(argv: list[str] | None = None) -> None:
    """Command line of the builder."""
    parser = SentenceParser(prog="osp_fast.assets.build", description="Make the embedded model from nothing.")
    parser.add_argument("--out", type=Path, default=EMBEDDED_MODEL, help="folder of the model (default: the package's)")
    parser.add_argument("--work", type=Path, default=Path("tiny_build"), help="folder of all that is in between")
    for field in dataclasses.fields(Sizes):
        parser.add_argument(f"--{field.name}", type=int, default=field.default, help=f"default: {field.default}")
    options = vars(parser.parse_args(argv))
    out, work = options.pop("out"), options.pop("work")
    for name, number in options.items():
        if number < 1:
            raise UserError(f"--{name} {number} is too few: give at least 1")
    build(out, work, Sizes(**options))


if __name__ == "__main__":
    run_entry_point(main)
