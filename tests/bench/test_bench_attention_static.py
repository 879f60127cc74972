"""The binaries of the released model's attention: matrix units and TMA where they should be, and no spills."""

import json

import pytest


@pytest.fixture(scope="module")
def rows(bench, tmp_path_factory):
    file = tmp_path_factory.mktemp("static") / "attention.json"
    process = bench("static", "--op", "model_attention", "--arch", 80, 90, "--json", file)
    assert process.returncode == 0, process.stdout + process.stderr
    return json.loads(file.read_text())


def main_loop(row):
    return max(row["loops"], key=lambda loop: loop["HGMMA"] + loop["HMMA"])


@pytest.mark.parametrize("head_dim", [96, 128])
@pytest.mark.parametrize("kernel", ["forward", "keys, fused", "keys", "queries"])
def test_hopper_loads_by_tma_and_multiplies_by_warpgroup(rows, head_dim, kernel):
    label = f"{kernel} D{head_dim} bf16 group descriptor"
    (row,) = (row for row in rows if row["arch"] == "sm_90" and row["config"].startswith(label))
    loop = main_loop(row)
    assert loop["HGMMA"] > 0 and loop["HMMA"] == 0 and loop["UTMALDG"] == (4 if head_dim == 96 else 2)
    assert loop["UTMAREDG"] == ((2 if head_dim == 96 else 1) if kernel == "keys, fused" else 0)
    assert loop["LDG"] <= 4  # row vectors; no token goes around the TMA unit
    assert row["spills"] == row["stack"] == 0 and row["shared"] <= 227 << 10


@pytest.mark.parametrize("head_dim", [96, 128])
@pytest.mark.parametrize("kernel", ["forward", "keys", "queries"])
def test_ampere_multiplies_by_tensor_cores(rows, head_dim, kernel):
    label = f"{kernel} D{head_dim} bf16 group pointer"
    (row,) = (row for row in rows if row["arch"] == "sm_80" and row["config"].startswith(label))
    assert main_loop(row)["HMMA"] > 0 and main_loop(row)["LDGSTS"] > 0 and row["spills"] == row["stack"] == 0
