"""What GPUs can do: the rates that predictions and MFU are made of, with their sources.

"datasheet" is NVIDIA's for that GPU, dense, without sparsity. "measured" is on one H100 SXM. "as the H100" carries a
measured share of an H100's datasheet over to another GPU: nothing has been measured there. "assumed" is neither.
"""

import re
from dataclasses import dataclass

MATMUL_SHARE = 798 / 989  # measured: a bf16 product of 8192^3 on random data, of the datasheet's
COPY_SHARE = 3.0 / 3.35  # measured: a copy on the device, bytes read and written, of the datasheet's
LINK_SHARE = 0.8  # assumed: what collectives reach of a link's datasheet
NODE = 8  # GPUs of a machine, joined by NVLink


@dataclass(frozen=True)
class DeviceModel:
    """One kind of GPU. FLOP/s of bf16 and bytes/s.

    pattern: regular expression of the name that CUDA gives it, after "NVIDIA"
    memory: bytes that programs can have
    peak_flops: what MFU is a share of
    matmul_flops, copy_bytes: what products and copies reach
    attention_forward, attention_backward: FLOP/s that skiparse attention is to reach
    nvlink_bytes, network_bytes: to other GPUs, of one GPU in one direction, on its machine and between machines
    host_bytes: to CPU memory, in one direction
    """

    name: str
    pattern: str
    memory: int
    peak_flops: float
    matmul_flops: float
    copy_bytes: float
    attention_forward: float
    attention_backward: float
    nvlink_bytes: float
    network_bytes: float
    host_bytes: float


def _model(
    name: str, pattern: str, memory: float, peak: float, hbm: float, nvlink: float, network: float, pcie: float
) -> DeviceModel:
    """memory: GiB; peak: TFLOP/s; hbm, nvlink, network, pcie: GB/s, one direction."""
    return DeviceModel(
        name=name,
        pattern=pattern,
        memory=round(memory * 2**30),
        peak_flops=peak * 1e12,
        matmul_flops=MATMUL_SHARE * peak * 1e12,
        copy_bytes=COPY_SHARE * hbm * 1e9,
        attention_forward=600 / 989 * peak * 1e12,  # the kernel's targets on an H100, not yet measured
        attention_backward=500 / 989 * peak * 1e12,
        nvlink_bytes=LINK_SHARE * nvlink * 1e9,
        network_bytes=LINK_SHARE * network * 1e9,
        host_bytes=LINK_SHARE * pcie * 1e9,
    )


# Memory: what CUDA reports of the nominal 80, 141, 80 and 40 GB. Peak, HBM, NVLink (half of what the datasheet adds up
# over both directions) and PCIe: datasheets. Network: one port for each GPU as in NVIDIA's DGX machines of that
# generation, 400 Gb/s (NDR) or 200 Gb/s (HDR). Rates of the H200 and A100 are as the H100's shares.
H100 = _model("H100 SXM", r"H100 80GB HBM3", 79.1, 989, hbm=3350, nvlink=450, network=50, pcie=64)
H200 = _model("H200", r"H200", 139.8, 989, hbm=4800, nvlink=450, network=50, pcie=64)
A100_80 = _model("A100 SXM 80 GB", r"A100-SXM4?-80GB", 79.1, 312, hbm=2039, nvlink=300, network=25, pcie=32)
A100_40 = _model("A100 SXM 40 GB", r"A100-SXM4?-40GB", 39.4, 312, hbm=1555, nvlink=300, network=25, pcie=32)
DEVICES = (H100, H200, A100_80, A100_40)


def find_device(name: str) -> DeviceModel | None:
    """The GPU of this name, as `torch.cuda.get_device_name` gives it; None if it is not in the table."""
    return next((device for device in DEVICES if re.fullmatch(f"(NVIDIA )?{device.pattern}", name)), None)


def peak_flops(name: str) -> float | None:
    """bf16 FLOP/s of a GPU's datasheet, that MFU is a share of; None if the GPU is not in the table."""
    device = find_device(name)
    return None if device is None else device.peak_flops
