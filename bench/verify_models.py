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

Weights are `make_dit`'s, with which the output depends on every part: on 800 tokens four such blocks without
self-attention are 60 % off.
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
from bench.suites import Job, Setting, reason_of
from bench.suites.dits import (
    Case,
    exact_seconds,
    fresh_dit,
    kernels_path,
    let_go,
    make_dit,
    plain_float32,
    same_dit,
)
from bench.suites.stock_vae import StockDecoder, StockEncoder
from bench.suites.vae import make_vae
from bench.verify import NOT_MADE, SUITE, check_row, name_of
from osp_fast.data.buckets import Bucket
from osp_fast.diffusion.denoise import GuidedModel, Text, prepare_text
from osp_fast.engine.compile import compile_blocks
from osp_fast.engine.cuda_graphs import CudaMachine
from osp_fast.engine.forward_graph import GraphedForward
from osp_fast.models.dit import DIT_CONFIGS, DiT, DiTConfig

RELEASED = "OpenSoraT2V_v1_3-2B/122"
BLOCKS = 4  # full, full, single, group
# Of bfloat16 against float32, outputs and gradients. Reckoned on a CPU with the references, a quarter as wide: four
# blocks 0.9 % and the worst parameter's gradient 2.5 %, 32 blocks 2.4 %.
BF16, BF16_WHOLE, BF16_VAE, EXACT = (0.025, 0.07), (0.06, 0.06), (0.05, 0.05), (2e-5, 2e-4)
SCALE = 2.0  # of guidance; a larger one would magnify rounding
# Predictions: seconds of Inductor for blocks without and with gradients, and what a check costs besides.
COMPILE_S, COMPILE_TRAINING_S, OTHER_S = 12.0, 30.0, 3.0
VAE_S = 12.0
# The interpreter's tokens and its blocks for convolutions, of which it then needs few.
INTERPRETED_S = {"DiT": 12.0, "step": 6.0, "encode": 5.0, "decode": 16.0}
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
    return _gpu_jobs() if device_type == "cuda" else _cpu_jobs()


def _gpu_jobs() -> list[Job]:
    config, whole = replace(DIT_CONFIGS[RELEASED], num_layers=BLOCKS), DIT_CONFIGS[RELEASED]
    small, large, clip = (Case(Bucket(*size)) for size in ((29, 352, 640), (93, 640, 640), (93, 352, 640)))
    pair = replace(small, clips=2)
    found = []
    for case in (pair, large):
        for masked in (False, True):
            check = functools.partial(blocks_errors, config, case, masked, False)
            seconds = OTHER_S + exact_seconds(config, case.workload(), training=True)
            found.append(_job(f"DiT blocks {case}, {'padded clip' if masked else 'text mask'}", seconds, BF16, check))
    seconds = 2 * OTHER_S + exact_seconds(whole, clip.workload(), training=False)
    found.append(_job(f"whole DiT {clip}", seconds, BF16_WHOLE, functools.partial(whole_errors, whole, clip)))
    for direction in ("encode", "decode"):
        tilings = ((4, None, None), (4, 16, 24))
        check = functools.partial(vae_errors, "WFVAEModel_D8_4x8x8", direction, clip.latent_size, tilings)
        found.append(_job(f"VAE {direction} {clip}, in pieces, in tiles", VAE_S, BF16_VAE, check))
    check = functools.partial(blocks_errors, config, pair, False, True)
    found.append(_job(f"compiled DiT blocks {pair}", OTHER_S + COMPILE_TRAINING_S, BF16, check))
    check = functools.partial(graph_errors, config, pair)
    found.append(_job(f"CUDA graph of DiT blocks {pair}", OTHER_S + COMPILE_S, BF16, check))
    seconds = OTHER_S + COMPILE_S + exact_seconds(config, pair.workload(), training=False)
    check = functools.partial(step_errors, config, small)
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
    case = Case(Bucket(1, 48, 96), 1, 8)
    check = functools.partial(step_errors, config, case)
    found.append(_job(f"guided step of the tiny DiT {case}", INTERPRETED_S["step"], EXACT, check, torch.float32))
    for direction, tiles in (("encode", (1, None, None)), ("decode", (2, 1, 2))):
        check = functools.partial(vae_errors, "tiny", direction, (2, 2, 2), (tiles,))
        what = "in pieces" if tiles[1] is None else "in tiles"
        seconds = INTERPRETED_S[direction]
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


def blocks_errors(
    config: DiTConfig, case: Case, masked: bool, compiled: bool, device: torch.device, say: Callable[[str], None]
) -> Errors:
    """Of a DiT's result and of all gradients, through our operations, in bfloat16 on a GPU.

    masked: a clip is padded, as `latent_mask` says; compiled: blocks are, and are held against those that are not
    """
    dit, inputs, bf16 = make_dit(config, device), _make_inputs(config, case, masked, device), device.type == "cuda"
    if not compiled:
        with plain_float32(device) as plain:
            plain.prepare(dit).recompute_blocks(noop_context_fn)
            expected = _with_gradients(dit, inputs, False)
        dit.recompute_blocks(None)
    with kernels_path("triton"):
        dit.use_attention("triton", device, torch.bfloat16 if bf16 else torch.float32)
        if compiled:
            expected = _with_gradients(dit, inputs, bf16)
            compile_blocks(dit, buckets=1)
        found = _with_gradients(dit, inputs, bf16)
    return {name: relative_error(x, expected[name]) for name, x in found.items()}


@torch.no_grad()
def whole_errors(config: DiTConfig, case: Case, device: torch.device, say: Callable[[str], None]) -> Errors:
    """Of a DiT in bfloat16, as it samples, against the same weights in float32."""
    dit = fresh_dit(config, device, torch.bfloat16)
    latents, timestep, text, mask, _ = _make_inputs(config, case, False, device).arguments()
    latents, text = latents.bfloat16(), text.bfloat16()
    with kernels_path("triton"):
        found = dit.use_attention("triton")(latents, timestep, text, mask)
    with plain_float32(device) as plain:
        expected = plain.prepare(dit.float())(latents.float(), timestep, text.float(), mask)
    return {"out": relative_error(found, expected)}


@torch.no_grad()
def graph_errors(config: DiTConfig, case: Case, device: torch.device, say: Callable[[str], None]) -> Errors:
    """Of a CUDA graph of compiled blocks in bfloat16 against the same uncompiled: of one text, of another, and back."""
    dit = fresh_dit(config, device, torch.bfloat16)
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
def step_errors(config: DiTConfig, case: Case, device: torch.device, say: Callable[[str], None]) -> Errors:
    """Of guided predictions in two steps, as the engine samples, against the usual lines."""
    on_gpu = device.type == "cuda"
    dit = fresh_dit(config, device, torch.bfloat16 if on_gpu else torch.float32)
    inputs = [_make_inputs(config, case, False, device, seed) for seed in (0, 1)]
    texts = [Text(one.text, one.text_mask) for one in inputs]
    timesteps = torch.tensor([600.0, 400.0])
    with kernels_path("triton"):
        ours = same_dit(dit).use_attention("triton")
        if on_gpu:
            compile_blocks(ours, buckets=1)
        graph = GraphedForward(ours, CudaMachine(device), False, say) if on_gpu else None
        guided = GuidedModel(ours, prepare_text(ours, *texts), timesteps, SCALE, forward=graph)
        found = [guided(one.latents, step) for step, one in enumerate(inputs)]
    errors = {}
    with plain_float32(device) as plain:
        exact = plain.prepare(dit.float())
        for step, one in enumerate(inputs):
            time = timesteps[step : step + 1].to(device)
            with_prompt, without = (exact(one.latents, time, text.states, text.mask) for text in texts)
            errors[f"out{step}"] = relative_error(found[step], without + SCALE * (with_prompt - without))
    return errors


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
