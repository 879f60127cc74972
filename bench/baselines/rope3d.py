"""The reference of 3D RoPE in eager mode and by torch.compile.

Liger-Kernel's rotary embedding turns all of a head by one angle's multiples for a token; three axes in three parts of
a head are other mathematics, so it is not among these.
"""

from osp_fast.kernels.rope3d import rope3d_ref

from bench.baselines import Baseline, compiled_reference, eager_reference


def baselines() -> tuple[Baseline, ...]:
    """Both, with the operation's own arguments."""
    return eager_reference(rope3d_ref), compiled_reference(rope3d_ref)
