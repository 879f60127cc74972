"""Kernels compiled ahead of time in a process of their own, and what is read from their binaries."""

import json

import pytest
import triton

from bench.build import empty_row
from bench.static import resident, row_faults

ROW_KEYS = ["op", "kernel", "arch", "config", "registers", "spills", "shared", "instructions"]


@pytest.fixture(scope="module")
def sound(bench, tmp_path_factory):
    file = tmp_path_factory.mktemp("static") / "toy.json"
    process = bench("static", "--op", "toy", "--arch", 80, 90, 100, "--json", file)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout, json.loads(file.read_text())


@pytest.fixture(scope="module")
def faulty(bench, tmp_path_factory):
    file = tmp_path_factory.mktemp("static") / "faulty.json"
    process = bench("static", "--op", "faulty", "--arch", 80, "--json", file)
    assert process.returncode == 1, process.stdout + process.stderr
    return process.stdout, json.loads(file.read_text())


def rows_of(rows, **wanted):
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def test_rows_are_in_the_order_of_the_builds(sound):
    _, rows = sound
    order = [("sm_80", "pointers")]
    order += [(arch, config) for arch in ("sm_90", "sm_100") for config in ("pointers", "boxes", "gluon")]
    assert [(row["arch"], row["config"]) for row in rows] == order


def test_every_row_has_the_promised_keys_and_figures(sound):
    for row in sound[1]:
        assert list(row)[:8] == ROW_KEYS
        assert row["triton"] == triton.__version__ and row["spills"] == 0 and row["missing"] == []
        assert 0 < row["registers"] <= 255 and row["shared"] > 0
        assert row["instructions"]["total"] > row["loop_instructions"]["total"] > 0


def test_matrix_products_and_loads_lie_in_the_loop(sound):
    rows = sound[1]
    # 128 x 64 x 64 by 4 warps: HMMA is 16 x 8 x 16, 256 of them; HGMMA is 64 x 64 x 16, 8 of them
    for arch, config, name, count in (
        ("sm_80", "pointers", "HMMA", 64),
        ("sm_90", "pointers", "HGMMA", 8),
        ("sm_90", "boxes", "HGMMA", 8),
        ("sm_100", "boxes", "UTCHMMA", 4),
    ):
        (row,) = rows_of(rows, arch=arch, config=config)
        assert row["loop_instructions"][name] == count
        assert len(row["loops"]) == 1
    (row,) = rows_of(rows, arch="sm_90", config="boxes")
    assert row["loop_instructions"]["UTMALDG"] == 2 < row["instructions"]["UTMALDG"]
    assert row["instructions"]["UTMASTG"] == 1 and row["loop_instructions"]["UTMASTG"] == 0
    (row,) = rows_of(rows, arch="sm_90", config="pointers")
    assert row["instructions"]["MUFU.EX2"] == 64 and row["loop_instructions"]["MUFU.EX2"] == 0


def test_gluon_kernels_compile(sound):
    for row in rows_of(sound[1], config="gluon"):
        assert row["kernel"] == "copy_kernel"
        assert row["loop_instructions"]["UTMALDG"] == row["loop_instructions"]["UTMASTG"] == 1


def test_the_table_has_a_line_per_kernel_and_progress_comes_before(sound):
    text, rows = sound
    lines = text.splitlines()
    assert sum(line.startswith("[") for line in lines) == len(rows)
    assert f"[{len(rows)}/{len(rows)}]" in text
    (line,) = [line for line in lines if line.startswith("toy") and " boxes " in line and "sm_90" in line]
    assert "HGMMA 8 (8)" in line
    assert lines[-1] == "7 kernels compiled ahead of time, 0 faults"


def test_spills_and_missing_instructions_fail(faulty):
    text, rows = faulty
    (row,) = rows_of(rows, config="capped")
    assert row["registers"] == 32 and row["spills"] > 0 and row["stack"] > 0
    assert row["spills"] == row["instructions"]["LDL"] + row["instructions"]["STL"]
    assert row["missing"] == ["HGMMA"]
    assert f"FAULT faulty product_kernel sm_80 capped: {row['spills']} instructions spill" in text
    assert "FAULT faulty product_kernel sm_80 capped: no HGMMA in the binary" in text


def test_what_does_not_compile_is_an_error_in_its_row(faulty):
    text, rows = faulty
    assert [row["config"] for row in rows] == ["capped", "broken", "short", "gluon", "large"]
    reasons = ("power of 2", "differ in ['inner']", "signal 6: LLVM ERROR")
    for row, reason in zip(rows[1:4], reasons, strict=True):
        assert list(row)[:8] == ROW_KEYS and row["registers"] is None
        assert reason in row["error"] and "\n" not in row["error"]
        assert f"FAULT faulty {row['kernel']} sm_80 {row['config']}: {row['error']}" in text
    assert text.splitlines()[-1] == "5 kernels compiled ahead of time, 6 faults"


def test_more_memory_than_a_block_has_fails(faulty):
    text, rows = faulty
    assert rows[4]["shared"] > 163 * 1024
    assert f"FAULT faulty product_kernel sm_80 large: {rows[4]['shared']} bytes of shared memory, a block has" in text
    row = {**rows[4], "arch": "sm_100", "tensor_memory": 624}  # as many columns as the compiler made a trap for
    (fault,) = row_faults(row)
    assert fault.endswith("624 columns of tensor memory, there are 512")


def test_programs_that_do_not_fit_fail(toy):
    """By registers (133 are given as 136 to each thread: three blocks of four warps) and by shared memory."""
    row = {**empty_row("toy", toy.pointer_build(90, ())), "registers": 133, "warps": 4, "shared": 1000, "spills": 0}
    row |= {"tensor_memory": 0, "missing": []}
    assert resident(row) == 3 and not row_faults({**row, "programs": 3}) and not row_faults(row)
    (fault,) = row_faults({**row, "programs": 4})
    assert fault.endswith("a multiprocessor holds 3 programs, 4 are started")
    assert resident({**row, "shared": 100 << 10}) == 2 and resident({**row, "shared": 100 << 10, "arch": "sm_80"}) == 1


def test_narrow_accesses_fail_where_they_are_counted(bench, tmp_path):
    file = tmp_path / "copies.json"
    process = bench("static", "--op", "copies", "--arch", 90, 100, "--json", file)
    assert process.returncode == 1, process.stdout + process.stderr
    for arch in ("sm_90", "sm_100"):
        wide, narrow, uncounted = rows_of(json.loads(file.read_text()), arch=arch)
        assert wide["access_widths"] == {"16": 2}  # 8 rows of 256 bytes by 128 threads, there and back
        assert narrow["access_widths"] == uncounted["access_widths"] == {"2": 16}
        fault = f"FAULT copies rows_kernel {arch} narrow: 16 accesses narrower than 16 bytes (2:16), 15 allowed"
        assert fault in process.stdout.splitlines()
    assert process.stdout.splitlines()[-1] == "6 kernels compiled ahead of time, 2 faults"
    lines = [line.split() for line in process.stdout.splitlines()]
    (line,) = [line for line in lines if line[:4] == ["copies", "rows_kernel", "sm_90", "wide"]]
    assert "16:2" in line


def test_the_interpreter_cannot_compile(bench):
    process = bench("static", "--op", "toy", TRITON_INTERPRET="1")
    assert process.returncode == 2
    assert process.stderr.startswith("error: TRITON_INTERPRET is set") and process.stderr.count("\n") == 1
