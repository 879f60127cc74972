"""`pytest bench --benchmark-only`: a clip decoded, a clip and caption read from a latent cache, a caption encoded."""

from contextlib import ExitStack

import pytest
import torch

from bench.accuracy import relative_error
from bench.suites.data_cache import embedded_encoder, filled_cache
from bench.suites.data_readers import Source, Task, exact_pixels, readers, write_source
from osp_fast.data.buckets import Bucket

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """17 frames amid a video of 48."""
    folder = tmp_path_factory.mktemp("data")
    task = Task(folder / "clip.mp4", Source(48, 192, 320), 11, Bucket(17, 160, 256))
    write_source(task.file, task.source)
    return task


def test_decode(task, benchmark):
    expected = exact_pixels(task)
    with ExitStack() as stack:
        read = next(make for _, role, make in readers(task, stack) if role == "ours")()
        assert relative_error(benchmark(read), expected) < 0.01


def test_read_cache(task, tmp_path, benchmark):
    generator = torch.Generator().manual_seed(0)
    moments, states = (torch.randn(shape, generator=generator) for shape in ((16, 5, 20, 32), (9, 64)))
    cache = filled_cache(tmp_path / "cache", task, moments, states)
    found = benchmark(lambda: (cache.moments(task.clip, task.indices), cache.text(task.caption)))
    assert all(torch.equal(*pair) for pair in zip(found, (moments, states), strict=True))


def test_encode_text(task, tmp_path, benchmark):
    encode = embedded_encoder(64, CPU)
    states, mask = benchmark(lambda: encode([task.caption]))
    real = mask[0].bool()
    encode.max_length = int(real.sum())  # without padding
    assert relative_error(states[0, real], encode([task.caption])[0][0]) < 1e-5
