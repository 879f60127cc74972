"""A sampling run: its text stages, then clip after clip, alone, beside other processes, or together with them.

Without `--sp` the processes of a run are on their own: each takes the next clip that nobody has (`claims.py`), and the
others go on when one dies. With `--sp` all of them work on one clip, and each decodes one in turn.
"""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from osp_fast.diffusion.denoise import Text
from osp_fast.parallel.world import World
from osp_fast.pipeline import VideoPipeline
from osp_fast.pipeline.decoding import Beside
from osp_fast.pipeline.run import Run
from osp_fast.progress import Progress, duration
from osp_fast.sampling.claims import Claims
from osp_fast.sampling.models import Models
from osp_fast.sampling.output import Clip, Output
from osp_fast.sampling.prompts import clean_prompts
from osp_fast.sampling.texts import TextStages

SHARED_FOLDER = ".sampling"  # in the output folder, for what processes share


@dataclass(frozen=True)
class Prompt:
    """One prompt of a run. refined: by the refiner, None without one; used: cleaned; text: encoded."""

    refined: str | None
    used: str
    text: Text


class SamplingJob:
    """All clips of a command.

    models, prompts: what the flags name; output: where the clips go
    world: this process among the others; together: they share each clip (`--sp`)
    report: gets lines for the user, of every process
    """

    def __init__(
        self,
        models: Models,
        pipeline: VideoPipeline,
        prompts: list[str],
        output: Output,
        world: World,
        together: bool,
        report: Callable[[str], None],
    ):
        self._models, self._pipeline, self._given, self._output = models, pipeline, prompts, output
        self._world, self._together, self._report = world, together, report
        self._to_all = report if world.is_first else (lambda line: None)  # what one process says for all
        self._folder = output.folder / SHARED_FOLDER
        self._claims = Claims(self._folder)

    def run(self) -> None:
        """Make all clips that are not there, and the grid. Raises `UserError`."""
        clips = self._output.clips
        wanted = [clip for clip in clips if not self._output.is_finished(clip)]
        if self._together:
            wanted = self._world.gather(wanted)[0]
        if len(wanted) < len(clips):
            there = len(clips) - len(wanted)
            self._to_all(f"{there} of {len(clips)} clips are there already: skipped (--overwrite makes them again)")
        others = [clip for clip in wanted if self._output.path(clip).exists()]
        if others:
            name, what = self._output.path(others[0]).name, self._output.difference(others[0])
            self._to_all(f"note: {name} is there, but not what is asked for ({what}): replaced, {len(others)} in all")
        if wanted:
            self._make(wanted)
        if len(clips) > 1 and (self._world.is_first or not self._together):
            for _, claim in self._claims.share(["grid"], str, lambda _: self._output.has_grid()):
                self._report(f"wrote {self._output.write_grid()}")
                claim.release()
        self._claims.tidy()

    def _make(self, wanted: list[Clip]) -> None:
        run = self._pipeline.prepare(self._models.clip_settings(), len(wanted), self._to_all)
        stages = TextStages(run, None if self._world.alone else self._folder, self._text_facts(), self._report)
        prompts, negative = self._prepare(run, stages, sorted({clip.prompt_index for clip in wanted}))
        makes = ClipMaker(self._models, run, self._output, prompts, negative, self._world, self._report)
        with run.beside() as beside:
            if self._together:
                self._make_together(wanted, makes, beside)
            else:
                self._make_apart(wanted, makes, beside)
        makes.progress.close()

    def _make_apart(self, wanted: list[Clip], makes: "ClipMaker", beside: Beside) -> None:
        def waiting(clips: list[Clip]) -> None:
            numbers = ", ".join(str(clip.index + 1) for clip in clips)
            self._report(f"other processes are at work on clip{'s' * (len(clips) > 1)} {numbers}: waiting for them")

        last: Future[None] | None = None
        for clip, claim in self._claims.share(
            wanted, lambda clip: self._output.stem(clip.index).name, self._output.is_finished, waiting
        ):
            left = sum(not self._output.is_finished(clip) for clip in wanted)
            write = makes.clip(clip, -(-left // self._world.size), claim.release)
            if last is not None:
                last.result()
            last = beside.submit(*write)
        if last is not None:
            last.result()

    def _make_together(self, wanted: list[Clip], makes: "ClipMaker", beside: Beside) -> None:
        last: Future[None] | None = None
        for number, clip in enumerate(wanted):
            # Not together: one that fails here alone must leave the others' exchanges, not wait for them.
            write = makes.clip(clip, len(wanted) - number)
            with self._world.together():
                if last is not None:
                    last.result()
                last = beside.submit(*write) if number % self._world.size == self._world.rank else None
        with self._world.together():
            if last is not None:
                last.result()

    def _prepare(self, run: Run, stages: TextStages, needed: list[int]) -> tuple[dict[int, Prompt], Text | None]:
        """These prompts, refined and encoded, by their numbers; and the negative prompt."""
        given = [self._given[number] for number in needed]
        refined: list[str | None] = [None] * len(needed)
        if self._models.folders.refiner is not None:
            refined = [text or None for text in stages.refine(given, self._models.config.seed)]
        used = clean_prompts([text or mine for text, mine in zip(refined, given, strict=True)], self._models.clean)
        texts = stages.encode(run.settings.texts(used))
        negative = texts.pop() if run.settings.guided else None
        rows = zip(needed, refined, used, texts, strict=True)
        return {number: Prompt(*row) for number, *row in rows}, negative

    def _text_facts(self) -> dict[str, object]:
        config, prints = self._models.config, self._models.fingerprints()
        return {
            "text_encoder": prints["text_encoder"],
            "refiner": prints.get("refiner"),
            "dtype": str(self._models.folders.dtype),
            **{
                name: getattr(config, name)
                for name in ("max_sequence_length", "text_8bit", "refiner_max_tokens", "refiner_temperature", "seed")
            },
        }


class ClipMaker:
    """Denoises clips and tells of it, and makes what decodes and writes them."""

    def __init__(
        self,
        models: Models,
        run: Run,
        output: Output,
        prompts: dict[int, Prompt],
        negative: Text | None,
        world: World,
        report: Callable[[str], None],
    ):
        self._output, self._prompts, self._negative, self._seed = output, prompts, negative, models.config.seed
        self._calls, self._done = run.calls, 0
        run.load()
        self._sampler, self._decode = run.sampler(), run.decoder()
        self.progress = Progress(run.calls, quiet=not world.is_first)
        self._report = self.progress.message if world.is_first else report

    def clip(
        self, clip: Clip, left: int, release: Callable[[], None] = lambda: None
    ) -> tuple[Callable[[Tensor], None], Tensor]:
        """Denoise a clip: what is to be called with its latents, and these.

        left: clips that this process is expected to make, with this one; release: called when the clip is written
        """
        self.progress.expect((self._done + left) * self._calls)
        prompt = self._prompts[clip.prompt_index]
        latents = self._sampler(
            prompt.text, self._negative, self._seed, clip.prompt_index, clip.sample_index, partial(self._show, clip)
        )
        self._done += 1
        cache = self._sampler.step_cache
        facts = {} if cache is None else {"step_cache_skipped": cache.skipped, "calls": cache.calls}
        return partial(self._write, clip, prompt, facts, release), latents

    def _write(
        self, clip: Clip, prompt: Prompt, facts: dict[str, int], release: Callable[[], None], latents: Tensor
    ) -> None:
        try:
            self._output.forget(clip)  # what is there, while the video is replaced, is not this clip
            with self._output.files() as files:
                for piece in self._decode.pieces(latents):
                    files.write(clip.index, piece)
                path = files.finish(clip.index)
            self._output.write_sidecar(clip, prompt.refined, prompt.used, **facts)
            self._report(f"wrote {path}")
        finally:
            release()

    def _show(self, clip: Clip, done: int, calls: int) -> None:
        units = self._done * calls + done
        pace = self.progress.pace(units)
        facts = f"{pace:.2f} s/step, {duration(pace * (calls - done))} left for this clip"
        place = f"clip {clip.index + 1}/{len(self._output.clips)}, step {done}/{calls}"
        self.progress.show(units, place, facts, milestone=done == calls)
