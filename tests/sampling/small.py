"""A small random model in real folders, and command lines that sample it."""

import shutil
from pathlib import Path

import torch
from torch import nn

from osp_fast import sample
from osp_fast.models.dit import DiT, DiTConfig

VAE_FOLDER = Path(__file__).parents[1] / "golden/vae"
CONFIG = DiTConfig(
    num_layers=2, num_attention_heads=2, attention_head_dim=24, caption_channels=16, cross_attention_dim=48
)
WORDS = ["<pad>", "</s>", "<unk>", "high", "quality", "aesthetic", "low", "a", "red", "circle", "moves", "left"]


def small_dit(config: DiTConfig = CONFIG) -> DiT:
    """A fresh DiT ends in zeros: they are filled, so that its output depends on text and latents."""
    dit = DiT.create(config, seed=0)
    with torch.no_grad():
        for parameter in dit.parameters():
            if not parameter.any() and parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter, generator=torch.Generator().manual_seed(1))
    return dit


def save_text_encoder(folder: Path) -> None:
    """A T5 of one layer."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    config = T5Config(vocab_size=len(WORDS), d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        T5EncoderModel(config).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def small_flags(models: Path, output: Path) -> dict:
    """Flags that sample the models of a folder, `dit` and `text`, in a second."""
    return dict(
        model_path=models / "dit",
        text_encoder_name_1=models / "text",
        ae="tiny",
        ae_path=VAE_FOLDER,
        text_prompt=["A red circle"],
        num_frames=5,
        height=16,
        width=32,
        num_sampling_steps=2,
        guidance_scale=3,
        max_sequence_length=16,
        sample_method="DDIM",
        save_img_path=output,
        device="cpu",
    )


def command_line(flags: dict, **changes: object) -> list[str]:
    """The words of a command; True stands for a switch, None for a flag that is left out."""
    line = []
    for name, value in {**flags, **changes}.items():
        if value is True:
            line.append(f"--{name}")
        elif value is not None:
            line += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return line


def run(flags, **changes):
    """Sample into a fresh folder; returns it."""
    folder = Path(changes.get("save_img_path", flags["save_img_path"]))
    shutil.rmtree(folder, ignore_errors=True)
    sample.main(command_line(flags, **changes))
    return folder
