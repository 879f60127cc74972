"""What `bench verify` checks of whole models: the paths that training and sampling take, against plain float32.

On a GPU, of the released width, with random weights:

- four blocks (full, full, single, group) and their gradients, Triton operations in bfloat16 by autocast, of clips with
  a text mask and of padded clips: against PyTorch's operations and attention in float32
- the same, compiled: against uncompiled
- sampling's forward, compiled and captured in a CUDA graph, of one text after the other: against uncompiled
- a guided step, with text keys and time vectors computed once: against the usual lines in float32
- the forward of all 32 blocks in bfloat16: against float32
- the VAE in bfloat16, at once, in pieces and in tiles: against stock operations in float32

On a CPU the interpreter runs tiny models of very few tokens in float32; nothing is compiled there.

Weights are as large as they are after training, unlike those of a fresh DiT, whose attention changes its output by less
than bfloat16 rounds it: products keep their input's size, queries and keys are 1.4 times as large. On 800 tokens four
such blocks without self-attention are 60 % off.
"""

import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from osp_fast.kernels import tuning
from osp_fast.kernels.causal_conv3d_launch import FORWARD, ConvConfig
from torch import Tensor
from torch.utils.checkpoint import noop_context_fn

from bench.accuracy import exact_float32, relative_error
from bench.results import OURS, Row
from bench.sample_steps import Case, Implementation, let_go, make_noise, make_sampler, prepare, same_dit
from bench.suites import Job, Setting, reason_of
from bench.suites.stock_vae import StockDecoder, StockEncoder
from bench.suites.vae import make_vae
from bench.train_steps import kernels_path
from bench.verify import NOT_MADE, SUITE, check_row, name_of
from osp_fast.data.buckets import Bucket
from osp_fast.engine.compile import compile_blocks
from osp_fast.engine.cost import step_flops
from osp_fast.engine.cuda_graphs import CudaMachine
from osp_fast.engine.forward_graph import GraphedForward
from osp_fast.models.dit import DIT_CONFIGS, DiT, DiTConfig

RELEASED = "OpenSoraT2V_v1_3-2B/122"
BLOCKS = 4  # full, full, single, group
# Of bfloat16 against float32, outputs and gradients. Reckoned on a CPU with the references, a quarter as wide: four
# blocks 0.9 % and the worst parameter's gradient 2.5 %, 32 blocks 2.4 %.
BF16, BF16_WHOLE, BF16_VAE, EXACT = (0.025, 0.07), (0.06, 0.06), (0.05, 0.05), (2e-5, 2e-4)
QUERY_KEY_GAIN = 1.4
STEPS, STEP = 100, 37  # the step that is checked of so many
# Predictions: FLOP/s of float32 on one H100, products and attention together, seconds of Inductor for blocks without
# and with gradients, and what a check costs besides.
FLOAT32_RATE, COMPILE_S, COMPILE_TRAINING_S, OTHER_S = 25e12, 15.0, 40.0, 3.0
VAE_S = 12.0
# The interpreter's tokens and its blocks for convolutions, of which it then needs few.
INTERPRETED_S = {"DiT": 12.0, "step": 5.0, "VAE": 15.0}
WIDE = ConvConfig(16, 32, 64, 64, 4, 1)

Errors = dict[str, float]


@dataclass(frozen=True)
class Inputs:
    """What a DiT is given, and a gradient of what it returns."""

    latents: Tensor
    timestep: Tensor
    text: Tensor
    text_mask: Tensor
    latent_mask: Tensor | None
    cotangent: Tensor

    def arguments(self) -> tuple[Tensor | None, ...]:
        """Of `DiT.forward`."""
        return self.latents, self.timestep, self.text, self.text_mask, self.latent_mask


def model_jobs(device_type: str, types: Sequence[str]) -> list[Job]:
    """A job for each path, those that are compiled last; none unless `types` has theirs."""
    dtype = {"cuda": "bfloat16", "cpu": "float32"}[device_type]
    if dtype not in types:
        return []
    return [*_gpu_jobs()] if device_type == "cuda" else [*_cpu_jobs()]


def _gpu_jobs() -> list[Job]:
    config, whole = replace(DIT_CONFIGS[RELEASED], num_layers=BLOCKS), DIT_CONFIGS[RELEASED]
    large, small = Case(Bucket(93, 640, 640)), Case(Bucket(29, 352, 640))
    found = []
    for case, clips in ((small, 2), (large, 1)):
        for masked in (False, True):
            what = "padded clip" if masked else "text mask"
            check = functools.partial(blocks_errors, config, replace(case, clips=clips), masked, False)
            seconds = OTHER_S + 4 / 3 * clips * _training_flops(config, case) / FLOAT32_RATE
            found.append(_job(f"DiT blocks {case}, {what}", seconds, BF16, check))
    clip = Case(Bucket(93, 352, 640))
    seconds = 2 * OTHER_S + _training_flops(whole, clip) / 3 / FLOAT32_RATE
    found.append(_job(f"whole DiT {clip}", seconds, BF16_WHOLE, functools.partial(whole_errors, whole, clip)))
    for direction in ("encode", "decode"):
        tilings = ((4, None, None), (4, 16, 24))
        check = functools.partial(vae_errors, "WFVAEModel_D8_4x8x8", direction, (24, 44, 80), tilings)
        found.append(_job(f"VAE {direction} {clip}, in pieces, in tiles", VAE_S, BF16_VAE, check))
    check = functools.partial(blocks_errors, config, replace(small, clips=2), False, True)
    found.append(_job(f"compiled DiT blocks {small}", OTHER_S + COMPILE_TRAINING_S, BF16, check))
    check = functools.partial(graph_errors, config, replace(small, clips=2))
    found.append(_job(f"CUDA graph of DiT blocks {small}", OTHER_S + COMPILE_S, BF16, check))
    implementation = Implementation(OURS, "triton", "triton", compiled=True, keys_once=True, times_once=True)
    check = functools.partial(step_errors, implementation, config, small)
    seconds = OTHER_S + COMPILE_S + 2 * _training_flops(config, small) / 3 / FLOAT32_RATE
    found.append(_job(f"guided step of DiT blocks {small}", seconds, BF16_WHOLE, check))
    return found


def _cpu_jobs() -> list[Job]:
    config = DIT_CONFIGS["tiny"]
    found = []
    for masked, clips in ((False, 1), (True, 2)):
        case = Case(Bucket(1, 48, 96), clips, 7)  # 18 tokens, so that sets differ in length
        check = functools.partial(blocks_errors, config, case, masked, False)
        what = "padded clip" if masked else "text mask"
        found.append(_job(f"tiny DiT {case}, {what}", clips * INTERPRETED_S["DiT"] / 2, EXACT, check, torch.float32))
    implementation = Implementation(OURS, "triton", "triton", keys_once=True, times_once=True)
    case = Case(Bucket(1, 48, 96), 1, 8)
    check = functools.partial(step_errors, implementation, config, case)
    found.append(_job(f"guided step of the tiny DiT {case}", INTERPRETED_S["step"], EXACT, check, torch.float32))
    for direction, tiles in (("encode", (1, None, None)), ("decode", (2, 1, 2))):
        check = functools.partial(vae_errors, "tiny", direction, (2, 2, 2), (tiles,))
        what = "in pieces" if tiles[1] is None else "in tiles"
        seconds = INTERPRETED_S["VAE"] / 2
        found.append(_job(f"tiny VAE {direction} 5x16x16, {what}", seconds, EXACT, check, torch.float32))
    return found


def _job(
    case: str,
    seconds: float,
    tolerances: tuple[float, float],
    check: Callable[[torch.device, Callable[[str], None]], Errors],
    dtype: torch.dtype = torch.bfloat16,
) -> Job:
    return Job(SUITE, case, seconds, functools.partial(_measure, case, tolerances, check, name_of(dtype)))


def _measure(case: str, tolerances: tuple[float, float], check: Callable, dtype: str, setting: Setting) -> list[Row]:
    """The row of a check. Whatever it compiled is let go."""
    try:
        with exact_float32():
            errors = check(setting.device, setting.say)
    except torch.OutOfMemoryError:
        return [Row(SUITE, case, OURS, "ours", dtype, note=f"{NOT_MADE}out of memory")]
    except Exception as error:  # one path that breaks must not hide the others
        return [Row(SUITE, case, OURS, "ours", dtype, note=f"error: {reason_of(error)}")]
    finally:
        let_go(setting.device)
    return [check_row(case, errors, tolerances, dtype)]


def lively_dit(config: DiTConfig, device: torch.device) -> DiT:
    """Random float32 weights with which the output depends on every part; see the module's docstring."""
    with torch.device("meta"):
        dit = DiT(config)
    dit.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in dit.named_parameters():
            std = 0.5 if name.endswith("table") else 0.1
            if parameter.dim() > 1 and not name.endswith("table"):
                std = parameter[0].numel() ** -0.5
                std *= QUERY_KEY_GAIN if name.endswith(("qkv.weight", "q.weight", "kv.weight")) else 1
            parameter.normal_(std=std, generator=generator)
    return dit


def blocks_errors(
    config: DiTConfig, case: Case, masked: bool, compiled: bool, device: torch.device, say: Callable[[str], None]
) -> Errors:
    """Of a DiT's result and of all gradients, through our operations.

    masked: a clip is padded, as `latent_mask` says; compiled: blocks are, and are held against those that are not
    """
    dit, inputs = lively_dit(config, device), _make_inputs(config, case, masked, device)
    bf16 = device.type == "cuda"
    plain = "triton" if compiled else "reference"
    with kernels_path(plain):
        attention = plain if compiled or not bf16 else "sdpa"
        dit.use_attention(attention, device, torch.bfloat16 if bf16 and compiled else torch.float32)
        dit.recompute_blocks(None if compiled else noop_context_fn)
        expected = _with_gradients(dit, inputs, bf16 and compiled)
    with kernels_path("triton"):
        dit.recompute_blocks(None)
        dit.use_attention("triton", device, torch.bfloat16 if bf16 else torch.float32)
        if compiled:
            compile_blocks(dit, buckets=1)
        found = _with_gradients(dit, inputs, bf16)
    return {name: relative_error(x, expected[name]) for name, x in found.items()}


@torch.no_grad()
def whole_errors(config: DiTConfig, case: Case, device: torch.device, say: Callable[[str], None]) -> Errors:
    """Of a DiT in bfloat16, as it samples, against the same weights in float32."""
    dit = lively_dit(config, device).bfloat16()
    latents, timestep, text, mask, _ = _make_inputs(config, case, False, device).arguments()
    latents, text = latents.bfloat16(), text.bfloat16()
    with kernels_path("triton"):
        found = dit.use_attention("triton")(latents, timestep, text, mask)
    with kernels_path("reference"):
        expected = dit.float().use_attention("sdpa")(latents.float(), timestep, text.float(), mask)
    return {"out": relative_error(found, expected)}


@torch.no_grad()
def graph_errors(config: DiTConfig, case: Case, device: torch.device, say: Callable[[str], None]) -> Errors:
    """Of a CUDA graph of compiled blocks in bfloat16 against the same uncompiled: of one text, of another, and back."""
    dit = lively_dit(config, device).bfloat16().requires_grad_(False)
    with kernels_path("triton"):
        dit.use_attention("triton")
        compiled = compile_blocks(same_dit(dit).use_attention("triton"), buckets=1)
        graph = GraphedForward(compiled, CudaMachine(device), True, say)
        errors = {}
        drawn = [_make_inputs(config, case, False, device, seed) for seed in (0, 1)]
        texts = [dit.text_context(one.text.bfloat16(), one.text_mask) for one in drawn]
        for turn, place in enumerate((0, 1, 0)):
            latents, time = drawn[place].latents.bfloat16(), dit.time_context(drawn[place].timestep + 100.0 * turn)
            found = graph(latents, time, texts[place])
            errors[f"out{turn}"] = relative_error(found, dit(latents, time, texts[place]))
        return errors


@torch.no_grad()
def step_errors(
    one: Implementation, config: DiTConfig, case: Case, device: torch.device, say: Callable[[str], None]
) -> Errors:
    """Of a guided prediction, and of the latents after its step, as the engine samples, against the usual lines."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    dit = lively_dit(config, device).to(dtype).requires_grad_(False).eval()
    noise = make_noise(config, case, device)
    with kernels_path(one.path):
        ours = make_sampler(one, prepare(one, same_dit(dit)), case, STEPS, say)
        found = ours.predict(noise, STEP), ours.run(noise, range(STEP, STEP + 1))
    plain = Implementation("float32", "masked", "reference")
    with kernels_path(plain.path):
        exact = make_sampler(plain, prepare(plain, dit.float()), case, STEPS, say)
        expected = exact.predict(noise, STEP), exact.run(noise, range(STEP, STEP + 1))
    pairs = zip(("out prediction", "out latents"), found, expected, strict=True)
    return {name: relative_error(*pair) for name, *pair in pairs}


@torch.no_grad()
def vae_errors(
    size: str,
    direction: str,
    latent_size: tuple[int, int, int],
    tilings: Sequence[tuple[int | None, int | None, int | None]],
    device: torch.device,
    say: Callable[[str], None],
) -> Errors:
    """Of encoding or decoding in each of these tilings, and on a GPU at once, against stock operations in float32."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    exact = make_vae(size, device, torch.float32)
    frames, rows, columns = latent_size
    shape = (1, 3, 4 * frames - 3, 8 * rows, 8 * columns) if direction == "encode" else (1, 8, *latent_size)
    x = torch.randn(shape, generator=torch.Generator(device).manual_seed(0), device=device)
    with kernels_path("reference"):
        expected = (StockEncoder if direction == "encode" else StockDecoder)(exact, channels_last=False)(x)
    vae = make_vae(size, device, dtype)
    del exact
    errors = {}
    with kernels_path("triton"), tuning.forced(FORWARD, WIDE) if device.type == "cpu" else nullcontext():
        for tiles in (*((None,) if device.type == "cuda" else ()), *tilings):
            if direction == "encode":
                posterior = vae.encode(x.to(dtype), tiles)
                found = torch.cat((posterior.mean, posterior.logvar), dim=1)
            else:
                found = vae.decode(x.to(dtype), tiles)
            errors[f"out of tiles {tiles}" if tiles else "out at once"] = relative_error(found, expected)
    return errors


def _training_flops(config: DiTConfig, case: Case) -> int:
    """Of forward and backward, by the mathematics."""
    return step_flops(config, case.workload("triton", "triton", True)).model


def _make_inputs(config: DiTConfig, case: Case, masked: bool, device: torch.device, seed: int = 0) -> Inputs:
    """Of a clip or several; the first text is a quarter padding, the first clip, if any is, in all three dimensions."""
    generator = torch.Generator(device).manual_seed(seed)
    draw = functools.partial(torch.randn, generator=generator, device=device)
    size, clips, length = case.latent_size, case.clips, case.text_tokens
    real = torch.full((clips, 1), length, device=device)
    real[0] = length * 3 // 4 - seed
    mask = None
    if masked:
        mask = torch.ones(clips, *size, device=device)
        parts = zip(size, config.patch, strict=True)
        frames, rows, columns = (length - length // 4 // part * part for length, part in parts)
        mask[0, frames:], mask[0, :, rows:], mask[0, :, :, columns:] = 0, 0, 0
    return Inputs(
        latents=draw(clips, config.in_channels, *size),
        timestep=torch.arange(clips, device=device) * 300 + 400,
        text=draw(clips, length, config.caption_channels),
        text_mask=(torch.arange(length, device=device) < real).long(),
        latent_mask=mask,
        cotangent=draw(clips, config.out_channels, *size),
    )


def _with_gradients(dit: DiT, inputs: Inputs, bf16: bool) -> dict[str, Tensor]:
    """ "out", and "d" + name for the latents, the text and every parameter."""
    leaves = {"latents": inputs.latents.clone().requires_grad_(), "text": inputs.text.clone().requires_grad_()}
    own = replace(inputs, **leaves)
    with torch.autocast(inputs.latents.device.type, torch.bfloat16, enabled=bf16):
        out = dit(*own.arguments())
    leaves |= dict(dit.named_parameters())
    gradients = torch.autograd.grad(out, list(leaves.values()), inputs.cotangent.to(out.dtype))
    named = {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return {"out": out.detach(), **named}
