"""What `--preset tiny` needs: data set, VAE and text encoder, made once into a folder, the same on every run.

    python -m osp_fast.assets.build [--out tiny]

`data/` is generated video, `vae/` the wavelet codec fitted to it, `text_encoder/` a random, frozen T5 whose tokenizer
is trained on the captions: it tells words apart, which is all that the small transformer needs.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from osp_fast.assets.codec import wavelet_codec
from osp_fast.assets.shapes import generate_shapes
from osp_fast.config import TINY_FOLDER
from osp_fast.data.annotations import Entry, read_entries
from osp_fast.data.decode import read_video
from osp_fast.errors import UserError, run_entry_point
from osp_fast.models.dit import DIT_CONFIGS
from osp_fast.seeding import stable_seed

VOCABULARY = 512
CODEC_CLIPS = 64
CODEC_FRAMES = 17
WORD_SHARE = 0.1  # small: a state is mostly its own word's, with a tenth of its neighbours' mixed in
# Left out by the tokenizer: a model that trains for minutes learns faster from the words that tell clips apart.
WORDS_WITHOUT_MEANING = r"\b(high quality, high aesthetic,|a|the|to|on|moves|stays|background)(?=\s|$)"
SPECIAL_TOKENS = ("<pad>", "</s>", "<unk>")


def ensure_tiny(folder: str | Path = TINY_FOLDER) -> None:
    """Make what is missing of data/, vae/ and text_encoder/ in folder. A part is complete or absent."""
    folder = Path(folder)
    data = folder / "data"
    generate_shapes(data)
    _complete_or_absent(folder / "vae", lambda out: wavelet_codec(_videos(data)).save_pretrained(out))
    _complete_or_absent(folder / "text_encoder", lambda out: save_text_encoder(out, _captions(data)))


def _complete_or_absent(target: Path, make: Callable[[Path], None]) -> None:
    if target.exists():
        return
    print(f"making {target}", file=sys.stderr, flush=True)
    unfinished = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        make(unfinished)
        if not target.exists():  # another process may have been faster
            os.rename(unfinished, target)
    except OSError as error:
        raise UserError(f"{target} cannot be written ({error.strerror}): use a folder that can") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _entries(data: Path) -> list[Entry]:
    return [entry for entry in read_entries(str(data / "data.txt")) if isinstance(entry, Entry)]


def _captions(data: Path) -> list[str]:
    return [caption for entry in _entries(data) for caption in entry.captions]


def _videos(data: Path) -> Iterable[Tensor]:
    """Some clips as (3, T, H, W) in [-1, 1]."""
    for entry in [entry for entry in _entries(data) if not entry.is_image][:CODEC_CLIPS]:
        frames = torch.from_numpy(read_video(entry.file)[:CODEC_FRAMES])
        yield frames.permute(3, 0, 1, 2) / 127.5 - 1


def save_text_encoder(folder: Path, captions: list[str]) -> None:
    """A random T5 encoder and a byte-level BPE tokenizer trained on captions, as a transformers folder."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex(WORDS_WITHOUT_MEANING), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=True)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", SPECIAL_TOKENS.index("</s>"))]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    wrapped.save_pretrained(folder)
    width = DIT_CONFIGS["tiny"].caption_channels
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=width,
        d_kv=16,
        d_ff=2 * width,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        initializer_factor=WORD_SHARE,
    )
    with torch.random.fork_rng(devices=[]):  # transformers initialises from the global state
        torch.manual_seed(stable_seed("tiny text encoder"))
        T5EncoderModel(config).save_pretrained(folder)


def main(argv: list[str] | None = None) -> None:
    """Command line of the builder."""
    parser = argparse.ArgumentParser(prog="osp_fast.assets.build", description="Make what --preset tiny needs.")
    parser.add_argument("--out", default=TINY_FOLDER, help=f"folder (default: {TINY_FOLDER})")
    ensure_tiny(parser.parse_args(argv).out)


if __name__ == "__main__":
    run_entry_point(main)
