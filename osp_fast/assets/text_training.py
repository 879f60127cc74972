"""The tiny text encoder: a byte-level BPE tokenizer and a T5 encoder of two layers, both trained on captions.

The encoder learns to name every token of a caption, of which some are hidden from it ("denoising", as BERT's masked
tokens; Devlin et al. 2018): its states keep the words apart and tell of their neighbours.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from osp_fast.models.transformers_folder import quiet_transformers
from osp_fast.progress import Progress
from osp_fast.seeding import python_random, stable_seed, torch_generator

VOCABULARY = 512
# Left out by the tokenizer: a small model learns faster from the words that tell clips apart.
WORDS_WITHOUT_MEANING = (
    r"\b(high quality, high aesthetic,|a|the|to|on|in|that|front of|moves|moving|stays|standing|background)(?=[\s,.]|$)"
)
PUNCTUATION = r"[,.;:!?]"
HIDDEN = "<extra_id_0>"  # T5's first sentinel
SPECIAL_TOKENS = ("<pad>", "</s>", "<unk>", HIDDEN)


@dataclass(frozen=True)
class TextRecipe:
    """How long and how the text encoder learns; `hidden` is the share of tokens that it has to guess."""

    steps: int = 600
    batch: int = 64
    learning_rate: float = 2e-3
    hidden: float = 0.15
    seed: int = 0


def train_text_encoder(captions: Sequence[str], width: int, recipe: TextRecipe, folder: Path) -> None:
    """Write the tokenizer and the encoder, whose states are `width` wide, as a transformers folder."""
    from transformers import T5Config, T5EncoderModel

    tokenizer = train_tokenizer(captions)
    config = T5Config(
        vocab_size=VOCABULARY, d_model=width, d_kv=16, d_ff=2 * width, num_layers=2, num_heads=4, dropout_rate=0.0
    )
    with torch.random.fork_rng(devices=[]):  # transformers initialises from the global state
        torch.manual_seed(stable_seed("tiny text encoder", recipe.seed))
        encoder = T5EncoderModel(config)
    tokens = tokenizer(list(captions), padding=True, return_tensors="pt")
    ids, mask = tokens["input_ids"], tokens["attention_mask"]
    hidden = tokenizer.convert_tokens_to_ids(HIDDEN)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=recipe.learning_rate, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, recipe.steps)
    progress = Progress(recipe.steps)
    for step in range(recipe.steps):
        rows = python_random("caption batch", recipe.seed, step).choices(range(len(ids)), k=recipe.batch)
        draws = torch.rand((recipe.batch, ids.shape[1]), generator=torch_generator("hidden", recipe.seed, step))
        loss = naming_loss(encoder, ids[rows], mask[rows], (draws < recipe.hidden) & mask[rows].bool(), hidden)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
        progress.show(step + 1, f"text encoder step {step + 1}/{recipe.steps}", f"loss {loss.item():.3f}")
    progress.close()
    with quiet_transformers():
        tokenizer.save_pretrained(folder)
        encoder.save_pretrained(folder)


def naming_loss(encoder: Any, ids: Tensor, mask: Tensor, hide: Tensor, hidden: int) -> Tensor:
    """Cross entropy of naming the real tokens of ids (B, L) by their states, where `hide` (B, L) replaces some."""
    states = encoder(input_ids=ids.masked_fill(hide, hidden), attention_mask=mask).last_hidden_state
    logits = states @ encoder.shared.weight.T * states.shape[-1] ** -0.5
    return F.cross_entropy(logits[mask.bool()], ids[mask.bool()])


def train_tokenizer(captions: Sequence[str]) -> Any:
    """A byte-level BPE tokenizer of VOCABULARY tokens, which knows the captions' words and spells all others."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Lowercase(),
            normalizers.Replace(Regex(WORDS_WITHOUT_MEANING), " "),
            normalizers.Replace(Regex(PUNCTUATION), " "),
        ]
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
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
