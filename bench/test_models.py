"""`pytest bench --benchmark-only`: the tiny models on a CPU, each result held against another way to it."""

import pytest
import torch

from bench.accuracy import relative_error
from bench.suites.dits import Case, fresh_dit, make_dit, same_dit, tiny_training
from bench.suites.sample_steps import ON_CPU as SAMPLERS
from bench.suites.sample_steps import checked_noise, exact_prediction, make_sampler, prepare
from bench.suites.stock_vae import StockDecoder, StockEncoder
from bench.suites.train_steps import ON_CPU as TRAINERS
from bench.suites.train_steps import exact_step, prepare_step
from bench.suites.vae import make_vae
from osp_fast.data.buckets import Bucket
from osp_fast.models.dit import DIT_CONFIGS

CPU = torch.device("cpu")
TINY = DIT_CONFIGS["tiny"]
CLIP = Case(Bucket(9, 64, 96), text_tokens=32)


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_dit_forward(benchmark):
    dit = fresh_dit(TINY, CPU, torch.float32)
    batch = CLIP.make_batch(TINY, CPU)
    inputs = batch.latents, batch.timesteps, batch.text, batch.text_mask
    found = benchmark(dit, *inputs)
    exact = dit.double()(*(x.double() if x.is_floating_point() else x for x in inputs))
    assert relative_error(found, exact) < 1e-4


def test_train_step(benchmark):
    case = tiny_training()
    batch = case.make_batch(TINY, CPU)
    step = prepare_step(TRAINERS[0], make_dit(TINY, CPU), case, False, print).step
    assert relative_error(step(batch), exact_step(TINY, case, CPU)) < 1e-4  # loss and norm
    benchmark(step, batch)


def test_sample_step(benchmark):
    dit = fresh_dit(TINY, CPU, torch.float32)
    sampler = make_sampler(SAMPLERS[0], prepare(SAMPLERS[0], same_dit(dit)), CLIP, 50)
    noise = checked_noise(dit, CLIP)
    found = benchmark(sampler.run, noise, range(20, 21))
    expected = sampler.ddim.step(noise, exact_prediction(dit, CLIP, 50, 20), 20)
    assert relative_error(found, expected) < 1e-4


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
