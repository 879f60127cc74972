"""`pytest bench`: benchmarks for comparing two commits on a CPU, with names that stay."""

import json
import os
import subprocess
import sys
from pathlib import Path

from osp_fast.kernels.spec import DIRECTIONS

from bench.ops import load_specs

ROOT = Path(__file__).parents[2]
OTHERS = {"test_dit_forward", "test_train_step", "test_sample_step", "test_vae[encode]", "test_vae[decode]"}
OTHERS |= {"test_decode", "test_read_cache", "test_encode_text"}


CHOSEN = {"test_operation[adaln-forward]", "test_operation[haar-backward]", "test_vae[encode]", "test_sample_step"}
RUN = """
import sys, pytest

class Names:
    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items):
        open(sys.argv[1], "w").write("\\n".join(item.name for item in items))

sys.exit(pytest.main(sys.argv[2:], plugins=[Names()]))
"""


def test_benchmarks_have_the_names_that_are_compared(tmp_path):
    """All are found in one place, by names that a result of an earlier commit has too; some run, for an instant."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON", "PYTEST"))}
    names, out = tmp_path / "names", tmp_path / "out.json"
    options = ["--benchmark-json", out, "--benchmark-max-time", "0.001", "--benchmark-min-rounds", "2"]
    options += ["-k", "adaln-forward or haar-backward or vae and encode or sample_step"]
    command = [sys.executable, "-c", RUN, names, "bench", "--benchmark-only", *options]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, env=variables, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and "warning" not in done.stdout, done.stdout + done.stderr
    operations = {f"test_operation[{name}-{way}]" for name in load_specs() for way in DIRECTIONS}
    assert set(names.read_text().splitlines()) == OTHERS | operations
    written = json.loads(out.read_text())
    found = {one["name"]: one["stats"] for one in written["benchmarks"]}
    assert set(found) == CHOSEN and "commit_info" in written
    assert all(stats["rounds"] >= 2 and stats["median"] > 0 for stats in found.values())
