"""Adaptive layer norm: add what a layer made, normalise, modulate by vectors of the timestep, in one pass.

    norm_modulate(x, shift, scale)                        = norm(x) * (1 + scale) + shift
    gate_residual(x, gate, y)                             = x + gate * y
    gate_residual_norm_modulate(x, gate, y, shift, scale) = r, norm(r) * (1 + scale) + shift with r = x + gate * y

x, y are (B, N, d) in any strides with contiguous channels, in types of their own; gate, shift and scale are (B, d), a
vector of each sample; the gate may be missing. Each may come as two parts, the sample's vector and a table's row (d,)
that all samples share, which are added inside: what AdaLN-single's blocks have. norm is LayerNorm (or RMSNorm) over d
with optional weight and bias (d,). All is computed in float32; r has x's type and is normalised as rounded to it.
bfloat16, float16, float32.

Source: "Scalable Diffusion Models with Transformers" (Peebles and Xie, 2022), adaLN-Zero; the shared vectors are those
of PixArt-alpha (Chen et al., 2023); the backward of the norm is Ba, Kiros and Hinton's (2016).

Bytes of rows, in units of the 2 B N d that one tensor has in 16 bits (vectors and 8 bytes a row of statistics beside):

| | forward | backward |
|---|---|---|
| norm_modulate | 2: x, out | 3: out's gradient, x, x's gradient |
| gate_residual | 3: x, y, r | 3: r's gradient, y, y's gradient; x's gradient is r's |
| both | 4: x, y, r, out | 6: both gradients, r, y, x's and y's gradients |
| both, no gate | 4 | 4: both gradients, r, one gradient for x and y |

About 15 FLOPs an element forward and 25 backward: bound by memory everywhere. Gradients of vectors are summed in
registers over the rows of a program and over programs in a second, small kernel: no atomics, the same bits each time.
Forward-mode differentiation gives zero tangents. A call costs the host about 0.1 ms: compile, or capture, small ones.
The kernels: `adaln_kernels.py`; shapes, tolerances, predictions: `adaln_spec.py`.
"""

import torch
import torch.nn.functional as F
from osp_fast.kernels.adaln_launch import adaln_backward, adaln_forward
from osp_fast.kernels.launch import check_triton, constant_path, current
from torch import Tensor

NORMS = ("layer", "rms")


def norm_modulate(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    *,
    shift_table: Tensor | None = None,
    scale_table: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm: str = "layer",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """norm(x) * (1 + scale) + shift, (B, N, d) in `dtype` (x's by default); see the module's docstring.

    Triton on CUDA, the reference elsewhere; `OSP_FAST_KERNELS` forces one. Raises ValueError on shapes that do not fit.
    """
    options = dict(shift_table=shift_table, scale_table=scale_table, weight=weight, bias=bias, norm=norm, dtype=dtype)
    if constant_path(x.device) == "triton":
        return adaln_triton(x, shift=shift, scale=scale, eps=eps, **options)[1]
    check_arguments(x, None, None, None, shift, scale, shift_table, scale_table, weight, bias, norm)
    return norm_modulate_ref(x, shift, scale, eps, **options)


def gate_residual(x: Tensor, gate: Tensor, y: Tensor, *, gate_table: Tensor | None = None) -> Tensor:
    """x + gate * y, (B, N, d) in x's dtype; paths and errors as `norm_modulate`."""
    if constant_path(x.device) == "triton":
        return adaln_triton(x, y=y, gate=gate, gate_table=gate_table)[0]
    check_arguments(x, y, gate, gate_table)
    return gate_residual_ref(x, gate, y, gate_table=gate_table)


def gate_residual_norm_modulate(
    x: Tensor,
    gate: Tensor | None,
    y: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    *,
    gate_table: Tensor | None = None,
    shift_table: Tensor | None = None,
    scale_table: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm: str = "layer",
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """r = x + gate * y (x + y without a gate) in x's dtype and norm(r) * (1 + scale) + shift in `dtype` (x's by
    default), both (B, N, d); paths and errors as `norm_modulate`."""
    options = dict(gate_table=gate_table, shift_table=shift_table, scale_table=scale_table)
    options |= dict(weight=weight, bias=bias, norm=norm, dtype=dtype)
    if constant_path(x.device) == "triton":
        return adaln_triton(x, y=y, gate=gate, shift=shift, scale=scale, eps=eps, **options)
    check_arguments(x, y, gate, gate_table, shift, scale, shift_table, scale_table, weight, bias, norm)
    return gate_residual_norm_modulate_ref(x, gate, y, shift, scale, eps, **options)


def adaln_triton(
    x: Tensor,
    *,
    y: Tensor | None = None,
    gate: Tensor | None = None,
    gate_table: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    shift_table: Tensor | None = None,
    scale_table: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 0.0,
    norm: str = "layer",
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """All of them by the Triton kernels: (x + gate * y, its norm modulated); what was not asked for is empty.

    Raises ValueError also where they cannot run: no GPU, another dtype.
    """
    check_arguments(x, y, gate, gate_table, shift, scale, shift_table, scale_table, weight, bias, norm)
    tensors = (x, y, gate, gate_table, shift, scale, shift_table, scale_table, weight, bias)
    check_triton("adaln", *(tensor for tensor in tensors if tensor is not None))
    residual, modulated, _, _ = torch.ops.osp_fast.adaln(*tensors, eps, norm == "rms", dtype or x.dtype)
    return residual, modulated


def norm_modulate_ref(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    *,
    shift_table: Tensor | None = None,
    scale_table: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm: str = "layer",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The reference of `norm_modulate`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    weight, bias = (None if vector is None else vector.to(wide) for vector in (weight, bias))
    if norm == "layer":
        normed = F.layer_norm(x.to(wide), x.shape[-1:], weight, bias, eps)
    else:
        normed = F.rms_norm(x.to(wide), x.shape[-1:], weight, eps)
        normed = normed if bias is None else normed + bias
    shift, scale = _sum_ref(shift, shift_table, wide), _sum_ref(scale, scale_table, wide)
    return (normed * (1 + scale) + shift).to(dtype or x.dtype)


def gate_residual_ref(x: Tensor, gate: Tensor | None, y: Tensor, *, gate_table: Tensor | None = None) -> Tensor:
    """The reference of `gate_residual`; without a gate it adds."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if gate is None:
        return (x.to(wide) + y.to(wide)).to(x.dtype)
    return torch.addcmul(x.to(wide), _sum_ref(gate, gate_table, wide), y.to(wide)).to(x.dtype)


def gate_residual_norm_modulate_ref(
    x: Tensor, gate: Tensor | None, y: Tensor, shift: Tensor, scale: Tensor, eps: float, *,
    gate_table: Tensor | None = None, **options
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The reference of `gate_residual_norm_modulate`; `options` are those of `norm_modulate_ref`."""
    residual = gate_residual_ref(x, gate, y, gate_table=gate_table)
    return residual, norm_modulate_ref(residual, shift, scale, eps, **options)


def _sum_ref(vector: Tensor, table: Tensor | None, wide: torch.dtype) -> Tensor:
    """(B, 1, d): a sample's vector, plus the table's row."""
    total = vector.to(wide) if table is None else vector.to(wide) + table.to(wide)
    return total[:, None]


def check_arguments(
    x: Tensor,
    y: Tensor | None = None,
    gate: Tensor | None = None,
    gate_table: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    shift_table: Tensor | None = None,
    scale_table: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm: str = "layer",
) -> None:
    """Raises ValueError for arguments that the operations do not take."""
    if norm not in NORMS:
        raise ValueError(f"norm {norm!r} is unknown: choose from {', '.join(NORMS)}")
    if x.dim() != 3:
        raise ValueError(f"x {tuple(x.shape)} must be (B, N, d)")
    batch, _, width = x.shape
    if y is not None and y.shape != x.shape:
        raise ValueError(f"y {tuple(y.shape)} must have x's shape {tuple(x.shape)}")
    if (y is None and (gate is not None or shift is None)) or (shift is None) != (scale is None):
        raise ValueError("a gate needs y, and shift needs scale: give y, or shift and scale, or all of them")
    per_sample = {"gate": gate, "shift": shift, "scale": scale}
    for name, vector in per_sample.items():
        if vector is not None and vector.shape != (batch, width):
            raise ValueError(f"{name} {tuple(vector.shape)} must be (B, d) = {(batch, width)}")
    tables = {
        "gate_table": (gate_table, gate),
        "shift_table": (shift_table, shift),
        "scale_table": (scale_table, scale),
    }
    for name, (table, vector) in (tables | {"weight": (weight, shift), "bias": (bias, shift)}).items():
        if table is not None and (table.shape != (width,) or vector is None):
            raise ValueError(f"{name} {tuple(table.shape)} must be (d,) = {(width,)}, beside vectors of samples")
    if (shift_table is None) != (scale_table is None):
        raise ValueError("shift_table and scale_table go together: give both or none")


@torch.library.custom_op("osp_fast::adaln", mutates_args=())
def _forward(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    gate_table: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    shift_table: Tensor | None,
    scale_table: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """residual, modulated, and the means and inverse deviations (B, N) float32 of rows; empty what is not computed."""
    with current(x.device):
        return adaln_forward(
            x, y, gate, gate_table, shift, scale, shift_table, scale_table, weight, bias, eps, rms, dtype
        )


@_forward.register_fake
def _(x, y, gate, gate_table, shift, scale, shift_table, scale_table, weight, bias, eps, rms, dtype):
    def made(there: bool, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return x.new_empty(shape if there else (0,), dtype=dtype)

    rows = made(scale is not None, x.shape[:2], torch.float32)
    means = made(scale is not None and not rms, x.shape[:2], torch.float32)
    return made(y is not None, x.shape, x.dtype), made(scale is not None, x.shape, dtype), means, rows


@torch.library.custom_op("osp_fast::adaln_backward", mutates_args=())
def _backward(
    residual_grad: Tensor | None,
    modulated_grad: Tensor | None,
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    gate_table: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    shift_table: Tensor | None,
    scale_table: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    means: Tensor,
    inverses: Tensor,
    rms: bool,
) -> list[Tensor]:
    """x is the residual stream that was normalised. Gradients of x, y and each vector; empty where there is none.

    Without modulated_grad x's gradient is residual_grad and empty here; without a gate y's is x's and empty here.
    """
    with current(x.device):
        return adaln_backward(
            residual_grad, modulated_grad, x, y, gate, gate_table, shift, scale, shift_table, scale_table,
            weight, bias, means, inverses, rms,
        )  # fmt: skip


@_backward.register_fake
def _(
    residual_grad, modulated_grad, x, y, gate, gate_table, shift, scale, shift_table, scale_table, weight, bias, means,
    inverses, rms,
):  # fmt: skip
    modulates = modulated_grad is not None
    rows = [x if modulates else None, y if gate is not None else None]
    vectors = [gate, gate_table, *((shift, scale, shift_table, scale_table, weight, bias) if modulates else [None] * 6)]
    return [x.new_empty(0) if one is None else one.new_empty(one.shape) for one in (*rows, *vectors)]


def _save_for_backward(ctx, inputs, output) -> None:
    x, y, *vectors, _, ctx.rms, _ = inputs
    residual, modulated, means, inverses = output
    gate, scale = vectors[0], vectors[3]
    unused = [residual] * (y is None) + [modulated] * (scale is None)
    ctx.mark_non_differentiable(means, inverses, *unused)
    ctx.set_materialize_grads(False)
    ctx.y_dtype = None if y is None else y.dtype
    normed = x if y is None else residual
    # Without a norm the residual stream is not needed again: y stands for its shape.
    ctx.save_for_backward(y if scale is None else normed, None if gate is None else y, *vectors, means, inverses)


def _gradients(ctx, residual_grad, modulated_grad, *_):
    if residual_grad is None and modulated_grad is None:
        return (None,) * 13
    x, y, *vectors, means, inverses = ctx.saved_tensors
    if modulated_grad is None and y is None:  # a sum without a gate
        return residual_grad, residual_grad.to(ctx.y_dtype), *(None,) * 11
    grads = torch.ops.osp_fast.adaln_backward(residual_grad, modulated_grad, x, y, *vectors, means, inverses, ctx.rms)
    x_grad, y_grad, *vector_grads = grads
    if modulated_grad is None:
        x_grad = residual_grad
    if y is None:  # added without a gate, or nothing added
        y_grad = None if ctx.y_dtype is None else x_grad.to(ctx.y_dtype)
    # The gate's vectors come first; those of the norm have gradients only if its result has one.
    sought = [*vectors[:2], *(vectors[2:] if modulated_grad is not None else [None] * 6)]
    given = [None if vector is None else grad for vector, grad in zip(sought, vector_grads, strict=True)]
    return x_grad, y_grad, *given, None, None, None


_forward.register_autograd(_gradients, setup_context=_save_for_backward)
