"""Settings of the whole suite."""

import os

os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is defined: the suite runs them on CPU tensors
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: each core has a worker of its own

import triton.language as tl
from hypothesis import settings
from triton._C.libtriton import ir
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

# The same examples on every run, so that a red suite is red again; no deadline, as a busy machine is no fault.
settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")


def descriptor_reduce(self, kind, descriptor, value, offsets):
    """Triton's interpreter lacks additions through a tensor descriptor; the suite adds them."""
    assert kind == ir.DESCRIPTOR_REDUCE_KIND.ADD
    pointers, mask = descriptor.materialize_pointers(offsets)
    mask = TensorHandle(mask, tl.int1)
    return self.create_atomic_rmw(ir.ATOMIC_OP.FADD, pointers, value, mask, ir.MEM_SEMANTIC.RELAXED, None)


InterpreterBuilder.create_descriptor_reduce = descriptor_reduce
