"""What Inductor makes of a DiT block's references: kernels and bytes of a compiled block on the CPU, at a small size.

Attention is replaced by an operation that Inductor cannot look into, as a kernel of its own is for it. Read from
Inductor's own schedule after fusion; bytes are in passes, reads or writes of one (tokens, width) tensor in 16 bits, so
that they hold for any clip. A GPU's schedule may differ: reductions are split otherwise there.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from osp_fast.kernels.launch import forced_path
from torch import Tensor

HEADS, LATENT_SIZE, TEXT_TOKENS, CAPTION_CHANNELS = 2, (4, 32, 32), 32, 32


@dataclass(frozen=True)
class Schedule:
    """The memory-bound kernels of one direction: how many, and how many passes over a (tokens, width) tensor."""

    kernels: int
    passes: float


@torch.library.custom_op("bench::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Zeros in place of attention: only its inputs and outputs matter."""
    return torch.zeros(q.shape, dtype=q.dtype, device=q.device)


@attention.register_fake
def _(q, k, v):
    return q.new_empty(q.shape)


@torch.library.custom_op("bench::attention_backward", mutates_args=())
def attention_backward(out_grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Zeros in place of the gradients of q, k and v."""
    q_grad, k_grad, v_grad = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    return q_grad, k_grad, v_grad


@attention_backward.register_fake
def _(out_grad, q, k, v, out):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save_for_backward(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, output)


def _gradients(ctx, out_grad):
    return torch.ops.bench.attention_backward(out_grad, *ctx.saved_tensors)


attention.register_autograd(_gradients, setup_context=_save_for_backward)


def has_compiler() -> bool:
    """Whether there is a C++ compiler, which Inductor needs on the CPU."""
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        return False
    return True


def block_schedules(config: Any, layers: int) -> dict[str, Schedule]:
    """forward, backward -> what the block after `layers` others adds to a compiled bfloat16 DiT of `HEADS` heads."""
    config = replace(config, num_attention_heads=HEADS, caption_channels=CAPTION_CHANNELS, cross_attention_dim=None)
    fewer, more = (_compiled_schedules(replace(config, num_layers=count)) for count in (layers, layers + 1))
    return {
        direction: Schedule(second.kernels - first.kernels, second.passes - first.passes)
        for direction, first, second in zip(("forward", "backward"), fewer, more, strict=True)
    }


def _compiled_schedules(config: Any) -> list[Schedule]:
    """Of a compiled DiT's forward and backward graphs."""
    from osp_fast.models.attention_backends import AttentionBackend
    from osp_fast.models.dit import DiT

    model = DiT.create(config, seed=0).bfloat16()
    opaque = AttentionBackend("opaque", lambda q, k, v, *options: attention(q, k, v), lambda mode, sparse_n: "zeros")
    for block in model.transformer_blocks:
        block.self_attention.backend = block.cross_attention.backend = opaque
    frames, rows, columns = LATENT_SIZE
    tokens = frames * rows * columns // (config.patch_size_t * config.patch_size**2)
    latents = torch.randn(1, config.in_channels, *LATENT_SIZE).bfloat16()
    text = torch.randn(1, TEXT_TOKENS, CAPTION_CHANNELS).bfloat16()
    inputs = (latents, torch.tensor([1]), text)
    with forced_path("reference"):
        return graph_schedules(model, inputs, list(model.parameters()), 2 * tokens * config.width)


def graph_schedules(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], leaves: Sequence[Tensor], unit: int
) -> list[Schedule]:
    """[forward, backward] of a compiled function, its passes in units of so many bytes."""
    from torch._inductor import config as inductor_config

    graphs: list[Schedule] = []

    def look(nodes: Sequence[Any]) -> Sequence[Any]:
        moved = [node.get_read_write_buffers_sizes() for node in nodes if not node.is_extern()]
        graphs.append(Schedule(sum(map(bool, moved)), sum(moved) / unit))
        return nodes

    with inductor_config.patch(_post_fusion_custom_pass=look, fx_graph_cache=False):
        torch._dynamo.reset()
        out = torch.compile(function, dynamic=False, fullgraph=True)(*inputs)
        torch.autograd.grad(out, leaves, torch.zeros_like(out))
    if len(graphs) != 2:
        raise RuntimeError(f"Inductor made {len(graphs)} graphs of a forward and a backward pass")
    return graphs
