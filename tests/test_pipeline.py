"""The path from prompt to frames on a small random model."""

import dataclasses
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from osp_fast.config import Recipe
from osp_fast.diffusion.samplers import FLOW_METHOD
from osp_fast.errors import UserError
from osp_fast.models.dit import DiT, DiTConfig
from osp_fast.models.wfvae import WFVAE
from osp_fast.pipeline import VideoPipeline, resolve_parametrization
from osp_fast.pipeline.decoding import Beside
from osp_fast.pipeline.networks import Held
from osp_fast.pipeline.run import Run
from osp_fast.pipeline.sampler import padded, trimmed
from osp_fast.pipeline.settings import NEGATIVE_PROMPT

VAE_FOLDER = Path(__file__).parent / "golden/vae"
CONFIG = DiTConfig(
    num_layers=2, num_attention_heads=2, attention_head_dim=24, caption_channels=12, cross_attention_dim=48
)
RECIPE = Recipe("v_prediction", True, False, 24.0, 9, "32x32", 16)
SETTINGS = dict(num_frames=5, height=16, width=32, steps=2, guidance_scale=3.0, method="DDIM", seed=1)


class LetterStates(nn.Module):
    """Stands for a text encoder: states that depend on the text, and a record of what it was asked."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.asked = []

    def forward(self, texts):
        self.asked += texts
        states = torch.zeros(len(texts), 6, CONFIG.caption_channels)
        for row, text in enumerate(texts):
            for place, letter in enumerate(text):
                states[row, place % 6, ord(letter) % CONFIG.caption_channels] += 0.3
        return states, torch.ones(len(texts), 6)


@pytest.fixture(scope="module")
def networks():
    dit = DiT.create(CONFIG, seed=0)
    # A fresh DiT ends in zeros: fill them, so that its output depends on text and latents.
    with torch.no_grad():
        for parameter in dit.parameters():
            if not parameter.any() and parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter, generator=torch.Generator().manual_seed(1))
    return dit, WFVAE.from_pretrained(VAE_FOLDER)


@pytest.fixture
def letters():
    return LetterStates()


@pytest.fixture
def pipeline(networks, letters):
    return VideoPipeline(*networks, letters)


def frames_of(pipeline, prompts=("a cat",), **changes):
    return [clip.frames for clip in pipeline.generate(list(prompts), **{**SETTINGS, **changes})]


def test_clips_come_prompt_by_prompt(pipeline):
    calls = []
    clips = list(
        pipeline.generate(
            ["a cat", "a dog"], **SETTINGS, samples_per_prompt=2, on_step=lambda *step: calls.append(step)
        )
    )
    assert [(c.prompt_index, c.sample_index, c.prompt, c.seed) for c in clips] == [
        (0, 0, "a cat", 1),
        (0, 1, "a cat", 1),
        (1, 0, "a dog", 1),
        (1, 1, "a dog", 1),
    ]
    assert calls == [(p, s, done, 2) for p in (0, 1) for s in (0, 1) for done in (1, 2)]
    for clip in clips:
        assert clip.frames.dtype == np.uint8 and clip.frames.shape == (5, 16, 32, 3)
        assert clip.frames.std() > 1


def test_texts_are_encoded_once_with_template_and_negative_prompt(pipeline, letters):
    frames_of(pipeline, ["a cat", "a dog"], samples_per_prompt=2)
    prefix = "high quality, high aesthetic, "
    assert letters.asked == [prefix + "a cat", prefix + "a dog", NEGATIVE_PROMPT]
    letters.asked.clear()
    frames_of(pipeline, negative_prompt="", guidance_scale=2.0)
    assert letters.asked == [prefix + "a cat", ""]
    letters.asked.clear()
    frames_of(pipeline, guidance_scale=1.0)
    assert letters.asked == [prefix + "a cat"]


@pytest.mark.parametrize("method", ["DDIM", "EulerAncestralDiscrete"])
def test_a_sample_depends_on_seed_and_its_own_place_only(pipeline, method):
    alone = frames_of(pipeline, ["a cat"], method=method)[0]
    among = frames_of(pipeline, ["a cat", "a dog"], method=method, samples_per_prompt=2)
    assert np.array_equal(among[0], alone)
    assert not np.array_equal(among[1], alone)
    assert not np.array_equal(frames_of(pipeline, ["a cat"], method=method, seed=2)[0], alone)
    assert not np.array_equal(frames_of(pipeline, ["a dog"], method=method)[0], alone)


def test_prompt_negative_prompt_and_guidance_matter(pipeline):
    base = frames_of(pipeline)[0].astype(int)
    for change in (dict(prompts=["zebra"]), dict(negative_prompt="x"), dict(guidance_scale=1.0)):
        assert np.abs(frames_of(pipeline, **change)[0] - base).mean() > 0.05, change


def test_tiles_change_nothing(pipeline):
    base = frames_of(pipeline, num_frames=9)[0].astype(int)
    assert np.abs(frames_of(pipeline, num_frames=9, tiles=(1, None, None))[0] - base).max() <= 1


def test_frames_come_while_the_clip_is_decoded(pipeline):
    pieces, said = [], []
    clip = next(
        pipeline.generate(
            ["a cat"],
            **{**SETTINGS, "num_frames": 17},
            most_latent_frames=2,
            on_frames=lambda prompt, sample, frames: pieces.append((prompt, sample, frames)),
            report=said.append,
        )
    )
    assert [(prompt, sample, len(frames)) for prompt, sample, frames in pieces] == [(0, 0, 3), (0, 0, 8), (0, 0, 6)]
    assert np.array_equal(np.concatenate([frames for *_, frames in pieces]), clip.frames)
    assert len(said) == 1 and said[0].startswith("VAE decode of 17x16x32: 2 of 5 latent frames at once")


def test_memory_that_is_not_enough_is_refused_before_anything_is_computed(pipeline, letters):
    with pytest.raises(UserError, match="VAE decode of 5x16x32 needs at least .* by --vae_memory"):
        pipeline.generate(["a cat"], **SETTINGS, vae_memory=1000)
    assert not letters.asked
    base = frames_of(pipeline, num_frames=9)[0].astype(int)
    assert np.abs(frames_of(pipeline, num_frames=9, vae_memory=3 << 20)[0] - base).max() <= 1


def test_save_memory_holds_one_network_at_a_time(networks, letters, pipeline, monkeypatch):
    base = frames_of(pipeline)[0]
    # cpu:0, so that a move to the device differs from one back to the CPU.
    frugal = VideoPipeline(*networks, letters, device="cpu:0", save_memory=True)
    moves = []
    for name, network in zip(("dit", "vae", "text_encoder"), (*networks, letters), strict=True):
        monkeypatch.setattr(network, "to", lambda place, name=name: moves.append((name, str(place))))
    clips = frames_of(frugal, samples_per_prompt=2)
    assert np.array_equal(clips[0], base)
    order = ["text_encoder", "dit", "vae", "dit", "vae"]
    assert moves == [(name, place) for name in order for place in ("cpu:0", "cpu")]


def test_decoding_beside_the_next_clip_changes_nothing(pipeline, monkeypatch):
    expected = list(pipeline.generate(["a cat", "a dog"], **SETTINGS, samples_per_prompt=2))
    monkeypatch.setattr(Run, "beside", lambda run: Beside(torch.device("cpu"), overlap=True))
    threads, calls, pieces = set(), [], []

    def on_frames(prompt, sample, frames):
        threads.add(threading.current_thread().name)
        pieces.append((prompt, sample))

    clips = pipeline.generate(
        ["a cat", "a dog"],
        **SETTINGS,
        samples_per_prompt=2,
        on_step=lambda *step: calls.append(step[:2]),
        on_frames=on_frames,
    )
    first = next(clips)
    assert calls == [(0, 0)] * 2 + [(0, 1)] * 2  # the second one is denoised before the first one is given
    found = [first, *clips]
    assert [(c.prompt_index, c.sample_index) for c in found] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert all(np.array_equal(a.frames, b.frames) for a, b in zip(found, expected, strict=True))
    assert sorted(set(pieces)) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert len(threads) == 1 and "decoding" in threads.pop()


def test_an_error_of_decoding_beside_ends_the_run(pipeline, monkeypatch):
    monkeypatch.setattr(Run, "beside", lambda run: Beside(torch.device("cpu"), overlap=True))

    def full(prompt, sample, frames):
        raise UserError("the disk is full")

    with pytest.raises(UserError, match="the disk is full"):
        list(pipeline.generate(["a cat", "a dog", "a bird"], **SETTINGS, on_frames=full))


def test_a_callback_ends_a_run(pipeline):
    class Enough(Exception):
        pass

    def stop(prompt, sample, done, calls):
        if prompt == 1:
            raise Enough

    clips = pipeline.generate(["a cat", "a dog"], **SETTINGS, on_step=stop)
    assert next(clips).prompt == "a cat"
    with pytest.raises(Enough):
        next(clips)


def test_the_step_cache_is_off_by_default_and_of_one_clip(pipeline):
    plain = frames_of(pipeline, steps=6, samples_per_prompt=2)
    never = frames_of(pipeline, steps=6, samples_per_prompt=2, step_cache=1e-9)
    often = frames_of(pipeline, steps=6, samples_per_prompt=2, step_cache=1.0)
    for clip in (0, 1):
        assert np.abs(plain[clip].astype(int) - never[clip]).max() <= 1
        assert not np.array_equal(plain[clip], often[clip])
    assert np.array_equal(frames_of(pipeline, steps=6, step_cache=1.0)[0], often[0])


@torch.no_grad()
def test_a_text_without_its_padding_is_the_same_text(networks):
    dit = networks[0]
    states = torch.randn(1, 9, CONFIG.caption_channels, generator=torch.Generator().manual_seed(3))
    mask = torch.tensor([[1, 1, 1, 1, 0, 0, 0, 0, 0]])
    kept = trimmed(states, mask)
    assert kept.states.shape == (1, 4, CONFIG.caption_channels)
    latents = torch.randn(1, 8, 2, 2, 4, generator=torch.Generator().manual_seed(4))
    timestep = torch.tensor([500])
    assert torch.equal(dit(latents, timestep, *padded(kept)), dit(latents, timestep, states, mask))
    assert trimmed(states, torch.zeros_like(mask)).states.shape[1] == 0


def test_a_network_from_a_folder_comes_and_goes():
    loaded, device = [], torch.device("cpu")

    def load():
        loaded.append(nn.Linear(2, 2))
        return loaded[-1]

    held = Held(device, load=load, keep=False, leaves=True)
    for _ in range(2):
        with held.use() as network:
            assert network is loaded[-1]
    assert len(loaded) == 2
    held = Held(device, load=load)  # one that stays
    with held.use() as network:
        pass
    with held.use() as again:
        assert again is network and len(loaded) == 3
    held.leave()
    with held.use() as again:  # from memory
        assert again is network and len(loaded) == 3


def test_flow_without_a_recipe(pipeline):
    assert frames_of(pipeline, method=FLOW_METHOD)[0].shape == (5, 16, 32, 3)


def test_an_image_is_one_frame(pipeline):
    assert frames_of(pipeline, num_frames=1)[0].shape == (1, 16, 32, 3)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(num_frames=6), "--num_frames 6 .* 4n\\+1"),
        (dict(num_frames=0), "--num_frames 0"),
        (dict(height=24), "--height 24 .* 16"),
        (dict(width=0), "--width 0"),
        (dict(steps=1), "--num_sampling_steps 1"),
        (dict(method="EulerAncestralDiscrete", prediction_type="sample"), "predicts 'sample'"),
    ],
)
def test_settings_are_checked_before_anything_is_computed(pipeline, changes, words):
    with pytest.raises(UserError, match=words):
        pipeline.generate(["a cat"], **{**SETTINGS, **changes})


def test_recipe_decides(networks):
    flow = dataclasses.replace(RECIPE, rectified_flow=True)
    assert resolve_parametrization(None, "DDIM") == ("epsilon", False, False)
    assert resolve_parametrization(None, "DDIM", "v_prediction", True) == ("v_prediction", True, False)
    assert resolve_parametrization(None, FLOW_METHOD) == ("velocity", False, True)
    assert resolve_parametrization(RECIPE, "DDIM") == ("v_prediction", True, False)
    assert resolve_parametrization(RECIPE, "DDIM", "v_prediction", True) == ("v_prediction", True, False)
    assert resolve_parametrization(flow, "DDIM") == ("velocity", False, True)
    with pytest.raises(UserError, match="--prediction_type epsilon contradicts"):
        resolve_parametrization(RECIPE, "DDIM", "epsilon")
    with pytest.raises(UserError, match="--rescale_betas_zero_snr False contradicts"):
        resolve_parametrization(RECIPE, "DDIM", None, False)
    trained = VideoPipeline(*networks, LetterStates(), RECIPE)
    explicit = VideoPipeline(*networks, LetterStates())
    by_flags = frames_of(explicit, prediction_type="v_prediction", rescale_betas_zero_snr=True)[0]
    assert np.array_equal(frames_of(trained)[0], by_flags)
    assert not np.array_equal(frames_of(explicit)[0], by_flags)
    with pytest.raises(UserError, match="use FlowMatchEulerDiscrete"):
        frames_of(VideoPipeline(*networks, LetterStates(), flow))
    with pytest.raises(UserError, match="needs a model trained with rectified flow"):
        frames_of(trained, method=FLOW_METHOD)
