"""metrics.jsonl is one consistent history; the progress line says what it should."""

import io
import json

import pytest

from osp_fast.config import RunConfig
from osp_fast.training.metrics import MetricsLog, drop_lines_after
from osp_fast.training.progress import Progress


def record(step: int, **values) -> dict:
    return dict(step=step, loss=0.5, lr=1e-4, grad_norm=1.0, s_per_step=0.1, data_wait_s=0.0, skipped=0, **values)


def steps(file) -> list[int]:
    return [json.loads(line)["step"] for line in file.read_text().splitlines()]


def test_resuming_drops_later_and_broken_lines(tmp_path):
    run = RunConfig(output_dir=str(tmp_path), report_to="none")
    log = MetricsLog(run, resumed_step=0)
    for step in (1, 2, 3, 4):
        log.write(record(step))
    log.close()
    with log.file.open("a") as out:
        out.write('{"step": 5, "lo')
    log = MetricsLog(run, resumed_step=2)
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

    log = MetricsLog(RunConfig(output_dir=str(tmp_path), logging_dir="logs", report_to="tensorboard"), 0)
    log.write(record(3))
    log.close()
    events = EventAccumulator(str(tmp_path / "logs"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(3, 0.5)]


def test_plain_progress_is_sparse_and_says_first_and_last_step():
    stream, now = io.StringIO(), [0.0]
    progress = Progress(0, 10, stream, clock=lambda: now[0])
    for step in range(1, 11):
        now[0] += 1.0
        progress.step(step, loss=0.25, seconds=0.75, wait_share=0.5)
    progress.close()
    lines = stream.getvalue().splitlines()
    # The time left follows from the mean since the start, which a single odd step does not move much.
    assert lines[0] == "step 1/10: loss 0.2500, 0.75 s/step, 50% waiting for data, 0:00:09 left"
    assert [line.split(":")[0] for line in lines] == ["step 1/10", "step 6/10", "step 10/10"]


def test_a_terminal_gets_a_bar():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    progress = Progress(4, 6, stream)
    progress.step(5, 0.25, 1.0, 0.0)
    progress.message("a note")
    progress.step(6, 0.125, 1.0, 0.0)
    progress.close()
    assert "a note\n" in stream.getvalue() and "6/6" in stream.getvalue() and "loss 0.1250" in stream.getvalue()
