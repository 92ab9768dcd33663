"""Clips, sampling and everything that turns into one."""

import io
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from stvision.io import Clip, as_clip
from stvision.io.sampling import fps_indices, uniform_indices


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 2**31))
def test_uniform_samples_are_distinct_ascending_and_reach_both_ends(length, n, seed):
    times = torch.from_numpy(np.cumsum(np.random.default_rng(seed).uniform(0.01, 1, length)))
    if n > length:
        with pytest.raises(ValueError, match=f"num_frames is {n}"):
            uniform_indices(times, n)
        return
    picks = uniform_indices(times, n)
    assert len(picks) == n and all(a < b for a, b in itertools.pairwise(picks))
    assert n == 1 or (picks[0] == 0 and picks[-1] == length - 1)


@pytest.mark.parametrize(("fps", "count"), [(0.5, 5), (2, 20), (7.3, 73), (25, 250), (12.5, 125)])
def test_rates_of_ten_seconds_at_25(fps, count):
    picks = fps_indices(torch.arange(250, dtype=torch.float64) / 25, fps)
    assert len(picks) == len(set(picks)) == count
    assert all(abs(p / 25 - k / fps) <= 0.02 + 1e-9 for k, p in enumerate(picks))


def test_a_rate_above_the_clips_own_repeats_nothing():
    clip = Clip.from_frames(noise(10, 4, 4, 3), fps=29.97)
    with pytest.warns(UserWarning, match="29.97"):
        up = clip.at_fps(60)
    assert len(up) == 10 and up.fps == pytest.approx(29.97)
    assert clip.at_fps(29.97).times.tolist() == clip.times.tolist()


def test_selection_keeps_true_times():
    clip = Clip.from_frames(noise(9, 4, 6, 3), fps=4)
    for which in (slice(2, 7), slice(None, None, -2), [5, 1], torch.tensor([0, 8]), slice(1, 9, 3)):
        rows = np.arange(9)[which if isinstance(which, slice) else np.array(which)]
        assert torch.equal(clip[which].frames, clip.frames[torch.from_numpy(rows.copy())])
        assert clip[which].times.tolist() == [r / 4 for r in rows]
    assert clip[1:9:3].fps == pytest.approx(4 / 3)
    assert clip[-1].times.tolist() == [2.0]
    with pytest.raises(IndexError, match="frame 9 of a clip of 9"):
        clip[9]


@pytest.mark.parametrize("size", [(5, 7), (40, 30), (16, 9)])
def test_resize_equals_a_float64_reference(size):
    clip = Clip.from_frames(noise(35, 16, 20, 3))
    reference = torch.nn.functional.interpolate(
        clip.frames.permute(0, 3, 1, 2).double(), size, mode="bilinear", antialias=True
    ).permute(0, 2, 3, 1)
    assert (clip.resize(*size).frames.double() - reference).abs().max() <= 0.5 + 1e-3
    exact = Clip(clip.frames.double() / 255, clip.times).resize(*size).frames * 255
    assert (exact - reference).abs().max() < 1e-9


def test_float_and_uint8_round_trip_and_crop():
    clip = Clip.from_frames(noise(3, 9, 11, 3))
    assert torch.equal(clip.to_float().to_uint8().frames, clip.frames)
    assert torch.equal(clip.to_float(torch.float16).to_uint8().frames, clip.frames)
    assert torch.equal(clip.center_crop(4, 5).frames, clip.frames[:, 2:6, 3:8])
    with pytest.raises(ValueError, match="10x10"):
        clip.center_crop(10)


def test_clip_says_what_is_wrong():
    with pytest.raises(ValueError, match=r"\(T, H, W, C\)"):
        Clip(noise(4, 4, 3), torch.zeros(4))
    with pytest.raises(TypeError, match="int64"):
        Clip(noise(1, 4, 4, 3).long(), torch.zeros(1))
    with pytest.raises(ValueError, match="times"):
        Clip(noise(2, 4, 4, 3), torch.zeros(3))
    with pytest.raises(ValueError, match="fps is 0"):
        Clip.from_frames(noise(2, 4, 4, 3), fps=0)


def test_arrays_tensors_and_images_are_the_same_clip(tmp_path):
    frames = noise(5, 8, 10, 3)
    images = [Image.fromarray(f.numpy()) for f in frames]
    paths = []
    for i, image in enumerate(images):
        paths.append(tmp_path / f"frame{i * 6}.png")
        image.save(paths[-1])
    for source in (
        frames,
        frames.numpy(),
        frames.permute(0, 3, 1, 2),
        images,
        tuple(frames),
        paths,
        [f.numpy() for f in frames],
        tmp_path,
        str(tmp_path),
        Clip.from_frames(frames, 4),
        frames.double() / 255,
    ):
        clip = as_clip(source) if isinstance(source, Clip) else as_clip(source, fps=4)
        assert torch.equal(clip.to_uint8().frames, frames), type(source)
        assert clip.times.tolist() == [i / 4 for i in range(5)]
    data = paths[2].read_bytes()
    for one in (paths[2], data, io.BytesIO(data), images[2], frames[2], frames[2].permute(2, 0, 1)):
        clip = as_clip(one)
        assert torch.equal(clip.frames, frames[2:3]) and clip.fps is None


def test_grey_and_transparent_images():
    grey = noise(5, 8, 10, 1)
    assert torch.equal(as_clip(grey).frames, grey.expand(-1, -1, -1, 3))
    assert torch.equal(as_clip(grey[..., 0]).frames, grey.expand(-1, -1, -1, 3))
    clear = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    assert as_clip(clear).frames.unique().tolist() == [255]


def test_exif_orientation_is_applied(tmp_path):
    frame = noise(6, 9, 3).numpy()
    image = Image.fromarray(np.rot90(frame))  # stored a quarter turn counter-clockwise
    exif = image.getexif()
    exif[0x0112] = 6  # show it turned clockwise
    image.save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(as_clip(tmp_path / "a.png").frames[0].numpy(), frame)


def test_animated_gif_carries_its_durations():
    frames = [Image.new("RGB", (6, 6), c) for c in ("red", "blue", "lime", "white")]
    held = io.BytesIO()
    frames[0].save(
        held, format="GIF", save_all=True, append_images=frames[1:], duration=[100, 40, 300, 100]
    )
    clip = as_clip(held.getvalue())
    assert clip.times.tolist() == pytest.approx([0, 0.1, 0.14, 0.44])
    assert [tuple(f[3, 3].tolist()) for f in clip.frames] == [
        (255, 0, 0),
        (0, 0, 255),
        (0, 255, 0),
        (255, 255, 255),
    ]


def test_bad_frames_are_refused():
    with pytest.raises(ValueError, match=r"from -1 to 1; allowed is \[0, 1\]"):
        as_clip(torch.tensor([-1.0, 1.0]).reshape(1, 1, 2, 1))
    with pytest.raises(ValueError, match="nan"):
        as_clip(torch.full((1, 2, 2, 3), float("nan")))
    with pytest.raises(TypeError, match="int32"):
        as_clip(np.zeros((2, 4, 4, 3), np.int32))
    with pytest.raises(ValueError, match="shape"):
        as_clip(np.zeros((2, 5, 4, 7), np.uint8))
    with pytest.raises(ValueError, match="differ in size"):
        as_clip([np.zeros((4, 4, 3), np.uint8), np.zeros((4, 5, 3), np.uint8)])
    with pytest.raises(ValueError, match="empty list"):
        as_clip([])
    with pytest.raises(TypeError, match="dict"):
        as_clip({})


def test_a_folder_of_unequal_images_names_the_file(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    Image.new("RGB", (5, 4)).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match="b.png: 4x5"):
        as_clip(tmp_path)
