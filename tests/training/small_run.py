"""A training run of a few thousand weights on a few small clips: what it needs, and the entry point to run it.

    python tests/training/small_run.py <training flags>

is `python -m osp_fast.train` with `--model tiny` made smaller still.
"""

import json
from pathlib import Path

import numpy as np

from osp_fast.data.write import write_image, write_video
from osp_fast.models import dit
from osp_fast.models.dit import DiTConfig
from osp_fast.seeding import python_random, stable_seed

GOLDEN_VAE = Path(__file__).parents[1] / "golden" / "vae"
SMALL = DiTConfig(
    num_layers=4, num_attention_heads=2, attention_head_dim=12, caption_channels=16, cross_attention_dim=24
)
COLOURS = dict(red=(255, 0, 0), green=(0, 255, 0), blue=(0, 0, 255), grey=(128, 128, 128))


def write_data(folder: Path, images: int, videos: int, frames: int = 9) -> Path:
    """A data set of squares on grey, 32 x 32 pixels (each third one 32 x 48). Returns its data.txt."""
    folder.mkdir()
    entries = []
    for number in range(images + videos):
        colour = list(COLOURS)[number % 3]
        width = 48 if number % 3 == 2 else 32
        length = 1 if number < images else frames
        pixels = np.full((length, 32, width, 3), COLOURS["grey"], dtype=np.uint8)
        row, column = (python_random("place", number, axis).randrange(16) for axis in "xy")
        for frame in range(length):
            start = min(column + frame, width - 16)
            pixels[frame, row : row + 16, start : start + 16] = COLOURS[colour]
        name = f"{number}.{'png' if length == 1 else 'mp4'}"
        if length == 1:
            write_image(folder / name, pixels[0])
        else:
            write_video(folder / name, pixels, fps=24)
        entry = dict(path=name, cap=[f"a {colour} square"], resolution=dict(height=32, width=width))
        entries.append(entry if length == 1 else dict(entry, num_frames=length, fps=24))
    (folder / "clips.json").write_text(json.dumps(entries))
    (folder / "data.txt").write_text(f"{folder},{folder / 'clips.json'}\n")
    return folder / "data.txt"


def write_text_encoder(folder: Path) -> Path:
    """A random T5 encoder with a word-level tokenizer, as a transformers folder."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    words = ["<pad>", "</s>", "<unk>", "a", "square", *COLOURS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    wrapped.save_pretrained(folder)
    config = T5Config(vocab_size=len(words), d_model=SMALL.caption_channels, d_kv=4, d_ff=32, num_layers=1, num_heads=4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stable_seed("text encoder"))
        T5EncoderModel(config).save_pretrained(folder)
    return folder


def flags(data: Path, text_encoder: Path, output: Path, **changed: object) -> list[str]:
    """The command line of a small run; True stands for a flag without value, None and False leave one out."""
    values = dict(
        data=data,
        text_encoder_name_1=text_encoder,
        ae_path=GOLDEN_VAE,
        output_dir=output,
        model="tiny",
        ae="tiny",
        model_max_length=8,
        num_frames=9,
        drop_short_ratio=0.0,
        max_hxw=32 * 48,
        hw_stride=16,
        min_hxw=16 * 16,
        train_batch_size=2,
        max_train_steps=4,
        checkpointing_steps=1000,
        learning_rate=0.01,
        prediction_type="v_prediction",
        report_to="none",
        dataloader_num_workers=1,
        group_data=True,
        use_ema=True,
        device="cpu",
    )
    values.update(changed)
    words = []
    for name, value in values.items():
        if value is not None and value is not False:
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words


def use_small_model() -> None:
    """Let `--model tiny` mean `SMALL` in this process."""
    dit.DIT_CONFIGS["tiny"] = SMALL


if __name__ == "__main__":
    from osp_fast.errors import run_entry_point
    from osp_fast.train import main

    use_small_model()
    run_entry_point(main)
