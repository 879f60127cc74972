"""The toy operation, for tests in this process and for commands in processes of their own."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
COMMAND = "import sys, toy; from bench.__main__ import main; from osp_fast.errors import run_entry_point; "
COMMAND += "run_entry_point(lambda: sys.exit(main(sys.argv[1:], toy.load)))"


@pytest.fixture(scope="session")
def toy():
    spec = importlib.util.spec_from_file_location("toy_operation", HERE / "toy.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def bench():
    """bench(arguments, **environment) -> the finished process of `python -m bench` on the toy operations.

    Triton is not interpreted there, whatever this process has; None as a variable's value removes it.
    """

    def call(*arguments, **environment):
        paths = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(HERE.parents[1]), str(HERE)]))
        variables = {**os.environ, "PYTHONPATH": paths, "TRITON_INTERPRET": None, **environment}
        variables = {name: value for name, value in variables.items() if value is not None}
        command = [sys.executable, "-c", COMMAND, *map(str, arguments)]
        return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300)

    return call
