"""Times on a GPU: median of many runs over rotating inputs, beside two ceilings of the same device and run."""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from osp_fast.kernels.launch import interpreting, selected_path
from osp_fast.kernels.spec import Result
from torch import Tensor

from bench.accuracy import differentiable
from osp_fast.errors import UserError

COPY_BYTES = 1 << 30
MATMUL_SIZE = 8192
WARMUP_MS, MEASURE_MS = 50, 400
FEWEST_RUNS = 10  # also of a call that takes long
MOST_INPUT_SETS = 16

# Calls that do the same on different inputs -> (median seconds, (80th - 20th percentile) / median).
Timer = Callable[[Sequence[Callable[[], Any]]], tuple[float, float]]


def require_cuda(command: str) -> torch.device:
    """The GPU to measure on. Raises UserError where there is none, or where the references would serve it."""
    if not torch.cuda.is_available():
        raise UserError(
            f"bench {command} needs an NVIDIA GPU and PyTorch sees none, so nothing was measured: "
            "bench list and bench static work without one"
        )
    device = torch.device("cuda", torch.cuda.current_device())
    if interpreting():
        raise UserError(f"TRITON_INTERPRET=1 interprets the kernels, which bench {command} does not measure: unset it")
    try:
        path = selected_path(device)
    except ValueError as error:
        raise UserError(str(error)) from None
    if path != "triton":
        raise UserError(f"OSP_FAST_KERNELS chooses the references, which bench {command} does not measure: unset it")
    return device


def environment(device: torch.device) -> dict[str, Any]:
    """What the figures depend on: device and versions."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else device.type,
        "capability": "sm_{}{}".format(*torch.cuda.get_device_capability(device)) if on_gpu else None,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def median_seconds(calls: Sequence[Callable[[], Any]]) -> tuple[float, float]:
    """The `Timer` of a GPU: device events around each run, the L2 cache overwritten before it.

    `calls` take turns, so that with inputs beyond the L2 cache no run finds its own there. At least `FEWEST_RUNS`.
    """
    turns = itertools.cycle(calls)
    measure = functools.partial(triton.testing.do_bench, lambda: next(turns)(), quantiles=(0.2, 0.5, 0.8))
    _, once, _ = measure(warmup=1, rep=1)
    low, median, high = measure(warmup=WARMUP_MS, rep=max(MEASURE_MS, math.ceil(FEWEST_RUNS * once * 1.1)))
    return median * 1e-3, (high - low) / median


def input_set_count(inputs: dict[str, Any], device: torch.device) -> int:
    """How many sets of inputs like this one exceed twice the L2 cache; at least 2, at most `MOST_INPUT_SETS`."""
    size = sum(x.numel() * x.element_size() for x in inputs.values() if isinstance(x, Tensor))
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    return min(max(2, math.ceil(2 * cache / size)), MOST_INPUT_SETS)


def ceilings(device: torch.device, timer: Timer = median_seconds) -> dict[str, float]:
    """The device's own limits: a device copy (bytes read plus written) and a bf16 matrix product, on random data."""
    source = torch.randn(COPY_BYTES // 2, device=device).bfloat16()
    target = torch.empty_like(source)
    copy_seconds, _ = timer([functools.partial(target.copy_, source)])
    del source, target
    pairs = [tuple(torch.randn(MATMUL_SIZE, MATMUL_SIZE, device=device).bfloat16() for _ in range(2)) for _ in range(2)]
    matmul_seconds, _ = timer([functools.partial(torch.matmul, *pair) for pair in pairs])
    return {
        "copy_bytes_per_second": 2 * COPY_BYTES / copy_seconds,
        "matmul_flops_per_second": 2 * MATMUL_SIZE**3 / matmul_seconds,
    }


def direction_calls(
    bound: Sequence[tuple[Callable[[], Result], Sequence[Tensor]]], direction: str
) -> list[Callable[[], Any]]:
    """What is timed, for each set of inputs: (call, leaves) -> the call without graph, or the gradients of the leaves.

    backward keeps the graph of one forward call, which is not timed, and takes the gradients of it again and again,
    from a random gradient of each result that has one.
    """
    return [(_forward_call if direction == "forward" else _backward_call)(*pair) for pair in bound]


def _forward_call(call: Callable[[], Result], leaves: Sequence[Tensor]) -> Callable[[], Any]:
    return torch.no_grad()(call)


def _backward_call(call: Callable[[], Result], leaves: Sequence[Tensor]) -> Callable[[], Any]:
    with torch.enable_grad():
        outs = list(differentiable(call()).values())
    cotangents = [torch.randn_like(out) for out in outs]
    return lambda: torch.autograd.grad(outs, leaves, cotangents, retain_graph=True)
