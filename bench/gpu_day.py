"""`bench run gpu-day`: what is worth most to know of one GPU, in this order, in under nine minutes.

First what users wait for and what everything is made of: attention, then whole steps and the VAE; then the operations
bound by memory; then other sizes. A run that is cut off, or whose time is up, goes on where it was.
"""

from collections.abc import Sequence

from bench.suites import Job, Options, jobs_of
from osp_fast.errors import UserError

NAME = "gpu-day"
MINUTES = 9.0
CASES = (
    ("kernels", "skiparse_attention 93x640x640 group"),
    ("sample", "93x640x640"),
    ("train", "93x640x640"),
    ("vae", "decode 93x640x640"),
    ("kernels", "adaln 93x640x640 gate norm"),
    ("kernels", "causal_conv3d decode 128 17x320x320"),
    ("kernels", "rope3d 93x640x640"),
    ("kernels", "skiparse_attention 93x640x640 single"),
    ("kernels", "skiparse_attention 93x640x640 full"),
    ("vae", "encode 93x768x768"),
    ("kernels", "channel_norm 47x320x320, 128"),
    ("kernels", "haar 93x352x640 bf16 to bf16"),
)


def gpu_day_jobs(names: Sequence[str], options: Options) -> list[Job]:
    """`CASES` of their suites. names: as the command has them, gpu-day alone. Raises UserError for anything beside."""
    if tuple(names) != (NAME,):
        raise UserError(f"bench run {NAME} is a choice of cases of its own: name no suites beside it")
    if options.device != "cuda":
        raise UserError(f"bench run {NAME} is for a GPU: bench run --device cpu has what a CPU can do")
    suites = list(dict.fromkeys(suite for suite, _ in CASES))
    every = {(job.suite, job.case): job for job in jobs_of(suites, options)}
    return [every[case] for case in CASES]
