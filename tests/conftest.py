"""Settings of the whole suite."""

from hypothesis import settings

# The same examples on every run, so that a red suite is red again; no deadline, as a busy machine is no fault.
settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")
