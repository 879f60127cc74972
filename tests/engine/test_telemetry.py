"""Sensors of a GPU, by a stand-in for NVML; and the kinds of memory."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from osp_fast.engine.telemetry import Telemetry, memory_by_kind, throttle_words

GPU = torch.device("cuda", 0)
GIB = 2**30


class FakeNvml(ModuleType):
    """Two GPUs, counted by NVML the other way round than by PyTorch; power cannot be read on `mute` ones."""

    NVML_CLOCK_SM, NVML_TEMPERATURE_GPU = 1, 0

    class NVMLError(Exception):
        pass

    class NVMLError_NotFound(NVMLError):
        pass

    class NVMLError_InvalidArgument(NVMLError):
        pass

    def __init__(self, driver: bool = True, uuids: bool = True, mute: bool = False):
        super().__init__("pynvml")
        self.driver, self.mute, self.opened = driver, mute, 0
        self.by_uuid = {"GPU-other": "wrong", "GPU-mine": "right"} if uuids else {}
        self.by_bus = {"00000000:3B:00.0": "right"}

    def nvmlInit(self):
        if not self.driver:
            raise self.NVMLError("NVML Shared Library Not Found")
        self.opened += 1

    def nvmlShutdown(self):
        self.opened -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid):
        return self._find(self.by_uuid, uuid)

    def nvmlDeviceGetHandleByPciBusId(self, bus):
        return self._find(self.by_bus, bus)

    def _find(self, table, key):
        if key not in table:
            raise self.NVMLError_NotFound("Not Found")
        return table[key]

    def nvmlDeviceGetPowerUsage(self, handle):
        if self.mute:
            raise self.NVMLError("Not Supported")
        return {"right": 693_500, "wrong": 70_000}[handle]

    def nvmlDeviceGetClockInfo(self, handle, kind):
        return {"right": 1755}[handle] if kind == self.NVML_CLOCK_SM else 0

    def nvmlDeviceGetTemperature(self, handle, sensor):
        return {"right": 64}[handle]

    def nvmlDeviceGetUtilizationRates(self, handle):
        return SimpleNamespace(gpu={"right": 98}[handle], memory=0)

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle):
        return {"right": 0x04 | 0x20 | 0x01}[handle]


@pytest.fixture
def read(monkeypatch):
    """Telemetry of the GPU "mine" through a stand-in, and what was reported."""
    properties = SimpleNamespace(uuid="mine", pci_domain_id=0, pci_bus_id=0x3B, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)

    def make(nvml: ModuleType) -> tuple[Telemetry, list[str]]:
        monkeypatch.setitem(sys.modules, "pynvml", nvml)
        lines: list[str] = []
        return Telemetry(GPU, lines.append), lines

    return make


@pytest.mark.parametrize("uuids", [True, False], ids=["by UUID", "by PCI address"])
def test_sensors_of_this_process_s_gpu(read, uuids):
    nvml = FakeNvml(uuids=uuids)
    telemetry, lines = read(nvml)
    assert telemetry.read() == {
        "power_w": 693.5,
        "sm_clock_mhz": 1755,
        "temperature_c": 64,
        "utilisation": 0.98,
        "throttle": "power cap, hot (software)",
    }
    assert lines == [] and nvml.opened == 1
    telemetry.close()
    telemetry.close()
    assert nvml.opened == 0 and telemetry.read() == {}


def test_what_a_gpu_cannot_tell_is_left_out_and_said_once(read):
    telemetry, lines = read(FakeNvml(mute=True))
    for _ in range(3):
        assert set(telemetry.read()) == {"sm_clock_mhz", "temperature_c", "utilisation", "throttle"}
    assert lines == ["power_w is not logged: Not Supported"]


def test_nothing_is_made_up(read):
    unknown = FakeNvml(uuids=False)
    unknown.by_bus = {}
    for nvml, words in ((FakeNvml(driver=False), "Shared Library"), (unknown, "does not know"), (None, "nvidia-ml-py")):
        telemetry, lines = read(nvml)
        assert telemetry.read() == {} and len(lines) == 1 and words in lines[0]
    assert unknown.opened == 0
    lines = []
    assert Telemetry(torch.device("cpu"), lines.append).read() == {} and "no NVIDIA GPU" in lines[0]


def test_idle_and_set_clocks_are_no_trouble():
    assert throttle_words(0x01 | 0x02 | 0x100) == ""
    assert throttle_words(0x08 | 0x40 | 0x80) == "hardware slowdown, hot (hardware), power brake"


def test_memory_of_a_gpu_by_kind(monkeypatch):
    numbers = dict(memory_allocated=40 * GIB, max_memory_allocated=70 * GIB, memory_reserved=75 * GIB)
    for name, value in numbers.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    found = memory_by_kind(GPU, weights=10 * GIB, gradients=10 * GIB, optimizer=20 * GIB, ema=0)
    assert found["activations_and_other"] == 30 * GIB
    assert (found["allocated"], found["peak"], found["reserved"]) == (40 * GIB, 70 * GIB, 75 * GIB)
    assert (found["weights"], found["ema"]) == (10 * GIB, 0)


def test_memory_of_a_cpu_is_the_process_s():
    found = memory_by_kind(torch.device("cpu"), 1000, 0, 0, 0)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    assert found["peak"] == pytest.approx(1024 * int(status["VmHWM"].split()[0]), rel=0.05)
    assert found["activations_and_other"] == found["peak"] - 1000 and "reserved" not in found
