"""How many bytes the networks of sampling need at work, beside their weights: measured on fake tensors.

Each network runs at the real shape, where tensors have sizes and no contents; `LiveBytes` counts their storages. So
what is predicted is what the code does. Without gradients nothing is kept from one block to the next but the tokens, so
of the DiT one block of each kind of attention is enough. What a library's kernel allocates within one operation and
frees again is not seen, and compiled blocks need less than these, which run operation by operation.
"""

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from osp_fast.engine.activation_trace import ATTENTION_FUNCTIONS, share_as_in
from osp_fast.engine.cost import Workload
from osp_fast.kernels.launch import forced_path
from osp_fast.models.attention_backends import AttentionBackend
from osp_fast.models.dit import DiT, DiTConfig
from osp_fast.models.wfvae_decoder import COLOURS
from osp_fast.models.wfvae_plan import Task
from osp_fast.models.wfvae_stream import Plan
from osp_fast.models.wfvae_trace import LiveBytes

SAMPLER_LATENTS = 3  # float32, that a sampler holds during a model call: the noise, its latents, the model's input


@dataclass(frozen=True)
class DenoisingBytes:
    """peak: at most, while clips are denoised; of it text_keys stay behind a clip."""

    peak: int
    text_keys: int


def denoising_bytes(
    config: DiTConfig, workload: Workload, turns: int = 1, calls: int = 1, step_cache: bool = False
) -> DenoisingBytes:
    """Of one clip's denoising, with text keys and time vectors computed before; the weights do not count.

    workload: of one call of the DiT; turns: such calls in a step, with a text each; calls: steps
    step_cache: whether a `FirstBlockCache` is used
    """
    modes = list(dict.fromkeys(config.attention_mode(index) for index in range(config.num_layers)))
    clips, size, dtype = workload.clips, workload.latent_size, workload.dtype
    shallow = _shallow(config, workload, modes)
    with FakeTensorMode(), forced_path(workload.path), torch.no_grad():
        dit = share_as_in(workload, _faked(shallow))
        trace, peaks = LiveBytes(), []
        with trace:
            texts = [_text_context(dit, workload) for _ in range(turns)]
            own_keys = sum(x.nbytes for keys in texts[0].keys for x in keys) * turns
            keys = own_keys * config.num_layers // len(dit.transformer_blocks)
            peaks.append(trace.peak - own_keys + keys)
            trace.peak = trace.live
            times = dit.time_context(torch.empty(calls))
            held = [torch.empty(1, config.in_channels, *size) for _ in range(SAMPLER_LATENTS)]
            cache = _TracedCache() if step_cache else None
            options = {} if cache is None else {"step_cache": cache}
            for _ in range(1 if cache is None else 2):  # the second full step replaces what the first one kept
                x = torch.cat([held[-1].to(dtype)] * clips) if clips > 1 else held[-1].to(dtype)
                predictions = [dit(x, times.at(0, clips), text, **options).float() for text in texts]
                del x, predictions
            peaks.append(trace.peak - own_keys + keys)
    return DenoisingBytes(max(peaks), keys)


def text_encoder_bytes(network: nn.Module, tokens: int) -> int:
    """Of encoding one text of so many tokens, its padding included; weights do not count.

    network: an encoder of transformers without weights, as `text_encoder_on_meta` makes it
    """
    with FakeTensorMode(), torch.no_grad():
        encoder = _faked(network)
        with LiveBytes() as trace:
            shape = (1, tokens, network.config.d_model)
            rows = torch.empty(shape, dtype=float_type(network))  # of the tokens' embeddings, each once
            embedded = torch.empty_like(rows)
            mask = torch.ones(1, tokens, dtype=torch.long)
            del rows
            encoder(inputs_embeds=embedded, attention_mask=mask)
    return trace.peak


def refiner_bytes(network: nn.Module, tokens: int, new_tokens: int) -> int:
    """Of rewriting a prompt of so many tokens, instruction included, in at most `new_tokens`; weights do not count.

    The most is held either when the prompt is read, or at the end, when keys and values of all tokens are there.

    network: a causal language model of transformers without weights, as `refiner_on_meta` makes it
    """
    options = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(network.forward).parameters else {}
    with FakeTensorMode(), torch.no_grad():
        model = _faked(network)
        with LiveBytes() as trace:
            given = torch.ones(1, tokens, dtype=torch.long)
            # Without a mask: one of ones, which a single prompt has, is dropped where its contents are known.
            result = model(input_ids=given, use_cache=True, **options)
            last = result.logits[:, -1].float()
            cache = result.past_key_values
            del result
            reading, trace.peak = trace.peak, trace.live
            # The next token: keys and values of all before it are copied, layer by layer.
            model(input_ids=given[:, :1], past_key_values=cache, use_cache=True, **options)
    del last
    return max(reading, trace.peak * (tokens + new_tokens) // tokens)


@dataclass(frozen=True)
class VaeWork:
    """FLOPs of products and convolutions; bytes that all operations read and write, each tensor once in each."""

    flops: int
    moved: int


def vae_work(vae: nn.Module, task: Task) -> VaeWork:
    """Of encoding or decoding a clip in whole frames on the Triton path, without the products of attention.

    vae: without weights, on the meta device
    """
    encodes = task.direction == "encode"
    if encodes:
        shape, dtype = (task.batch, COLOURS, task.frames, task.height, task.width), task.source
    else:
        shape = (task.batch, vae.config.latent_dim, task.latent_frames, *task.cells)
        dtype = float_type(vae)
    given = torch.empty(shape, dtype=dtype, device="meta")
    traffic, counter = _Traffic(), FlopCounterMode(display=False)
    with forced_path("triton"), torch.no_grad(), counter, traffic:
        stream = vae.encode_stream((given,), Plan()) if encodes else vae.decode_stream((given,), Plan(), task.pixels)
        for piece in stream:
            del piece
    return VaeWork(counter.get_total_flops(), traffic.moved)


def float_type(module: nn.Module) -> torch.dtype:
    """In what a network computes: the type of its first parameter that is not of whole numbers."""
    return next(parameter.dtype for parameter in module.parameters() if parameter.is_floating_point())


def weight_bytes(module: nn.Module) -> int:
    """Of parameters and buffers, each once."""
    return sum(x.nbytes for x in (*module.parameters(), *module.buffers()))


def dit_on_meta(config: DiTConfig, dtype: torch.dtype) -> DiT:
    """A DiT without weights: shapes and types only."""
    with torch.device("meta"):
        return DiT(config).to(dtype)


def _shallow(config: DiTConfig, workload: Workload, modes: list[str]) -> DiT:
    """A DiT without weights, with one block of each mode, and one more before them that has no part to add yet."""
    index_of = {config.attention_mode(index): index for index in reversed(range(config.num_layers))}
    dit = dit_on_meta(replace(config, num_layers=0), workload.dtype)
    with torch.device("meta"):
        indices = [index_of[mode] for mode in (modes[0], *modes)]
        dit.transformer_blocks.extend(config.block(index).to(workload.dtype) for index in indices)
    backend = AttentionBackend(workload.attention, ATTENTION_FUNCTIONS[workload.attention], lambda mode, sparse_n: "")
    for block in dit.transformer_blocks:
        block.self_attention.backend = block.cross_attention.backend = backend
    return dit


def _text_context(dit: DiT, workload: Workload) -> Any:
    shape = (workload.clips, workload.text_tokens)
    states = torch.empty(*shape, dit.config.caption_channels, dtype=workload.dtype)
    return dit.text_context(states, torch.empty(shape, dtype=torch.long))


def _faked(module: nn.Module) -> nn.Module:
    """A copy of a network on the meta device whose tensors are fake ones; to be called in a `FakeTensorMode`."""
    fakes: dict[int, Any] = {}  # in place of which original; what is tied stays so
    for x in (*module.parameters(), *module.buffers()):
        empty = torch.empty(x.shape, dtype=x.dtype)
        fakes[id(x)] = nn.Parameter(empty, False) if isinstance(x, nn.Parameter) else empty
    return copy.deepcopy(module, fakes)


class _TracedCache:
    """Makes and holds the tensors of a `FirstBlockCache` whose every step is a full one; decides nothing."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []

    def __call__(self, x: Tensor, first: Callable[[Tensor], Tensor], rest: Callable[[Tensor], Tensor]) -> Tensor:
        after_first = first(x)
        part = after_first - x
        if self.kept:
            (part - self.kept[0]).abs().sum((1, 2), dtype=torch.float32)
        self.kept = [part]
        result = rest(after_first)
        self.kept.append(result - after_first)
        return result


class _Traffic(TorchDispatchMode):
    """Within it `moved` adds up the bytes that operations read and write; views move none."""

    def __init__(self) -> None:
        super().__init__()
        self.moved = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {id(x): x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        storages = {id(x.untyped_storage()) for x in given.values()}
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        works = func._schema.is_mutable or any(id(x.untyped_storage()) not in storages for x in made)
        if works and "empty" not in func.__name__:
            self.moved += sum(x.numel() * x.element_size() for x in (*given.values(), *made))
        return result
