"""Frames by presentation number against a plain sequential decode, images, and what is refused and why."""

import random
import wave
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from media import cut_start, picture, set_track_rotation, shown_frames, write_clip
from PIL import Image

from osp_fast.data.clip_request import ClipRequest, DecodeError
from osp_fast.data.decode import _behind_intra, decode_clip, read_video
from osp_fast.data.packet_scan import PacketScan
from osp_fast.errors import UserError

RNG = random.Random(0)
IRREGULAR = [sum(random.Random(1).choices([3, 10, 10, 11, 47], k=i)) + i for i in range(150)]

# file name -> how it is written
KINDS = {
    "ultrafast.mp4": dict(options={"preset": "ultrafast"}),
    "b_frames.mp4": dict(options={"x264-params": "keyint=40:bframes=5:b-pyramid=normal:b-adapt=0:scenecut=0"}),
    "open_gop.mp4": dict(options={"x264-params": "keyint=12:open-gop=1:bframes=3:b-adapt=0:scenecut=0"}),
    "variable_rate.mp4": dict(times=IRREGULAR, options={"x264-params": "keyint=20:bframes=3:b-adapt=0"}),
    "variable_rate.mkv": dict(times=IRREGULAR, options={"x264-params": "keyint=20:bframes=3:b-adapt=0"}),
    "one_keyframe.mp4": dict(options={"x264-params": "keyint=infinite:bframes=3:scenecut=0"}),
    "intra_refresh.mp4": dict(options={"x264-params": "keyint=20:intra-refresh=1:bframes=0:scenecut=0"}),
    "fragmented.mp4": dict(muxing={"movflags": "frag_keyframe+empty_moov"}, options={"x264-params": "keyint=15"}),
    "fast_start.mp4": dict(muxing={"movflags": "faststart"}),
    "hevc.mp4": dict(codec="libx265", options={"x265-params": "keyint=24:bframes=4:log-level=none:pools=1"}),
    "ten_bit.mp4": dict(pix_fmt="yuv420p10le", options={"preset": "ultrafast"}),
    "vp9.webm": dict(codec="libvpx-vp9", options={"cpu-used": "8", "deadline": "realtime", "g": "30"}),
    "stream.ts": dict(options={"x264-params": "keyint=25:bframes=2:b-adapt=0"}),
    "no_timestamps.avi": dict(codec="mpeg4", options={"bf": "2", "g": "12"}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("media")


def ask(file: Path, indices, *, height=48, width=64, num_frames=1, rect=None, is_image=False) -> np.ndarray:
    request = ClipRequest(
        str(file), tuple(indices), rect or (0, width, 0, height), height, width, num_frames, is_image, threads=2
    )
    out = np.zeros(request.shape, np.uint8)
    decode_clip(request, out)
    return out


def windows(frames: int) -> list[list[int]]:
    """All frames, the ends, and random windows at strides of 1, 2 and 0.7."""
    asked = [list(range(frames)), [0], [frames - 1], list(range(frames - 5, frames))]
    for _ in range(6):
        stride = RNG.choice([1, 1, 2, 0.7])
        length = RNG.randint(1, 30)
        start = RNG.randint(0, frames - 1 - int((length - 1) * stride))
        asked.append([start + int(i * stride) for i in range(length)])
    return asked


@pytest.mark.parametrize("name", KINDS)
def test_frames_equal_sequential_decode(folder, name):
    file = write_clip(folder / name, 150, **KINDS[name])
    truth = shown_frames(file)
    assert len(truth) == 150
    for indices in windows(150):
        np.testing.assert_array_equal(ask(file, indices, num_frames=150), truth[indices])
    np.testing.assert_array_equal(read_video(file), truth)


@pytest.mark.parametrize("name", ["ultrafast.mp4", "b_frames.mp4", "open_gop.mp4"])
@pytest.mark.parametrize("hidden", [7, 60])
def test_frames_before_an_edit_list_are_not_counted(folder, name, hidden):
    whole = write_clip(folder / name, 150, **KINDS[name])
    file = cut_start(whole, folder / f"cut_{hidden}_{name}", hidden)
    truth = shown_frames(file)
    assert 150 - hidden - 2 <= len(truth) <= 150 - hidden + 2
    np.testing.assert_array_equal(truth, shown_frames(whole)[-len(truth) :])
    for indices in windows(len(truth)):
        np.testing.assert_array_equal(ask(file, indices, num_frames=150), truth[indices])
    with pytest.raises(DecodeError, match=r"is needed, but only \d+ of its 150 frames are shown") as error:
        ask(file, [149], num_frames=150)
    assert not error.value.whole_file


@pytest.mark.parametrize("bframes", [0, 3])
def test_only_what_is_needed_is_decoded(folder, bframes):
    """From the keyframe at or before the first frame to the last frame, wherever reading starts."""
    params = f"keyint=12:min-keyint=12:scenecut=0:bframes={bframes}:b-adapt=0:open-gop=0"
    file = write_clip(folder / "groups.mp4", 150, options={"x264-params": params})
    for first, last, keyframe in [(0, 3, 0), (11, 11, 0), (100, 101, 96), (101, 113, 96), (120, 149, 120)]:
        with av.open(str(file)) as container:
            scan = PacketScan(container, container.streams.video[0], first, last, from_start=False)
            packets = scan.packets(scan.timestamps((first, last)))
            read = scan.total - scan._kept_from
        assert packets[0].is_keyframe and abs(len(packets) - (last - keyframe + 1)) <= bframes
        assert sum(packet.is_keyframe for packet in packets) == 1 + (last - keyframe) // 12
        assert read <= len(packets) + 96  # neither the start nor the end of the file, if these are far


def test_decoding_starts_at_intact_pictures_only():
    def frames(kind, corrupt):
        start = SimpleNamespace(pts=5, pict_type=kind, is_corrupt=corrupt)
        return iter([SimpleNamespace(pts=4), start, SimpleNamespace(pts=6)])

    kinds = av.video.frame.PictureType
    assert [frame.pts for frame in _behind_intra(frames(kinds.I, False), 5)] == [5, 6]
    for kind, corrupt in [(kinds.P, False), (kinds.I, True)]:
        assert not list(_behind_intra(frames(kind, corrupt), 5))
    assert not list(_behind_intra(frames(kinds.I, False), 7))


def test_pixels_are_the_pictures(folder):
    """Against what was encoded: near enough to tell neighbours apart, so numbering cannot be off by one."""
    file = write_clip(folder / "close.mp4", 40, options={"crf": "5"})
    decoded = ask(file, range(10, 30), num_frames=40).astype(int)
    for number, frame in zip(range(10, 30), decoded, strict=True):
        errors = [np.abs(frame - picture(near)).mean() for near in range(40)]
        assert np.argmin(errors) == number and errors[number] < 8


def test_rectangle_and_repeats(folder):
    file = write_clip(folder / "rect.mp4", 20)
    truth = shown_frames(file)
    indices = [3, 3, 4, 9, 9, 9]
    part = ask(file, indices, num_frames=20, rect=(5, 40, 7, 47))
    np.testing.assert_array_equal(part, truth[indices, 7:47, 5:40])
    with pytest.raises(DecodeError, match="not inside 64x48"):
        ask(file, [0], num_frames=20, rect=(5, 65, 7, 47))


@pytest.mark.parametrize("degrees", [90, 180, -90])
def test_rotation_is_applied(folder, degrees):
    file = write_clip(folder / f"turned{degrees}.mp4", 8, rotation=degrees)
    truth = np.rot90(shown_frames(file), degrees // 90, axes=(1, 2))  # both count counter-clockwise
    height, width = truth.shape[1:3]
    np.testing.assert_array_equal(ask(file, range(8), height=height, width=width, num_frames=8), truth)
    rect = (2, 30, 10, 20)
    part = ask(file, [4], height=height, width=width, num_frames=8, rect=rect)
    np.testing.assert_array_equal(part[0], truth[4, 10:20, 2:30])
    np.testing.assert_array_equal(read_video(file), truth)


def test_clockwise_track_header_turns_clockwise(folder):
    file = write_clip(folder / "clockwise.mp4", 4)
    truth = np.rot90(shown_frames(file), -1, axes=(1, 2))
    set_track_rotation(file, 90)
    np.testing.assert_array_equal(ask(file, range(4), height=64, width=48, num_frames=4), truth)


def test_odd_rotation_is_refused(folder):
    file = write_clip(folder / "odd.mp4", 8)
    set_track_rotation(file, 37)
    with pytest.raises(DecodeError, match=r"^rotation of 37 degrees is not a multiple of 90$"):
        ask(file, [0], num_frames=8)


def broken(folder: Path, name: str) -> Path:
    """The broken file of the given name."""
    file = folder / name
    whole = write_clip(folder / "whole.mp4", 60, options={"preset": "ultrafast"}).read_bytes()
    fast = write_clip(folder / "fast.mp4", 60, muxing={"movflags": "faststart"}).read_bytes()
    if name == "directory.mp4":
        file.mkdir()
    elif name == "sound.wav":
        with wave.open(str(file), "wb") as sound:
            sound.setparams((1, 2, 8000, 0, "NONE", ""))
            sound.writeframes(bytes(8000))
    elif name != "missing.mp4":
        contents = {
            "empty.mp4": b"",
            "text.mp4": b"not a video at all\n" * 50,
            "no_index.mp4": whole[: len(whole) // 2],
            "short.mp4": fast[: len(fast) * 3 // 4],
            "random.mp4": random.Random(0).randbytes(5000),
        }
        file.write_bytes(contents[name])
    return file


@pytest.mark.parametrize(
    "name, reason",
    [
        ("missing.mp4", "missing"),
        ("directory.mp4", "is a directory"),
        ("empty.mp4", r"empty \(0 bytes\)"),
        ("text.mp4", "not a video, or damaged"),
        ("random.mp4", "not a video, or damaged"),
        ("no_index.mp4", "truncated or damaged: an mp4 file without a readable index"),
        ("short.mp4", r"truncated: \d+ of at least \d+ bytes"),
        ("sound.wav", "no video stream"),
    ],
)
def test_broken_files_are_named(tmp_path, name, reason):
    with pytest.raises(DecodeError, match=f"^{reason}$") as error:
        ask(broken(tmp_path, name), range(5), num_frames=60)
    assert error.value.whole_file


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.avi"])
def test_wrong_annotation_is_refused(tmp_path, name):
    file = write_clip(tmp_path / name, 30, codec="mpeg4" if name.endswith("avi") else "libx264")
    with pytest.raises(DecodeError, match="decoded size 64x48 differs from annotated 64x64"):
        ask(file, [0], height=64, num_frames=30)
    with pytest.raises(DecodeError, match="has only 30 frames, but the annotation says 31"):
        ask(file, [0] if name != "clip.avi" else [30], num_frames=31)


def test_damage_inside_a_file_hits_only_its_frames(tmp_path):
    file = write_clip(tmp_path / "hole.mp4", 90, options={"x264-params": "keyint=30:bframes=0:scenecut=0"})
    truth = shown_frames(file)
    with av.open(str(file)) as container:
        packet = next(p for i, p in enumerate(container.demux(video=0)) if i == 30)
        place, size = packet.pos, packet.size
    data = bytearray(file.read_bytes())
    data[place : place + size] = bytes(size)
    file.write_bytes(data)
    np.testing.assert_array_equal(ask(file, range(5, 25), num_frames=90), truth[5:25])
    np.testing.assert_array_equal(ask(file, range(60, 90), num_frames=90), truth[60:90])
    with pytest.raises(DecodeError, match="frame 30 cannot be decoded") as error:
        ask(file, range(25, 40), num_frames=90)
    assert not error.value.whole_file


def save(image: Image.Image, path: Path, **options) -> Path:
    image.save(path, **options)
    return path


def test_images(tmp_path):
    rgb = picture(3)
    image = Image.fromarray(rgb)
    assert (ask(save(image, tmp_path / "a.png"), [0], is_image=True)[0] == rgb).all()
    assert (ask(save(image, tmp_path / "a.webp", lossless=True), [0], is_image=True)[0] == rgb).all()
    jpeg = ask(save(image, tmp_path / "a.jpg", quality=98), [0], is_image=True)[0]
    assert np.abs(jpeg.astype(int) - rgb).mean() < 4
    part = ask(tmp_path / "a.png", [0], is_image=True, rect=(3, 9, 1, 48))
    assert (part[0] == rgb[1:48, 3:9]).all()

    alpha = image.convert("RGBA")
    alpha.putalpha(77)
    assert (ask(save(alpha, tmp_path / "alpha.png"), [0], is_image=True)[0] == rgb).all()
    palette = image.quantize(64)
    expected = np.asarray(palette.convert("RGB"))
    assert (ask(save(palette, tmp_path / "palette.png"), [0], is_image=True)[0] == expected).all()
    grey16 = Image.fromarray(np.arange(48 * 64, dtype=np.uint16).reshape(48, 64) * 21)
    expected = np.repeat((np.asarray(grey16) >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
    assert (ask(save(grey16, tmp_path / "deep.png"), [0], is_image=True)[0] == expected).all()
    cmyk = image.convert("CMYK")
    assert ask(save(cmyk, tmp_path / "cmyk.jpg"), [0], is_image=True).shape == (1, 48, 64, 3)


def test_exif_orientation(tmp_path):
    rgb = picture(3)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned clockwise by 90 degrees
    file = save(Image.fromarray(rgb), tmp_path / "turned.png", exif=exif)
    shown = ask(file, [0], height=64, width=48, is_image=True)[0]
    assert (shown == np.rot90(rgb, -1)).all()


def test_broken_images(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    file = save(Image.fromarray(noise), tmp_path / "a.png")
    with pytest.raises(DecodeError, match="decoded size 64x48 differs from annotated 64x50"):
        ask(file, [0], height=50, is_image=True)
    (tmp_path / "cut.png").write_bytes(file.read_bytes()[:3000])
    with pytest.raises(DecodeError, match="damaged image"):
        ask(tmp_path / "cut.png", [0], is_image=True)
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(DecodeError, match="not an image"):
        ask(tmp_path / "text.png", [0], is_image=True)
    bomb = save(Image.new("1", (20000, 10000)), tmp_path / "bomb.png")
    with pytest.raises(DecodeError, match="pixels"):
        ask(bomb, [0], height=10000, width=20000, is_image=True)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # Pillow's own limit is lower
    huge = save(Image.new("1", (15000, 10000)), tmp_path / "huge.png")
    with pytest.raises(DecodeError, match="is more than 134217728 pixels"):
        ask(huge, [0], height=10000, width=15000, is_image=True)


def test_read_video_of_a_broken_file_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match=r"missing\.mp4.*missing"):
        read_video(tmp_path / "missing.mp4")
