"""Decoding in a child process: equal pixels, deadlines, crashes, and nothing left behind."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from media import shown_frames, write_clip
from PIL import Image

from osp_fast.data.clip_request import ClipRequest, DecodeError
from osp_fast.data.video import Decoder


def request(file: Path, indices=range(8), rect=(0, 64, 0, 48), num_frames=30, is_image=False) -> ClipRequest:
    return ClipRequest(str(file), tuple(indices), rect, 48, 64, num_frames, is_image, threads=1)


def pid_of(decoder: Decoder) -> int:
    return decoder._child.pid


def running(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return write_clip(tmp_path_factory.mktemp("video") / "clip.mp4", 30)


@pytest.fixture
def pipe(tmp_path) -> Path:
    """A video whose opening never returns."""
    os.mkfifo(tmp_path / "pipe.mp4")
    return tmp_path / "pipe.mp4"


@pytest.fixture
def decoder():
    with Decoder(timeout_s=30) as decoder:
        yield decoder


def test_pixels_come_back_whole_and_the_child_is_kept(clip, tmp_path, decoder):
    truth = shown_frames(clip)
    np.testing.assert_array_equal(decoder.decode(request(clip)), truth[:8])
    pid = pid_of(decoder)
    part = decoder.decode(request(clip, [29], (3, 20, 5, 9)))  # less memory than before
    np.testing.assert_array_equal(part, truth[[29], 5:9, 3:20])
    np.testing.assert_array_equal(decoder.decode(request(clip, range(30))), truth)  # more
    Image.fromarray(truth[0]).save(tmp_path / "image.png")
    image = decoder.decode(request(tmp_path / "image.png", [0], num_frames=1, is_image=True))
    np.testing.assert_array_equal(image, truth[:1])
    with pytest.raises(DecodeError, match=r"^missing$") as error:
        decoder.decode(request(tmp_path / "none.mp4"))
    assert error.value.whole_file
    assert pid_of(decoder) == pid


def test_relative_path_and_odd_name(clip, tmp_path, monkeypatch, decoder):
    name = "a b\n'ü\udcff.mp4"  # a new line, and a byte that is no UTF-8
    (tmp_path / name).write_bytes(clip.read_bytes())
    monkeypatch.chdir(tmp_path)
    np.testing.assert_array_equal(decoder.decode(request(Path(name))), shown_frames(clip)[:8])


def test_deadline(clip, pipe):
    with Decoder(timeout_s=30) as decoder:
        decoder.decode(request(clip))  # the child's start is not part of the deadline
        decoder.timeout_s = 0.3
        pid = pid_of(decoder)
        start = time.monotonic()
        with pytest.raises(DecodeError, match=r"^decoding took more than 0\.3 s \(--decode_timeout\)$") as error:
            decoder.decode(request(pipe))
        assert time.monotonic() - start < 3
        assert error.value.whole_file
        assert not running(pid)
        decoder.timeout_s = 30
        assert decoder.decode(request(clip)).shape == (8, 48, 64, 3)


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL])
def test_crash(clip, pipe, decoder, number):
    decoder.decode(request(clip))
    threading.Timer(0.3, os.kill, (pid_of(decoder), number)).start()
    with pytest.raises(DecodeError, match=rf"^crashes the decoder \({number.name}\)$"):
        decoder.decode(request(pipe))
    assert decoder.decode(request(clip)).shape == (8, 48, 64, 3)
    os.kill(pid_of(decoder), number)  # between two clips, where it is the fault of neither
    time.sleep(0.1)
    assert decoder.decode(request(clip)).shape == (8, 48, 64, 3)


@pytest.mark.parametrize(
    "code, message",
    [
        ("print('{}', flush=True); input(); print('hello', flush=True)", "answer nonsense"),
        ("print('{}', flush=True); input(); print('[1]', flush=True)", "answer nonsense"),
        ("print('{}', flush=True); input(); raise SystemExit('bad day')", "code 1: bad day"),
    ],
)
def test_nonsense(clip, decoder, monkeypatch, code, message):
    popen = subprocess.Popen
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", lambda args, **rest: popen([sys.executable, "-c", code], **rest))
        with pytest.raises(DecodeError, match=message):
            decoder.decode(request(clip))
    assert decoder.decode(request(clip)).shape == (8, 48, 64, 3)


def test_impossible_sizes_are_refused(clip, decoder):
    for shape in [(0, 10**6, 0, 10**6), (5, 5, 0, 48)]:
        with pytest.raises(DecodeError, match="is not the shape of a clip"):
            decoder.decode(request(clip, rect=shape))


def test_close_from_another_thread_ends_a_hang(clip, pipe):
    decoder = Decoder(timeout_s=60)
    decoder.decode(request(clip))
    pid = pid_of(decoder)
    threading.Timer(0.3, decoder.close).start()
    start = time.monotonic()
    with pytest.raises(DecodeError, match="the decoder is closed"):
        decoder.decode(request(pipe))
    decoder.close()
    assert time.monotonic() - start < 5
    assert not running(pid)
    with pytest.raises(DecodeError, match="the decoder is closed"):
        decoder.decode(request(clip))


PARENT = """
import sys
from osp_fast.data.clip_request import ClipRequest
from osp_fast.data.video import Decoder
decoder = Decoder(60)
clip, pipe = sys.argv[1:]
ask = lambda file: decoder.decode(ClipRequest(file, (0,), (0, 64, 0, 48), 48, 64, 30, False, 1))
ask(clip)
print(decoder._child.pid, flush=True)
ask(pipe)
"""


def test_no_child_outlives_a_killed_parent(clip, pipe):
    before = set(os.listdir("/dev/shm"))
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(clip), str(pipe)], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    time.sleep(0.3)  # now the child hangs
    assert running(child)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert wait_until(lambda: not running(child))
    assert set(os.listdir("/dev/shm")) == before


def test_closing_gives_back_files(clip):
    def use() -> None:
        with Decoder(timeout_s=30) as decoder:
            decoder.decode(request(clip))

    use()
    before = len(os.listdir("/proc/self/fd"))
    use()
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_child_does_not_load_torch():
    code = "import sys, osp_fast.data.decode_server; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
