"""Which implementation of an operation runs.

`OSP_FAST_KERNELS` forces a path. This version has the PyTorch references only, so that "reference" is the one value
that can be served and the default on every device.
"""

import os


def selected_path() -> str:
    """The path that serves every operation of this process. Raises ValueError for a value that cannot be served."""
    value = os.environ.get("OSP_FAST_KERNELS", "reference")
    if value == "triton":
        raise ValueError("OSP_FAST_KERNELS=triton: this version has the PyTorch reference kernels only; unset it")
    if value != "reference":
        raise ValueError(f"OSP_FAST_KERNELS={value!r} is unknown: use reference, or unset it")
    return value
