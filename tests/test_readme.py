"""The README's commands and flags are real."""

import argparse
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from bench.__main__ import _parser
from osp_fast.cli import reconstruct_parser, sample_parser, serve_parser, train_parser

README = (Path(__file__).parents[1] / "README.md").read_text()

OF_PYTEST = {"--benchmark-only"}
OF_TORCHRUN = {"--nproc-per-node", "--max-restarts", "--shutdown-timeout", "--signals-to-handle"}


def commands() -> list[str]:
    """Every `python -m osp_fast...` of the code blocks, continuation lines joined, comments cut."""
    blocks = re.findall(r"```(?:\w*)\n(.*?)```", README, flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.startswith("python -m osp_fast.")]


def bench_parsers() -> list[argparse.ArgumentParser]:
    """Of each of its commands."""
    (commands,) = [action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction)]
    return list(commands.choices.values())


@pytest.mark.parametrize("line", [line for line in README.splitlines() if line.startswith("python -m bench ")])
def test_commands_of_the_bench_are_accepted(line):
    assert _parser().parse_args(shlex.split(line, comments=True)[3:]).command


def test_there_are_commands():
    assert {line.split()[2] for line in commands()} >= {"osp_fast.train", "osp_fast.sample", "osp_fast.encode"}


@pytest.mark.parametrize("command", commands())
def test_commands_are_accepted(command):
    words = shlex.split(command)
    done = subprocess.run([sys.executable, *words[1:], "--print_config"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_flag_that_is_mentioned_exists():
    known = {
        flag
        for parser in (train_parser(), sample_parser(), serve_parser(), reconstruct_parser())
        for flag in parser._option_string_actions
    }
    known |= {"--json"}  # osp_fast.inspect's own, see tests/test_inspect.py
    known |= {flag for parser in bench_parsers() for flag in parser._option_string_actions}
    known |= OF_TORCHRUN | OF_PYTEST
    mentioned = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]*", README))
    assert len(mentioned) > 40 and mentioned <= known, mentioned - known


def test_every_flag_of_the_readme_is_run_by_a_test():
    tests = "".join(path.read_text() for path in Path(__file__).parent.rglob("*.py") if path.name != "test_readme.py")
    for flag in set(re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]*", README)) - OF_TORCHRUN:
        # Tests give flags as text, or as keyword arguments of a helper that makes a command line of them.
        assert re.search(rf"{flag}\b|\b{flag[2:]}=", tests), f"no test runs {flag}"
