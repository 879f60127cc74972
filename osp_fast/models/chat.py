"""One question to a chat model and its answer, as text: what stands between a tokenizer with a template and a user."""

import re
from collections.abc import Iterable
from datetime import datetime
from typing import Any, NamedTuple

from osp_fast.errors import UserError
from osp_fast.models.transformers_folder import first_line

# Templates may tell the model what day it is, by this function: an answer must not depend on that.
TODAY = datetime(2025, 1, 1)
TODAY_IN_TEMPLATES = (
    "{% macro strftime_now(format) -%}{{ format"
    + "".join(f"|replace('{part}', '{TODAY.strftime(part)}')" for part in "%Y %m %d %B %b %A %a %H %M %S".split())
    + " }}{%- endmacro %}"
)
TRIAL = "A red circle moves to the left."
THINKING = re.compile(r"<think>.*?</think>", re.DOTALL)
QUOTES = {'"': '"', "'": "'", "“": "”", "‘": "’", "„": "“”", "«": "»", "「": "」", "『": "』"}
APOSTROPHE = re.compile(r"(?<=\w)['’](?=\w)")
SENTENCE_END = re.compile(r"[.!?…]+[\"'”’»]*(?=\s|$)|[。！？]+[”’」』）]*")


class Question(NamedTuple):
    """tokens: of the whole conversation up to where the answer begins; thinks: the model is made to think first."""

    tokens: list[int]
    thinks: bool


class Chat:
    """Conversations of one instruction, one message and one answer in a tokenizer's chat template.

    A template that has no place for an instruction (it raises an error, or leaves it out) gets it with the message.
    Raises `UserError`, naming `place`, if the template cannot be used.
    """

    def __init__(self, tokenizer: Any, instruction: str, place: str):
        self.tokenizer, self._instruction = tokenizer, instruction
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._special = (special | set(tokenizer.all_special_tokens)) - {""}
        for takes_instruction in (True, False):
            self._takes_instruction = takes_instruction
            try:
                text = self._render(TRIAL)
            except Exception as error:  # jinja2's errors, and whatever else a template may cause
                why = first_line(error)
                continue
            if instruction in text and TRIAL in text:
                return
            why = "it leaves out what the user says"
        raise UserError(f"{place}: the chat template cannot be used ({why}): copy the tokenizer's files again")

    def question(self, message: str) -> Question:
        """What the model is to continue."""
        text = self._render(message)
        # The template has written what begins a text already.
        tokens = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return Question(tokens, text.rstrip().endswith("<think>"))

    def answer(self, tokens: list[int], question: Question, cut_off: bool) -> str:
        """The tokens that the model has added as one paragraph; "" if they say nothing. cut_off: it would go on."""
        text = self.tokenizer.decode(tokens, skip_special_tokens=False)
        return clean_answer(f"<think>{text}" if question.thinks else text, self._special, cut_off)

    def _render(self, message: str) -> str:
        if self._takes_instruction:
            messages = [{"role": "system", "content": self._instruction}, {"role": "user", "content": message}]
        else:
            messages = [{"role": "user", "content": f"{self._instruction}\n\n{message}"}]
        return self.tokenizer.apply_chat_template(
            messages,
            chat_template=TODAY_IN_TEMPLATES + self.tokenizer.get_chat_template(),
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,  # a name that some templates know and others ignore
        )


def clean_answer(text: str, special: Iterable[str], cut_off: bool) -> str:
    """What a model has written as one paragraph, without its thoughts, special tokens and enclosing quotes.

    special: texts of special tokens
    cut_off: the model would have gone on; the result ends with the last whole sentence, if there is one
    """
    text = THINKING.sub(" ", text).rpartition("</think>")[2]
    text = text.partition("<think>")[0]  # thoughts that did not come to an end
    for token in sorted(special, key=len, reverse=True):
        text = text.replace(token, " ")
    text = " ".join(text.split())
    if cut_off:
        ends = [match.end() for match in SENTENCE_END.finditer(text)]
        text = text[: ends[-1]] if ends else text
    return _without_quotes(text, cut_off)


def _without_quotes(text: str, cut_off: bool) -> str:
    """The text without a pair of quotes around all of it; of one that was cut off, the first quote is enough."""
    closing = QUOTES.get(text[:1])
    if closing is None:
        return text
    inside = text[1:-1] if len(text) > 1 and text[-1] in closing else text[1:]
    if any(mark in APOSTROPHE.sub("", inside) for mark in (text[0], *closing)):
        return text  # several quotations, or one at the beginning
    return inside.strip() if cut_off or text[-1] in closing else text
