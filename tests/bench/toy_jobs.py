"""Jobs of the bench that are done at once, or break in every way there is; children of its worker import this file."""

import os
import signal
import time

import torch

from bench.results import Ceilings, Row
from bench.suites import Job
from bench.worker import InProcess
from osp_fast.errors import UserError

CPU = torch.device("cpu")
LIMITS = Ceilings(1e12, 1e11)


def row(case, impl="osp_fast", ms=1.0, **more):
    more = {"ok": ms is not None, "ms": ms, "ms_p20": ms, "ms_p80": ms, "flops": 5e8} | more
    return Row("toys", case, impl, "ours" if impl == "osp_fast" else "peer", "float32", **more)


def good(setting):
    return [row("good"), row("good", "other", 2.0)]


def faster(setting):
    yield row("faster")
    yield row("faster", "other", 0.5)


def breaks(setting):
    yield row("breaks part")
    raise RuntimeError("no kernel image\nfor this device")


def impossible(setting):
    raise UserError("two GPUs are needed")


def wrong(setting):
    return [row("wrong", ms=None, note="WRONG, not timed: off by 1.0e-02")]


def dies(setting):
    yield row("dies part")
    os.kill(os.getpid(), signal.SIGKILL)


def hangs(setting):
    time.sleep(60)


MEASURES = (good, faster, breaks, impossible, wrong, dies, hangs)


def toy_jobs(names, options):
    parts = {"breaks": ("part",), "dies": ("part",)}
    seconds = {"faster": 50.0}
    jobs = {
        one.__name__: Job("toys", one.__name__, seconds.get(one.__name__, 2.0), one, parts.get(one.__name__, ()))
        for one in MEASURES
    }
    return [jobs[name] for name in names or jobs]


def in_process():
    return InProcess(CPU, LIMITS)
