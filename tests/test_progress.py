"""Progress on a terminal and in a pipe."""

import io

from osp_fast.progress import Progress, duration


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines_are_sparse_and_tell_the_time_left():
    stream, now = io.StringIO(), [0.0]
    progress = Progress(24, first=4, stream=stream, clock=lambda: now[0])
    for step in range(5, 25):
        now[0] += 1.0
        progress.show(step, f"step {step}/24", "loss 0.2500", milestone=step == 7)
    progress.close()
    lines = stream.getvalue().splitlines()
    assert lines[0] == "step 5/24: loss 0.2500, 0:00:19 left"
    # Every five seconds, and for the milestone and the last step.
    assert [line.split("/")[0] for line in lines] == [f"step {step}" for step in (5, 7, 12, 17, 22, 24)]
    assert progress.pace(24) == 1.0


def test_a_terminal_gets_a_bar():
    stream = Terminal()
    progress = Progress(6, first=4, stream=stream)
    progress.show(5, "clip 1/2", "loss 0.2500")
    progress.message("a note")
    progress.show(6, "clip 2/2", "loss 0.1250")
    progress.close()
    shown = stream.getvalue()
    assert "a note\n" in shown and "6/6" in shown and "loss 0.1250" in shown and "clip 2/2" in shown


def test_duration():
    assert [duration(seconds) for seconds in (0.4, 59.6, 3723)] == ["0:00:00", "0:01:00", "1:02:03"]


def test_a_log_that_cannot_be_written_stops_nothing():
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    progress = Progress(3, stream=Full())
    for step in (1, 2, 3):
        progress.show(step, f"step {step}/3", "loss 0.5")
    progress.message("a line")
    progress.close()
    assert progress.pace(3) >= 0 and not progress._stream.getvalue()
