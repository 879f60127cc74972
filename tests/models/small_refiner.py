"""A chat model made for tests: a small random Llama with a word-level tokenizer and a chat template."""

from pathlib import Path

import torch

WORDS = ["<pad>", "<unk>", "<|user|>", "<|system|>", "<|model|>", "<|end|>"]
WORDS += [*"a red circle moves to the left over grass , slowly and camera stays still in soft light".split(), "."]
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|> {{ message.content }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|model|>{% endif %}"
)
# Templates like Gemma's: there is no such role.
TEMPLATE_WITHOUT_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no such role') }}{% endif %}" + TEMPLATE
)


def save_refiner(folder: Path, template: str | None = TEMPLATE, positions: int = 512, **generation: object) -> Path:
    """Write the chat model; it answers with words of its own vocabulary, as random as its weights.

    generation: of generation_config.json, beside its special tokens
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<|end|>",
        additional_special_tokens=["<|user|>", "<|system|>", "<|model|>"],
    )
    wrapped.chat_template = template
    wrapped.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        bos_token_id=None,
        eos_token_id=WORDS.index("<|end|>"),
        initializer_range=0.5,  # far from zero, so that answers are not one word
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = LlamaForCausalLM(config)
    for name, value in generation.items():
        setattr(network.generation_config, name, value)
    network.save_pretrained(folder)
    return folder
