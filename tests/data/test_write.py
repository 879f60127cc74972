"""Written files are read back: colours, sizes, rates, and nothing half-written."""

import os
import subprocess
import sys

import av
import numpy as np
import pytest
from media import picture
from PIL import Image

from osp_fast.assets.shapes import Scene
from osp_fast.data.decode import read_video
from osp_fast.data.write import VideoWriter, contact_sheet, image_grid, video_grid, write_image, write_video
from osp_fast.errors import UserError

COLOURS = [(200, 30, 90), (10, 220, 40), (30, 60, 230), (255, 255, 255), (0, 0, 0)]


def flat(colour, frames=4, height=32, width=48) -> np.ndarray:
    return np.broadcast_to(np.array(colour, np.uint8), (frames, height, width, 3))


@pytest.mark.parametrize("colour", COLOURS)
def test_colours_survive(tmp_path, colour):
    write_video(tmp_path / "a.mp4", flat(colour), 24)
    assert np.abs(read_video(tmp_path / "a.mp4").astype(int) - colour).max() <= 3


def test_motion_survives(tmp_path):
    frames = np.stack([picture(number, 64, 96) for number in range(20)])
    write_video(tmp_path / "a.mp4", frames, 12)
    back = read_video(tmp_path / "a.mp4")
    assert back.shape == frames.shape
    assert np.abs(back.astype(int) - frames).mean() < 5
    write_video(tmp_path / "b.mp4", frames, 12, crf=40)
    rough = np.abs(read_video(tmp_path / "b.mp4").astype(int) - frames).mean()
    assert rough > 1.5 * np.abs(back.astype(int) - frames).mean()
    assert os.path.getsize(tmp_path / "b.mp4") < os.path.getsize(tmp_path / "a.mp4")


@pytest.mark.parametrize("fps", [24, 12.5, 23.976, 1, 60])
def test_stream_is_what_players_expect(tmp_path, fps):
    write_video(tmp_path / "a.mp4", flat(COLOURS[0], frames=7), fps)
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264" and stream.codec_context.pix_fmt == "yuv420p"
        assert float(stream.average_rate) == pytest.approx(fps, rel=1e-4)
        assert float(stream.duration * stream.time_base) == pytest.approx(7 / fps, rel=1e-3)
        frames = list(container.decode(stream))
        assert len(frames) == 7 and frames[0].colorspace == 1 and frames[0].color_range == 1
    data = (tmp_path / "a.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # plays while it loads


@pytest.mark.parametrize("height, width", [(31, 47), (32, 47), (31, 48), (1, 1)])
def test_odd_sizes(tmp_path, height, width):
    write_video(tmp_path / "a.mp4", flat(COLOURS[1], height=height, width=width), 24)
    back = read_video(tmp_path / "a.mp4")
    assert back.shape[1:3] == (height + height % 2, width + width % 2)
    assert np.abs(back.astype(int) - COLOURS[1]).max() <= 3


WRITE = """
import sys
import numpy as np
from osp_fast.data.write import write_video
write_video(sys.argv[1], np.load(sys.argv[2]), 24)
"""


def test_bytes_do_not_depend_on_unused_memory(tmp_path):
    np.save(tmp_path / "frames.npy", Scene.draw(5, 0).frames(33, 64))
    written = []
    for fill in ("85", "170", "255"):  # what the C library puts into freed memory
        arguments = [str(tmp_path / f"{fill}.mp4"), str(tmp_path / "frames.npy")]
        environment = {**os.environ, "MALLOC_PERTURB_": fill}
        subprocess.run([sys.executable, "-c", WRITE, *arguments], env=environment, check=True)
        written.append((tmp_path / f"{fill}.mp4").read_bytes())
    assert written[0] == written[1] == written[2]


def test_images(tmp_path):
    write_image(tmp_path / "a.png", picture(1))
    write_image(tmp_path / "a.jpg", picture(1))
    assert (np.asarray(Image.open(tmp_path / "a.png")) == picture(1)).all()
    jpeg = Image.open(tmp_path / "a.jpg")
    assert jpeg.format == "JPEG" and np.abs(np.asarray(jpeg).astype(int) - picture(1)).mean() < 5
    with pytest.raises(UserError, match=r"a\.gif.*must end with"):
        write_image(tmp_path / "a.gif", picture(1))


def test_a_failed_file_is_absent(tmp_path):
    with pytest.raises(UserError, match=r"none/a\.mp4 cannot be written"):
        write_video(tmp_path / "none" / "a.mp4", flat(COLOURS[0]), 24)
    with pytest.raises(UserError, match=r"none/a\.png cannot be written"):
        write_image(tmp_path / "none" / "a.png", picture(1))
    write_image(tmp_path / "a.png", picture(1))
    with pytest.raises(ValueError, match="uint8"):
        write_image(tmp_path / "a.png", picture(1).astype(np.float32))
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(UserError, match=r"folder\.mp4 cannot be written"):
        write_video(tmp_path / "folder.mp4", flat(COLOURS[0]), 24)
    assert sorted(os.listdir(tmp_path)) == ["a.png", "folder.mp4"]


def test_grids():
    grid = image_grid([flat(colour)[0] for colour in COLOURS], 3)
    assert grid.shape == (2 * 32 + 2, 3 * 48 + 4, 3)
    assert (grid[5, 50 + 5] == COLOURS[1]).all() and (grid[34 + 5, 5] == COLOURS[3]).all()
    assert (grid[5, 48:50] == 0).all() and (grid[34:, 100:] == 0).all()
    short, long = flat(COLOURS[0], frames=2), flat(COLOURS[1], frames=5, height=40)
    grid = video_grid([short, long], 7)
    assert grid.shape == (5, 40, 2 * 48 + 2, 3)
    assert (grid[4, :32, :48] == COLOURS[0]).all() and (grid[:, :, 50:] == COLOURS[1]).all()


def test_contact_sheet(tmp_path):
    videos = [flat(COLOURS[0], frames=17, height=64, width=64), flat(COLOURS[1], frames=3, height=64, width=64)]
    contact_sheet(tmp_path / "sheet.png", videos, ["a red circle", "a long caption " * 20])
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    for colour, count in zip(COLOURS, (5, 3), strict=False):
        assert (sheet == colour).all(axis=-1).sum() == count * 64 * 64
    letters = (sheet.max(axis=-1) < 100).sum(axis=1)
    assert letters[:26].sum() > 50  # the first caption is above the first row
    with pytest.raises(ValueError, match="zip"):
        contact_sheet(tmp_path / "sheet.png", videos, ["one"])


def test_pieces_make_the_same_file(tmp_path):
    frames = np.stack([picture(number, 30, 46) for number in range(9)])
    write_video(tmp_path / "whole.mp4", frames, 24)
    with VideoWriter(tmp_path / "pieces.mp4", 24) as writer:
        for start, end in ((0, 1), (1, 5), (5, 9)):
            writer.write(frames[start:end])
            assert not (tmp_path / "pieces.mp4").exists()
    assert (tmp_path / "pieces.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()


def test_a_failure_among_the_pieces_leaves_no_file(tmp_path):
    with pytest.raises(RuntimeError, match="no more frames"), VideoWriter(tmp_path / "a.mp4", 24) as writer:
        writer.write(flat(COLOURS[0]))
        raise RuntimeError("no more frames")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_missing_is_told_though_many_pieces_wait(tmp_path):
    with pytest.raises(UserError, match="cannot be written"), VideoWriter(tmp_path / "no/a.mp4", 24) as writer:
        for _ in range(20):
            writer.write(flat(COLOURS[0]))
