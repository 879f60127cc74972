"""The suite `prompts`: what it counts, what it demands, and that it can fail."""

import numpy as np
import pytest
import torch

from bench.results import H100, OURS, REFERENCE
from bench.run import case_table
from bench.shape_checker import Reading
from bench.suites import Options, Setting, jobs_of, prompts
from osp_fast.assets.shapes import HELD_OUT, Scene
from osp_fast.data.buckets import Bucket
from osp_fast.errors import UserError

SETTING = Setting(torch.device("cpu"), H100, say=lambda line: None)


def drawn(change=lambda kind: kind):
    """In place of sampling: the clips that are asked for, or what `change` makes of the kinds."""

    def sampled(setting, method, steps, samples=1, way=prompts.WAYS[OURS], skipped=None):
        for number, kind in enumerate(HELD_OUT):
            for _ in range(samples):
                yield Scene.draw(number, 1, [change(kind)]).frames(17, 64)

    return sampled


def test_a_model_that_obeys_scores_everything_and_one_that_is_blind_to_colour_does_not(monkeypatch):
    monkeypatch.setattr(prompts, "sampled", drawn())
    monkeypatch.setattr(prompts, "SAMPLES", 1)
    (row,) = prompts.score_method("EulerAncestralDiscrete", 20, SETTING)
    assert row.ok and row.figures["clips"] == 30
    assert all(row.figures[name] == 1 for name in (prompts.ALL, *prompts.ATTRIBUTES))
    assert row.note.startswith("all 100 %, colour 100 %") and row.note in case_table([row])

    monkeypatch.setattr(prompts, "sampled", drawn(lambda kind: kind._replace(colour="red")))
    (row,) = prompts.score_method("DDIM", 20, SETTING)
    assert not row.ok and row.note.startswith("WRONG, less than 85%")
    assert row.figures["colour"] == row.figures["all"] == pytest.approx(1 / 6)
    assert row.figures["shape"] == row.figures["motion"] == row.figures["background"] == 1


def test_one_attribute_below_its_bar_is_enough(monkeypatch):
    """Two of thirty clips that stand still where they should move: 93 % in all, but motion below 95 %."""
    wrong = [kind for kind in HELD_OUT if kind.motion != "still"][:2]
    monkeypatch.setattr(
        prompts, "sampled", drawn(lambda kind: kind._replace(motion="still") if kind in wrong else kind)
    )
    monkeypatch.setattr(prompts, "SAMPLES", 1)
    (row,) = prompts.score_method("EulerAncestralDiscrete", 20, SETTING)
    assert row.figures["all"] > 0.9 and not row.ok
    (row,) = prompts.score_method("DDIM", 20, SETTING)
    assert row.ok


def test_other_prompts_score_what_chance_gives(monkeypatch):
    monkeypatch.setattr(prompts, "sampled", drawn())
    (row,) = prompts.score_other_prompts(SETTING)
    assert row.ok and row.figures["all"] == 0
    assert row.figures["colour"] == pytest.approx(4 / 29) and row.figures["shape"] == pytest.approx(9 / 29)
    # A checker that reads every clip as the same kind is right too often for one of them.
    monkeypatch.setattr(prompts, "read_kind", lambda clip: Reading(*HELD_OUT[0]))
    (row,) = prompts.score_other_prompts(SETTING)
    assert not row.ok and "above chance" in row.note


def test_paths_must_score_as_the_reference(monkeypatch):
    perfect, blind = drawn(), drawn(lambda kind: kind._replace(background="grey"))

    def sampled(setting, method, steps, samples=1, way=prompts.WAYS[OURS], skipped=None):
        skipped.append(3)
        if way.folders.get("compile"):
            raise UserError("there is no compiler")
        return (blind if way.settings else perfect)(setting, method, steps, samples, way)

    monkeypatch.setattr(prompts, "sampled", sampled)
    rows = {row.impl: row for row in prompts.score_paths(SETTING)}
    assert next(iter(rows)) == REFERENCE and set(rows) == set(prompts.WAYS)
    assert rows[OURS].ok and rows[OURS].figures["read_as_reference"] == 1
    assert rows[f"{OURS} compiled"].note == "refused: there is no compiler"
    worse = rows[f"{OURS} step cache 0.2"]
    assert not worse.ok and "another score" in worse.note and worse.figures["read_as_reference"] == pytest.approx(1 / 3)
    assert worse.role == "ours"  # so that the run ends with exit code 1
    assert worse.figures["steps_skipped"] == 3
    assert rows[f"{OURS} bfloat16"].dtype == "bfloat16" and rows[f"{OURS} bfloat16"].ok


def test_a_step_cache_that_skips_nothing_proves_nothing(monkeypatch):
    def sampled(*arguments, way=prompts.WAYS[OURS], skipped, **more):
        skipped.append(0)
        yield from drawn()(*arguments, way=way)

    monkeypatch.setattr(prompts, "sampled", sampled)
    rows = {row.impl: row for row in prompts.score_paths(SETTING)}
    assert rows[OURS].ok and "no step was skipped" in rows[f"{OURS} step cache 0.2"].note


def test_without_the_reference_there_is_nothing_to_compare(monkeypatch):
    def sampled(*arguments, **more):
        raise UserError("there is no model")

    monkeypatch.setattr(prompts, "sampled", sampled)
    with pytest.raises(UserError, match="there is no model"):
        list(prompts.score_paths(SETTING))


def test_plain_calls_and_the_engine_make_the_same_clips(monkeypatch):
    """Of the embedded model, two prompts and two steps: what the engine keeps from step to step changes nothing."""
    monkeypatch.setattr(prompts, "HELD_OUT", HELD_OUT[:2])
    clips = {
        name: np.stack(list(prompts.sampled(SETTING, "DDIM", 2, way=prompts.WAYS[name]))) for name in (OURS, REFERENCE)
    }
    assert clips[OURS].shape == (2, 17, 64, 64, 3)
    assert np.abs(clips[OURS].astype(int) - clips[REFERENCE]).max() <= 1
    assert np.abs(clips[OURS][0].astype(int) - clips[OURS][1]).max() > 10


def test_what_it_needs_is_said(monkeypatch, tmp_path):
    jobs = jobs_of(["prompts"], Options("cpu"))
    assert [job.case for job in jobs][-2:] == ["paths", "other prompts"] and len(jobs) == len(prompts.METHODS) + 2
    with pytest.raises(UserError, match="leave it out"):
        jobs_of(["prompts"], Options("cpu", sizes=(Bucket(17, 32, 32),)))
    with monkeypatch.context() as patch:
        patch.setattr(prompts, "installed", lambda name: name != "diffusers")
        with pytest.raises(UserError, match="pip install diffusers"):
            jobs[0].measure(SETTING)
    monkeypatch.setattr(prompts, "EMBEDDED_MODEL", tmp_path)
    with pytest.raises(UserError, match=str(tmp_path)):
        jobs[0].measure(SETTING)
