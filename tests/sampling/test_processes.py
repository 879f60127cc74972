"""Many processes, one set of clips: alone or shared, killed or not, the files are those of one process."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from osp_fast import sample
from osp_fast.data.decode import read_video
from osp_fast.errors import run_entry_point
from osp_fast.sampling.clips import SHARED_FOLDER, ClipMaker

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "parallel"))
from ranks import RankProcesses, run_ranks
from small import command_line, save_text_encoder, small_dit, small_flags

PROMPTS = ["a red circle", "left", "a circle moves left", "red", "high quality"]
VIDEOS = [f"EulerAncestralDiscrete_{index}_gs3.0_s3.mp4" for index in range(5)]
GRID = "EulerAncestralDiscrete_gs3.0_s3_grid.mp4"


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    small_dit().save_pretrained(root / "dit")
    save_text_encoder(root / "text")
    changes = dict(text_prompt=PROMPTS, sample_method="EulerAncestralDiscrete", num_sampling_steps=3)
    return {**small_flags(root, root / "one"), **changes}


@pytest.fixture(scope="module")
def one(flags):
    """What one process makes."""
    sample.main(command_line(flags))
    folder = Path(flags["save_img_path"])
    assert sorted(path.name for path in folder.glob("*.mp4")) == sorted([*VIDEOS, GRID])
    return {name: read_video(folder / name).astype(int) for name in VIDEOS}


def check(folder: Path, one: dict) -> None:
    """The clips are those of one process, and nothing else is left in the folder."""
    names = {*VIDEOS, *(name.replace(".mp4", ".json") for name in VIDEOS), GRID}
    assert {path.name for path in folder.iterdir()} == names
    for name in VIDEOS:
        assert np.abs(read_video(folder / name).astype(int) - one[name]).max() <= 2, name


def makers(ranks: RankProcesses) -> dict[str, int]:
    """Which rank wrote which clip."""
    lines = [(rank, line) for rank in range(len(ranks.logs)) for line in ranks.printed(rank).splitlines()]
    return {line.rsplit("/", 1)[-1]: rank for rank, line in lines if "wrote " in line and "grid" not in line}


def run_and_die_in_clip(line: list[str], meeting: Path, deaths: dict[str, int]) -> None:
    """Rank r kills itself in the first step of clip number deaths[r] of those that it makes.

    All wait in the first step of their first clip until all others have one, however busy the machine is.
    """
    show, begun = ClipMaker._show, []

    def show_or_die(self, clip, done, calls):
        if done == 1:
            begun.append(clip)
            if len(begun) == 1:
                meet(meeting)
            if len(begun) > deaths.get(os.environ["RANK"], 99):
                os.kill(os.getpid(), signal.SIGKILL)
        show(self, clip, done, calls)

    ClipMaker._show = show_or_die
    sample.main(line)


def meet(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    (folder / os.environ["RANK"]).touch()
    while len(list(folder.iterdir())) < int(os.environ["WORLD_SIZE"]):
        time.sleep(0.01)


def main_with_code(line: list[str]) -> None:
    run_entry_point(lambda: sample.main(line))


@pytest.mark.parametrize("size", [2, 3])
def test_each_takes_its_share(size, flags, one, tmp_path):
    line = command_line(flags, save_img_path=tmp_path / "out")
    ranks = run_ranks(size, tmp_path / "logs", run_and_die_in_clip, line, tmp_path / "meeting", {})
    check(tmp_path / "out", one)
    made = makers(ranks)
    assert sorted(made) == VIDEOS and set(made.values()) == set(range(size))
    assert "rank 1: wrote" in ranks.printed(1) and "step" not in ranks.printed(1)  # one shows progress


@pytest.mark.parametrize("size", [2, 3])
def test_all_work_on_each_clip(size, flags, one, tmp_path):
    """Two ranks have a prompt each, three share the tokens; the model has two heads."""
    line = command_line(flags, save_img_path=tmp_path / "out", sp=True)
    ranks = run_ranks(size, tmp_path / "logs", sample.main, line)
    check(tmp_path / "out", one)
    made = makers(ranks)
    assert sorted(made) == VIDEOS and set(made.values()) == set(range(size))  # each decodes in turn
    assert ("one for the prompt" if size == 2 else "share each clip's tokens") in ranks.printed(0)


def test_an_error_of_one_ends_all_in_its_sentence(flags, tmp_path):
    """The second clip is rank 1's to write, and its place is taken by a folder."""
    out = tmp_path / "out"
    (out / VIDEOS[1]).mkdir(parents=True)
    ranks = RankProcesses(2, tmp_path / "logs", main_with_code, (command_line(flags, save_img_path=out, sp=True),))
    assert ranks.codes() == [2, 2], ranks.printed()
    for rank in (0, 1):
        assert f"{VIDEOS[1]} cannot be written" in ranks.printed(rank).splitlines()[-1]
    assert (out / VIDEOS[0]).is_file()


def test_one_is_killed_and_the_rest_takes_over(flags, one, tmp_path):
    line = command_line(flags, save_img_path=tmp_path / "out")
    ranks = RankProcesses(3, tmp_path / "logs", run_and_die_in_clip, (line, tmp_path / "meeting", {"1": 0}))
    assert ranks.codes() == [0, -signal.SIGKILL, 0], ranks.printed()
    check(tmp_path / "out", one)
    assert set(makers(ranks).values()) == {0, 2}


def test_all_are_killed_and_a_restart_completes(flags, one, tmp_path):
    out = tmp_path / "out"
    line = command_line(flags, save_img_path=out)
    ranks = RankProcesses(2, tmp_path / "logs", run_and_die_in_clip, (line, tmp_path / "meeting", {"0": 1, "1": 1}))
    assert ranks.codes() == [-signal.SIGKILL] * 2, ranks.printed()
    there = {path: path.stat().st_mtime_ns for path in out.glob("*.mp4")}
    assert len(there) == 2 and (out / SHARED_FOLDER).is_dir()
    again = run_ranks(2, tmp_path / "again", sample.main, line)
    check(out, one)
    assert all(path.stat().st_mtime_ns == time for path, time in there.items())
    assert "2 of 5 clips are there already: skipped" in again.printed(0)
    assert len(makers(again)) == 3


def test_a_sidecar_of_another_clip_does_not_count(flags, one, tmp_path, capsys):
    out = tmp_path / "out"
    sample.main(command_line(flags, save_img_path=out, text_prompt=["left", *PROMPTS[1:]]))
    there = {path.name: path.stat().st_mtime_ns for path in out.glob("*.mp4")}
    sample.main(command_line(flags, save_img_path=out))
    check(out, one)
    told = f"note: {VIDEOS[0]} is there, but not what is asked for (prompt): replaced, 1 in all"
    assert told in capsys.readouterr().err
    same = [name for name in VIDEOS if (out / name).stat().st_mtime_ns == there[name]]
    assert same == VIDEOS[1:]
    assert json.loads((out / VIDEOS[0].replace("mp4", "json")).read_text())["prompt"] == PROMPTS[0]
