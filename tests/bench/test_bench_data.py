"""The suite `data` on short clips: what readers give, what is wrong or missing, and the cache beside live encoding."""

import pytest
import torch

from bench.measure import Timing
from bench.results import Ceilings, complete_case
from bench.suites import Options, Setting, data, data_readers
from bench.suites.data_readers import Source
from osp_fast.data.buckets import Bucket
from osp_fast.data.dataset import clip_pixels
from osp_fast.data.resize import resize_and_crop

SOURCE, FIRST, BUCKET = Source(100, 64, 96), 75, Bucket(17, 40, 64)
LIMITS = Ceilings(1e12, 1e10)


def count_them(contestants, device, effort):
    assert device.type == "cpu"
    for one in contestants:
        one.calls[0]()
    return {one.name: Timing([[float(place)]]) for place, one in enumerate(contestants, 1)}


def rows_of(measure, case: str) -> list:
    setting = Setting(torch.device("cpu"), LIMITS, say=[].append, timer=count_them)
    rows = data._measure(measure, case, SOURCE, FIRST, BUCKET, setting)
    complete_case(rows, LIMITS)
    return rows


@pytest.fixture(scope="module")
def decoded() -> dict:
    return {row.impl: row for row in rows_of(data.measure_decode, "decode")}


def test_jobs_are_the_same_everywhere():
    cases = [[(job.case, job.seconds) for job in data.jobs(Options(device))] for device in ("cpu", "cuda")]
    assert cases[0] == cases[1] and [case for case, _ in cases[0]] == [*data.DECODE, *data.CACHE]
    for source, first, bucket in (*data.DECODE.values(), *data.CACHE.values()):
        assert first + bucket.frames <= source.frames
        assert source.height >= bucket.height and source.width >= bucket.width


def test_readers_give_the_same_pixels(decoded):
    roles = {"osp_fast": "ours", "reference": "reference", "strong": "strong", "decord": "peer", "torchcodec": "peer"}
    assert {name: row.role for name, row in decoded.items()} == roles
    for name in ("osp_fast", "reference", "strong"):
        row = decoded[name]
        assert row.ok and row.rel_err < data.DECODE_TOLERANCE / 2 and row.ms
        assert row.figures["frames_per_second"] == pytest.approx(17 / row.ms * 1e3)
    assert decoded["reference"].rel_err < 1e-5 < decoded["osp_fast"].rel_err  # the one rounds to levels
    assert decoded["osp_fast"].vs["reference"] == 2


def test_what_is_not_installed_is_a_row(decoded):
    for name in ("decord", "torchcodec"):
        if not data_readers.installed(name):
            assert not decoded[name].ok and decoded[name].note == f"{name} is not installed"


def test_frames_that_are_others_are_wrong(monkeypatch):
    """One frame later, or a crop one pixel beside: neither is timed."""

    def late(decoder, clip, indices, threads):
        return clip_pixels(decoder, clip, [index + 1 for index in indices], threads)

    def beside(frames, task):
        return resize_and_crop(frames, task.clip.geometry, task.bucket).roll(1, -1)

    monkeypatch.setattr(data_readers, "clip_pixels", late)
    monkeypatch.setattr(data_readers, "_of_uint8", beside)
    rows = {row.impl: row for row in rows_of(data.measure_decode, "decode")}
    for name in ("osp_fast", "strong"):
        assert not rows[name].ok and rows[name].ms is None and rows[name].note.startswith("WRONG, not timed: off by")
    assert rows["reference"].ok and rows["osp_fast"].vs == {}


def test_without_pyav_a_case_is_one_row(monkeypatch):
    monkeypatch.setattr(data, "installed", lambda name: name != "av")
    for measure in (data.measure_decode, data.measure_cache):
        (row,) = rows_of(measure, "some case")
        assert (row.impl, row.ok, row.note) == ("osp_fast", False, "not measured: av not installed")


def test_a_cache_beside_what_it_saves():
    cached, reference, live = rows_of(data.measure_cache, "cache")
    assert [(row.impl, row.role) for row in (cached, reference, live)] == [
        ("osp_fast", "ours"), ("reference", "reference"), ("osp_fast live", "variant"),
    ]  # fmt: skip
    for row in (cached, reference, live):
        assert row.ok and row.rel_err < data.CACHE_TOLERANCE, row.note
    assert cached.vs == {"reference": 2, "osp_fast live": 3}
