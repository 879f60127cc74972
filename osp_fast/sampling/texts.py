"""The text stages of a run: prompts rewritten by the refiner, and encoded; each once, however many processes there are.

Several processes share what they have made through small files. Prompts are rewritten by all of them; the text encoder,
which is large to load and quick to use, runs in the first one that comes to it.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from osp_fast.data.identity import model_files
from osp_fast.diffusion.denoise import Text
from osp_fast.files import whole
from osp_fast.models.weights import write_json
from osp_fast.pipeline.run import Run
from osp_fast.progress import Progress
from osp_fast.sampling.claims import Claims

MANY_TEXTS = 20  # whose encoding may take long enough to be told


class TextStages:
    """Rewrites and encodes the texts of a run.

    folder: for what processes share, None: there is one process
    facts: all that decides on the results beside the text itself
    report: gets lines for the user
    """

    def __init__(self, run: Run, folder: Path | None, facts: dict[str, Any], report: Callable[[str], None]):
        self._run, self._folder, self._report = run, folder, report
        self._facts = json.dumps(facts, sort_keys=True, default=str)
        self._claims = None if folder is None else Claims(folder)

    def refine(self, prompts: Sequence[str], seed: int) -> list[str]:
        """Each prompt rewritten, by itself; "" where the refiner had no answer."""
        if self._claims is None:
            with self._run.refiner() as refine:
                return [self._told(prompt, refine(prompt, seed)) for prompt in prompts]
        answers: dict[str, str] = {}

        def is_known(prompt: str) -> bool:
            if prompt not in answers:
                with suppress(FileNotFoundError):
                    answers[prompt] = json.loads(self._refined(prompt).read_text(encoding="utf-8"))["refined"]
            return prompt in answers

        with ExitStack() as stack:
            refine = None
            for prompt, claim in self._claims.share(list(dict.fromkeys(prompts)), self._key, is_known):
                if refine is None:
                    refine = stack.enter_context(self._run.refiner())
                answers[prompt] = self._told(prompt, refine(prompt, seed))
                with whole(self._refined(prompt)) as writing:
                    write_json(writing, {"prompt": prompt, "refined": answers[prompt]})
                claim.release()
        return [answers[prompt] for prompt in prompts]

    def encode(self, texts: Sequence[str]) -> list[Text]:
        """Each text encoded, on the CPU."""
        if self._claims is None:
            with self._run.text_encoder() as encode:
                return [encode(text) for text in self._counted(list(texts))]
        encoded: dict[str, Text] = {}

        def missing() -> list[str]:
            for text in texts:
                if text not in encoded:
                    with suppress(FileNotFoundError):
                        encoded[text] = _load(self._encoded(text))
            return [text for text in dict.fromkeys(texts) if text not in encoded]

        for _, claim in self._claims.share(["encode"], str, lambda _: not missing()):
            with self._run.text_encoder() as encode:
                for text in self._counted(missing()):
                    encoded[text] = encode(text)
                    _save(self._encoded(text), encoded[text])
            claim.release()
        return [encoded[text] for text in texts]

    def _counted(self, texts: list[str]) -> Iterator[str]:
        """The texts, with lines on how many are encoded where there are many."""
        if len(texts) < MANY_TEXTS:
            yield from texts
            return
        progress = Progress(len(texts))
        for done, text in enumerate(texts, 1):
            yield text
            progress.show(done, f"text {done}/{len(texts)}", "encoded")
        progress.close()

    def _told(self, prompt: str, answer: str) -> str:
        self._report(f"refined: {answer}" if answer else f"the refiner has no answer to {prompt!r}: it stays as it is")
        return answer

    def _refined(self, prompt: str) -> Path:
        return self._folder / f"{self._key(prompt)}.refined.json"

    def _encoded(self, text: str) -> Path:
        return self._folder / f"{self._key(text)}.text.safetensors"

    def _key(self, text: str) -> str:
        return hashlib.blake2b(f"{self._facts}\0{text}".encode(), digest_size=16).hexdigest()


def fingerprint(folder: Path) -> str:
    """Of a model folder's files, by their sizes and times: another one after any change."""
    parts = [
        (name, status.st_size, status.st_mtime_ns)
        for name, path in model_files(folder).items()
        for status in [path.stat()]
    ]
    return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()


def _save(path: Path, text: Text) -> None:
    from safetensors.torch import save_file

    with whole(path) as writing:
        save_file({"states": text.states.contiguous(), "mask": text.mask.contiguous()}, writing)


def _load(path: Path) -> Text:
    from safetensors.torch import load_file

    return Text(**load_file(path))
