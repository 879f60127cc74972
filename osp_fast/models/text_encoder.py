"""mT5 and T5 encoders from a local transformers folder."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from osp_fast.errors import UserError

ENCODER_CLASSES = {"mt5": "MT5EncoderModel", "t5": "T5EncoderModel", "umt5": "UMT5EncoderModel"}
T5_WIDTH = 512  # of a config.json that leaves it out, as transformers has it
TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "sentencepiece.bpe.model")


class TextEncoderFacts(NamedTuple):
    """What a folder's config.json says.

    width: of a state; is_multilingual: an mT5, whose captions keep their Chinese
    """

    model_type: str
    width: int
    is_multilingual: bool


class TextEncoder(nn.Module):
    """Captions -> last hidden states of the encoder, padded to `max_length` tokens. Frozen.

    `width` is the size of a state; `is_multilingual` tells an mT5, whose captions keep their Chinese.
    """

    def __init__(self, tokenizer: Any, encoder: nn.Module, facts: TextEncoderFacts, max_length: int):
        super().__init__()
        self.tokenizer = tokenizer
        self.encoder = encoder.eval().requires_grad_(False)
        self.max_length = max_length
        self.width = facts.width
        self.is_multilingual = facts.is_multilingual

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        max_length: int = 512,
        cache_dir: str | Path | None = None,
    ) -> "TextEncoder":
        """Load a transformers folder (or a model name that stands in cache_dir); never from the network.

        dtype is float32 or bfloat16: T5's activations overflow float16. Raises `UserError`.
        """
        if dtype not in (torch.float32, torch.bfloat16):
            raise UserError(f"the text encoder runs in float32 or bfloat16, not {dtype}: T5 overflows in float16")
        folder = find_folder(name, cache_dir)
        facts = read_facts(folder)
        # Without its files transformers would build an empty tokenizer, which turns every word into <unk>.
        if not any((folder / file).is_file() for file in TOKENIZER_FILES):
            raise UserError(f"{folder}: the tokenizer is missing ({' or '.join(TOKENIZER_FILES)}): copy it there")
        import transformers

        encoder_class = getattr(transformers, ENCODER_CLASSES[facts.model_type])
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # as below: no common base, each means a broken or missing file
            raise UserError(
                f"{folder}: the tokenizer cannot be loaded ({_first_line(error)}): copy its files"
            ) from None
        try:
            with _quiet_loading():
                encoder, info = encoder_class.from_pretrained(
                    folder, dtype=dtype, local_files_only=True, output_loading_info=True
                )
        except Exception as error:  # the loader's errors have no common base; each means a broken or missing file
            raise UserError(
                f"{folder}: the weights cannot be loaded ({_first_line(error)}): copy them again"
            ) from error
        if tokenizer.pad_token_id is None:
            raise UserError(f"{folder}: tokenizer_config.json names no pad_token: copy the tokenizer's files again")
        # The encoder's embedding may stand in the file under the name that it shares with the decoder's.
        missing = sorted(set(info["missing_keys"]) - {"encoder.embed_tokens.weight"})
        if missing or info["mismatched_keys"]:
            name = missing[0] if missing else next(iter(info["mismatched_keys"]))
            raise UserError(f"{folder}: the weights do not fit the encoder ({name}): copy the folder again")
        return cls(tokenizer, encoder.to(device), facts, max_length)

    @torch.no_grad()
    def forward(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """texts, B of them -> states (B, max_length, width), mask (B, max_length), 1 = real token."""
        tokens = self.tokenizer(
            texts, max_length=self.max_length, padding="max_length", truncation=True, return_tensors="pt"
        )
        device = self.encoder.get_input_embeddings().weight.device
        mask = tokens["attention_mask"].to(device)
        states = self.encoder(input_ids=tokens["input_ids"].to(device), attention_mask=mask).last_hidden_state
        return states, mask


def find_folder(name: str | Path, cache_dir: str | Path | None = None) -> Path:
    """The folder of a model: a path, a path inside cache_dir, or a model name in the hub cache there.

    Raises `UserError` if there is none; nothing is downloaded.
    """
    places = [Path(name)]
    if cache_dir is not None:
        places.append(Path(cache_dir) / name)
        snapshots = Path(cache_dir) / f"models--{str(name).replace('/', '--')}" / "snapshots"
        places += sorted(snapshots.glob("*"), key=lambda path: path.stat().st_mtime, reverse=True)
    for place in places:
        with suppress(OSError):  # such as a name that is too long for a file
            if (place / "config.json").is_file():
                return place
    looked = " or ".join(str(place) for place in places)
    raise UserError(f"no model folder (config.json) at {looked}: download the model by hand and name its folder")


def read_facts(folder: Path) -> TextEncoderFacts:
    """What config.json of a transformers folder says. Raises `UserError`."""
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        model_type, width = values["model_type"], int(values.get("d_model", T5_WIDTH))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: model_type or d_model cannot be read ({error!r}): copy the folder again") from None
    if model_type not in ENCODER_CLASSES:
        raise UserError(f"{path}: model_type {model_type!r} is not a T5 or mT5 encoder")
    return TextEncoderFacts(model_type, width, model_type in ("mt5", "umt5"))


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """Keep transformers' bars, and its report on the decoder's weights that an encoder leaves out, from the log."""
    from transformers.utils import logging

    enabled, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if enabled:
            logging.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    return (str(error) or repr(error)).strip().splitlines()[0]
