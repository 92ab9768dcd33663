"""Clips with an early cue: the cue alone depends on the class, and it is over long before the end."""

import math

import pytest
import torch

from stvision.datasets.early_cue import COLOURS, KINDS, WHITE, EarlyCue

CASES = [
    {},
    {"frames": 21, "size": 27, "distractors": 5, "cue_frames": 3, "cue_start": (0, 5), "seed": 7},
    {"frames": 16, "size": 16, "radius": 3.5, "distractors": 0, "cue_frames": 1},
]


def drawn(kind: str, y: float, x: float, size: int, radius: float) -> list[tuple[int, int]]:
    """Pixels of a shape by its definition, one by one."""
    found = []
    for row in range(size):
        for column in range(size):
            dy, dx = row - y, column - x
            far = math.hypot(dy, dx)
            straight = min(abs(dy), abs(dx))
            slanted = min(abs(dy + dx), abs(dy - dx)) / math.sqrt(2)
            belongs = {
                "disc": True,
                "ring": far >= 0.6 * radius,
                "plus": straight <= 0.3 * radius,
                "cross": slanted <= 0.3 * radius,
            }[kind]
            if far <= radius and belongs:
                found.append((row, column))
    return found


@pytest.mark.parametrize("options", CASES)
def test_classes_differ_in_the_frames_of_the_cue_alone(options: dict) -> None:
    clips = EarlyCue(24, **options)
    indices = list(range(24))
    shown = [clips.batch(indices, [label] * 24) for label in range(len(KINDS))]
    for i in indices:
        cue = clips.cue_times(i)
        assert cue.stop <= clips.frames - 1
        for label in range(1, len(KINDS)):
            differs = (shown[0][i] != shown[label][i]).flatten(1).any(1)
            assert differs.nonzero().flatten().tolist() == list(cue)
    # so what comes after the cue is the same for all classes, bit by bit
    end = clips.cue_start[1] - 1 + clips.cue_frames
    for label in range(1, len(KINDS)):
        assert torch.equal(shown[0][:, end:], shown[label][:, end:])


@pytest.mark.parametrize("options", CASES)
def test_cue_is_the_shape_of_the_class_in_white(options: dict) -> None:
    clips = EarlyCue(8, **options)
    frames = clips.batch(range(8))
    for i in range(8):
        white = (frames[i] == torch.tensor(WHITE, dtype=torch.uint8)).all(-1)
        assert white.flatten(1).any(1).nonzero().flatten().tolist() == list(clips.cue_times(i))
        y, x = (clips._draws(i)[1:3] * (clips.size - 1 - 2 * clips.radius) + clips.radius).tolist()
        wanted = drawn(KINDS[clips.label(i)], y, x, clips.size, clips.radius)
        for t in clips.cue_times(i):
            assert [tuple(p) for p in white[t].nonzero().tolist()] == wanted


def test_shapes_move_all_the_time_in_their_colours() -> None:
    frames = EarlyCue(4, distractors=4).batch(range(4))
    still = (frames[:, 1:] == frames[:, :-1]).flatten(2).all(2)
    assert not still.any()
    seen = {tuple(pixel) for pixel in frames[:, 20:].flatten(0, 3).unique(dim=0).tolist()}
    assert seen <= {(0, 0, 0), *COLOURS} and len(seen) >= 4


def test_classes_take_turns() -> None:
    clips = EarlyCue(40)
    labels = [clips.label(i) for i in range(40)]
    for first in range(33):
        assert sorted(labels[first : first + 4]) == [0, 1, 2, 3]
    assert clips[-1].meta["label"] == clips.label(39) == labels[-1]


def test_a_clip_is_the_same_alone_and_in_a_batch() -> None:
    clips = EarlyCue(12, 20)
    together = clips.batch(range(12))
    record = clips[5]
    assert torch.equal(record.frames, together[5]) and record.frames.dtype == torch.uint8
    assert torch.equal(clips.batch([-7])[0], together[5])
    assert record.meta["class"] in record.text and len(record.times) == 20
    for other in (EarlyCue(12, 20, seed=1), EarlyCue(12, 20, split="test")):
        assert not torch.equal(other.batch([5])[0], together[5])
    assert clips.batch([]).shape == (0, 20, 32, 32, 3)


def test_a_longer_clip_begins_like_the_shorter_one() -> None:
    assert torch.equal(EarlyCue(3, 40).batch([2])[:, :20], EarlyCue(3, 20).batch([2]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames": 12}, "cue_start must rise.*last of 12 frames"),
        ({"cue_start": (5, 5)}, "cue_start must rise"),
        ({"size": 10}, "must be above 0 and fit into size=10"),
        ({"speed": (2.0, 1.0)}, "speed must be two numbers"),
        ({"split": "dev"}, "split must be 'train' or 'test', got 'dev'"),
        ({"cue_frames": 0}, "cue_frames at least 1"),
    ],
)
def test_bad_numbers_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EarlyCue(4, **options)


def test_bad_clips_and_labels_are_named() -> None:
    with pytest.raises(IndexError, match="index 4 is out of range for 4 clips"):
        EarlyCue(4).batch([4])
    with pytest.raises(ValueError, match="labels must be 1 numbers from 0 to 3"):
        EarlyCue(4).batch([0], [4])
