"""`python -m bench COMMAND`, from the repository's root: bench/README.md lists what there is."""

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from osp_fast.kernels.spec import OpSpec

from bench.ops import choose_ops, choose_shapes, load_specs
from bench.results import RESULTS
from osp_fast.cli import SentenceParser, memory_size
from osp_fast.errors import UserError, run_entry_point

ARCHS = (80, 90, 100)
DTYPES = ("float32", "float16", "bfloat16")
PREDICTIONS = ("ops", "steps", "parallel")


def main(argv: Sequence[str] | None = None, load: Callable[[], Mapping[str, OpSpec]] = load_specs) -> int:
    """Run one command on the operations that `load` gives; returns the exit code. Raises UserError on bad usage."""
    arguments = _parser().parse_args(argv)
    return arguments.command(arguments, load)


def _list(arguments: argparse.Namespace, load: Callable) -> int:
    from bench.listing import run_list

    return run_list(choose_shapes(choose_ops(load(), arguments.op), arguments.shape))


def _run(arguments: argparse.Namespace, load: Callable) -> int:
    from bench import gpu_day
    from bench.measure import require_cuda
    from bench.run import Plan, dry_run, run_bench
    from bench.suites import ON_CPU, SUITES, Options, jobs_of
    from osp_fast.data.buckets import Bucket

    try:
        sizes = tuple(map(Bucket.parse, arguments.size))
    except ValueError as error:
        raise UserError(f"--size: {error}") from None
    budgets = tuple(arguments.memory_budget)
    options = Options(arguments.device, sizes, tuple(arguments.step_cache), budgets, arguments.vae_memory)
    names = tuple(arguments.suites) or (SUITES if arguments.device == "cuda" else ON_CPU)
    daily = gpu_day.NAME in names
    seconds = 60 * (arguments.minutes or gpu_day.MINUTES) if daily or arguments.minutes else None
    plan = Plan(names, options, tuple(arguments.case), (daily or arguments.resume) and not arguments.fresh, seconds)
    make = gpu_day.gpu_day_jobs if daily else jobs_of
    if arguments.dry_run:
        return dry_run(plan, make)
    if arguments.device == "cuda":
        require_cuda("run")
    return run_bench(plan, arguments.json, make)


def _verify(arguments: argparse.Namespace, load: Callable) -> int:
    if arguments.device == "cpu":  # Triton reads it when kernels are decorated
        os.environ["TRITON_INTERPRET"] = "1"
        os.environ["OSP_FAST_KERNELS"] = "triton"
    specs = choose_ops(load(), arguments.op)
    from bench.verify import run_verify

    pairs = (
        _small_shapes(specs, arguments.shape) if arguments.device == "cpu" else choose_shapes(specs, arguments.shape)
    )
    models = arguments.op is None if arguments.models is None else arguments.models
    return run_verify(pairs, models, arguments.device, arguments.seeds, arguments.dtype, arguments.json)


def _static(arguments: argparse.Namespace, load: Callable) -> int:
    from bench.static import run_static

    return run_static(choose_ops(load(), arguments.op), arguments.arch, arguments.json)


def _block(arguments: argparse.Namespace, load: Callable) -> int:
    from bench.block import run_block

    return run_block(arguments.size, arguments.clip, arguments.inductor, arguments.json)


def _predict(arguments: argparse.Namespace, load: Callable) -> int:
    from bench.predict import run_predict

    pairs = choose_shapes(choose_ops(load(), arguments.op), arguments.shape)
    return run_predict(arguments.what, pairs, arguments.ceilings, arguments.json, arguments.markdown)


def _compare(arguments: argparse.Namespace, load: Callable) -> int:
    from bench.compare import run_compare

    return run_compare(arguments.before, arguments.after, arguments.threshold / 100)


def _report(arguments: argparse.Namespace, load: Callable) -> int:
    from bench.report import run_report

    pairs = choose_shapes(choose_ops(load(), None), None)
    return run_report(pairs, arguments.results, arguments.device, arguments.readme)


def _parser() -> argparse.ArgumentParser:
    parser = SentenceParser(prog="bench", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Callable, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(command=command)
        return added

    def add_choice(added: argparse.ArgumentParser, shapes: bool = True) -> None:
        added.add_argument("--op", nargs="+", metavar="NAME", help="only these operations")
        if shapes:
            added.add_argument("--shape", nargs="+", metavar="NAME", help="only the shapes with these names")

    add_choice(add("list", _list, "operations, shapes, and what each call should cost"))
    _add_run(add("run", _run, "measure suites beside their baselines, in turns, into result files"))

    verify = add("verify", _verify, "check operations, gradients and whole models against higher precision")
    add_choice(verify)
    _add_device(verify, "cpu: Triton's interpreter, small shapes, float32")
    words = "draws of inputs (2 on a GPU, 1 on a CPU)"
    verify.add_argument("--seeds", type=_at_least_one, metavar="N", help=words)
    verify.add_argument("--dtype", nargs="+", choices=DTYPES, help="only these types (all that the spec has)")
    verify.add_argument("--models", action=argparse.BooleanOptionalAction, help="whole models (unless --op is given)")
    verify.add_argument("--json", type=Path, metavar="DIR", help="write a result file into this folder")

    static = add("static", _static, "compile every kernel ahead of time and read its binary; needs no GPU")
    add_choice(static, shapes=False)
    static.add_argument("--arch", nargs="+", type=int, choices=ARCHS, default=ARCHS, help="compute capabilities")
    static.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file")

    block = add("block", _block, "kernels and bytes of one DiT block, references and our operations; needs no GPU")
    block.add_argument("--size", default="OpenSoraT2V_v1_3-2B/122", metavar="NAME", help="the model (the released one)")
    block.add_argument("--clip", default="93x640x640", metavar="TxHxW", help="frames and pixels (93x640x640)")
    words = "leave out what Inductor makes of it"
    block.add_argument("--no-inductor", dest="inductor", action="store_false", help=words)
    block.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file")

    predict = add("predict", _predict, "rooflines of operations, whole steps, and many GPUs; needs no GPU")
    predict.add_argument("what", nargs="*", type=_prediction, metavar="WHAT", help="ops, steps (both), or parallel")
    add_choice(predict)
    predict.add_argument("--ceilings", type=Path, metavar="FILE", help="of this result file (one H100 SXM's)")
    predict.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file")
    predict.add_argument("--markdown", action="store_true", help="print Markdown, as the documentation has it")

    compare = add("compare", _compare, "two result files of run, or two of static: what changed")
    compare.add_argument("before", type=Path, metavar="A.json")
    compare.add_argument("after", type=Path, metavar="B.json")
    compare.add_argument("--threshold", type=float, default=5.0, metavar="PERCENT", help="a change that fails (5)")

    report = add("report", _report, "Markdown tables and plots of the newest results, into their folders")
    report.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="where they are (bench/results)")
    report.add_argument("--device", metavar="NAME", help="only this device's, by the name of its folder (all)")
    report.add_argument("--readme", type=Path, metavar="FILE", help="write the table of results in this README anew")
    return parser


def _add_run(run: argparse.ArgumentParser) -> None:
    run.add_argument("suites", nargs="*", metavar="SUITE", help="kernels model vae train sample parallel data (all), "
                     "or tune, prompts, or gpu-day: the most important of one GPU in nine minutes")  # fmt: skip
    run.add_argument(
        "--case", nargs="+", default=(), metavar="TEXT", help="only cases whose names contain one of these"
    )
    run.add_argument("--size", nargs="+", default=(), metavar="TxHxW", help="clips in pixels in place of a suite's own")
    _add_device(run, "cpu: cases of seconds on a CPU, whose ratios alone mean something")
    run.add_argument("--dry_run", action="store_true", help="list the cases and the seconds each should take")
    run.add_argument("--json", type=Path, default=RESULTS, metavar="DIR", help="where results go (bench/results)")
    run.add_argument("--resume", action="store_true", help="go on with the newest file of the same (gpu-day does)")
    run.add_argument("--fresh", action="store_true", help="begin a new file (gpu-day)")
    run.add_argument("--minutes", type=float, metavar="M", help="begin no case that would end later (gpu-day: 9)")
    words = "sample: whole runs with a step cache of these thresholds, too"
    run.add_argument("--step_cache", nargs="+", type=_threshold, default=(), metavar="FRACTION", help=words)
    words = "sample: steps within so much memory, too (10GiB and 6GiB, of the case 93x480x640)"
    run.add_argument("--memory_budget", nargs="+", type=_amount, default=(), metavar="BYTES", help=words)
    words = "vae: what ours may hold (what is free)"
    run.add_argument("--vae_memory", type=_amount, metavar="BYTES", help=words)


def _add_device(added: argparse.ArgumentParser, text: str) -> None:
    added.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help=f"{text} (cuda)")


def _small_shapes(specs: Sequence[OpSpec], names: Sequence[str] | None) -> list:
    """What the interpreter can do of these operations."""
    return choose_shapes([dataclasses.replace(spec, shapes=spec.small) for spec in specs], names)


def _prediction(text: str) -> str:
    if text not in PREDICTIONS:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(PREDICTIONS)}")
    return text


def _amount(text: str) -> int:
    size = memory_size(text)
    if size is None:
        raise argparse.ArgumentTypeError("auto is no amount of memory: write bytes, 500MiB or 4GiB")
    return size


def _threshold(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be between 0 and 1")
    return value


def _at_least_one(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be at least 1")
    return value


if __name__ == "__main__":
    run_entry_point(lambda: sys.exit(main()))
