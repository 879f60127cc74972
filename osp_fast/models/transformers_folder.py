"""Local transformers folders: loaded without a word on the screen, and in one sentence what is wrong with them."""

import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from osp_fast.errors import UserError

TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model", "vocab.json")


def load_tokenizer(folder: Path, files: Collection[str] = TOKENIZER_FILES) -> Any:
    """The tokenizer of a folder, which has one of `files`. Raises `UserError`."""
    # Without its files transformers would build an empty tokenizer, which turns every word into <unk>.
    if not any((folder / file).is_file() for file in files):
        raise UserError(f"{folder}: the tokenizer is missing ({' or '.join(files)}): copy it there")
    try:
        with quiet_transformers():
            from transformers import AutoTokenizer

            return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # as below: no common base, each means a broken or missing file
        raise UserError(f"{folder}: the tokenizer cannot be loaded ({first_line(error)}): copy its files") from None


def load_config(folder: Path) -> Any:
    """config.json of a folder, as transformers' class for it. Raises `UserError`."""
    try:
        with quiet_transformers():
            from transformers import AutoConfig

            return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # likewise
        raise UserError(
            f"{folder / 'config.json'} cannot be read ({first_line(error)}): copy the folder again, or name another"
        ) from None


def load_network(
    network_class: str, folder: Path, dtype: torch.dtype, kind: str, found_elsewhere: Collection[str] = ()
) -> nn.Module:
    """The network of a folder, on the CPU, all of its weights from the folder. Raises `UserError`.

    network_class: its name in transformers; kind: what a user calls it
    found_elsewhere: weights that may be missing, as others are the same
    """
    try:
        with quiet_transformers():
            import transformers

            network, info = getattr(transformers, network_class).from_pretrained(
                folder, dtype=dtype, local_files_only=True, trust_remote_code=False, output_loading_info=True
            )
    except Exception as error:  # the loader's errors have no common base; each means a broken or missing file
        raise UserError(f"{folder}: the weights cannot be loaded ({first_line(error)}): copy them again") from error
    missing = sorted(set(info["missing_keys"]) - set(found_elsewhere))
    if missing or info["mismatched_keys"]:
        name = missing[0] if missing else next(iter(info["mismatched_keys"]))
        raise UserError(f"{folder}: the weights do not fit the {kind} ({name}): copy the folder again")
    return network.eval().requires_grad_(False)


def network_on_meta(network_class: str, config: Any, dtype: torch.dtype) -> nn.Module:
    """A network without weights: shapes and types only. network_class: as above, of one that is made from `config`."""
    with quiet_transformers(), torch.device("meta"):
        import transformers

        made = getattr(transformers, network_class)
        network = made.from_config(config) if network_class.startswith("Auto") else made(config)
    return network.to(dtype).eval().requires_grad_(False)


@contextmanager
def quiet_logging() -> Iterator[None]:
    """Keep warnings from the log.

    transformers imports torchao where it is installed, which reports on those of its kernels that are for other
    machines; users can do nothing about that.
    """
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        yield
    finally:
        logging.disable(before)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep from the log what users can do nothing about: bars, and reports on weights that a network has no use for."""
    with quiet_logging():
        from transformers.utils import logging as its_logging

        enabled, verbosity = its_logging.is_progress_bar_enabled(), its_logging.get_verbosity()
        its_logging.disable_progress_bar()
        its_logging.set_verbosity_error()
        try:
            yield
        finally:
            its_logging.set_verbosity(verbosity)
            if enabled:
                its_logging.enable_progress_bar()


def first_line(error: BaseException) -> str:
    """What an error of a library says, as far as it goes into a sentence."""
    return (str(error) or repr(error)).strip().splitlines()[0]
