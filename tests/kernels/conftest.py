"""Fixtures of the kernels' tests."""

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def count_traffic():
    """The context manager of traffic.py."""
    spec = importlib.util.spec_from_file_location("traffic", Path(__file__).with_name("traffic.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.count_traffic
