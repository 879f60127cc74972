"""Where a run computes: its device and its processes."""

import os

import torch

from osp_fast.errors import UserError


def resolve_device(name: str) -> torch.device:
    """auto, cpu, cuda or cuda:N -> a device that is there. Raises `UserError`."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name!r} is not a device: use auto, cpu, cuda or cuda:N") from None
    if device.type == "cpu" and device.index is not None:
        raise UserError(f"--device {name}: there is one cpu, without a number")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: only cpu and NVIDIA GPUs (cuda) are supported")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: PyTorch sees {torch.cuda.device_count()} GPUs here; use --device cpu")
    return device


def rank_device(name: str) -> torch.device:
    """`resolve_device`, where torchrun's LOCAL_RANK says which of the machine's GPUs auto and cuda are."""
    local = os.environ.get("LOCAL_RANK")
    device = resolve_device(name)
    if local is None or device.type != "cuda" or device.index is not None:
        return device
    return resolve_device(f"cuda:{local}")


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """`--dtype`: auto is bfloat16 on a GPU and float32 on a CPU."""
    if name == "auto":
        name = "bf16" if device.type == "cuda" else "fp32"
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[name]


def memory_allowance(device: torch.device, held: int = 0) -> int:
    """Bytes that something may hold on a device: what is free and the `held` bytes it has already, less a margin.

    The margin is a tenth of what is free, for fragments and libraries' workspaces.
    """
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return held + free * 9 // 10


def check_single_process(program: str) -> None:
    """Raise `UserError` under torchrun with several ranks, for a program that works in one."""
    world = os.environ.get("WORLD_SIZE", "1")
    if world != "1":
        raise UserError(
            f"{program} under torchrun with WORLD_SIZE={world}: it works in one process, start it without torchrun"
        )
