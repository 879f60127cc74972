"""mT5 and T5 encoders from a local transformers folder."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from osp_fast.errors import UserError
from osp_fast.models.quantize import load_torchao, quantize_linear_weights
from osp_fast.models.transformers_folder import (
    load_config,
    load_network,
    load_tokenizer,
    network_on_meta,
    quiet_transformers,
)

ENCODER_CLASSES = {"mt5": "MT5EncoderModel", "t5": "T5EncoderModel", "umt5": "UMT5EncoderModel"}
T5_WIDTH = 512  # of a config.json that leaves it out, as transformers has it
TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "sentencepiece.bpe.model")
# The encoder's embedding may stand in a file under the name that it shares with the decoder's.
EMBEDDING = ("encoder.embed_tokens.weight",)
# google/mt5-xxl
MT5_XXL = dict(
    vocab_size=250112, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"
)


class TextEncoderFacts(NamedTuple):
    """What a folder's config.json says.

    width: of a state; is_multilingual: an mT5, whose captions keep their Chinese
    """

    model_type: str
    width: int
    is_multilingual: bool


class _Vocabulary:
    """The embedding of each token, in CPU memory. No module, so that it stays there whatever is moved.

    Only the rows of a text's tokens are ever read: of mT5-XXL's 1.9 GiB (in bfloat16) at most 4 MiB for a text.
    """

    def __init__(self, rows: Tensor):
        self._rows = rows.cpu()

    def embed(self, tokens: Tensor, device: torch.device) -> Tensor:
        """tokens (B, L), on the CPU -> embeddings (B, L, width) on a device, to which each row goes once."""
        distinct, places = tokens.unique(return_inverse=True)
        return F.embedding(places.to(device), self._rows[distinct].to(device))


class TextEncoder(nn.Module):
    """Captions -> last hidden states of the encoder, padded to `max_length` tokens. Frozen.

    The vocabulary stays in CPU memory, wherever the encoder is moved.
    `width` is the size of a state; `is_multilingual` tells an mT5, whose captions keep their Chinese.
    """

    def __init__(self, tokenizer: Any, encoder: nn.Module, facts: TextEncoderFacts, max_length: int):
        super().__init__()
        self.tokenizer = tokenizer
        self._vocabulary = _Vocabulary(encoder.get_input_embeddings().weight)
        encoder.set_input_embeddings(nn.Identity())
        self.encoder = encoder
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
        *,
        eight_bit: bool = False,
    ) -> "TextEncoder":
        """Load a transformers folder (or a model name that stands in cache_dir); never from the network.

        dtype is float32 or bfloat16: T5's activations overflow float16. eight_bit: the layers' weights as
        `quantize_linear_weights` makes them. Raises `UserError`.
        """
        if eight_bit:
            load_torchao()  # or the error, before the weights are read
        if dtype not in (torch.float32, torch.bfloat16):
            raise UserError(f"the text encoder runs in float32 or bfloat16, not {dtype}: T5 overflows in float16")
        folder = find_folder(name, cache_dir)
        facts = read_facts(folder)
        tokenizer = load_tokenizer(folder, TOKENIZER_FILES)
        encoder = load_network(ENCODER_CLASSES[facts.model_type], folder, dtype, "encoder", found_elsewhere=EMBEDDING)
        if tokenizer.pad_token_id is None:
            raise UserError(f"{folder}: tokenizer_config.json names no pad_token: copy the tokenizer's files again")
        loaded = cls(tokenizer, encoder, facts, max_length)
        if eight_bit:
            quantize_linear_weights(loaded.blocks)
        return loaded.to(device)

    @property
    def blocks(self) -> nn.ModuleList:
        """The encoder's layers, which hold all but a few of its weights: what may be streamed."""
        return encoder_layers(self.encoder)

    @torch.no_grad()
    def forward(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """texts, B of them -> states (B, max_length, width), mask (B, max_length), 1 = real token."""
        tokens = self.tokenizer(
            texts, max_length=self.max_length, padding="max_length", truncation=True, return_tensors="pt"
        )
        device = self.encoder.encoder.final_layer_norm.weight.device  # where layers are, or come to when used
        mask = tokens["attention_mask"].to(device)
        embedded = self._vocabulary.embed(tokens["input_ids"], device)
        states = self.encoder(inputs_embeds=embedded, attention_mask=mask).last_hidden_state
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


def text_encoder_on_meta(folder: Path | None, dtype: torch.dtype) -> nn.Module:
    """The encoder of a folder's config.json without weights: shapes and types only; without a folder that of mT5-XXL.

    It has what a `TextEncoder` has on its device: all but the vocabulary, so it is called with
    `inputs_embeds` (B, L, width) and `attention_mask` (B, L). Its layers are `encoder_layers(network)`.
    Raises `UserError`.
    """
    if folder is None:
        with quiet_transformers():
            from transformers import MT5Config
        config, model_type = MT5Config(**MT5_XXL), "mt5"
    else:
        config, model_type = load_config(folder), read_facts(folder).model_type
    network = network_on_meta(ENCODER_CLASSES[model_type], config, dtype)
    network.set_input_embeddings(nn.Identity())
    return network


def encoder_layers(network: nn.Module) -> nn.ModuleList:
    """The layers of a T5, mT5 or UMT5 encoder of transformers."""
    return network.encoder.block
