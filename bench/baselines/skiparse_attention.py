"""Dense attention on gathered sets: as the original code calls it, compiled, and other people's kernels.

- `reference`: sets gathered, memory-efficient SDPA with an additive mask of all keys, outputs scattered.
- `strong`: torch.compile of gather and scatter around the best SDPA that takes the call: cuDNN, else flash, else
  memory-efficient; no mask where all keys are visible.
- peers, each as "gather + X + scatter" and, gathered before the clock starts, as "X, gathered before": the three
  backends of SDPA, flex_attention, and where they are installed FlashAttention-2, 3 and 4.

A gathered tensor is (B k, N / k, H, D), contiguous; kernels get the view (B k, H, N / k, D). Where N does not divide by
k (single skip) or k^2 (group skip) the clip is padded at its end and the padding masked, which not every kernel can do.
"""

import contextlib
import functools
import importlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._functorch import config as functorch_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from bench.attention_check import KNOWN
from bench.baselines import PEER, Baseline, Unavailable, compiled, forget_compiled
from bench.results import REFERENCE, STRONG

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v -> out, all (S, H, n, D)
MakeAttend = Callable[[int, Tensor | None], Attend]  # queries per set, visible keys (S, m) or None
BACKENDS = {
    "cuDNN SDPA": SDPBackend.CUDNN_ATTENTION,
    "flash SDPA": SDPBackend.FLASH_ATTENTION,
    "efficient SDPA": SDPBackend.EFFICIENT_ATTENTION,
}


FLEX = "flex_attention"
# FlashAttention's functions of (B, N, H, D): name -> where it is
FLASH_ATTENTION = {
    "FlashAttention-2": ("flash_attn", "flash_attn_func"),
    "FlashAttention-3": ("flash_attn_interface", "flash_attn_func"),
    "FlashAttention-4": ("flash_attn.cute", "flash_attn_func"),
}


def baselines() -> tuple[Baseline, ...]:
    """The original's way, the compiled one, and every kernel twice."""
    kernels: dict[str, MakeAttend] = {name: functools.partial(sdpa, backend) for name, backend in BACKENDS.items()}
    kernels[FLEX] = _compiled_flex
    for name in FLASH_ATTENTION:
        if (function := installed(name)) is not None:
            kernels[name] = functools.partial(flash_attention, name, function)
    peers = [make(name, make_attend) for name, make_attend in kernels.items() for make in (as_written, gathered)]
    return as_written(REFERENCE, with_additive_mask, REFERENCE), compiled_best(), *peers


def as_written(name: str, make_attend: MakeAttend, role: str = PEER) -> Baseline:
    """A kernel with its gather and scatter inside the clock. The mask is made once, outside: so do models."""

    def bind(inputs: dict[str, Any]) -> tuple[Callable[[], Tensor], list[Tensor]]:
        skip, attend = skip_of(inputs), _bind_mask(make_attend, inputs)
        leaves = [inputs[key] for key in "qkv"]

        def call() -> Tensor:
            out = attend(*(gather(x, *skip).transpose(1, 2) for x in leaves)).transpose(1, 2)
            return scatter(out, *skip, *inputs["q"].shape[:2])

        return call, leaves

    title = f"gather + {name} + scatter" if role == PEER else name
    return Baseline(title, role, bind, compiled=name == FLEX)


def compiled_best() -> Baseline:
    """Gather and scatter compiled around the first SDPA of cuDNN, flash and memory-efficient that takes the call."""
    function = compiled(_gather_attend_scatter)

    def bind(inputs: dict[str, Any]) -> tuple[Callable[[], Tensor], list[Tensor]]:
        forget_compiled()
        skip, visible = skip_of(inputs), visible_keys(inputs)
        leaves = [inputs[key] for key in "qkv"]
        mask = None if visible is None else visible[:, None, None, :]

        def call() -> Tensor:
            with sdpa_kernel(list(BACKENDS.values()), set_priority=True):
                return function(*leaves, mask, *skip)

        return call, leaves

    return Baseline(STRONG, STRONG, bind, compiled=True)


def _gather_attend_scatter(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, mode: str, sparse_n: int) -> Tensor:
    sets = (gather(x, mode, sparse_n).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(*sets, attn_mask=mask).transpose(1, 2)
    return scatter(out, mode, sparse_n, *q.shape[:2])


def gathered(name: str, make_attend: MakeAttend) -> Baseline:
    """A kernel on sets that were gathered before the clock starts."""

    def bind(inputs: dict[str, Any]) -> tuple[Callable[[], Tensor], list[Tensor]]:
        skip, attend = skip_of(inputs), _bind_mask(make_attend, inputs)
        leaves = [
            gather(inputs[key].detach(), *skip).contiguous().requires_grad_(inputs[key].requires_grad) for key in "qkv"
        ]
        return lambda: attend(*(x.transpose(1, 2) for x in leaves)).transpose(1, 2), leaves

    def restore(out: Tensor, inputs: dict[str, Any]) -> Tensor:
        return scatter(out, *skip_of(inputs), *inputs["q"].shape[:2])

    return Baseline(f"{name}, gathered before", PEER, bind, restore, compiled=name == FLEX)


def skip_of(inputs: dict[str, Any]) -> tuple[str, int]:
    """(mode, sparse_n) of a call, its defaults filled in. Raises Unavailable on arguments unknown here."""
    unknown = {name for name, value in inputs.items() if value is not None} - KNOWN
    if unknown:
        raise Unavailable(f"this baseline does not know the arguments {sorted(unknown)}")
    sparse_n = inputs.get("sparse_n", 4)
    return ("full" if sparse_n == 1 else inputs.get("mode", "full")), sparse_n


def gather(x: Tensor, mode: str, sparse_n: int) -> Tensor:
    """(B, N, ...) -> (B k, ceil(N / k), ...), zeros behind the clip's end; itself in mode full."""
    if mode == "full":
        return x
    batch, tokens = x.shape[:2]
    period = _period(mode, sparse_n)
    if tokens % period:  # padding by nothing would copy all the same
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, -tokens % period))
    sets = x.reshape(batch, -1, sparse_n, period // sparse_n, *x.shape[2:])
    return sets.movedim(2, 1).reshape(batch * sparse_n, -1, *x.shape[2:])


def scatter(x: Tensor, mode: str, sparse_n: int, batch: int, tokens: int) -> Tensor:
    """The inverse of `gather`: (B k, n, ...) -> (B, N, ...)."""
    if mode == "full":
        return x
    inner = _period(mode, sparse_n) // sparse_n
    sets = x.reshape(batch, sparse_n, -1, inner, *x.shape[2:])
    return sets.movedim(1, 2).reshape(batch, -1, *x.shape[2:])[:, :tokens]


def visible_keys(inputs: dict[str, Any]) -> Tensor | None:
    """Which gathered keys may be seen, (B k, m); None if all."""
    mode, sparse_n = skip_of(inputs)
    batch, keys = inputs["k"].shape[:2]
    mask, lengths = inputs.get("key_mask"), inputs.get("key_lengths")
    padded = mode != "full" and keys % _period(mode, sparse_n)
    if mask is None and lengths is None and not padded:
        return None
    visible = torch.ones((batch, keys), dtype=torch.bool, device=inputs["k"].device)
    if mask is not None:
        visible &= mask.bool()
    if lengths is not None:
        visible &= torch.arange(keys, device=visible.device) < lengths[:, None]
    return gather(visible, mode, sparse_n)


def _bind_mask(make_attend: MakeAttend, inputs: dict[str, Any]) -> Attend:
    queries = gather(inputs["q"][:, :, 0, 0].detach(), *skip_of(inputs)).shape[1]
    return make_attend(queries, visible_keys(inputs))


def _period(mode: str, sparse_n: int) -> int:
    return sparse_n if mode == "single" else sparse_n * sparse_n


def sdpa(backend: SDPBackend, queries: int, visible: Tensor | None) -> Attend:
    """One backend of scaled_dot_product_attention and no other."""
    mask = None if visible is None else visible[:, None, None, :].expand(-1, -1, queries, -1)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel([backend]):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def explain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """PyTorch says in warnings why a backend does not serve; recording them is left to the failure."""
        try:
            return attend(q, k, v)
        except RuntimeError as error:
            with warnings.catch_warnings(record=True) as said, contextlib.suppress(RuntimeError):
                warnings.simplefilter("always")
                attend(q, k, v)
            reasons = [str(warning.message).split(" (Triggered")[0] for warning in said]
            raise Unavailable("; ".join(reasons) or str(error)) from error

    return explain


def with_additive_mask(queries: int, visible: Tensor | None) -> Attend:
    """Memory-efficient SDPA with an additive mask in the type of q, (S, 1, 1, M), broadcast over heads and queries.

    It is there even if all is visible. Its rows begin at multiples of 16 numbers: PyTorch would copy others, and for
    every query.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys = k.shape[2]
        if not held:
            mask = q.new_zeros((len(q), 1, 1, keys + -keys % 16))[..., :keys]
            held.append(mask if visible is None else mask.masked_fill_(~visible[:, None, None], float("-inf")))
        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION if q.is_cuda else SDPBackend.MATH):
            mask = held[0].expand(-1, q.shape[1], queries, -1)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    held: list[Tensor] = []  # made by the first call, of its type, outside of what is timed
    return attend


def installed(name: str) -> Callable[..., Any] | None:
    """FlashAttention's function of this name, None if it is not installed."""
    module, function = FLASH_ATTENTION[name]
    try:
        return getattr(importlib.import_module(module), function, None)
    except ImportError:
        return None


def flash_attention(name: str, function: Callable[..., Any], queries: int, visible: Tensor | None) -> Attend:
    """FlashAttention of (B, N, H, D). Raises Unavailable where keys are masked."""
    if visible is not None:
        raise Unavailable(f"{name} takes no mask of keys")

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found = function(*(x.transpose(1, 2) for x in (q, k, v)))
        return (found[0] if isinstance(found, tuple) else found).transpose(1, 2)

    return attend


def flex(function: Callable[..., Tensor], queries: int, visible: Tensor | None) -> Attend:
    """flex_attention, compiled or not, the mask as its block mask."""
    block_mask = None
    if visible is not None:

        def mask_mod(sample: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return visible[sample, key]

        block_mask = create_block_mask(mask_mod, len(visible), None, queries, visible.shape[1], device=visible.device)

    # Backward runs many times over one graph, which buffers donated to it would not survive.
    @functorch_config.patch(donated_buffer=False)
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return function(q, k, v, block_mask=block_mask)

    return attend


def _compiled_flex(queries: int, visible: Tensor | None) -> Attend:
    forget_compiled()
    return flex(torch.compile(flex_attention, dynamic=False), queries, visible)
