"""Captions: the golden cleanings, robustness, and what training draws."""

import dataclasses
import json
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from osp_fast.data import aesthetic
from osp_fast.data.annotations import parse_entry
from osp_fast.data.captions import clean_caption, training_caption

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "captions.json").read_text(encoding="utf-8"))
ALL_SENTENCES = (aesthetic.LOW_IMAGE, aesthetic.HIGH_IMAGE, aesthetic.LOW_VIDEO, aesthetic.HIGH_VIDEO)


def entry(path="a.mp4", cap="a cat", score=None):
    record = {"path": path, "cap": cap, "resolution": {"height": 480, "width": 640}, "num_frames": 93}
    return parse_entry({**record, "aesthetic": score}, "root", "root")


@pytest.mark.parametrize("case", GOLDEN, ids=range(len(GOLDEN)))
def test_golden(case):
    assert clean_caption(case["caption"], case["chinese"]) == case["cleaned"]


def test_chinese_stays_by_default():
    assert clean_caption("一只猫") == "一只猫"


def test_a_run_of_dashes_is_one_dash():
    assert clean_caption("before ——– after") == "before - after"


markup = st.lists(st.sampled_from(["<", ">", "&", "!", "[", "--", "script", "#x", ";", "a", " ", "\ud800", "."]))


@settings(max_examples=300)
@given(text=st.one_of(st.text(st.characters(), max_size=60), markup.map("".join)), chinese=st.booleans())
@example(text="<![if x", chinese=True)
@example(text="a &#xd800; \ud800 & b", chinese=True)
@example(text="a&b.txt", chinese=False)
def test_any_text_gives_one_line_that_utf8_can_hold(text, chinese):
    cleaned = clean_caption(text, chinese)
    assert cleaned == cleaned.strip()
    assert "\n" not in cleaned
    cleaned.encode("utf-8")


def test_long_text_is_cleaned_in_reasonable_time():
    assert clean_caption("a. " * 3000).startswith("a. a. a.")


@pytest.mark.parametrize("sentences", ALL_SENTENCES)
def test_aesthetic_sentences_survive_cleaning(sentences):
    assert len(set(sentences)) >= 12
    assert [clean_caption(sentence) for sentence in sentences] == list(sentences)


@pytest.mark.parametrize(
    ("score", "path", "expected"),
    [
        (4.25, "a.mp4", aesthetic.LOW_VIDEO),
        (4.26, "a.mp4", ()),
        (5.74, "a.jpg", ()),
        (5.75, "a.jpg", aesthetic.HIGH_IMAGE),
        (5.75, "a.mp4", aesthetic.HIGH_VIDEO),
        (1, "a.webp", aesthetic.LOW_IMAGE),
        (None, "a.mp4", ()),
    ],
)
def test_sentence_follows_score_and_kind(score, path, expected):
    clip = entry(path, score=score)
    drawn = {training_caption(clip, random.Random(seed), 0.0, True) for seed in range(400)}
    if not expected:
        assert drawn == {"a cat"}
    else:
        assert drawn == {f"a cat {s}" for s in expected} | {f"{s} a cat" for s in expected}


def test_sentence_stands_before_or_after_with_equal_odds():
    clip = entry(score=9.0)
    before = sum(training_caption(clip, random.Random(seed), 0.0, True).endswith("a cat") for seed in range(1000))
    assert 430 < before < 570  # 500 +- 4.4 standard deviations


def test_one_of_several_captions_is_drawn():
    clip = entry(cap=["One", "Two", "Three"])
    drawn = Counter(training_caption(clip, random.Random(seed), 0.0, True) for seed in range(900))
    assert set(drawn) == {"one", "two", "three"}
    assert min(drawn.values()) > 230  # 300 +- 4.9 standard deviations


def test_caption_is_dropped_with_the_given_probability():
    clip = entry(score=9.0)
    dropped = sum(training_caption(clip, random.Random(seed), 0.1, True) == "" for seed in range(2000))
    assert 140 < dropped < 260  # 200 +- 4.5 standard deviations
    assert training_caption(clip, random.Random(0), 1.0, True) == ""


def test_chinese_is_dropped_for_other_encoders():
    clip = entry(cap="汉字 cat")
    assert training_caption(clip, random.Random(0), 0.0, False) == "cat"


def test_draws_do_not_depend_on_the_entry():
    plain = entry()
    others = [entry(cap=["a", "b"], score=9.0), entry("a.jpg", score=1.0), dataclasses.replace(plain, aesthetic=5.0)]
    expected = random.Random(7)
    training_caption(plain, expected, 0.0, True)
    for other in others:
        for probability in (0.0, 1.0):
            draw = random.Random(7)
            training_caption(other, draw, probability, False)
            assert draw.getstate() == expected.getstate()
