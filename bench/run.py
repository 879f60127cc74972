"""`bench run`: jobs measured one after another, printed and written as soon as each has ended."""

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.results import (
    OURS,
    SAME,
    Result,
    Row,
    best_of,
    cases_of,
    complete_case,
    folder_name,
    read_result,
    result_path,
    write_result,
)
from bench.suites import Job, Options
from bench.table import format_table, milliseconds, percent
from bench.worker import Failed, InProcess, JobsOf, Measurer, Worker
from osp_fast.errors import UserError
from osp_fast.progress import duration

FAILED = "FAILED"


@dataclass(frozen=True)
class Plan:
    """What is run.

    names: the suites, which name the file; resume: go on with the newest file of the same, where it was left
    seconds: no job is begun that would end later; None: all are
    """

    names: tuple[str, ...]
    options: Options
    cases: tuple[str, ...] = ()
    resume: bool = False
    seconds: float | None = None


def chosen_jobs(plan: Plan, jobs_of: JobsOf) -> list[Job]:
    """The plan's jobs: all, or those whose suite and case contain one of its texts. Raises UserError if a text is in
    none."""
    jobs = jobs_of(plan.names, plan.options)
    for text in plan.cases:
        if not any(text in f"{job.suite} {job.case}" for job in jobs):
            raise UserError(
                f"--case {text!r} is in the name of no case: see bench run {' '.join(plan.names)} --dry_run"
            )
    return [job for job in jobs if not plan.cases or any(text in f"{job.suite} {job.case}" for text in plan.cases)]


def dry_run(plan: Plan, jobs_of: JobsOf) -> int:
    """Print the jobs with the seconds that each should take, and their sum."""
    jobs = chosen_jobs(plan, jobs_of)
    lines = []
    total = 0.0
    for job in jobs:
        total += job.seconds
        lines.append([job.suite, job.case, f"{job.seconds:.1f} s", duration(total)])
    print(format_table(["suite", "case", "predicted", "ends at"], lines))
    where = "one H100" if plan.options.device == "cuda" else "two CPU cores"
    print(f"{len(jobs)} cases, predicted {duration(total)} on {where}: building, compiling, checking, measuring")
    if plan.seconds is not None and total > plan.seconds:
        print(f"more than the {duration(plan.seconds)} of a run: the same command again goes on with the rest")
    return 0


def run_bench(plan: Plan, folder: Path, jobs_of: JobsOf, measurer: Measurer | None = None) -> int:
    """Measure the plan's jobs into a file of `folder`; 1 if something of ours is wrong or broke. Raises `UserError`."""
    jobs = chosen_jobs(plan, jobs_of)
    started = time.monotonic()
    if measurer is None:
        on_gpu = plan.options.device == "cuda"
        measurer = Worker(plan.names, plan.options, jobs_of) if on_gpu else InProcess(torch.device("cpu"))
    with contextlib.closing(measurer):
        env = measurer.env
        print(f"{env['device']}: {describe_ceilings(env)}", flush=True)
        path, result = _file(plan, folder, env)
        done = set(cases_of(result.rows))
        waiting = [job for job in jobs if not any((job.suite, case) in done for case in job.cases)]
        if done:
            print(f"{path}: {len(jobs) - len(waiting)} of {len(jobs)} cases are there already", flush=True)
        write_result(path, result)  # known before minutes of measuring
        measured: list[Row] = []
        for place, job in enumerate(waiting):
            spent = time.monotonic() - started
            if plan.seconds is not None and spent + job.seconds > plan.seconds:
                print(f"left for the same command again, its time being up: {len(waiting) - place} cases", flush=True)
                break
            left = sum(other.seconds for other in waiting[place:])
            print(f"[{place + 1}/{len(waiting)}] {job.suite} {job.case} (about {duration(left)} left)", flush=True)
            measured += _measure(job, measurer, result, path)
    print(_summary(measured))
    print(f"written to {path}")
    return 1 if any(row.role == "ours" and row.note.startswith((FAILED, "WRONG")) for row in measured) else 0


def _file(plan: Plan, folder: Path, env: dict) -> tuple[Path, Result]:
    """A new file, or the newest of the same suites, environment and commit if the plan resumes."""
    stem = "-".join(plan.names)
    path = result_path(folder, env["device"], stem)
    if plan.resume:
        earlier = sorted((folder / folder_name(env["device"])).glob(f"{stem}-[0-9]*.json"))
        found = read_result(earlier[-1]) if earlier else None
        if isinstance(found, Result) and all(found.env.get(key) == env.get(key) for key in (*SAME, "git")):
            return earlier[-1], found
    return path, Result(env, [])


def _measure(job: Job, measurer: Measurer, result: Result, path: Path) -> list[Row]:
    """The rows of a job, printed, and in the file whatever happens to the next one."""
    rows: list[Row] = []
    trouble = None
    try:
        for row in measurer.rows(job):
            rows.append(row)
    except UserError as error:
        trouble = f"not measured: {error}"
    except Failed as error:
        trouble = f"{FAILED}: {error}"
    if trouble is not None:
        print(trouble, flush=True)
        if not any(row.role == "ours" for row in rows):
            rows.append(Row(job.suite, job.cases[0], OURS, "ours", "", note=trouble))
    for of_case in cases_of(rows).values():
        complete_case(of_case, result.ceilings)
    result.rows += rows
    write_result(path, result)
    print(case_table(rows, absolute=result.env["device"] != "cpu"), flush=True)
    return rows


def describe_ceilings(env: dict) -> str:
    """The two ceilings in words; of a CPU none, as they compare with nothing."""
    if env["device"] == "cpu":
        return f"{env['cpu']}, {env['threads']} threads: only the ratios of a run mean something"
    return f"copy {env['copy_tbps'] * 1e3:.0f} GB/s, bf16 matrix product {env['matmul_tflops']:.0f} TFLOP/s"


def case_table(rows: Sequence[Row], absolute: bool = True) -> str:
    """A line for each implementation of each case, with its time over ours; no times unless `absolute`."""
    headers = ["case", "implementation", "times ours", "time", "TFLOP/s", "GB/s", "of peak", "predicted", "peak memory"]
    headers += ["spread", "error", ""]
    lines = []
    for (_, case), of_case in cases_of(rows).items():
        ours = next((row for row in of_case if row.role == "ours"), None)
        for row in of_case:
            ratio = ours.vs.get(row.impl) if ours else None
            figures = _figures(row) if absolute else [None] * 6
            end = [_spread(row), None if row.rel_err is None else f"{row.rel_err:.1e}", row.note or None]
            lines.append([case, row.impl, f"{ratio:.2f}" if ratio else None, *figures, *end])
    kept = [place for place in range(len(headers)) if place < 2 or any(line[place] for line in lines)]
    return format_table([headers[place] for place in kept], [[line[place] for place in kept] for line in lines])


def _figures(row: Row) -> list[str | None]:
    times = [None if value is None else milliseconds(value * 1e-3) for value in (row.ms, row.predicted_ms)]
    rates = [None if rate is None else f"{rate:.1f}" for rate in (row.tflops, row.tbps and row.tbps * 1e3)]
    memory = None if row.peak_mib is None else f"{row.peak_mib / 1024:.2f} GiB"
    return [times[0], *rates, percent(row.of_peak), times[1], memory]


def _spread(row: Row) -> str | None:
    return None if row.ms is None else percent((row.ms_p80 - row.ms_p20) / row.ms)


def _summary(rows: Sequence[Row]) -> str:
    """How many cases there are, and every one in which ours is wrong, missing or not the fastest."""
    lines = []
    for (suite, case), of_case in cases_of(rows).items():
        ours = next((row for row in of_case if row.role == "ours"), None)
        best = best_of(of_case)
        if ours is None or not ours.timed:
            if ours is None or not ours.ok:
                lines.append(f"NOT MEASURED {suite} {case}: {ours.note if ours else 'no row of ours'}")
        elif best is not None and best.ms < ours.ms:
            lines.append(f"SLOWER {suite} {case}: {best.impl} needs {best.ms / ours.ms:.2f} of our time")
    return "\n".join([*lines, f"{len(cases_of(rows))} cases measured"])
