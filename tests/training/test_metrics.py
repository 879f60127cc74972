"""metrics.jsonl is one consistent history; the progress line says what it should."""

import json

import pytest

from osp_fast.config import RunConfig
from osp_fast.training.metrics import MetricsLog, drop_lines_after


def record(step: int, **values) -> dict:
    return dict(step=step, loss=0.5, lr=1e-4, grad_norm=1.0, s_per_step=0.1, data_wait_s=0.0, skipped=0, **values)


def steps(file) -> list[int]:
    return [json.loads(line)["step"] for line in file.read_text().splitlines()]


def test_resuming_drops_later_and_broken_lines(tmp_path):
    run = RunConfig(output_dir=str(tmp_path), report_to="none")
    log = MetricsLog(run, resumed_step=0, report=print)
    for step in (1, 2, 3, 4):
        log.write(record(step))
    log.close()
    with log.file.open("a") as out:
        out.write('{"step": 5, "lo')
    log = MetricsLog(run, resumed_step=2, report=print)
    log.write(record(3, loss_again=True))
    log.close()
    assert steps(log.file) == [1, 2, 3]
    assert "loss_again" in log.file.read_text().splitlines()[-1]


def test_a_failure_while_rewriting_keeps_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "metrics.jsonl"
    file.write_text(json.dumps(record(1)) + "\n" + json.dumps(record(2)) + "\n")
    before = file.read_text()

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        drop_lines_after(file, 1)
    assert file.read_text() == before


def test_tensorboard_gets_the_same_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricsLog(RunConfig(output_dir=str(tmp_path), logging_dir="logs", report_to="tensorboard"), 0, print)
    log.write(record(3))
    log.close()
    events = EventAccumulator(str(tmp_path / "logs"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(3, 0.5)]


def test_a_full_disk_delays_lines_and_loses_none(tmp_path, monkeypatch):
    told = []
    log = MetricsLog(RunConfig(output_dir=str(tmp_path), report_to="none"), 0, told.append)
    log.write(record(1))

    class Full:
        """A file on a disk with room for half a line."""

        def __init__(self, file):
            self.file = file
            self.seek = file.seek

        def write(self, data: bytes) -> int:
            return self.file.write(data[: len(data) // 2])

    file, log._lines = log._lines, Full(log._lines)
    log.write(record(2))
    log.write(record(3))
    assert steps(log.file) == [1] and len(told) == 1 and "metrics.jsonl cannot be written (No space left" in told[0]
    log._lines = file
    log.write(record(4))
    log.close()
    assert steps(log.file) == [1, 2, 3, 4] and len(told) == 1
