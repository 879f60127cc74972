"""`bench static`: every kernel of every operation compiled ahead of time, no GPU needed, and its binary read."""

import json
import multiprocessing
import os
import re
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import IO, Any

from osp_fast.kernels.spec import KernelBuild, OpSpec

from bench.build import WARP_SIZE, check_compilable, empty_row, static_row
from bench.sass import MATRIX, WIDE
from bench.table import format_table
from osp_fast.errors import UserError

WORKERS = 2
LOADS = ("UTMALDG", "LDG", "LDGSTS")
ERROR_LENGTH = 300
# What a block may have (CUDA C++ Programming Guide, compute capabilities): bytes, and columns of sm_100's tensor memory
SHARED_MEMORY = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10}
TENSOR_MEMORY_COLUMNS = 512
# What a multiprocessor has: registers, given to warps in pieces; shared memory, of which each block takes 1 KiB more
REGISTERS, REGISTER_PIECE = 65536, 256
MULTIPROCESSOR_MEMORY = {"sm_80": 164 << 10, "sm_90": 228 << 10, "sm_100": 228 << 10}
BLOCK_OVERHEAD = 1 << 10


def run_static(specs: Sequence[OpSpec], archs: Sequence[int], json_file: Path | None) -> int:
    """Compile, print, optionally write the rows as JSON; 1 if a kernel fails its spec, else 0."""
    check_compilable()
    if json_file is not None:  # known before minutes of compiling
        try:
            json_file.parent.mkdir(parents=True, exist_ok=True)
            json_file.touch()
        except OSError as error:
            raise UserError(f"--json {json_file}: cannot be written ({error.strerror}): name another file") from None
    jobs = [(spec.name, build) for arch in archs for spec in specs for build in spec.builds(arch)]
    rows = compile_all(jobs, _progress)
    if json_file is not None:
        json_file.write_text(json.dumps(rows, indent=1) + "\n")
    print(static_table(rows))
    faults = [fault for row in rows for fault in row_faults(row)]
    for fault in faults:
        print(f"FAULT {fault}")
    print(f"{len(rows)} kernels compiled ahead of time, {len(faults)} faults")
    return 1 if faults else 0


def compile_all(
    jobs: Sequence[tuple[str, KernelBuild]], progress: Callable[[int, int, dict[str, Any], float], None]
) -> list[dict[str, Any]]:
    """One row per job, in the order of the jobs, whatever order they finish in.

    Each job has a process of its own, `WORKERS` at a time: the compiler aborts the process on some inputs, and that is
    then an "error" in the row. `progress(finished, all, row, seconds)` is called as jobs end.
    """
    context = multiprocessing.get_context("fork")  # kernels cannot be pickled
    rows: dict[int, dict[str, Any]] = {}
    running: dict[Connection, tuple[int, BaseProcess, IO[bytes], float]] = {}
    waiting = list(enumerate(jobs))
    while waiting or running:
        while waiting and len(running) < WORKERS:
            place, (op, build) = waiting.pop(0)
            printed = tempfile.TemporaryFile()  # noqa: SIM115 (closed below, when the child has ended)
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_compile_in_child, args=(op, build, sender, printed))
            process.start()
            sender.close()  # the child's copy is the last: its death ends the pipe
            running[receiver] = (place, process, printed, time.monotonic())
        for receiver in wait(list(running)):
            place, process, printed, started = running.pop(receiver)
            with receiver, printed:
                rows[place] = empty_row(*jobs[place]) | _outcome(receiver, process, printed)
            progress(len(rows), len(jobs), rows[place], time.monotonic() - started)
    return [rows[place] for place in range(len(jobs))]


def row_faults(row: dict[str, Any]) -> list[str]:
    """What a row is failed for, one sentence each."""
    name = f"{row['op']} {row['kernel']} {row['arch']} {row['config']}:"
    if "error" in row:
        return [f"{name} {row['error']}"]
    faults = []
    if row["spills"] and not row["may_spill"]:
        faults.append(f"{name} {row['spills']} instructions spill registers, {row['stack']} bytes of stack")
    if row["shared"] > SHARED_MEMORY[row["arch"]]:
        faults.append(f"{name} {row['shared']} bytes of shared memory, a block has {SHARED_MEMORY[row['arch']]}")
    if (row["tensor_memory"] or 0) > TENSOR_MEMORY_COLUMNS:
        faults.append(f"{name} {row['tensor_memory']} columns of tensor memory, there are {TENSOR_MEMORY_COLUMNS}")
    if row["programs"] is not None and resident(row) < row["programs"]:
        faults.append(f"{name} a multiprocessor holds {resident(row)} programs, {row['programs']} are started")
    narrow = sum(count for width, count in row["access_widths"].items() if int(width) < WIDE)
    if row["narrow"] is not None and narrow > row["narrow"]:
        widths = _widths(row)
        faults.append(f"{name} {narrow} accesses narrower than {WIDE} bytes ({widths}), {row['narrow']} allowed")
    return faults + [f"{name} no {missing} in the binary" for missing in row["missing"]]


def resident(row: dict[str, Any]) -> int:
    """How many programs a multiprocessor holds at once, by registers and shared memory."""
    warp_registers = -(-row["registers"] * WARP_SIZE // REGISTER_PIECE) * REGISTER_PIECE
    by_registers = REGISTERS // warp_registers // row["warps"]
    return min(by_registers, MULTIPROCESSOR_MEMORY[row["arch"]] // (row["shared"] + BLOCK_OVERHEAD))


def static_table(rows: Sequence[dict[str, Any]]) -> str:
    """One line per kernel. "8 (4+4)": eight in the binary, four in each of two innermost loops.

    access: accesses to global memory by the bytes that each moves for a thread, "16:8 4:1".
    """
    headers = "op,kernel,arch,config,warps,stages,registers,spills,shared,matrix,TMA load,LDG,LDGSTS,access,EX2,BAR,all"
    return format_table(headers.split(","), [_table_line(row) for row in rows])


def _table_line(row: dict[str, Any]) -> list[object]:
    begin = [row[name] for name in ("op", "kernel", "arch", "config")]
    begin += [row.get("warps", row["num_warps"]), row["num_stages"]]
    if "error" in row:
        return [*begin, "error", *[None] * 10]
    registers = str(row["registers"])
    if row["register_splits"]:
        registers += f" -> {'/'.join(map(str, row['register_splits']))}"
    matrix = [f"{name} {_with_loops(row, name)}" for name in MATRIX if row["instructions"][name]]
    loads, others = ([_with_loops(row, name) for name in names] for names in (LOADS, ("MUFU.EX2", "BAR", "total")))
    figures = [registers, row["spills"], row["shared"], " ".join(matrix) or None]
    return [*begin, *figures, *loads, _widths(row) or None, *others]


def _widths(row: dict[str, Any]) -> str:
    return " ".join(f"{width}:{count}" for width, count in row["access_widths"].items())


def _with_loops(row: dict[str, Any], name: str) -> str:
    in_loops = [str(loop[name]) for loop in row["loops"] if loop[name]]
    return str(row["instructions"][name]) + (f" ({'+'.join(in_loops)})" if in_loops else "")


def _progress(finished: int, total: int, row: dict[str, Any], seconds: float) -> None:
    result = row.get("error") or f"{row['registers']} registers, {row['spills']} spills"
    print(
        f"[{finished}/{total}] {row['op']} {row['kernel']} {row['arch']} {row['config']}: {result} ({seconds:.1f} s)",
        flush=True,
    )


def _compile_in_child(op: str, build: KernelBuild, sender: Connection, printed: IO[bytes]) -> None:
    for descriptor in (1, 2):  # also what the compiler prints from C++
        os.dup2(printed.fileno(), descriptor)
    try:
        sender.send(static_row(op, build))
    except Exception:
        traceback.print_exc()


def _outcome(receiver: Connection, process: BaseProcess, printed: IO[bytes]) -> dict[str, Any]:
    """The row that the child sent, or the reason why it sent none."""
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        printed.seek(0)
        return {"error": _reason(printed.read().decode(errors="replace"), process.exitcode)}
    finally:
        process.join()


def _reason(printed: str, exit_code: int) -> str:
    """One line: what the compiler complained of first, and what ended it."""
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    complaints = [line for line in lines if re.search(r"\berror:|LLVM ERROR|Assertion", line)]
    last = lines[-1] if lines else "no output"
    end = f"the compiler died of signal {-exit_code}" if exit_code < 0 else last
    reason = f"{end}: {complaints[0]}" if complaints and complaints[0] != end else end
    return reason[:ERROR_LENGTH]
