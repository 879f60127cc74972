"""The checker of generated clips: right on everything that can be drawn, and able to say no."""

import numpy as np
import pytest

from bench.shape_checker import Reading, read_kind
from osp_fast.assets.shapes import BACKGROUNDS, COLOURS, KINDS, Kind, Scene

RED_CIRCLE = Kind("red", "circle", "right", "black")


def blurred(frames: np.ndarray, seed: int) -> np.ndarray:
    """A 3x3 binomial filter and noise of four levels, about what a VAE of 30 dB makes of a clip."""
    padded = np.pad(frames.astype(float), ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    rows = (padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]) / 4
    both = (rows[:, :, :-2] + 2 * rows[:, :, 1:-1] + rows[:, :, 2:]) / 4
    noise = np.random.default_rng(seed).normal(0, 4, frames.shape)
    return (both + noise).clip(0, 255).round().astype(np.uint8)


# The whole way, and half of it; every kind is sharp in one of the two and blurred in the other.
@pytest.mark.parametrize(("window", "blurred_ones"), [(slice(None, None, 4), 0), (slice(8, 25, 2), 1)])
def test_every_kind_is_read_sharp_and_blurred(window, blurred_ones):
    for number in range(len(KINDS)):
        scene = Scene.draw(number, 0, KINDS)
        frames = scene.frames(33, 64)[window]
        if number % 2 == blurred_ones:
            frames = blurred(frames, number)
        assert tuple(read_kind(frames)) == tuple(scene.kind)


def scene(kind: Kind, start=(0.3, 0.5), radius=0.17) -> np.ndarray:
    return Scene(kind, radius, 0.4, start).frames(17, 64)


def test_what_is_not_there_is_not_read():
    noise = np.random.default_rng(0).integers(0, 256, (17, 64, 64, 3), dtype=np.uint8)
    assert read_kind(noise) == Reading()
    empty = np.full((17, 64, 64, 3), BACKGROUNDS["dark blue"], np.uint8)
    assert read_kind(empty) == Reading(background="dark blue")
    pink = np.full((17, 64, 64, 3), (255, 120, 190), np.uint8)
    assert read_kind(pink) == Reading()
    speck = scene(RED_CIRCLE, radius=0.05)
    assert read_kind(speck) == Reading(background="black")


def test_two_shapes_and_strange_colours_are_none():
    left, right = (Kind("red", "circle", "still", "black"), Kind("red", "circle", "still", "black"))
    two = np.maximum(scene(left, (0.25, 0.3), 0.14), scene(right, (0.75, 0.7), 0.14))
    assert read_kind(two).shape is None
    brown = scene(RED_CIRCLE) // 2
    assert read_kind(brown).colour is None and read_kind(brown).shape == "circle"


def test_a_clip_that_changes_half_way_agrees_with_nothing():
    first, second = scene(RED_CIRCLE), scene(RED_CIRCLE._replace(colour="green", shape="bar"))
    mixed = np.concatenate([first[:8], second[8:]])
    assert read_kind(mixed)[:2] == (None, None) and read_kind(mixed).motion == "right"


def test_motions_that_are_none():
    still = Kind("white", "ring", "still", "black")
    here, there = scene(still, (0.3, 0.5)), scene(still, (0.7, 0.5))
    assert read_kind(np.concatenate([here[:8], there[8:]])).motion is None  # a jump
    diagonal = np.stack([Scene(still, 0.15, 0.4, (0.3 + 0.02 * n, 0.3 + 0.02 * n)).frames(1, 64)[0] for n in range(17)])
    assert read_kind(diagonal).motion is None
    slow = np.stack([Scene(still, 0.15, 0.4, (0.3 + 0.005 * n, 0.3)).frames(1, 64)[0] for n in range(17)])
    assert read_kind(slow).motion is None
    back = np.concatenate([scene(RED_CIRCLE)[::2], scene(RED_CIRCLE)[::-2]])
    assert read_kind(back).motion is None
    blinking = scene(RED_CIRCLE)
    blinking[5] = 0
    assert read_kind(blinking).motion is None


def test_a_wrong_name_is_read_as_what_is_shown():
    shown = read_kind(scene(RED_CIRCLE))
    for name in COLOURS:
        assert (shown.colour == name) == (name == "red")
    assert read_kind(scene(RED_CIRCLE)[::-1]).motion == "left"
    turned = scene(RED_CIRCLE).transpose(0, 2, 1, 3)
    assert read_kind(turned).motion == "down"


def shown(inside, colour=(220, 40, 40)) -> np.ndarray:
    """A clip of what stands still where `inside` (64, 64) is, on black."""
    return np.repeat((inside[..., None] * np.array(colour)).astype(np.uint8)[None], 17, axis=0)


def test_shapes_that_are_none_of_the_three():
    y, x = np.indices((64, 64)) - 31.5
    distance, off_centre = np.hypot(x, y), np.hypot(x - 5, y)
    others = {
        "square": np.maximum(np.abs(x), np.abs(y)) < 11,
        "square on its tip": np.abs(x) + np.abs(y) < 14,
        "rectangle that is hardly longer": (np.abs(x) < 13.5) & (np.abs(y) < 9),
        "rectangle that stands": (np.abs(x) < 6) & (np.abs(y) < 14),
        "rectangle aslant": (np.abs(x + y) < 20) & (np.abs(x - y) < 9),
        "two rectangles": (np.abs(x) < 15) & (np.abs(y) > 3) & (np.abs(y) < 8),
        "ellipse": np.hypot(x / 1.5, y) < 9,
        "long ellipse": np.hypot(x / 2.2, y) < 7,
        "half disc": (distance < 13) & (y < 0),
        "two discs that overlap": np.minimum(np.hypot(x - 7, y), np.hypot(x + 7, y)) < 10,
        "triangle": np.maximum(y, 0.75**0.5 * np.abs(x) - 0.5 * y) < 7.2,
        "square frame": (np.maximum(np.abs(x), np.abs(y)) < 12) & (np.maximum(np.abs(x), np.abs(y)) > 6),
        "ring that is open": (np.abs(distance - 11) < 3) & ~((np.abs(y) < 5) & (x > 0)),
        "disc with a hole at its side": (distance < 13) & (off_centre > 6),
        "cross": np.minimum(np.maximum(np.abs(x) - 14, np.abs(y) - 4), np.maximum(np.abs(y) - 14, np.abs(x) - 4)) < 0,
    }
    for name, inside in others.items():
        assert read_kind(shown(inside)) == ("red", None, "still", "black"), name
    assert read_kind(shown(distance < 11)).shape == "circle"
    assert read_kind(shown(np.abs(distance - 11) < 3)).shape == "ring"
    assert read_kind(shown((np.abs(x) < 15) & (np.abs(y) < 7))).shape == "bar"


def test_a_shape_of_two_colours_has_none():
    y, x = np.indices((64, 64)) - 31.5
    disc = np.hypot(x, y) < 11
    parts = shown(disc & (x < 2)) + shown(disc & (x >= 2), COLOURS["green"])
    assert read_kind(parts) == (None, "circle", "still", "black")


@pytest.mark.parametrize(
    "way", [lambda n: np.clip((n - 7) / 3, 0, 1), lambda n: n / 11 if n < 12 else 1 - (n - 11) / 11]
)
def test_a_shape_that_waits_and_one_that_turns_back_do_not_move_steadily(way):
    still = Kind("white", "ring", "still", "black")
    frames = [Scene(still, 0.15, 0.4, (0.3 + 0.28 * way(n), 0.5)).frames(1, 64)[0] for n in range(17)]
    assert read_kind(np.stack(frames)).motion is None
