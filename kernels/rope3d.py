"""Rotary position embedding in three axes, by halves, on q and k in one pass; optional RMS norm of both in front.

    y = x / sqrt(mean(x^2) + eps) * weight        (with norm; over the D channels of each head)
    (y1, y2) -> (y1 cos a - y2 sin a, y2 cos a + y1 sin a),   a = position / scale * 10000^(-2 i / (D/3))

The head dimension D is three equal parts for time, rows and columns; in each part the two halves, (y1, y2) with i in
0 .. D/6 - 1, are rotated by the position on that axis. Tokens are in (t, h, w) order; `scale` is the axis' own
interpolation_scale. Source: "RoFormer" (Su et al., 2021); the norm of q and k: "Scaling Vision Transformers to 22
Billion Parameters" (Dehghani et al., 2023), with RMS for LN.

qkv is the projection's output (B, N, 3, H, D), in any strides with contiguous channels; bfloat16, float16 or float32,
computed in float32. q, k, v come back as (B, N, H, D), v as a view. The angles are a table of T + H + W lines for the
whole clip, 13 KB for 24 x 40 x 40 tokens, which stays in the first-level cache; positions are global: N tokens from
`Rope3D.start` on, as a shard has them, or wherever `Rope3D.positions` says, 4 bytes more for each token.

Bytes in 16 bits: forward 8 B N H D (q and k, one read, one write), in place or not; backward 12 B N H D (three
gradients read, one tensor of three written, so that nothing is stacked afterwards), with norm 16 (q and k again).
FLOPs: 6 for every pair of q and of k; with norm 8 more forward, 22 backward.
"""

from typing import NamedTuple

import torch
from osp_fast.kernels.launch import check_triton, constant_path, with_contiguous_channels
from osp_fast.kernels.rope3d_launch import rope3d_backward, rope3d_forward
from torch import Tensor

BASE = 10000.0
EPS = 1e-6


class Rope3D(NamedTuple):
    """What rotates the tokens of a clip, or of a part of it.

    axes: (2, T + H + W, D/6) float32, cos and sin, of `rope3d_axes`; size: (T, H, W) of the whole clip, in tokens
    start: where in the clip the first token given to the operation is
    positions: (N,) int32, where in the clip each of these tokens is, in any order, with a start of 0; None: they are
        consecutive. Nothing checks that they are 0 .. T H W - 1; on a GPU another one reads outside of the table.
    """

    axes: Tensor
    size: tuple[int, int, int]
    start: int = 0
    positions: Tensor | None = None


def make_rope3d(
    size: tuple[int, int, int],
    head_dim: int,
    interpolation_scale: tuple[float, float, float] = (1.0, 1.0, 1.0),
    device: torch.device | str | None = None,
    round_to: torch.dtype | None = None,
    start: int = 0,
) -> Rope3D:
    """The `Rope3D` of a clip; see `rope3d_axes`."""
    return Rope3D(rope3d_axes(size, head_dim, interpolation_scale, device, round_to), size, start)


def rope3d_axes(
    size: tuple[int, int, int],
    head_dim: int,
    interpolation_scale: tuple[float, float, float] = (1.0, 1.0, 1.0),
    device: torch.device | str | None = None,
    round_to: torch.dtype | None = None,
) -> Tensor:
    """cos and sin of every position of every axis: (2, T + H + W, D/6) float32, the axes' lines one after the other.

    size is (T, H, W) in tokens. `round_to` rounds angles, then cos and sin, to that type, as the released checkpoints
    were trained; they are float32 all the same. Raises ValueError if head_dim is not a multiple of 6.
    """
    if head_dim % 6:
        raise ValueError(f"head_dim {head_dim} is not a multiple of 6: three axes with two halves each")
    part = head_dim // 3
    frequency = BASE ** -(torch.arange(0, part, 2, dtype=torch.float32, device=device) / part)
    positions = [
        torch.arange(length, dtype=torch.float32, device=device) / scale
        for length, scale in zip(size, interpolation_scale, strict=True)
    ]
    angles = torch.cat(positions)[:, None] * frequency
    if round_to is not None:
        angles = angles.to(round_to)
    return torch.stack((angles.cos(), angles.sin())).float()


def rope3d(
    qkv: Tensor,
    rope: Rope3D,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = EPS,
    inplace: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (B, N, H, D) of qkv (B, N, 3, H, D), q and k normed (with weights (D,)) and rotated; v is a view of qkv.

    inplace: q and k of qkv may be overwritten, and qkv must not be used afterwards. They are overwritten by the Triton
    path, except where backward needs them (a norm), where qkv is a leaf that takes gradients or a view of one (compiled
    code decides this once, when it is traced, and sees no views), and where elements of it share memory.
    Triton on CUDA, the reference elsewhere; `OSP_FAST_KERNELS` forces one. Raises ValueError on shapes, devices or
    positions that do not fit.
    """
    if constant_path(qkv.device) == "triton":
        return rope3d_triton(qkv, rope, q_weight, k_weight, eps, inplace)
    check_arguments(*parts_of(qkv)[:2], rope, q_weight, k_weight, eps)
    return rope3d_ref(qkv, rope, q_weight, k_weight, eps)


def rope3d_triton(
    qkv: Tensor,
    rope: Rope3D,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = EPS,
    inplace: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """`rope3d` by the Triton kernels alone. Raises ValueError also where they cannot run."""
    q, k, v = parts_of(qkv)
    check_triton("rope3d", q, *_given(q_weight, k_weight))
    check_arguments(q, k, rope, q_weight, k_weight, eps)
    differentiated = torch.is_grad_enabled() and any(x.requires_grad for x in (qkv, *_given(q_weight, k_weight)))
    kept = differentiated and (q_weight is not None or _is_of_leaf(qkv))
    inplace = inplace and not kept and _can_be_overwritten(qkv)
    arguments = (*rope, q_weight, k_weight, eps)
    if differentiated:
        return _Rope3D.apply(qkv, *arguments, inplace)
    return (*_rotated(q, k, *arguments, inplace), v)


def rope3d_qk(
    q: Tensor,
    k: Tensor,
    rope: Rope3D,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = EPS,
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    """`rope3d` for q and k that are tensors of their own, (B, N, H, D) each in any strides with contiguous channels.

    inplace: they may be overwritten, and are by the Triton path where no gradient is wanted; q and k must then have no
    element in common. Raises as `rope3d`.
    """
    check_arguments(q, k, rope, q_weight, k_weight, eps)
    if constant_path(q.device) != "triton":
        return rope3d_qk_ref(q, k, rope, q_weight, k_weight, eps)
    check_triton("rope3d", q, k, *_given(q_weight, k_weight))
    differentiated = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, *_given(q_weight, k_weight)))
    inplace = inplace and not differentiated and _can_be_overwritten(q) and _can_be_overwritten(k)
    return _rotated(q, k, *rope, q_weight, k_weight, eps, inplace)


def rope3d_ref(
    qkv: Tensor, rope: Rope3D, q_weight: Tensor | None = None, k_weight: Tensor | None = None, eps: float = EPS
) -> tuple[Tensor, Tensor, Tensor]:
    """The reference of `rope3d`: never in place."""
    q, k, v = qkv.unbind(2)
    return (*rope3d_qk_ref(q, k, rope, q_weight, k_weight, eps), v)


def rope3d_qk_ref(
    q: Tensor, k: Tensor, rope: Rope3D, q_weight: Tensor | None = None, k_weight: Tensor | None = None, eps: float = EPS
) -> tuple[Tensor, Tensor]:
    """The reference of `rope3d_qk`: cos and sin expanded to every token, all in at least float32."""
    results = []
    for x, weight in ((q, q_weight), (k, k_weight)):
        y = x if weight is None else rms_norm_ref(x, weight, eps)
        results.append(rotate_ref(y, rope).to(x.dtype))
    return tuple(results)


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in at least float32."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rotate_ref(x: Tensor, rope: Rope3D) -> Tensor:
    """x (B, N, H, D) rotated, in at least float32."""
    cos, sin = token_angles(rope, x.shape[1])
    first, second = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (3, 2, -1)).unbind(-2)
    return torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-2).flatten(-3)


def token_angles(rope: Rope3D, tokens: int) -> tuple[Tensor, Tensor]:
    """cos and sin of `tokens` tokens of the rope, (N, 1, 3, D/6) each: one line for all heads."""
    frames, height, width = rope.size
    if rope.positions is None:
        place = torch.arange(rope.start, rope.start + tokens, device=rope.axes.device)
    else:
        place = rope.positions.long()
    frame, row, column = place // (height * width), place // width % height, place % width
    lines = torch.stack((frame, frames + row, frames + height + column), dim=1)
    cos, sin = rope.axes[:, lines].unsqueeze(2)
    return cos, sin


def parts_of(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of qkv (B, N, 3, H, D). Raises ValueError on another shape."""
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ValueError(f"qkv {tuple(qkv.shape)} must be (B, N, 3, H, D)")
    return qkv.unbind(2)


def check_arguments(
    q: Tensor, k: Tensor, rope: Rope3D, q_weight: Tensor | None, k_weight: Tensor | None, eps: float
) -> None:
    """Raises ValueError for arguments that `rope3d` and `rope3d_qk` do not take."""
    if q.dim() != 4 or q.shape != k.shape or q.dtype != k.dtype or q.device != k.device:
        raise ValueError(
            f"q {tuple(q.shape)} {q.dtype} and k {tuple(k.shape)} {k.dtype} must be alike, (B, N, H, D) on one device"
        )
    check_rope(rope, q.shape[1], q.shape[3], q.device)
    check_weights(q_weight, k_weight, q.shape[3], q.device, eps)


def check_rope(rope: Rope3D, tokens: int, head_dim: int, device: torch.device) -> None:
    """Raises ValueError if `rope` is not of such a head, on this device, or not of `tokens` tokens of its clip."""
    axes, (frames, height, width), start, positions = rope
    if axes.shape != (2, frames + height + width, head_dim // 6) or head_dim % 6 or axes.dtype != torch.float32:
        raise ValueError(
            f"the rope's axes {tuple(axes.shape)} {axes.dtype} must be float32, (2, T + H + W, D/6) of a clip of "
            f"{tuple(rope.size)} tokens and heads of {head_dim}"
        )
    if axes.device != device:
        raise ValueError(f"the rope's axes must be on {device}, where q and k are, not on {axes.device}")
    if positions is not None:
        if start != 0:
            raise ValueError(f"a rope with positions has no start of its own: it must be 0, not {start}")
        if positions.shape != (tokens,) or positions.dtype != torch.int32 or not positions.is_contiguous():
            raise ValueError(
                f"the rope's positions {tuple(positions.shape)} {positions.dtype} must be contiguous int32, one for "
                f"each of {tokens} tokens"
            )
        if positions.device != device:
            raise ValueError(f"the rope's positions must be on {device}, where q and k are, not on {positions.device}")
    elif start < 0 or start + tokens > frames * height * width:
        raise ValueError(f"{tokens} tokens from {start} on are not all in a clip of {tuple(rope.size)} tokens")


def check_weights(
    q_weight: Tensor | None, k_weight: Tensor | None, head_dim: int, device: torch.device, eps: float
) -> None:
    """Raises ValueError unless both weights are given, (D,) on this device, or none is."""
    if (q_weight is None) != (k_weight is None):
        raise ValueError("q_weight and k_weight go together: give both, or none")
    for weight in _given(q_weight, k_weight):
        if weight.shape != (head_dim,) or weight.device != device:
            raise ValueError(
                f"norm weights must be ({head_dim},) on {device}, not {tuple(weight.shape)} on {weight.device}"
            )
    if q_weight is not None and eps <= 0:
        raise ValueError(f"eps {eps} of the norm must be positive")


def _given(*tensors: Tensor | None) -> list[Tensor]:
    return [x for x in tensors if x is not None]


def _is_of_leaf(x: Tensor) -> bool:
    """Whether x is a leaf or a view of one; traced code sees the former alone."""
    return x.is_leaf if torch.compiler.is_compiling() or not x._is_view() else x._base.is_leaf


def _can_be_overwritten(x: Tensor) -> bool:
    """Whether channels are contiguous and no two elements share memory, as they do in an expanded tensor."""
    return x.stride(-1) == 1 and all(
        stride > 0 for stride, length in zip(x.stride(), x.shape, strict=True) if length > 1
    )


def _rotated(q: Tensor, k: Tensor, *arguments) -> tuple[Tensor, Tensor]:
    """q, k rotated, in place if the last of `arguments` says so."""
    *arguments, inplace = arguments
    if inplace:
        torch.ops.osp_fast.rope3d_(q, k, *arguments)
        return q, k
    return torch.ops.osp_fast.rope3d(q, k, *arguments)


@torch.library.custom_op("osp_fast::rope3d_", mutates_args=("q", "k"))
def _in_place(
    q: Tensor,
    k: Tensor,
    axes: Tensor,
    size: list[int],
    start: int,
    positions: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
) -> None:
    rope3d_forward(q, k, q, k, axes, size, start, positions, q_weight, k_weight, eps)


@_in_place.register_fake
def _(q, k, axes, size, start, positions, q_weight, k_weight, eps):
    return None


@torch.library.custom_op("osp_fast::rope3d", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    axes: Tensor,
    size: list[int],
    start: int,
    positions: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    q, k = with_contiguous_channels(q), with_contiguous_channels(k)
    q_out, k_out = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(2))
    rope3d_forward(q, k, q_out, k_out, axes, size, start, positions, q_weight, k_weight, eps)
    return q_out, k_out


@_forward.register_fake
def _(q, k, axes, size, start, positions, q_weight, k_weight, eps):
    return q.new_empty(q.shape), k.new_empty(k.shape)


@torch.library.custom_op("osp_fast::rope3d_backward", mutates_args=())
def _backward(
    q_grad: Tensor,
    k_grad: Tensor,
    v_grad: Tensor | None,
    axes: Tensor,
    size: list[int],
    start: int,
    positions: Tensor | None,
    q: Tensor | None,
    k: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """(B, N, 3 or 2, H, D) and (2, D) float32, or (0, D) without norm: see `rope3d_backward`."""
    return rope3d_backward(q_grad, k_grad, v_grad, axes, size, start, positions, q, k, q_weight, k_weight, eps)


@_backward.register_fake
def _(q_grad, k_grad, v_grad, axes, size, start, positions, q, k, q_weight, k_weight, eps):
    batch, tokens, heads, head_dim = q_grad.shape
    grad = q_grad.new_empty((batch, tokens, 2 if v_grad is None else 3, heads, head_dim))
    return grad, grad.new_empty((0 if q_weight is None else 2, head_dim), dtype=torch.float32)


def _save_for_backward(ctx, inputs, output) -> None:
    q, k, axes, *ctx.place, positions, q_weight, k_weight, ctx.eps = inputs
    normed = (None, None) if q_weight is None else (q, k)
    ctx.save_for_backward(axes, positions, *normed, q_weight, k_weight)


def _gradients(ctx, q_grad, k_grad):
    axes, positions, q, k, q_weight, k_weight = ctx.saved_tensors
    grad, weight_grads = torch.ops.osp_fast.rope3d_backward(
        q_grad, k_grad, None, axes, *ctx.place, positions, q, k, q_weight, k_weight, ctx.eps
    )
    return (*grad.unbind(2), *(None,) * 4, *weight_gradients(weight_grads, q_weight, k_weight), None)


_forward.register_autograd(_gradients, setup_context=_save_for_backward)


class _Rope3D(torch.autograd.Function):
    """q, k, v of qkv with one gradient for all three, which no operation of a library can give: v is a view.

    In place qkv is not marked as dirty: a projection's output is itself a view, and PyTorch then allows one result
    only. Nothing is lost by it. The operation raises the version of qkv, so that a backward pass that has saved it
    fails; and what autograd knows of qkv stays true as long as it is not used afterwards.
    """

    @staticmethod
    def forward(ctx, qkv, axes, size, start, positions, q_weight, k_weight, eps, inplace):
        q, k, v = qkv.unbind(2)
        ctx.save_for_backward(axes, positions, None if q_weight is None else qkv, q_weight, k_weight)
        ctx.place, ctx.eps = (size, start), eps
        return (*_rotated(q, k, axes, size, start, positions, q_weight, k_weight, eps, inplace), v)

    @staticmethod
    def backward(ctx, q_grad, k_grad, v_grad):
        axes, positions, qkv, q_weight, k_weight = ctx.saved_tensors
        q, k = (None, None) if qkv is None else qkv.unbind(2)[:2]
        grad, weight_grads = torch.ops.osp_fast.rope3d_backward(
            q_grad, k_grad, v_grad, axes, *ctx.place, positions, q, k, q_weight, k_weight, ctx.eps
        )
        return grad, *(None,) * 4, *weight_gradients(weight_grads, q_weight, k_weight), None, None


def weight_gradients(both: Tensor, q_weight: Tensor | None, k_weight: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of both norm weights in their types, of a (2, D) float32; None twice without norm."""
    if q_weight is None:
        return None, None
    return both[0].to(q_weight.dtype), both[1].to(k_weight.dtype)
