"""Training on broken data: it finishes, says what it left out, and runs nothing of a hostile annotation."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

from media import write_broken_and_sound

FLAGS = (
    "--preset tiny --data data.txt --max_height 48 --max_width 64 --num_frames 9 --train_batch_size 8"
    " --max_train_steps 6 --decode_timeout 2 --report_to none --device cpu"
)


class Hostile:
    """What a pickle does when it is loaded by the standard unpickler."""

    def __reduce__(self):
        return os.system, ("touch owned",)


def train(folder: Path, output_dir: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "osp_fast.train", *FLAGS.split(), "--output_dir", output_dir]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


def test_training_finishes_on_ten_broken_files_and_refuses_a_hostile_pickle(tmp_path):
    (tmp_path / "clips").mkdir()
    entries, reasons = write_broken_and_sound(tmp_path / "clips")
    (tmp_path / "clips.json").write_text(json.dumps(entries))
    (tmp_path / "data.txt").write_text("clips,clips.json\n")
    done = train(tmp_path, "run")
    assert done.returncode == 0 and "trained 6 steps" in done.stderr, done.stderr
    rejects = [json.loads(line) for line in (tmp_path / "run/rejects.jsonl").read_text().splitlines()]
    timeout = {"bad_hang.mp4": "decoding took more than 2 s (--decode_timeout)"}
    expected = {f"clips/{name}": reason for name, reason in {**reasons, **timeout}.items()}
    assert {line["path"]: line["reason"] for line in rejects} == expected and len(expected) == 10

    (tmp_path / "hostile.pkl").write_bytes(pickle.dumps([Hostile()]))
    (tmp_path / "data.txt").write_text("clips,clips.json\nclips,hostile.pkl\n")
    done = train(tmp_path, "hostile")
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "hostile.pkl: the pickle is refused because it refers to" in errors[0]
    assert not (tmp_path / "owned").exists()
