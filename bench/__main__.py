"""`python -m bench COMMAND`, from the repository's root: bench/README.md lists what there is."""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from osp_fast.kernels.spec import OpSpec

from bench.ops import choose_ops, choose_shapes, load_specs
from bench.results import RESULTS
from osp_fast.cli import SentenceParser, memory_size
from osp_fast.errors import UserError, run_entry_point

ARCHS = (80, 90, 100)
VAE_CASES = ("encode 93x768x768", "decode 93x640x640", "decode 93x720x1280")  # those that have targets
TRAIN_CASES = ("1x352x640", "29x352x640", "93x352x640", "93x640x640")
SAMPLE_CASES = ("93x352x640", "93x480x640", "93x640x640")
DTYPES = ("float32", "float16", "bfloat16")


def main(argv: Sequence[str] | None = None, load: Callable[[], Mapping[str, OpSpec]] = load_specs) -> int:
    """Run one command on the operations that `load` gives; returns the exit code. Raises UserError on bad usage."""
    arguments = _parser().parse_args(argv)
    return arguments.command(arguments, load)


def _list(arguments: argparse.Namespace, load: Callable) -> int:
    from bench.listing import run_list

    return run_list(choose_shapes(choose_ops(load(), arguments.op), arguments.shape))


def _run(arguments: argparse.Namespace, load: Callable) -> int:
    from bench.run import run_bench
    from bench.tune import run_tune

    pairs = choose_shapes(choose_ops(load(), arguments.op), arguments.shape)
    return (run_tune if arguments.tune else run_bench)(pairs, arguments.json)


def _verify(arguments: argparse.Namespace, load: Callable) -> int:
    from bench.verify import run_verify

    return run_verify(
        choose_shapes(choose_ops(load(), arguments.op), arguments.shape), arguments.seeds, arguments.dtype
    )


def _static(arguments: argparse.Namespace, load: Callable) -> int:
    from bench.static import run_static

    return run_static(choose_ops(load(), arguments.op), arguments.arch, arguments.json)


def _block(arguments: argparse.Namespace, load: Callable) -> int:
    from bench.block import run_block

    return run_block(arguments.size, arguments.clip, arguments.inductor, arguments.json)


def _vae(arguments: argparse.Namespace, load: Callable) -> int:
    from bench.vae import run_vae

    return run_vae(arguments.case, arguments.json, arguments.memory)


def _train(arguments: argparse.Namespace, load: Callable) -> int:
    from bench.train import run_train

    if arguments.tiny and arguments.case:
        raise UserError("--tiny measures the tiny preset's own size: leave --case out")
    return run_train(arguments.case or TRAIN_CASES, arguments.tiny, arguments.json)


def _sample(arguments: argparse.Namespace, load: Callable) -> int:
    from bench.sample import run_sample

    if arguments.tiny and arguments.case:
        raise UserError("--tiny measures the tiny preset's own size: leave --case out")
    if arguments.tiny and arguments.memory_budget:
        raise UserError("--memory_budget is measured on a GPU, and --tiny on a CPU: leave one of them out")
    cases, thresholds = arguments.case or SAMPLE_CASES, arguments.step_cache
    return run_sample(cases, arguments.tiny, arguments.json, thresholds, arguments.memory_budget)


def _parallel(arguments: argparse.Namespace, load: Callable) -> int:
    from bench.parallel import run_parallel

    return run_parallel(arguments.json, arguments.markdown)


def _compare(arguments: argparse.Namespace, load: Callable) -> int:
    from bench.compare import run_compare

    return run_compare(arguments.before, arguments.after, arguments.threshold / 100)


def _report(arguments: argparse.Namespace, load: Callable) -> int:
    from bench.report import run_report

    return run_report(choose_shapes(choose_ops(load(), arguments.op), None), arguments.results, arguments.output)


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

    run = add("run", _run, "measure every operation beside its baselines, on a GPU")
    add_choice(run)
    run.add_argument("--json", type=Path, default=RESULTS, metavar="DIR", help="where results go (bench/results)")
    run.add_argument("--tune", action="store_true", help="time each candidate configuration instead, print the best")

    verify = add("verify", _verify, "check every operation and its gradients against float64, on a GPU")
    add_choice(verify)
    verify.add_argument("--seeds", type=_at_least_one, default=2, metavar="N", help="fresh inputs per shape (2)")

    verify.add_argument("--dtype", nargs="+", choices=DTYPES, help="only these types (all that the spec has)")

    static = add("static", _static, "compile every kernel ahead of time and read its binary; needs no GPU")
    add_choice(static, shapes=False)
    static.add_argument("--arch", nargs="+", type=int, choices=ARCHS, default=ARCHS, help="compute capabilities")
    static.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file")

    block = add("block", _block, "kernels and bytes of one DiT block, references and our operations; needs no GPU")
    block.add_argument("--size", default="OpenSoraT2V_v1_3-2B/122", metavar="NAME", help="the model (the released one)")
    block.add_argument("--clip", default="93x640x640", metavar="TxHxW", help="frames and pixels (93x640x640)")
    block.add_argument(
        "--no-inductor", dest="inductor", action="store_false", help="leave out what Inductor makes of it"
    )
    block.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file")

    vae = add("vae", _vae, "the whole VAE beside stock PyTorch, on a GPU")
    vae.add_argument("--case", nargs="+", default=VAE_CASES, metavar="CASE", help='such as "decode 93x640x640"')
    vae.add_argument("--memory", type=memory_size, metavar="BYTES|auto", help="what ours may hold (auto: what is free)")
    vae.add_argument("--json", type=Path, default=RESULTS, metavar="DIR", help="where results go (bench/results)")

    train = add("train", _train, "a training step of the whole model beside the usual ones, on a GPU; --tiny: on a CPU")
    train.add_argument("--case", nargs="+", metavar="TxHxW", help=f"clips in pixels ({' '.join(TRAIN_CASES)})")
    train.add_argument("--tiny", action="store_true", help="the tiny preset on the CPU, beside a plain loop")
    train.add_argument("--json", type=Path, default=RESULTS, metavar="DIR", help="where results go (bench/results)")

    sample = add("sample", _sample, "a denoising step with guidance beside the usual ones, on a GPU; --tiny: on a CPU")
    sample.add_argument("--case", nargs="+", metavar="TxHxW", help=f"clips in pixels ({' '.join(SAMPLE_CASES)})")
    sample.add_argument("--tiny", action="store_true", help="the tiny preset on the CPU, and what each part saves")
    words = "whole runs with a step cache of these thresholds, too"
    sample.add_argument("--step_cache", nargs="+", type=_threshold, default=(), metavar="FRACTION", help=words)
    words = "steps within so much memory, too (10GiB and 6GiB, of the case 93x480x640)"
    sample.add_argument("--memory_budget", nargs="+", type=_amount, default=(), metavar="BYTES", help=words)
    where = "where results go (bench/results)"
    sample.add_argument("--json", "--out", dest="json", type=Path, default=RESULTS, metavar="DIR", help=where)

    parallel = add("parallel", _parallel, "what sharing a clip among GPUs costs, predicted; needs no GPU")
    parallel.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file")
    parallel.add_argument("--markdown", action="store_true", help="print what docs/parallel.md has of it")

    compare = add("compare", _compare, "two result files of run, or two of static: what changed")
    compare.add_argument("before", type=Path, metavar="A.json")
    compare.add_argument("after", type=Path, metavar="B.json")
    compare.add_argument("--threshold", type=float, default=5.0, metavar="PERCENT", help="a change that fails (5)")

    report = add("report", _report, "a Markdown table of the latest results")
    add_choice(report, shapes=False)
    report.add_argument("--results", type=Path, metavar="DIR", help="where they are (bench/results)")
    report.add_argument("--output", type=Path, metavar="FILE", help="write to this file instead of printing")
    return parser


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
