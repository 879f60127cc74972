"""Prompts rewritten by a chat model from a local transformers folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from osp_fast.errors import UserError
from osp_fast.models.chat import Chat
from osp_fast.models.quantize import load_torchao, quantize_linear_weights
from osp_fast.models.text_encoder import find_folder
from osp_fast.models.transformers_folder import (
    load_config,
    load_network,
    load_tokenizer,
    network_on_meta,
    quiet_transformers,
)
from osp_fast.models.weights import read_json
from osp_fast.seeding import torch_generator

INSTRUCTION = (
    "You rewrite prompts for a model that makes videos from text. Turn the user's prompt into one paragraph of plain"
    " prose that describes the video: its subject and how it looks, what it does, the scene around it, the light and"
    " the camera. Keep every fact of the prompt and contradict none of them. Answer in the language of the prompt, with"
    " this paragraph alone: no introduction, no list, no quotation marks."
)


class PromptRefiner(nn.Module):
    """Rewrites prompts, one at a time, so that a prompt's words depend on no other. Frozen.

    network: the chat model, a causal language model of transformers
    """

    def __init__(self, chat: Chat, network: nn.Module, max_new_tokens: int, temperature: float):
        super().__init__()
        from transformers import GenerationConfig

        self.network = network
        self._chat, self._max_new_tokens, self._temperature = chat, max_new_tokens, temperature
        given = network.generation_config
        self._ends = {*_listed(given.eos_token_id), *_listed(chat.tokenizer.eos_token_id)}
        paddings = (chat.tokenizer.pad_token_id, given.pad_token_id, *sorted(self._ends), 0)
        # Of what the folder says of generation its special tokens count; its sampling, penalties and lengths do not.
        network.generation_config = GenerationConfig(
            do_sample=False,
            use_cache=True,  # which some folders turn off for training
            max_new_tokens=max_new_tokens,
            bos_token_id=given.bos_token_id,
            eos_token_id=sorted(self._ends) or None,
            pad_token_id=next(token for token in paddings if token is not None),
        )

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        eight_bit: bool = False,
        cache_dir: str | Path | None = None,
    ) -> "PromptRefiner":
        """Load a transformers folder (or a model name that stands in cache_dir); never from the network.

        Args:
            max_new_tokens: of an answer; where there would be more, it ends with its last whole sentence
            temperature: of the choice of words; 0 takes the likeliest
            eight_bit: the layers' weights as `quantize_linear_weights` makes them; the output layer keeps its type

        Raises `UserError`.
        """
        if eight_bit:
            load_torchao()  # or the error, before the weights are read
        with _naming_the_flag():
            folder = find_folder(folder, cache_dir)
            chat = _read_chat(folder)
            network = load_network("AutoModelForCausalLM", folder, dtype, "chat model")
            refiner = cls(chat, network, max_new_tokens, temperature)
            if eight_bit:
                quantize_linear_weights(refiner.blocks)
        return refiner.to(device)

    @property
    def blocks(self) -> nn.ModuleList:
        """The model's layers, which hold most of its weights: what may be streamed. Raises `UserError`."""
        return decoder_layers(self.network)

    @torch.no_grad()
    def refine(self, prompt: str, seed: int) -> str:
        """The prompt as one paragraph in the model's words, or "" if it has none.

        What is drawn, with a temperature, depends on `seed` alone. Raises `UserError` if the prompt is too long.
        """
        question = self._chat.question(prompt)
        self._check_length(len(question.tokens))
        from transformers import LogitsProcessorList

        chosen = LogitsProcessorList([_Draws(self._temperature, seed)] if self._temperature > 0 else [])
        tokens = torch.tensor([question.tokens], device=self.network.get_input_embeddings().weight.device)
        output = self.network.generate(
            tokens,
            generation_config=self.network.generation_config,
            logits_processor=chosen,
            attention_mask=torch.ones_like(tokens),
        )
        answer = output[0, tokens.shape[1] :].tolist()
        cut_off = len(answer) == self._max_new_tokens and answer[-1] not in self._ends
        return self._chat.answer(answer, question, cut_off)

    def _check_length(self, length: int) -> None:
        most = getattr(self.network.config.get_text_config(), "max_position_embeddings", None)
        if most is not None and length + self._max_new_tokens > most:
            raise UserError(
                f"--caption_refiner: a prompt takes {length} tokens with the instruction, and its answer up to"
                f" {self._max_new_tokens}, but the model was made for {most}: lower --refiner_max_tokens or shorten it"
            )


class _Draws:
    """A logits processor that makes taking the likeliest token a draw from softmax(scores / temperature).

    It adds Gumbel noise (Maddison et al., "A* Sampling", 2014), drawn on the CPU from a generator of its own: no global
    random state is read or changed, and every device draws the same.
    """

    def __init__(self, temperature: float, seed: int):
        self._temperature, self._generator = temperature, torch_generator("prompt refiner", seed)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores (1, vocabulary) of the next token -> scores of which the largest is what is drawn."""
        drawn = torch.empty(scores.shape, dtype=torch.float64).exponential_(generator=self._generator)
        noise = -drawn.clamp(min=torch.finfo(torch.float64).tiny).log()
        return scores / self._temperature + noise.to(scores)


def check_refiner(folder: Path) -> None:
    """Raise the `UserError` that `PromptRefiner.from_pretrained` would, as far as all but the weights tell."""
    with _naming_the_flag():
        _read_chat(folder)


def refiner_on_meta(folder: Path, dtype: torch.dtype) -> nn.Module:
    """The chat model of a folder's config.json without weights: shapes and types only. Raises `UserError`.

    `decoder_layers` finds the layers in it.
    """
    with _naming_the_flag():
        return network_on_meta("AutoModelForCausalLM", _read_config(folder), dtype)


def decoder_layers(network: nn.Module) -> nn.ModuleList:
    """The layers of a causal language model: of its lists of modules of one class, the longest.

    Lists within lists, such as the experts of a layer, are not looked at. Raises `UserError` if there is none.
    """
    lists: dict[str, nn.ModuleList] = {}
    for name, module in network.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and not inside and len({type(member) for member in module}) == 1:
            lists[name] = module
    if not lists:
        raise UserError(
            f"--caption_refiner: a {type(network).__name__} has no list of like layers, which --text_8bit and"
            " --memory_budget need: leave them out or name another chat model"
        )
    return max(lists.values(), key=len)


def _read_chat(folder: Path) -> Chat:
    """The conversations of a folder that has all but weights; what is wrong with it is said at once."""
    _read_config(folder)
    if (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder} holds adapters (adapter_config.json): merge them into their model and name that")
    _refuse_code(folder / "tokenizer_config.json")
    tokenizer = load_tokenizer(folder)
    if tokenizer.chat_template is None:
        raise UserError(
            f"{folder}: there is no chat template (chat_template.jinja, or chat_template in tokenizer_config.json):"
            " name a chat model"
        )
    return Chat(tokenizer, INSTRUCTION, str(folder))


def _read_config(folder: Path) -> Any:
    """config.json of a causal language model that transformers knows."""
    path = folder / "config.json"
    _refuse_code(path)
    config = load_config(folder)
    with quiet_transformers():
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"{path}: model_type {config.model_type!r} is not a causal language model: name a chat model")
    return config


def _refuse_code(path: Path) -> None:
    if path.is_file() and read_json(path).get("auto_map"):
        raise UserError(
            f"{path} names code of the folder (auto_map), which is never run: name another chat model, or remove"
            " auto_map if transformers knows this kind of model itself"
        )


def _listed(token: int | list[int] | None) -> list[int]:
    """Token ids as transformers writes them in its configurations."""
    return [] if token is None else token if isinstance(token, list) else [token]


@contextmanager
def _naming_the_flag() -> Iterator[None]:
    """Let a `UserError` from within say which flag brought it about."""
    try:
        yield
    except UserError as error:
        named = str(error).startswith("--")
        raise UserError(str(error) if named else f"--caption_refiner: {error}") from error
