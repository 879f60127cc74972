"""`pytest bench --benchmark-only`: the tiny models on a CPU, each result held against another way to it."""

import pytest
import torch

from bench.accuracy import relative_error
from bench.sample_steps import ON_CPU as SAMPLERS
from bench.sample_steps import fresh_dit, make_noise, make_sampler, prepare, same_dit
from bench.suites.stock_vae import StockDecoder, StockEncoder
from bench.suites.vae import make_vae
from bench.train import tiny_case
from bench.train_steps import ON_CPU as TRAINERS
from bench.train_steps import Case, make_dit, prepare_step
from bench.verify_models import lively_dit
from osp_fast.data.buckets import Bucket
from osp_fast.models.dit import DIT_CONFIGS

CPU = torch.device("cpu")
TINY = DIT_CONFIGS["tiny"]
CLIP = Case(Bucket(9, 64, 96), text_tokens=32)


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_dit_forward(benchmark):
    dit = lively_dit(TINY, CPU)
    batch = CLIP.make_batch(TINY, CPU)
    inputs = batch.latents, batch.timesteps, batch.text, batch.text_mask
    found = benchmark(dit, *inputs)
    exact = dit.double()(*(x.double() if x.is_floating_point() else x for x in inputs))
    assert relative_error(found, exact) < 1e-4


def test_train_step(benchmark):
    case = tiny_case()
    batch = case.make_batch(TINY, CPU)
    ours, plain = (prepare_step(one, make_dit(TINY, CPU), case, False, print) for one in TRAINERS)
    assert relative_error(ours(batch), plain(batch)) < 1e-4  # loss and norm
    benchmark(ours, batch)


def test_sample_step(benchmark):
    dit = fresh_dit(TINY, CPU, torch.float32)
    ours, plain = (make_sampler(one, prepare(one, same_dit(dit)), CLIP, 50) for one in (SAMPLERS[0], SAMPLERS[-1]))
    noise = make_noise(TINY, CLIP, CPU)
    found = benchmark(ours.run, noise, range(20, 21))
    assert relative_error(found, plain.run(noise, range(20, 21))) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_vae(direction, benchmark):
    vae = make_vae("tiny", CPU, torch.float32)
    if direction == "encode":
        x = draw(1, 3, 9, 64, 96)
        assert relative_error(benchmark(vae.encode, x).mean, StockEncoder(vae, False)(x).chunk(2, dim=1)[0]) < 1e-4
    else:
        x = draw(1, 8, 3, 8, 12)
        assert relative_error(benchmark(vae.decode, x), StockDecoder(vae, False)(x)) < 1e-4
