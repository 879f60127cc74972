"""Launches the kernels of `adaln.py`: configurations, grids and buffers."""

import torch
import triton
from osp_fast.kernels import tuning
from osp_fast.kernels.adaln_kernels import adaln_bwd_kernel, adaln_bwd_sums_kernel, adaln_fwd_kernel
from osp_fast.kernels.launch import architecture, resident_programs, with_contiguous_channels
from osp_fast.kernels.tuning import RowConfig
from torch import Tensor

SUM_ROWS, SUM_COLUMNS, SUM_STAGES = 32, 32, 3  # of a block of the small sum: 16 bytes a thread
SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes that a multiprocessor has for programs


def candidates(
    kernel: str, arch: int, *, adds: bool, modulates: bool, width: int, dtype: torch.dtype
) -> list[RowConfig]:
    """The configurations worth timing of "adaln forward" or "adaln backward", the chosen one first.

    adds: there is y (forward) or a gate (backward). `programs` is what a multiprocessor holds: by its registers, as
    the static report says, and by the shared memory of the rows that are loaded ahead.
    """
    if arch == 0:  # several blocks, several programs and a rest
        return [RowConfig(2, 4, 2, 1)]
    forward = kernel == "adaln forward"
    tensors = 1 + adds if forward else 1 + adds + 2 * modulates
    row = tensors * triton.next_power_of_2(width) * dtype.itemsize
    available = SHARED_MEMORY[max(known for known in SHARED_MEMORY if known <= arch)]

    def config(rows: int, warps: int, stages: int, by_registers: int) -> RowConfig:
        by_memory = available // (row * rows * (stages - 1) + 1536)  # 1 KiB that the system takes, and row sums
        return RowConfig(rows, warps, stages, max(1, min(by_registers, by_memory)))

    if not modulates:
        return [config(1, 4, 3, 6), config(1, 4, 4, 4), config(2, 8, 3, 3)] if forward else [
            config(1, 8, 3, 4), config(1, 4, 3, 4), config(2, 8, 3, 2)]  # fmt: skip
    if forward:
        many = 3 if adds else 4  # with y 128 registers under Triton 3.7.1, 129 under 3.6.0
        return [config(1, 4, 3, many), config(1, 4, 4, many), config(1, 8, 3, 2), config(2, 8, 3, 2)]
    many = 1 if adds or dtype == torch.float32 or arch >= 100 else 2
    return [config(1, 8, 3, many), config(1, 8, 4, many), config(1, 16, 3, 1)]


def adaln_forward(
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
    """residual, modulated, means, inverse deviations; what is not computed is empty."""
    batch, tokens, width = x.shape

    def made(there: bool, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape if there else (0,), dtype=dtype, device=x.device)

    modulates = scale is not None
    residual, modulated = made(y is not None, x.shape, x.dtype), made(modulates, x.shape, dtype)
    means = made(modulates and not rms, (batch, tokens), torch.float32)
    inverses = made(modulates, (batch, tokens), torch.float32)
    if x.numel() == 0:
        return residual, modulated, means, inverses
    x, y, gate, shift, scale = (with_contiguous_channels(tensor) for tensor in (x, y, gate, shift, scale))
    gate_table, shift_table, scale_table, weight, bias = (
        with_contiguous_channels(tensor) for tensor in (gate_table, shift_table, scale_table, weight, bias)
    )
    config = _config("adaln forward", x, adds=y is not None, modulates=modulates)
    adaln_fwd_kernel[(_programs(x, config), batch)](
        x, y, gate, gate_table, shift, scale, shift_table, scale_table, weight, bias, residual, modulated,
        means, inverses, *_row_strides(x, y), *_vector_strides(gate, shift, scale), tokens, eps,
        D=width, BLOCK=triton.next_power_of_2(width), ROWS=config.rows, STAGES=config.num_stages,
        ADDS=y is not None, **_form(gate, gate_table, scale, scale_table, weight, rms), BIASED=bias is not None,
        num_warps=config.num_warps,
    )  # fmt: skip
    return residual, modulated, means, inverses


def adaln_backward(
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
    """Gradients of x, y, gate, gate_table, shift, scale, shift_table, scale_table, weight, bias; empty for none."""
    if modulated_grad is None:
        shift = scale = shift_table = scale_table = weight = bias = None
    batch, tokens, width = x.shape
    rows = [None if scale is None else x, y if gate is not None else None]
    vectors = [gate, gate_table, shift, scale, shift_table, scale_table, weight, bias]
    grads = [
        torch.empty((0,) if one is None else one.shape, dtype=(x if one is None else one).dtype, device=x.device)
        for one in (*rows, *vectors)
    ]
    if x.numel() == 0:
        return [grad.zero_() for grad in grads]
    x_grad, y_grad, gate_grad, gate_table_grad, shift_grad, scale_grad, *table_grads, weight_grad, bias_grad = grads
    x, y, gate, scale = (with_contiguous_channels(tensor) for tensor in (x, y, gate, scale))
    residual_grad, modulated_grad = with_contiguous_channels(residual_grad), with_contiguous_channels(modulated_grad)
    gate_table, scale_table, weight = (with_contiguous_channels(tensor) for tensor in (gate_table, scale_table, weight))
    config = _config("adaln backward", x, adds=gate is not None, modulates=scale is not None)
    form = _form(gate, gate_table, scale, scale_table, weight, rms)
    programs = _programs(x, config)
    sums = (2 if form["MODULATES"] else 0) + form["GATED"]
    partial = torch.empty((batch, programs, sums, width), dtype=torch.float32, device=x.device)
    adaln_bwd_kernel[(programs, batch)](
        residual_grad, modulated_grad, x, y, gate, gate_table, scale, scale_table, weight, means, inverses,
        x_grad, y_grad, partial, *_row_strides(residual_grad, modulated_grad, x, y), *_vector_strides(gate, scale),
        tokens, D=width, BLOCK=triton.next_power_of_2(width), ROWS=config.rows, STAGES=config.num_stages,
        FROM_RESIDUAL=residual_grad is not None, **form, num_warps=config.num_warps,
    )  # fmt: skip
    del form["RMS"]
    adaln_bwd_sums_kernel[(triton.cdiv(width, SUM_COLUMNS), sums)](
        partial, scale, scale_table, weight, with_contiguous_channels(bias), shift_grad, scale_grad, gate_grad,
        *table_grads, gate_table_grad, weight_grad, bias_grad, *_vector_strides(scale), batch, programs,
        D=width, ROWS=SUM_ROWS, COLUMNS=SUM_COLUMNS, STAGES=SUM_STAGES, **form, BIASED=bias is not None, num_warps=4,
    )  # fmt: skip
    return grads


def _config(kernel: str, x: Tensor, **form: bool) -> RowConfig:
    return tuning.pick(kernel, candidates(kernel, architecture(x.device), width=x.shape[2], dtype=x.dtype, **form))


def _form(
    gate: Tensor | None,
    gate_table: Tensor | None,
    scale: Tensor | None,
    scale_table: Tensor | None,
    weight: Tensor | None,
    rms: bool,
) -> dict[str, bool]:
    """The constants that all kernels share: which parts of the operation a call has."""
    return dict(
        GATED=gate is not None,
        GATE_TABLE=gate_table is not None,
        MODULATES=scale is not None,
        TABLE=scale_table is not None,
        WEIGHTED=weight is not None,
        RMS=rms,
    )


def _programs(x: Tensor, config: RowConfig) -> int:
    batch, tokens, _ = x.shape
    return resident_programs(x.device, config.programs, batch, triton.cdiv(tokens, config.rows))


def _row_strides(*tensors: Tensor | None) -> list[int]:
    """Batch and token strides of each; of none, those of nothing."""
    return [stride for x in tensors for stride in ((0, 0) if x is None else x.stride()[:2])]


def _vector_strides(*tensors: Tensor | None) -> list[int]:
    return [0 if x is None else x.stride(0) for x in tensors]
