"""A web page that samples: python -m osp_fast.serve --preset tiny, with the flags of sampling.

One clip is made at a time; others wait in a queue. Each goes to `--save_img_path` under a name of its own, with a JSON
file beside it, and only the browser that asked for it is told the name. The page loads nothing from elsewhere.
"""

import dataclasses
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from osp_fast.checks import check_sample, with_recipe
from osp_fast.cli import check_value, parse_serve
from osp_fast.config import SAMPLE_METHODS, SampleConfig, ServeConfig
from osp_fast.device import check_single_process, rank_device
from osp_fast.errors import UserError, run_entry_point
from osp_fast.models.weights import write_json
from osp_fast.pipeline.settings import PROMPT_TEMPLATE
from osp_fast.progress import duration, say
from osp_fast.sample_files import ClipFiles, versions
from osp_fast.sampling.folders import writable_folder
from osp_fast.sampling.models import Models

MOST_SEED = 2**31 - 1
KEPT = 24 * 3600  # seconds that gradio's copies of what it showed are kept
LAST_CLIP_S = 60.0  # that the end waits for a step, or for the decoding of a clip
FACTS_HEIGHT = 96  # pixels, so that there is room for progress before there is a clip
CHECKED = {"height", "width", "num_frames", "num_sampling_steps", "seed", "guidance_scale", "sample_method"}
WAITING = 32  # requests; more are told to come again
# (share done, words)
Tell = Callable[[float, str], None]


class Cancelled(Exception):
    """The one who asked for a clip wants it no more."""


@dataclasses.dataclass(frozen=True)
class Made:
    """A clip: its file, and what is told about it."""

    path: Path
    facts: dict[str, Any]


class Studio:
    """Makes clips one at a time, of whatever size, with the models that the flags name."""

    def __init__(self, config: SampleConfig, device: torch.device, report: Callable[[str], None] = say):
        self.models = Models.of(config, device)
        self.folder = writable_folder(config.save_img_path)
        self._pipeline = self.models.pipeline(report, keep=True)
        self._report = report
        self._one_at_a_time = threading.Lock()
        self._closed = threading.Event()

    @property
    def config(self) -> SampleConfig:
        """The settings that the page begins with."""
        return self.models.config

    def make(self, asked: dict[str, Any], tell: Tell, is_cancelled: Callable[[], bool]) -> Made:
        """A clip with these fields of `SampleConfig` in place of the flags'.

        Raises `UserError` for what cannot be, `Cancelled`.
        """
        config = dataclasses.replace(self.config, **asked)
        config.text_prompt = [asked["text_prompt"].strip()]
        if not self.models.clean(config.text_prompt[0]):
            raise UserError("the prompt is empty: describe the video in words")
        for name in CHECKED & asked.keys():
            setattr(config, name, check_value(SampleConfig, name, asked[name]))
        check_sample(config)
        models = dataclasses.replace(self.models, config=with_recipe(config, self.models.recipe))
        with self._one_at_a_time:
            try:
                return self._make(models, tell, lambda: is_cancelled() or self._closed.is_set())
            except torch.OutOfMemoryError as error:
                torch.cuda.empty_cache()
                size = f"{config.num_frames}x{config.height}x{config.width}"
                raise UserError(f"{size} does not fit into memory: ask for a smaller clip") from error

    def close(self) -> None:
        """Let the clip on its way end at its next step: a process that ends in the middle of one would crash."""
        self._closed.set()
        if self._one_at_a_time.acquire(timeout=LAST_CLIP_S):
            self._one_at_a_time.release()

    def _make(self, models: Models, tell: Tell, is_cancelled: Callable[[], bool]) -> Made:
        if is_cancelled():
            raise Cancelled
        config, settings = models.config, models.clip_settings()
        prompt, refined = config.text_prompt[0], None
        started = time.monotonic()
        run = self._pipeline.prepare(settings, 1, self._report)
        if models.folders.refiner is not None:
            tell(0.0, "the prompt is refined")
            with run.refiner() as refine:
                refined = refine(prompt, config.seed) or None
        cleaned = models.clean(refined or prompt)
        tell(0.0, "the prompt is encoded")
        texts, negative = run.encode([cleaned])
        run.load()
        begun = time.monotonic()

        def on_step(done: int, calls: int) -> None:
            if is_cancelled():
                raise Cancelled
            left = (time.monotonic() - begun) / done * (calls - done)
            tell(done / calls, f"step {done} of {calls}, {duration(left)} left")

        latents = run.sampler()(texts[0], negative, config.seed, 0, 0, on_step)
        tell(1.0, "the frames are decoded")
        stem = self.folder / f"{time.strftime('%Y%m%d-%H%M%S')}_{config.seed}_{secrets.token_hex(4)}"
        with ClipFiles(lambda index: stem, config.num_frames, config.fps) as files:
            for piece in run.decoder().pieces(latents):
                files.write(0, piece)
            path = files.finish(0)
        facts = {
            **models.settings(),
            "prompt": prompt,
            **({} if refined is None else {"refined_prompt": refined}),
            "full_prompt": PROMPT_TEMPLATE.format(cleaned),
            "negative_prompt": settings.negative,
            "seconds": round(time.monotonic() - started, 1),
            "versions": versions(),
        }
        facts.pop("text_prompt")
        write_json(stem.with_name(stem.name + ".json"), facts)
        self._report(f"wrote {path}")
        return Made(path, facts)


class Page:
    """What the page's parts call: a session asks for clips, and may cancel."""

    def __init__(self, studio: Studio, gradio: Any):
        self._studio, self._gradio = studio, gradio
        self._cancelled: dict[str, threading.Event] = {}

    def generate(
        self,
        prompt: str,
        negative: str,
        frames: float,
        height: float,
        width: float,
        steps: float,
        scale: float,
        method: str,
        seed: float,
        session: str,
        tell: Tell,
    ) -> tuple[Any, Any, str]:
        """(video, image, facts) for the page; what is wrong is shown on it, as gradio's own kind of error."""
        gradio = self._gradio
        cancelled = self._cancelled[session] = threading.Event()
        try:
            made = self._studio.make(
                dict(
                    text_prompt=prompt or "",
                    negative_prompt=negative,
                    num_frames=_whole(frames),
                    height=_whole(height),
                    width=_whole(width),
                    num_sampling_steps=_whole(steps),
                    guidance_scale=scale,
                    sample_method=method,
                    seed=_whole(seed),
                ),
                tell,
                cancelled.is_set,
            )
        except UserError as error:
            raise gradio.Error(str(error).replace("--", ""), duration=None, print_exception=False) from None
        except Cancelled:
            return gradio.update(), gradio.update(), "cancelled"
        finally:
            self._cancelled.pop(session, None)
        is_image = made.path.suffix == ".jpg"
        shown = gradio.update(value=str(made.path), visible=True)
        hidden = gradio.update(value=None, visible=False)
        return (hidden, shown, _told(made)) if is_image else (shown, hidden, _told(made))

    def cancel(self, session: str) -> None:
        """Let the session's clip end at its next step."""
        event = self._cancelled.get(session)
        if event is not None:
            event.set()

    def build(self) -> Any:
        """The page, as gradio's Blocks."""
        gr, config, bar = self._gradio, self._studio.config, self._gradio.Progress()

        # gradio finds out what to hand over by the parameters' types and defaults.
        def generate(prompt, negative, frames, height, width, steps, scale, method, seed, request: gr.Request, bar=bar):
            values = (prompt, negative, frames, height, width, steps, scale, method, seed)
            return self.generate(*values, request.session_hash, lambda done, words: bar(done, desc=words))

        def cancel(request: gr.Request) -> None:
            self.cancel(request.session_hash)

        with gr.Blocks(title="osp_fast", analytics_enabled=False, delete_cache=(KEPT, KEPT)) as page:
            gr.Markdown("# osp_fast\nText to video")
            with gr.Row():
                with gr.Column():
                    prompt = gr.Textbox(config.text_prompt[0], label="Prompt", lines=3, autofocus=True)
                    negative = gr.Textbox(
                        self._studio.models.clip_settings().negative, label="Negative prompt", lines=2
                    )
                    with gr.Row():
                        frames = gr.Number(config.num_frames, label="Frames", precision=0)
                        height = gr.Number(config.height, label="Height", precision=0)
                        width = gr.Number(config.width, label="Width", precision=0)
                    with gr.Row():
                        steps = gr.Number(config.num_sampling_steps, label="Steps", precision=0)
                        scale = gr.Number(config.guidance_scale, label="Guidance", minimum=1)
                        seed = gr.Number(config.seed, label="Seed", precision=0)
                    with gr.Row():
                        method = gr.Dropdown(list(SAMPLE_METHODS), value=config.sample_method, label="Sampler")
                        dice = gr.Button("Random seed")
                    with gr.Row():
                        go = gr.Button("Generate", variant="primary")
                        stop = gr.Button("Cancel")
                with gr.Column():
                    video = gr.Video(label="Video", autoplay=True, loop=True, interactive=False)
                    image = gr.Image(label="Image", visible=False, interactive=False, type="filepath")
                    facts = gr.Markdown(elem_id="facts", min_height=FACTS_HEIGHT)
            inputs = [prompt, negative, frames, height, width, steps, scale, method, seed]
            go.click(generate, inputs, [video, image, facts], concurrency_limit=1, show_progress_on=facts)
            stop.click(cancel, None, None, queue=False, api_visibility="private")
            dice.click(lambda: secrets.randbelow(MOST_SEED), None, seed, queue=False, api_visibility="private")
        return page


def _whole(value: float | None) -> Any:
    """What a field for numbers holds, as a whole number if it is one."""
    return int(value) if value is not None and float(value).is_integer() else value


def _told(made: Made) -> str:
    """What the page says below a clip."""
    facts = made.facts
    lines = [
        f"**{facts['num_frames']} x {facts['height']} x {facts['width']}**, seed {facts['seed']}, "
        f"{facts['num_sampling_steps']} steps of {facts['sample_method']}, guidance {facts['guidance_scale']:g}, "
        f"{facts['seconds']} s"
    ]
    if "refined_prompt" in facts:
        lines.append(f"refined prompt: {facts['refined_prompt']}")
    return "\n\n".join([*lines, f"`{made.path}`"])


def load_gradio() -> Any:
    """The package gradio, told to send nothing anywhere. Raises `UserError` if it is not installed."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        import gradio
    except ImportError as error:
        raise UserError(f'the web page needs the package gradio ({error}): pip install "osp_fast[serve]"') from None
    return gradio


def free_port(serve: ServeConfig) -> int:
    """The port to listen at. Raises `UserError` if it is taken, or the address is not this machine's."""
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((serve.host, serve.port))
            return probe.getsockname()[1]
    except OSError as error:
        raise UserError(
            f"--host {serve.host} --port {serve.port} cannot be listened at ({error.strerror}): name another port"
        ) from None


def main(argv: Sequence[str] | None = None) -> None:
    """Serve until Ctrl-C. Raises `UserError`."""
    config, serve = parse_serve(argv)
    check_single_process("osp_fast.serve")
    gradio = load_gradio()
    port = free_port(serve)
    studio = Studio(config, rank_device(config.device))
    page = Page(studio, gradio).build().queue(max_size=WAITING, default_concurrency_limit=1)
    page.launch(
        server_name=serve.host,
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        ssr_mode=False,
        footer_links=["gradio"],
        run_history=False,
        allowed_paths=[str(studio.folder.resolve())],
        theme=gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
    )
    say(f"open http://{'localhost' if serve.host in ('127.0.0.1', '0.0.0.0') else serve.host}:{port}")
    try:
        threading.Event().wait()
    finally:
        studio.close()
        page.close()


if __name__ == "__main__":
    run_entry_point(main)
