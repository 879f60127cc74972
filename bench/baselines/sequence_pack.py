"""The reference of the packing in eager mode and by torch.compile: rotation, then a copy into pieces."""

from osp_fast.kernels.sequence_pack import sequence_pack_ref

from bench.baselines import Baseline, compiled_reference, eager_reference


def baselines() -> tuple[Baseline, ...]:
    """Both, with the operation's own arguments."""
    return eager_reference(sequence_pack_ref), compiled_reference(sequence_pack_ref)
