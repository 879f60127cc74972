"""Validation samples: those of the sampling pipeline, and a training that does not notice them."""

import gc
import json
import random
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from osp_fast import validation
from osp_fast.config import TrainConfig
from osp_fast.data.annotations import Entry
from osp_fast.data.buckets import Bucket, Clip, Plan
from osp_fast.data.decode import read_video
from osp_fast.data.geometry import Geometry
from osp_fast.diffusion.samplers import FLOW_METHOD
from osp_fast.diffusion.schedule import DiffusionObjective
from osp_fast.errors import UserError
from osp_fast.models.dit import DiT, DiTConfig
from osp_fast.models.wfvae import WFVAE
from osp_fast.parallel.apply import shard_dit
from osp_fast.pipeline import VideoPipeline
from osp_fast.training.state import recipe_of
from osp_fast.training.step import DenoisingLoss, MicroBatch
from osp_fast.validation import ValidationSampler, add_to_board

CPU = torch.device("cpu")
VAE_FOLDER = Path(__file__).parent / "golden/vae"
CONFIG = DiTConfig(
    num_layers=3, num_attention_heads=2, attention_head_dim=12, caption_channels=8, cross_attention_dim=24
)


class Letters(nn.Module):
    """A text encoder whose states depend on the text's letters."""

    is_multilingual = False

    def forward(self, texts):
        states = torch.zeros(len(texts), 6, CONFIG.caption_channels)
        for row, text in enumerate(texts):
            for place, letter in enumerate(text):
                states[row, place % 6, ord(letter) % CONFIG.caption_channels] += 0.3
        return states, torch.ones(len(texts), 6)


@pytest.fixture(scope="module")
def vae():
    return WFVAE.from_pretrained(VAE_FOLDER).requires_grad_(False)


@pytest.fixture
def config(tmp_path):
    config = TrainConfig()
    config.run.output_dir, config.run.validation_sampling_steps = str(tmp_path), 2
    config.model.ae_path = str(VAE_FOLDER)
    config.diffusion.prediction_type, config.diffusion.rescale_betas_zero_snr = "v_prediction", True
    return config


@pytest.fixture
def plan():
    """Most clips are of 5x16x32, and two of them have one caption."""
    entry = Entry("1.mp4", "1.mp4", ("A RED circle",), 16, 32, 5, 24.0, None, None, None, False)
    small, large = Bucket(5, 16, 32), Bucket(5, 32, 32)
    captions = ("a tower", "A RED circle", "a RED  circle", "@someone", "a blue square")
    clips = [
        Clip(replace(entry, captions=(caption,)), small if number else large, Geometry((0, 32, 0, 16), 16, 32))
        for number, caption in enumerate(captions)
    ]
    return Plan(clips, buckets={large: [0], small: [1, 2, 3, 4]})


def make_dit():
    dit = DiT.create(CONFIG, 0).train()
    with torch.no_grad():
        for parameter in dit.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return dit


def test_the_samples_are_those_of_sampling(config, plan, vae, tmp_path):
    clips, said, dit = [], [], make_dit()
    sampler = ValidationSampler(
        config, plan, CPU, vae, Letters(), report=said.append, on_clip=lambda *clip: clips.append(clip)
    )
    folder = tmp_path / "validation/step-12"
    assert sampler(dit, 12) == [folder / "0.mp4", folder / "1.mp4", folder / "grid.mp4"]
    prompts = ["a red circle", "a blue square"]
    assert [(index, prompt, step) for index, prompt, _, step in clips] == [(0, prompts[0], 12), (1, prompts[1], 12)]
    expected = VideoPipeline(dit, vae, Letters(), recipe_of(config)).generate(
        prompts,
        num_frames=5,
        height=16,
        width=32,
        steps=2,
        guidance_scale=7.5,
        method="EulerAncestralDiscrete",
        seed=42,
    )
    for (_, _, frames, _), clip in zip(clips, expected, strict=True):
        assert np.array_equal(frames, clip.frames) and frames.std() > 1
    assert read_video(folder / "1.mp4").shape == (5, 16, 32, 3)
    sidecar = json.loads((folder / "1.json").read_text())
    facts = dict(step=12, prompt=prompts[1], num_sampling_steps=2, prediction_type="v_prediction", seed=42, fps=24.0)
    assert {name: sidecar[name] for name in facts} == facts
    assert len(said) == 1 and said[0].startswith(f"validation: 2 clips of 5x16x32 in {folder}")
    board = Board()
    add_to_board(board, *clips[0])
    assert board.image.shape == (16, 5 * 32 + 4 * 2, 3)


class Board:
    def add_image(self, name, image, step, dataformats):
        assert (name, step, dataformats) == ("validation/0", 12, "HWC")
        self.image = image

    def add_text(self, name, text, step):
        assert (name, text, step) == ("validation/0", "a red circle", 12)


def test_prompts_and_method_follow_the_run(config, plan, vae, tmp_path):
    config.run.validation_prompt, config.run.preset = ["A CAT  sleeps"], "tiny"
    config.diffusion.rf_scheduler = True
    plan.buckets = {Bucket(1, 32, 16): [0, 1, 2]}
    sampler = ValidationSampler(config, plan, CPU, vae, Letters())
    paths = sampler(make_dit(), 1)
    assert [path.name for path in paths] == ["0.jpg"]
    sidecar = json.loads((tmp_path / "validation/step-1/0.json").read_text())
    assert (sidecar["prompt"], sidecar["sample_method"]) == ("a cat sleeps", FLOW_METHOD)
    assert (sidecar["guidance_scale"], sidecar["negative_prompt"]) == (2.5, "")  # as --preset tiny is sampled
    config.diffusion.rf_scheduler, config.diffusion.prediction_type = False, "sample"
    assert len(ValidationSampler(config, plan, CPU, vae, Letters())(make_dit(), 2)) == 1
    config.run.validation_sampling_steps = 1
    with pytest.raises(UserError, match="--validation_sampling_steps 1 is out of range for DDIM"):
        ValidationSampler(config, plan, CPU, vae, Letters())
    config.run.validation_prompt = ["a cat", "@someone"]
    config.run.validation_sampling_steps = 2
    with pytest.raises(UserError, match=r"--validation_prompt .@someone. is empty after cleaning"):
        ValidationSampler(config, plan, CPU, vae, Letters())


def train(config, validate):
    """Two steps of two micro-batches with compiled blocks and bf16. Returns weights and states, and the graphs."""
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    dit = make_dit()
    for block in dit.transformer_blocks:
        block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False, backend=count)
    loss = DenoisingLoss(dit, DiffusionObjective(config.diffusion), bf16=True)
    optimizer = torch.optim.AdamW(dit.parameters(), 0.01)
    draw = torch.Generator().manual_seed(3)
    torch.manual_seed(5)
    for step in range(2):
        for _ in range(2):
            latents, noise = (torch.randn(2, 8, 2, 2, 4, generator=draw) for _ in range(2))
            text = torch.randn(2, 6, CONFIG.caption_channels, generator=draw)
            batch = MicroBatch(latents, noise, torch.tensor([10, 700]), text, torch.ones(2, 6))
            loss(batch).sum().backward()
            validate(dit, step)  # between two backwards, so that gradients are there
        optimizer.step()
        optimizer.zero_grad()
    torch._dynamo.reset()
    numpy_state = torch.tensor(np.random.get_state()[1].astype(np.int64))
    states = dict(torch=torch.get_rng_state(), numpy=numpy_state, training=torch.tensor(dit.training))
    return {**dit.state_dict(), **states}, graphs


def test_training_with_validation_is_training_without(config, plan, vae):
    config.model.mixed_precision = "bf16"
    random.seed(1)
    np.random.seed(1)
    before = random.getstate()
    expected, graphs = train(config, lambda dit, step: None)
    sampler = ValidationSampler(config, plan, CPU, vae, Letters())
    clips = []
    found, again = train(config, lambda dit, step: clips.append(sampler(dit, step)))
    assert len(clips) == 4 and all(len(paths) == 3 for paths in clips)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert random.getstate() == before
    assert not torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()
    assert len(again) == len(graphs)  # nothing was compiled for sampling


def test_a_run_from_a_latent_cache_loads_networks_for_a_moment(config, plan, vae, monkeypatch):
    alive = []

    def watched(load):
        def loaded(*arguments):
            network = load(*arguments)
            alive.append(weakref.ref(network))
            return network

        return loaded

    monkeypatch.setattr(validation, "load_text_encoder", watched(lambda model, device: Letters()))
    monkeypatch.setattr(validation, "load_vae", watched(validation.load_vae))
    with torch.device("meta"):
        nowhere = WFVAE(WFVAE.read_config(VAE_FOLDER))
    dit, clips = make_dit(), []
    sampler = ValidationSampler(config, plan, CPU, nowhere, on_clip=lambda *clip: clips.append(clip[2]))
    assert len(sampler(dit, 1)) == len(sampler(dit, 2)) == 3
    gc.collect()
    assert len(alive) == 3 and not any(reference() for reference in alive)
    ValidationSampler(config, plan, CPU, vae, Letters(), on_clip=lambda *clip: clips.append(clip[2]))(dit, 3)
    assert len(clips) == 6 and all(np.array_equal(clips[n], clips[n % 2]) for n in range(6))


def test_ranks_that_do_not_write_call_the_dit_as_often(config, plan, vae, tmp_path):
    calls = []
    dit = make_dit()
    dit.register_forward_hook(lambda *call: calls.append(call))
    for writes in (True, False):
        paths = ValidationSampler(config, plan, CPU, vae, Letters(), writes=writes, stopped=lambda: False)(dit, 1)
        assert bool(paths) == writes
    assert len(calls) == 2 * 2 * 2
    calls.clear()
    assert ValidationSampler(config, plan, CPU, vae, Letters(), stopped=lambda: True)(dit, 9) == []
    assert len(calls) == 1 and not (tmp_path / "validation/step-9").exists()


def test_a_sample_that_fails_does_not_end_the_training(config, plan, vae, tmp_path):
    said = []
    dit = make_dit()
    sampler = ValidationSampler(config, plan, CPU, vae, Letters(), report=said.append)
    (tmp_path / "validation").write_text("not a folder")
    assert sampler(dit, 7) == []
    assert said[0].startswith("validation at step 7 failed, and training goes on: ") and "Not a directory" in said[0]
    with torch.no_grad():
        dit.proj_out.bias.fill_(float("nan"))
    assert sampler(dit, 8) == [] and "numbers that are not finite" in said[1]
    assert len(said) == 2


def test_sharded_weights_are_gathered_and_left_as_they_were(config, plan, vae):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        clips, plain, sharded = [], make_dit(), make_dit()
        mesh = init_device_mesh("cpu", (1,))
        shard_dit(sharded, mesh)
        sampler = ValidationSampler(config, plan, CPU, vae, Letters(), on_clip=lambda *clip: clips.append(clip[2]))
        for dit in (plain, sharded):
            shards = list(dit.parameters())
            sampler(dit, 1)
            # What the optimizer does to the shards must be seen by the next sample.
            with torch.no_grad():
                for parameter in shards:
                    parameter.mul_(1.01)
            sampler(dit, 2)
        assert len(clips) == 8 and all(np.array_equal(clips[n], clips[n + 4]) for n in range(4))
        assert not np.array_equal(clips[0], clips[2])
    finally:
        dist.destroy_process_group()
