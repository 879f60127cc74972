"""What depends on the text or the timestep alone, computed once, and blocks that are skipped."""

import pytest
import torch

from osp_fast.diffusion.step_cache import FirstBlockCache
from osp_fast.models.dit import DiT, DiTConfig

CONFIG = DiTConfig(
    num_layers=4, num_attention_heads=2, attention_head_dim=24, caption_channels=16, cross_attention_dim=48
)
SHAPE = (2, 8, 2, 4, 6)


@pytest.fixture(scope="module")
def dit() -> DiT:
    model = DiT.create(CONFIG, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return model


def drawn(*shape: int, seed: int = 2) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def text() -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[1, 2:] = 0
    return drawn(2, 5, CONFIG.caption_channels), mask


@torch.no_grad()
def test_text_keys_once_are_text_keys_each_time(dit, text):
    latents, timestep = drawn(*SHAPE), torch.tensor([900, 900])
    context = dit.text_context(*text)
    assert len(context.keys) == 4 and context.keys[0].keys.shape == (2, 5, 2, 24)
    assert torch.equal(dit(latents, timestep, context), dit(latents, timestep, *text))


@torch.no_grad()
def test_a_text_context_is_of_its_text(dit, text):
    latents, timestep = drawn(*SHAPE), torch.tensor([900, 900])
    other = dit.text_context(text[0].flip(0), text[1])
    assert not torch.allclose(dit(latents, timestep, other), dit(latents, timestep, *text), atol=1e-4)


@torch.no_grad()
def test_all_timesteps_at_once(dit, text):
    latents, timesteps = drawn(*SHAPE), torch.tensor([999.0, 500.5, 3.0])
    times = dit.time_context(timesteps)
    for index, timestep in enumerate(timesteps):
        expected = dit(latents, timestep.expand(2), *text)
        found = dit(latents, times.at(index, 2), *text)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_a_step_cache_that_never_skips_changes_rounding_only(dit, text):
    cache = FirstBlockCache(threshold=1e-9)
    for seed in (2, 3):
        latents = drawn(*SHAPE, seed=seed)
        found = dit(latents, torch.tensor([900, 900]), *text, step_cache=cache)
        torch.testing.assert_close(found, dit(latents, torch.tensor([900, 900]), *text), rtol=1e-5, atol=1e-5)
    assert (cache.calls, cache.skipped) == (2, 0)


@torch.no_grad()
def test_a_step_that_is_like_the_last_full_one_is_skipped(dit, text):
    ran = []
    hooks = [
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
        for number, block in enumerate(dit.transformer_blocks)
    ]
    cache, latents, timestep = FirstBlockCache(threshold=0.2), drawn(*SHAPE), torch.tensor([900, 900])
    first = dit(latents, timestep, *text, step_cache=cache)
    near = dit(latents + 1e-3 * drawn(*SHAPE, seed=4), timestep, *text, step_cache=cache)
    assert ran == [0, 1, 2, 3, 0] and cache.skipped == 1
    torch.testing.assert_close(near, first, rtol=0.05, atol=0.05)
    # Compared with the last full step, not with the skipped one, so that small changes add up.
    dit(drawn(*SHAPE, seed=5), timestep, *text, step_cache=cache)
    assert ran[5:] == [0, 1, 2, 3] and (cache.calls, cache.skipped) == (3, 1)
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def test_one_clip_of_a_batch_that_changed_is_enough(dit, text):
    cache, latents, timestep = FirstBlockCache(threshold=0.2), drawn(*SHAPE), torch.tensor([900, 900])
    dit(latents, timestep, *text, step_cache=cache)
    changed = latents.clone()
    changed[1] = drawn(*SHAPE, seed=6)[1]
    dit(changed, timestep, *text, step_cache=cache)
    assert cache.skipped == 0


@torch.no_grad()
def test_ranks_decide_together(dit, text):
    """One that sees the greater change of another rank goes on, too."""
    cache = FirstBlockCache(0.2, agree=lambda sums: sums * torch.tensor([1e6, 1.0]))
    latents, timestep = drawn(*SHAPE), torch.tensor([900, 900])
    for _ in range(2):
        dit(latents + 1e-3 * drawn(*SHAPE, seed=7), timestep, *text, step_cache=cache)
        latents = latents * 1.001
    assert cache.skipped == 0
