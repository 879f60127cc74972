"""A trace of a few steps (`--profile`)."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

SKIPPED_STEPS = 4  # after the start or a resume: they compile, tune and fill caches
WARM_UP_STEPS = 1  # with the profiler on, but not recorded: its own start is slow
PASSED_STEPS = SKIPPED_STEPS + WARM_UP_STEPS
ROWS = 30


class StepProfiler:
    """Records `steps` steps with PyTorch's profiler: ops on CPU and GPU with their shapes, no Python stacks.

    The first 4 steps pass by, the fifth warms the profiler up, and those from the sixth on are recorded. Writes
    `folder/profile/rank-R-steps-A-B.json.gz`, for https://ui.perfetto.dev or chrome://tracing, and a table of the ops
    that took most time, `.txt`. On a GPU a step is what its host launched from one `step()` to the next.

    Args:
        steps: None: everything here returns at once.
        report: gets a line when the files are there, or why they are not; training goes on.
    """

    def __init__(
        self,
        steps: int | None,
        folder: Path,
        rank: int,
        device: torch.device,
        report: Callable[[str], None] = lambda line: None,
    ):
        self._wanted = steps or 0
        self._folder, self._rank, self._device, self._report = folder / "profile", rank, device, report
        self._done = 0
        self._recorded: list[int] = []
        self._profiler: profile | None = None

    @property
    def writes_next(self) -> bool:
        """Whether the next call of `step` writes the files, which may take minutes."""
        return self._wanted > 0 and self._done + 1 == PASSED_STEPS + self._wanted

    def step(self, number: int) -> None:
        """Step `number` is done. Recording begins and ends between two steps."""
        if not self._wanted:
            return
        self._done += 1
        if self._done == SKIPPED_STEPS:
            self._start()
        elif self._profiler is not None:
            if self._done > PASSED_STEPS:
                self._recorded.append(number)
            self._profiler.step()
            if len(self._recorded) == self._wanted:
                self._finish()

    def close(self) -> None:
        """Write what was recorded if the run ends before all steps were."""
        if self._profiler is not None:
            self._profiler.stop()
        if self._wanted:
            self._finish()

    def _start(self) -> None:
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profiler = profile(
            activities=activities,
            schedule=schedule(wait=0, warmup=WARM_UP_STEPS, active=self._wanted, repeat=1),
            record_shapes=True,
        )
        self._profiler.start()

    def _finish(self) -> None:
        """Write the files, and free what they are made of; no step is recorded from now on."""
        if self._recorded:
            self._report(self._write(self._profiler))
        else:
            self._report(f"--profile: no trace, as the run ended within its first {PASSED_STEPS} steps")
        self._wanted, self._profiler = 0, None

    def _write(self, recorded: profile) -> str:
        """Returns what to tell the user."""
        steps = f"{self._recorded[0]}-{self._recorded[-1]}"
        trace = self._folder / f"rank-{self._rank}-steps-{steps}.json.gz"
        table = self._folder / f"rank-{self._rank}-steps-{steps}.txt"
        by = "self_cuda_time_total" if self._device.type == "cuda" else "self_cpu_time_total"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            recorded.export_chrome_trace(str(trace))
            table.write_text(recorded.key_averages().table(sort_by=by, row_limit=ROWS) + "\n", encoding="utf-8")
        except (OSError, RuntimeError) as error:  # RuntimeError: of PyTorch, which writes a part itself
            return f"--profile: {trace} cannot be written ({error}); training goes on"
        return f"profile of steps {steps}: {trace}, the ops that took most time in {table.name}"
