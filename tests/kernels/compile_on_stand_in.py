"""Run by a test in a process of its own: Triton's real launch path for Hopper with a driver that launches nothing.

Prints one JSON line: kernel -> how often it was compiled over calls that differ in lengths and batch alone.
"""

import collections
import json

import torch
from osp_fast.kernels import skiparse_attention_launch as launch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

compiled = collections.Counter()


class Utils:
    def load_binary(self, name, binary, shared, device):
        return 1, 1, 100, 0, 1024  # module, function, registers, spills, largest block

    def get_device_properties(self, device):
        return {"max_shared_mem": 227 << 10, "multiprocessor_count": 132, "max_num_regs": 65536, "warpSize": 32}


class Launcher:
    def __init__(self, source, metadata):
        compiled[source.fn.__name__] += 1

    def __call__(self, *arguments):
        pass


class StandIn:
    utils, launcher_cls = Utils(), Launcher

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def map_python_to_cpp_type(self, kind):
        return kind


driver.set_active(StandIn())
launch.architecture, launch.multiprocessors = (lambda device: 90), (lambda device: 132)
for batch, tokens in ((1, 2048), (2, 1), (2, 37), (3, 2001), (1, 2016), (16, 5)):
    q, k, v = torch.zeros(batch, tokens, 3, 2, 96, dtype=torch.bfloat16).unbind(2)
    lengths = torch.zeros(batch + 1, dtype=torch.int32)[1:]  # its start is not on 16 bytes
    arguments = (None, lengths, "group", 4)
    out, lse = launch.attention_forward(q, k, v, *arguments, "auto")
    for deterministic in (False, True):
        launch.attention_backward(out, q, k, v, out, lse, *arguments, deterministic, "auto")
print(json.dumps(compiled))
