"""`bench run gpu-day`: what is worth most to know of one GPU, in this order, in under nine minutes.

First whether the model is right at all, and attention, which most of a step is made of; then an operation of each kind;
then whole steps; then what is left of attention, the VAE and the rest. A run that is cut off, or whose time is up, goes
on where it was. Larger clips take minutes each: `bench run train sample --case 93x640x640`.
"""

from collections.abc import Sequence

from bench import verify
from bench.suites import Job, Options, jobs_of
from osp_fast.errors import UserError

NAME = "gpu-day"
MINUTES = 9.0
CASES = (
    ("verify", "DiT blocks 2 x 29x352x640, text mask"),
    ("kernels", "skiparse_attention 93x640x640 group"),
    ("kernels", "adaln 93x640x640 gate norm"),
    ("kernels", "rope3d 93x640x640"),
    ("kernels", "causal_conv3d decode 128 17x320x320"),
    ("sample", "93x352x640"),
    ("train", "29x352x640"),
    ("kernels", "skiparse_attention 93x640x640 single"),
    ("kernels", "skiparse_attention 93x640x640 full"),
    ("verify", "whole DiT 93x352x640"),
    ("kernels", "channel_norm 47x320x320, 128"),
    ("kernels", "haar 93x352x640 bf16 to bf16"),
    ("vae", "decode 93x352x640"),
)


def gpu_day_jobs(names: Sequence[str], options: Options) -> list[Job]:
    """`CASES` of their suites. names: as the command has them, gpu-day alone. Raises UserError for anything beside."""
    if tuple(names) != (NAME,):
        raise UserError(f"bench run {NAME} is a choice of cases of its own: name no suites beside it")
    if options.device != "cuda":
        raise UserError(f"bench run {NAME} is for a GPU: bench run --device cpu has what a CPU can do")
    if options.sizes:
        raise UserError(f"bench run {NAME} has sizes of its own: leave --size out")
    suites = [suite for suite in dict.fromkeys(suite for suite, _ in CASES) if suite != verify.SUITE]
    every = {(job.suite, job.case): job for job in [*jobs_of(suites, options), *verify.jobs(options, [])]}
    return [every[case] for case in CASES]
