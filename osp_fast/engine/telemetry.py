"""What a GPU does beside computing: power, clocks, temperature; and what its memory is full of."""

import resource
import sys
from collections.abc import Callable
from typing import Any

import torch

# Bits of nvmlDeviceGetCurrentClocksEventReasons (nvml.h) for which clocks are lower than they could be. Idle GPUs and
# clocks that somebody has set are left out: they say nothing about trouble.
THROTTLE_REASONS = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x10: "sync boost",
    0x20: "hot (software)",
    0x40: "hot (hardware)",
    0x80: "power brake",
}


class Telemetry:
    """Reads a GPU's sensors through NVML (package nvidia-ml-py). It asks the driver: the GPU is not waited for.

    Where there is nothing to ask, `read` returns nothing, and `report` gets one sentence that says why.

    device: of this process. NVML counts all GPUs of the machine, so the GPU is found by its UUID, or by its PCI address
    """

    def __init__(self, device: torch.device, report: Callable[[str], None] = lambda line: None):
        self._nvml: Any = None
        self._handle: Any = None
        self._lacking: set[str] = set()
        self._report = report
        reason = self._open(device)
        if reason is not None:
            self.close()
            report(f"power, clocks and temperature of {device} are not logged: {reason}")

    def _open(self, device: torch.device) -> str | None:
        """Find the GPU. Returns why that is not possible."""
        if device.type != "cuda":
            return "it is no NVIDIA GPU"
        try:
            import pynvml
        except ImportError:
            return "pip install nvidia-ml-py"
        try:
            pynvml.nvmlInit()
            self._nvml = pynvml
            self._handle = _find(pynvml, torch.cuda.get_device_properties(device))
        except pynvml.NVMLError as error:
            return str(error)
        return None if self._handle is not None else "NVML does not know it"

    def read(self) -> dict[str, float | str]:
        """power_w, sm_clock_mhz, temperature_c, utilisation (0 to 1 of the last second or less), throttle.

        throttle: reasons that hold the clocks down, joined by ", "; "" for none. What this GPU cannot tell is left out,
        and reported once.
        """
        if self._handle is None:
            return {}
        nvml, handle = self._nvml, self._handle
        questions: dict[str, Callable[[], float | str]] = {
            "power_w": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
            "sm_clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
            "temperature_c": lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
            "utilisation": lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100,
            "throttle": lambda: throttle_words(nvml.nvmlDeviceGetCurrentClocksEventReasons(handle)),
        }
        found = {}
        for name, ask in questions.items():
            try:
                found[name] = ask()
            except nvml.NVMLError as error:
                if name not in self._lacking:
                    self._lacking.add(name)
                    self._report(f"{name} is not logged: {error}")
        return found

    def close(self) -> None:
        """Give NVML back; `read` returns nothing from then on."""
        if self._nvml is not None:
            self._nvml.nvmlShutdown()
        self._nvml = self._handle = None


def _find(nvml: Any, properties: Any) -> Any:
    """NVML's handle of the GPU with these properties of PyTorch's; None if it has no such GPU."""
    addresses = [
        (nvml.nvmlDeviceGetHandleByUUID, f"GPU-{properties.uuid}"),
        (
            nvml.nvmlDeviceGetHandleByPciBusId,
            f"{properties.pci_domain_id:08X}:{properties.pci_bus_id:02X}:{properties.pci_device_id:02X}.0",
        ),
    ]
    for find, address in addresses:
        try:
            return find(address)
        except (nvml.NVMLError_NotFound, nvml.NVMLError_InvalidArgument):  # of a slice of a GPU (MIG), NVML has others
            continue
    return None


def throttle_words(reasons: int) -> str:
    """The bits of NVML's clock event reasons that are trouble, in words."""
    return ", ".join(words for bit, words in THROTTLE_REASONS.items() if reasons & bit)


def memory_by_kind(device: torch.device, weights: int, gradients: int, optimizer: int, ema: int) -> dict[str, int]:
    """What the memory of a device holds, in bytes; nothing here waits for the GPU.

    Args:
        weights: bytes of this rank's part on the device, likewise the others; 0 for what is kept elsewhere.

    Returns:
        The four, and `peak`, the most at any time since the last `torch.cuda.reset_peak_memory_stats`; on a GPU also
        `allocated` (in tensors now) and `reserved` (taken from the driver). `activations_and_other` is `peak` less the
        four, below 0 where they were not all there at the peak. On a CPU `peak` is the most of the process's resident
        memory since its start, with Python and all libraries.
    """
    kinds = dict(weights=weights, gradients=gradients, optimizer=optimizer, ema=ema)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        totals = dict(
            allocated=torch.cuda.memory_allocated(device), peak=peak, reserved=torch.cuda.memory_reserved(device)
        )
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        totals = dict(peak=peak)
    return {**kinds, **totals, "activations_and_other": peak - sum(kinds.values())}
