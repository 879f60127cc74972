"""Which implementation of an operation runs, and on what.

`OSP_FAST_KERNELS=triton|reference` forces a path. The default is Triton on CUDA and the PyTorch reference elsewhere;
Triton on CPU tensors needs its interpreter (`TRITON_INTERPRET=1`), which is for tests: it is slow.
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

import torch
from triton import knobs

PATHS = ("triton", "reference")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
OLDEST = 80  # compute capability 8.0
_forced: ContextVar[str | None] = ContextVar("forced path", default=None)


def interpreting() -> bool:
    """Whether Triton kernels run in the interpreter, on CPU tensors."""
    return bool(knobs.runtime.interpret)


@contextmanager
def forced_path(path: str) -> Iterator[None]:
    """Within it, in this thread, `selected_path` is `path` for every device, whatever the environment says.

    For tracing: with "triton" the operations run on fake and meta tensors, where nothing is launched.
    """
    if path not in PATHS:
        raise ValueError(f"path {path!r} is unknown: use {' or '.join(PATHS)}")
    token = _forced.set(path)
    try:
        yield
    finally:
        _forced.reset(token)


def selected_path(device: torch.device) -> str:
    """triton or reference: what serves tensors on `device`. Raises ValueError for a choice that cannot be served."""
    if (forced := _forced.get()) is not None:
        return forced
    value = os.environ.get("OSP_FAST_KERNELS")
    if value is None:
        return "triton" if device.type == "cuda" else "reference"
    if value not in PATHS:
        raise ValueError(f"OSP_FAST_KERNELS={value!r} is unknown: use {' or '.join(PATHS)}, or unset it")
    if value == "triton" and device.type != "cuda" and not interpreting():
        raise ValueError("OSP_FAST_KERNELS=triton needs an NVIDIA GPU: unset it, or set TRITON_INTERPRET=1 to test")
    return value


# The decision is the process's, not the graph's: torch.compile takes it as a constant.
constant_path = torch.compiler.assume_constant_result(selected_path)


@torch.compiler.assume_constant_result
def obstacle(device: torch.device) -> str | None:
    """Why no Triton kernel can run on `device`, or None."""
    if device.type != "cuda":
        served = interpreting() or _forced.get() == "triton"
        return None if served else f"needs an NVIDIA GPU, and the tensors are on {device.type}"
    if architecture(device) < OLDEST:
        return f"needs compute capability 8.0, and this GPU has {architecture(device) / 10}"
    return None


def check_triton(operation: str, *tensors: torch.Tensor, dtypes: tuple[torch.dtype, ...] = DTYPES) -> None:
    """Raises ValueError where Triton cannot serve these tensors: no GPU, an old one, another dtype, two devices."""
    device = tensors[0].device
    reason = obstacle(device)
    if reason is not None:
        raise ValueError(f"{operation} by Triton {reason}")
    for x in tensors:
        if x.device != device:
            raise ValueError(f"{operation}: all tensors must be on {device}, where the first is, not on {x.device}")
        if x.dtype not in dtypes:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise ValueError(f"{operation} by Triton takes {names}, not {str(x.dtype).removeprefix('torch.')}")


def architecture(device: torch.device) -> int:
    """Compute capability of `device` as a number, 90 for Hopper; 0 in the interpreter on the CPU."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def current(device: torch.device) -> AbstractContextManager:
    """Within it kernels are launched on `device`: Triton launches on the current GPU, wherever its tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of `device`; 2 in the interpreter, so that persistent loops really loop there."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def resident_programs(device: torch.device, per_multiprocessor: int, batch: int, blocks: int) -> int:
    """Programs for each of `batch` samples of `blocks` blocks that they walk over: together what the GPU holds once."""
    return max(1, min(multiprocessors(device) * per_multiprocessor // batch, blocks))


def with_contiguous_channels(x: torch.Tensor | None) -> torch.Tensor | None:
    """x itself, or a copy of it where its last dimension has gaps."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()
