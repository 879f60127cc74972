"""The VAE's norm: LayerNorm over channels at each pixel, optionally followed by SiLU.

    out = silu(n * weight + bias), n = (x - mean) / sqrt(variance + eps)

x is (B, C, T, H, W) or (B, C, H, W), weight and bias are (C,); mean and (biased) variance are over C, all in float32.
bfloat16, float16 and float32; out has x's shape and type, in channels-last memory. x is read as it is where its
channels are contiguous and the pixels of a sample evenly spaced: channels-last tensors, slices of their channels,
frames or samples. Anything else is copied to channels-last memory first, which doubles the traffic.

Bytes: forward 2 B C T H W elements, x and out; backward 3 B C T H W, the gradient of out, x and the gradient of x.
Beside them weight and bias, and backward two float32 sums of C channels per program, written and read once. About 10
FLOPs an element forward, 25 backward, SiLU included: memory binds. Gradients of weight and bias are summed without
atomics, in an order that depends on sizes and on the GPU alone. They cannot be differentiated again: that raises.

Source: Ba, Kiros and Hinton, "Layer Normalization" (2016), with its backward formula. The kernels are in
`channel_norm_kernels.py`, launched by `channel_norm_launch.py`; shapes, tolerances and predicted times in
`channel_norm_spec.py`.
"""

import torch
import torch.nn.functional as F
from osp_fast.kernels.channel_norm_launch import channel_norm_backward, channel_norm_forward, channels_last_empty
from osp_fast.kernels.launch import check_triton, constant_path, current
from torch import Tensor


def channel_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, silu: bool = False) -> Tensor:
    """LayerNorm over dimension 1 of x with affine weights (C,), then SiLU if asked for; see the module's docstring.

    Triton on CUDA, the reference elsewhere; `OSP_FAST_KERNELS` forces one. Raises ValueError on shapes that do not fit.
    """
    if constant_path(x.device) == "triton":
        return channel_norm_triton(x, weight, bias, eps, silu)
    check_arguments(x, weight, bias)
    return channel_norm_ref(x, weight, bias, eps, silu)


def channel_norm_triton(x: Tensor, weight: Tensor, bias: Tensor, eps: float, silu: bool = False) -> Tensor:
    """`channel_norm` by the Triton kernels; raises ValueError also where they cannot run: no GPU, another dtype."""
    check_triton("channel_norm", x, weight, bias)
    check_arguments(x, weight, bias)
    return torch.ops.osp_fast.channel_norm(x, weight, bias, eps, silu)


def channel_norm_ref(x: Tensor, weight: Tensor, bias: Tensor, eps: float, silu: bool = False) -> Tensor:
    """The reference: in float32 or wider, the result in x's dtype and channels-last memory."""
    wide = torch.promote_types(x.dtype, torch.float32)
    normed = F.layer_norm(x.movedim(1, -1).to(wide), weight.shape, weight.to(wide), bias.to(wide), eps)
    return (F.silu(normed) if silu else normed).to(x.dtype).movedim(-1, 1)


def check_arguments(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Raises ValueError for shapes that the operation does not take."""
    if x.dim() not in (4, 5):
        raise ValueError(f"channel_norm: x {tuple(x.shape)} must be (B, C, H, W) or (B, C, T, H, W)")
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector.shape != (x.shape[1],):
            raise ValueError(f"channel_norm: {name} {tuple(vector.shape)} must be (C,) = {(x.shape[1],)}")


@torch.library.custom_op("osp_fast::channel_norm", mutates_args=())
def _forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float, silu: bool) -> Tensor:
    with current(x.device):
        return channel_norm_forward(x, weight, bias, eps, silu)


@_forward.register_fake
def _(x, weight, bias, eps, silu):
    return channels_last_empty(x)


@torch.library.custom_op("osp_fast::channel_norm_backward", mutates_args=())
def _backward(
    out_grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    with current(x.device):
        return channel_norm_backward(out_grad, x, weight, bias, eps, silu)


@_backward.register_fake
def _(out_grad, x, weight, bias, eps, silu):
    return channels_last_empty(x), weight.new_empty(weight.shape), bias.new_empty(bias.shape)


def _save_for_backward(ctx, inputs, output) -> None:
    x, weight, bias, ctx.eps, ctx.silu = inputs
    ctx.save_for_backward(x, weight, bias)


def _gradients(ctx, out_grad):
    return *torch.ops.osp_fast.channel_norm_backward(out_grad, *ctx.saved_tensors, ctx.eps, ctx.silu), None, None


_forward.register_autograd(_gradients, setup_context=_save_for_backward)
