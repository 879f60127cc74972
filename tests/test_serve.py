"""The web page: what it makes, what it says, and itself in a browser."""

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch

from osp_fast.cli import parse_serve
from osp_fast.config import ServeConfig
from osp_fast.data.decode import read_image, read_video
from osp_fast.errors import UserError
from osp_fast.serve import Cancelled, Page, Studio, free_port, load_gradio, main

sys.path.insert(0, str(Path(__file__).parent / "sampling"))
from small import command_line, save_text_encoder, small_dit, small_flags

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# As a root in a container, and without a word to anyone but the page's server.
CHROMIUM_FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
CHROMIUM_FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    small_dit().save_pretrained(root / "dit")
    save_text_encoder(root / "text")
    return small_flags(root, root / "made")


@pytest.fixture(scope="module")
def studio(flags):
    return Studio(parse_serve(command_line(flags))[0], torch.device("cpu"), lambda line: None)


def make(studio, tell=lambda done, words: None, cancelled=lambda: False, **asked):
    return studio.make({"text_prompt": "a red circle", "seed": 1, **asked}, tell, cancelled)


def test_a_clip_and_what_is_told_about_it(studio):
    told = []
    made = make(studio, lambda done, words: told.append((done, words)), num_frames=9, width=48, num_sampling_steps=3)
    assert read_video(made.path).shape == (9, 16, 48, 3)
    assert re.fullmatch(r"\d{8}-\d{6}_1_[0-9a-f]{8}\.mp4", made.path.name)
    facts = json.loads(made.path.with_suffix(".json").read_text())
    expected = dict(prompt="a red circle", seed=1, num_frames=9, width=48, height=16, num_sampling_steps=3)
    assert {name: facts[name] for name in expected} == expected and facts["versions"]
    assert [done for done, words in told if words.startswith("step")] == [1 / 3, 2 / 3, 1.0]
    assert told[1][1] == "step 1 of 3, 0:00:00 left" and told[-1][1] == "the frames are decoded"
    again = make(studio, num_frames=9, width=48, num_sampling_steps=3)
    assert again.path != made.path and (read_video(again.path) == read_video(made.path)).all()


def test_an_image(studio):
    made = make(studio, num_frames=1)
    assert made.path.suffix == ".jpg" and read_image(made.path).shape == (16, 32, 3)


def test_a_clip_that_is_cancelled_ends_at_its_next_step(studio):
    before, steps = set(studio.folder.iterdir()), []
    with pytest.raises(Cancelled):
        make(studio, lambda done, words: steps.append(words), lambda: len(steps) > 2, num_sampling_steps=9)
    assert len([words for words in steps if words.startswith("step")]) == 2 and set(studio.folder.iterdir()) == before


@pytest.mark.parametrize(
    "asked, words",
    [
        (dict(text_prompt="  "), "the prompt is empty"),
        (dict(text_prompt="\u4e00"), "the prompt is empty"),
        (dict(height=20), "--height 20 is not a multiple of 16"),
        (dict(num_frames=6), "--num_frames 6 is not of the form 4n\\+1"),
        (dict(num_sampling_steps=1), "--num_sampling_steps 1 is out of range"),
        (dict(num_sampling_steps=2.5), "--num_sampling_steps: '2.5' is not a whole number"),
        (dict(seed=None), "--seed: 'None' is not a whole number"),
        (dict(seed=-1), "--seed: -1 is out of range: it must be at least 0"),
        (dict(width=1 << 40), "--width: .* out of range"),
        (dict(guidance_scale=float("nan")), "--guidance_scale: 'nan' is not a finite number"),
        (dict(sample_method="best"), "--sample_method: 'best' is unknown"),
    ],
)
def test_what_cannot_be_is_a_sentence(studio, asked, words):
    with pytest.raises(UserError, match=words):
        make(studio, **asked)


def test_a_lack_of_memory_is_a_sentence(studio, monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(studio, "_make", full)
    with pytest.raises(UserError, match="5x16x32 does not fit into memory"):
        make(studio)


def test_the_page_shows_sentences_and_results(studio):
    gradio = load_gradio()
    page = Page(studio, gradio)
    fields = ["a red circle", "low", 5.0, 16.0, 32.0, 2.0, 3.0, "DDIM", 7.0]
    video, image, facts = page.generate(*fields, "session", lambda done, words: None)
    assert Path(video["value"]).is_file() and not image["visible"]
    assert "**5 x 16 x 32**, seed 7, 2 steps of DDIM, guidance 3" in facts
    with pytest.raises(gradio.Error, match="height 20 is not a multiple of 16"):
        page.generate(*fields[:3], 20.0, *fields[4:], "session", lambda done, words: None)
    cancel = lambda done, words: page.cancel("session")  # noqa: E731
    assert page.generate(*fields, "session", cancel)[2] == "cancelled"
    page.cancel("a session that makes nothing")


def test_without_gradio_there_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match=r'needs the package gradio .* pip install "osp_fast\[serve\]"'):
        load_gradio()


def test_a_port_that_is_taken_is_a_sentence():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port} cannot be listened at"):
            free_port(ServeConfig(port=port))
    assert free_port(ServeConfig(port=0)) > 0
    with pytest.raises(UserError, match=r"--host 203.0.113.1 --port 0 cannot be listened at"):
        free_port(ServeConfig(host="203.0.113.1", port=0))


def test_several_processes_are_refused(flags, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="osp_fast.serve under torchrun with WORLD_SIZE=2"):
        main(command_line(flags))


@pytest.fixture(scope="module")
def server(flags, tmp_path_factory):
    """(address, process) of the page as a program."""
    log = tmp_path_factory.mktemp("server") / "log"
    line = command_line(flags, port=0, host="127.0.0.1", text_prompt=["a red circle"])
    with log.open("w") as opened:
        process = subprocess.Popen([sys.executable, "-m", "osp_fast.serve", *line], stderr=opened, stdout=opened)
    until = time.monotonic() + 60
    while not (found := re.search(r"open (http://localhost:\d+)", log.read_text())):
        assert process.poll() is None and time.monotonic() < until, log.read_text()
        time.sleep(0.1)
    yield found[1], process
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130, log.read_text()
    assert log.read_text().splitlines()[-1] == "interrupted"


def test_the_server_gives_files_of_its_folder_only(server, flags):
    address = server[0]
    secret = Path(flags["model_path"]) / "config.json"
    with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen(f"{address}/gradio_api/file={secret}", timeout=10)


# Of an element, what the boxes around it do not cut off.
HEIGHT_SHOWN = """element => {
    let {top, bottom} = element.getBoundingClientRect();
    for (let box = element.parentElement; box !== null; box = box.parentElement) {
        if (getComputedStyle(box).overflowY === 'visible') continue;
        const around = box.getBoundingClientRect();
        top = Math.max(top, around.top);
        bottom = Math.min(bottom, around.bottom);
    }
    return bottom - top;
}"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium was found: the page is not tested in a browser")
def test_the_page_in_a_browser(server, tmp_path):
    from playwright.sync_api import sync_playwright

    address = server[0]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=CHROMIUM_FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        asked, failed = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: failed.append(str(error)))
        page.goto(address)
        generate = page.get_by_role("button", name="Generate")
        assert page.get_by_label("Prompt", exact=True).input_value(timeout=30000) == "a red circle"

        # A long one, to be cancelled while it tells how far it is.
        page.get_by_label("Steps").fill("500")
        generate.click()
        progress = page.get_by_text(re.compile(r"step \d+ of 500, 0:0\d:\d\d left")).first
        progress.wait_for(timeout=20000)
        assert progress.evaluate(HEIGHT_SHOWN) > 10  # on a page that has no clip yet
        page.screenshot(path=tmp_path / "progress.png")
        page.get_by_role("button", name="Cancel").click()
        page.get_by_text("cancelled").first.wait_for(timeout=20000)

        page.get_by_label("Steps").fill("3")
        page.get_by_label("Prompt", exact=True).fill("a red circle moves left")
        before = page.get_by_label("Seed").input_value()
        page.get_by_role("button", name="Random seed").click()
        page.wait_for_function(
            "([field, was]) => field.value !== was", arg=[page.get_by_label("Seed").element_handle(), before]
        )
        generate.click()
        video = page.locator("video")
        video.wait_for(timeout=20000)
        page.wait_for_function("() => document.querySelector('video').readyState >= 1")  # its size is known
        assert video.evaluate("video => [video.videoWidth, video.videoHeight]") == [32, 16]
        assert "3 steps of DDIM" in page.locator("#facts").inner_text()
        body = page.request.get(video.get_attribute("src")).body()
        assert body[4:8] == b"ftyp"
        (tmp_path / "shown.mp4").write_bytes(body)
        assert read_video(tmp_path / "shown.mp4").shape == (5, 16, 32, 3)

        page.get_by_label("Height").fill("20")
        generate.click()
        page.get_by_text("height 20 is not a multiple of 16").first.wait_for(timeout=20000)

        other = browser.new_context().new_page()  # another visitor
        other.goto(address)
        other.get_by_role("button", name="Generate").wait_for(timeout=30000)
        assert other.locator("video").count() == 0 and "steps of" not in other.locator("body").inner_text()
        page.screenshot(path=tmp_path / "page.png")

        page.get_by_label("Height").fill("16")  # the server is interrupted in the middle of this one
        page.get_by_label("Steps").fill("500")
        generate.click()
        progress.wait_for(timeout=20000)
        browser.close()
    elsewhere = [url for url in asked if not url.startswith((address, "data:", "blob:"))]
    assert not elsewhere and not failed
