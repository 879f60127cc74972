"""`--text_prompt`: prompts as given, or the lines of a file, and in the form of the training captions."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from osp_fast.errors import UserError


def read_prompts(arguments: Sequence[str]) -> list[str]:
    """The prompts of `--text_prompt`: its values, or the lines of the one .txt file that it names, without blank ones.

    Raises `UserError` for a file that is missing, empty or not UTF-8 text, and for an empty prompt.
    """
    files = [argument for argument in arguments if argument.lower().endswith(".txt") and _names_a_file(argument)]
    if not files:
        prompts = [argument.strip() for argument in arguments]
        if not all(prompts):
            raise UserError(f"--text_prompt: prompt number {prompts.index('') + 1} is empty, write one or leave it out")
        return prompts
    if len(arguments) > 1:
        raise UserError(f"--text_prompt takes prompts or one .txt file: give {files[0]} alone")
    path = Path(files[0])
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(
            f"--text_prompt {path} is not text in UTF-8: save it as plain text, a prompt per line"
        ) from None
    except OSError as error:
        raise UserError(
            f"--text_prompt {path} cannot be read ({error.strerror}): name a .txt file of prompts"
        ) from None
    if "\0" in text:
        raise UserError(f"--text_prompt {path} is a binary file: save it as plain text, a prompt per line")
    prompts = [line.strip() for line in re.split(r"\r?\n|\r", text) if line.strip()]
    if not prompts:
        raise UserError(f"--text_prompt {path} holds no prompt: write one per line")
    return prompts


def _names_a_file(argument: str) -> bool:
    """Whether an argument that ends in .txt is meant as a file: it is one, or has no words."""
    return Path(argument).is_file() or not any(character.isspace() for character in argument)


def clean_prompts(prompts: Sequence[str], clean: Callable[[str], str]) -> list[str]:
    """Prompts in the form of the training captions. Raises `UserError` where nothing is left."""
    cleaned = [clean(prompt) for prompt in prompts]
    for prompt, text in zip(prompts, cleaned, strict=True):
        if not text:
            raise UserError(f"--text_prompt {prompt!r} is empty after cleaning: write it in words that captions have")
    return cleaned
