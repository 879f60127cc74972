"""Plans of sampling's memory: they fit, they are fast where they can be, and what they predict is what is allocated."""

import importlib.util
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from osp_fast.diffusion.denoise import Text
from osp_fast.engine.cost import Workload
from osp_fast.engine.devices import H100
from osp_fast.engine.forward_peak import denoising_bytes, refiner_bytes, weight_bytes
from osp_fast.engine.sampling_cost import Streaming, pass_seconds
from osp_fast.engine.sampling_needs import SamplingNeeds, spread
from osp_fast.engine.sampling_plan import SamplingFacts
from osp_fast.engine.stages import plan_sampling, plan_within
from osp_fast.errors import UserError
from osp_fast.models.dit import DIT_CONFIGS, DiT
from osp_fast.models.quantize import quantize_linear_weights
from osp_fast.models.text_encoder import TextEncoder, TextEncoderFacts, encoder_layers, text_encoder_on_meta
from osp_fast.models.transformers_folder import network_on_meta
from osp_fast.models.wfvae import WFVAE, WFVAE_CONFIGS
from osp_fast.models.wfvae_plan import Task
from osp_fast.models.wfvae_trace import LiveBytes
from osp_fast.parallel.links import Link
from osp_fast.parallel.sequence import SequenceExchange
from osp_fast.parallel.sequence_plan import SequencePlan
from osp_fast.pipeline.decoding import Decoder
from osp_fast.pipeline.networks import Held
from osp_fast.pipeline.sampler import ClipSampler
from osp_fast.pipeline.settings import ClipSettings
from osp_fast.training.footprint import fake_world

SPEC = importlib.util.spec_from_file_location("allocations", Path(__file__).parents[1] / "models" / "allocations.py")
allocations = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(allocations)

GIB = 2**30
CPU, GPU = torch.device("cpu"), torch.device("cuda")  # where plans are for; nothing is computed on the latter
RELEASED, TINY = DIT_CONFIGS["OpenSoraT2V_v1_3-2B/122"], DIT_CONFIGS["tiny"]
SETTINGS = ClipSettings(17, 128, 128, 2, 7.5, "EulerAncestralDiscrete", prediction_type="v_prediction")
TOKENS = 32


def vae_on_meta(name, dtype):
    with torch.device("meta"):
        return WFVAE(WFVAE_CONFIGS[name]).to(dtype)


@pytest.fixture(scope="module")
def released():
    """93x480x640, 100 steps, guidance, bfloat16."""
    return SamplingFacts(
        RELEASED,
        torch.bfloat16,
        (24, 60, 80),
        guided=True,
        text_tokens=512,
        calls=100,
        clips=4,
        vae=vae_on_meta("WFVAEModel_D8_4x8x8", torch.bfloat16),
        decode=Task("decode", 93, 480, 640, collected=False, pixels=torch.float16),
        text_encoder=text_encoder_on_meta(None, torch.bfloat16),
    )


@pytest.fixture(scope="module")
def chat_model():
    """As large as a Llama of 8 billion weights."""
    from transformers import LlamaConfig

    sizes = dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32)
    config = LlamaConfig(vocab_size=128256, num_key_value_heads=8, **sizes)
    return network_on_meta("AutoModelForCausalLM", config, torch.bfloat16)


def small_facts(settings=SETTINGS, **changes):
    """Of the tiny model, in float32 on the CPU, with networks as `mt5` and `llama` make them."""
    from transformers import LlamaConfig, MT5Config

    encoder = network_on_meta("MT5EncoderModel", MT5Config(**MT5), torch.float32)
    encoder.set_input_embeddings(nn.Identity())
    facts = SamplingFacts(
        TINY,
        torch.float32,
        settings.latent_size(TINY),
        guided=True,
        text_tokens=TOKENS,
        calls=2,
        clips=2,
        vae=vae_on_meta("tiny", torch.float32),
        decode=Task("decode", settings.num_frames, 128, 128, collected=False, pixels=torch.float32),
        text_encoder=encoder,
        refiner=network_on_meta("AutoModelForCausalLM", LlamaConfig(**LLAMA), torch.float32),
        attention="reference",
        path="reference",
        refiner_tokens=300,
        refiner_new_tokens=30,
    )
    return replace(facts, **changes)


MT5 = dict(vocab_size=300, d_model=64, d_kv=16, d_ff=160, num_layers=6, num_heads=4, feed_forward_proj="gated-gelu")
LLAMA = dict(vocab_size=500, hidden_size=64, intermediate_size=160, num_hidden_layers=6, num_attention_heads=4)


def show(plan):
    print("\n".join(plan.lines()))
    assert plan.peak == max(plan.peaks.values()) <= plan.budget
    assert all(plan.peaks[name] > 0 for name in ("text encoder", "denoising", "decoding"))
    return plan


def test_plans_of_the_released_model(released, chat_model):
    needs = SamplingNeeds(released, GPU)
    fastest = show(plan_within(needs, 80 * GIB, H100))
    middle = show(plan_within(needs, 24 * GIB, H100))
    for plan in (fastest, middle):
        assert (plan.dit_streamed, plan.text_streamed, plan.refiner_streamed) == ((), (), ())
        assert plan.overlap and not plan.guidance_in_turns and plan.vae.tile is None
    assert middle.step_seconds == fastest.step_seconds

    small = show(plan_sampling(replace(released, refiner=chat_model), 10 * 10**9, GPU, H100))
    assert small.clip_seconds < 1.25 * fastest.clip_seconds
    assert small.refiner_streamed and small.slots == 2
    assert re.search(r"prompt refiner: .* \d+ of 32 layers streamed through 2 slots from", "\n".join(small.lines()))

    least = show(plan_within(needs, 4 * GIB))
    assert least.dit_streamed and least.text_streamed and least.guidance_in_turns and not least.overlap
    assert least.step_seconds is None and "predicted" not in "\n".join(least.lines())


def test_what_does_not_fit_is_told_with_what_helps():
    facts, budget = small_facts(refiner=None), 2**20
    with pytest.raises(UserError, match="by --vae_memory"):
        plan_sampling(replace(facts, vae_memory=1000), GIB, GPU)
    wide = type(facts.text_encoder.config)(**MT5 | dict(d_model=2048, vocab_size=9))
    wide = network_on_meta("MT5EncoderModel", wide, torch.float32)
    on_cpu = "as on a CPU all weights count and nothing can be streamed: give it that much, or"
    with pytest.raises(UserError, match=f"text encoder needs .* {on_cpu} add --text_8bit"):
        plan_sampling(replace(facts, text_encoder=wide), budget, CPU)
    quantize_linear_weights(encoder_layers(wide))
    with pytest.raises(UserError, match=f"{on_cpu} use a smaller"):
        plan_sampling(replace(facts, text_encoder=wide), budget, CPU)


@pytest.mark.parametrize("save_memory, step_cache", [(False, False), (True, True)])
def test_every_budget_is_kept_or_refused(save_memory, step_cache):
    facts = small_facts(save_memory=save_memory, step_cache=step_cache, path="triton", attention="triton")
    needs = SamplingNeeds(facts, GPU)
    said = r"--memory_budget 1.0 MiB is too little: \w+ needs .* even where all weights are streamed"
    with pytest.raises(UserError, match=said) as error:
        plan_within(needs, 2**20, H100)
    least = float(re.search(r"needs (\S+) MiB", str(error.value))[1]) * 2**20
    before = None
    for factor in (1, 1.05, 2):
        plan = plan_within(needs, round(factor * least), H100)
        assert plan.peak <= plan.budget
        assert not (step_cache and plan.guidance_in_turns) and not (save_memory and plan.overlap)
        assert before is None or plan.step_seconds <= 1.01 * before
        before = plan.step_seconds
    assert not plan.dit_streamed and plan.overlap == (not save_memory)
    if plan.overlap:
        needs.facts = replace(facts, clips=1)
        assert not plan_within(needs, plan.budget).overlap
    with pytest.raises(UserError):
        plan_within(needs, round(0.99 * least), H100)


@torch.no_grad()
@pytest.mark.parametrize("way", ["one batch", "in turns", "step cache"])
def test_denoising_and_decoding_take_what_is_predicted(way):
    step_cache = way == "step cache"
    # Of a longer clip, so that denoising it as one batch takes more than decoding it.
    settings = replace(SETTINGS, num_frames=33, step_cache=1e-9 if step_cache else None)
    facts = small_facts(settings, step_cache=step_cache, refiner=None, text_encoder=None)
    needs = SamplingNeeds(facts, CPU)
    plan = plan_within(needs, GIB)
    if way == "in turns":
        plan = plan_within(needs, plan.peaks["denoising"] - 1)
    assert plan.guidance_in_turns == (way == "in turns") and not plan.overlap
    dit, vae = DiT.create(TINY, 0).requires_grad_(False), WFVAE(WFVAE_CONFIGS["tiny"]).requires_grad_(False)
    sampler = ClipSampler(
        Held(CPU, dit), TINY, settings, settings.scheduler(None), CPU, in_turns=plan.guidance_in_turns
    )
    text = [Text(torch.zeros(1, 5, TINY.caption_channels), torch.tensor([[1] * 5 + [0] * 27])) for _ in range(2)]
    clips = []
    held = weight_bytes(dit) + weight_bytes(vae)
    measured = allocations.peak_bytes(lambda: clips.append(sampler(*text, 0, 0, 0)))
    print(f"{way}: {plan.peaks['denoising'] / (held + measured):.3f} of what is measured")
    assert plan.peaks["denoising"] - held == pytest.approx(measured, rel=0.1)  # of the activations alone
    decode = Decoder(Held(CPU, vae), facts.vae, settings, CPU, plan.vae)
    kept = sum(x.nbytes for context in sampler._prepared for keys in context.keys for x in keys)
    measured = held + kept + clips[0].nbytes + allocations.peak_bytes(lambda: decode(clips[0]))
    assert plan.peaks["decoding"] == pytest.approx(measured, rel=0.15)


@torch.no_grad()
def test_text_stages_take_what_is_predicted():
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, MT5Config, MT5EncoderModel

    facts = small_facts()
    stages = {stage.name: stage for stage in SamplingNeeds(facts, CPU).texts}
    tokens = torch.arange(TOKENS)[None]
    encoder = MT5EncoderModel(MT5Config(**MT5)).eval()
    held = weight_bytes(encoder)

    def tokenizer(texts, **options):
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}

    encoder = TextEncoder(tokenizer, encoder, TextEncoderFacts("mt5", 64, True), TOKENS)
    measured = allocations.peak_bytes(lambda: encoder(["some text"]))
    assert stages["text encoder"].network.resident((), 1) == held  # its vocabulary included
    assert stages["text encoder"].work == pytest.approx(measured, rel=0.1)
    model = LlamaForCausalLM(LlamaConfig(**LLAMA)).eval()
    settings = GenerationConfig(max_new_tokens=30, min_new_tokens=30, do_sample=False, pad_token_id=0)
    for length, new in ((300, 30), (40, 200)):
        settings.max_new_tokens = settings.min_new_tokens = new
        predicted = stages["prompt refiner"].work
        if new != facts.refiner_new_tokens:
            predicted = refiner_bytes(facts.refiner, length, new)
        prompt = torch.arange(length)[None]
        measured = allocations.peak_bytes(
            lambda prompt=prompt: model.generate(
                prompt, attention_mask=torch.ones_like(prompt), generation_config=settings
            )
        )
        assert predicted == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("plan", [SequencePlan(3), SequencePlan(4, 4), SequencePlan(4, 2)], ids=SequencePlan.describe)
@torch.no_grad()
def test_ranks_that_share_a_clip_need_less(plan):
    """As the exchange between ranks really allocates, in a group whose other ranks need not exist."""
    workload = Workload(2, (5, 16, 18), 16, torch.float32, torch.float32, "reference", "reference", compiled=False)
    dit = DiT.create(TINY, 0).requires_grad_(False)
    with fake_world(plan.ranks), LiveBytes() as trace:
        groups = (range(plan.ranks), range(plan.heads), range(0, plan.ranks, plan.heads))
        links = [Link(dist.new_group(list(group)).group_name) for group in groups]
        dit.share_tokens(SequenceExchange(plan, 0, TINY.sparse_n, *links))
        text = dit.text_context(torch.zeros(2, 16, TINY.caption_channels), torch.ones(2, 16))
        dit(torch.zeros(2, 8, *workload.latent_size), dit.time_context(torch.zeros(2)), text)
    alone, shared = (denoising_bytes(TINY, replace(workload, sequence=each), calls=2).peak for each in (None, plan))
    assert shared == pytest.approx(trace.peak, rel=0.1) and shared < 0.5 * alone


def test_ranks_divide_guidance():
    ways = {ranks: small_facts(ranks=ranks).batches for ranks in (1, 2, 3, 4)}
    both = [(2, 1), (1, 2)]
    assert ways == {1: both, 2: [(1, 1)], 3: both, 4: [(1, 1)]}


def test_copies_hide_behind_what_is_computed():
    device = replace(H100, host_bytes=1.0)

    def seconds(blocks, streamed, slots, copy):
        return pass_seconds(blocks, Streaming(tuple(streamed), slots, copy), device)

    blocks = [3.0] * 8
    assert seconds(blocks, (), 2, 5) == 24
    assert seconds(blocks, (1, 3, 5, 7), 1, 3) == 24  # a copy takes as long as the block between
    assert seconds(blocks, (1, 3, 5, 7), 1, 4) == 28
    assert seconds(blocks, range(8), 1, 4) == 8 * (3 + 4)
    assert seconds(blocks, range(8), 2, 3) == 24
    assert seconds(blocks, range(8), 2, 5) == 8 * 5  # the link is what binds
    assert seconds(blocks, (2, 5), 2, 100) == 24  # each has its slot


@given(blocks=st.integers(1, 40), data=st.data())
def test_streamed_blocks_are_spread_evenly(blocks, data):
    count = data.draw(st.integers(1, blocks))
    numbers = spread(count, blocks)
    gaps = [b - a for a, b in zip(numbers, (*numbers[1:], numbers[0] + blocks), strict=True)]
    assert len(set(numbers)) == count and set(numbers) <= set(range(blocks))
    assert max(gaps) - min(gaps) <= 1 and (0 in numbers) == (count == blocks)
