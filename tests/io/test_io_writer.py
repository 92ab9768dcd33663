"""Writers: colours, times, sizes and sound survive; nothing half-written stays."""

import warnings

import av
import numpy as np
import pytest
import torch
from PIL import Image

from stvision.io import (
    AudioTrack,
    Clip,
    VideoWriter,
    as_clip,
    open_video,
    read_clip,
    save_clip,
    write_frames,
    write_gif,
    write_strip,
    write_video,
)

COLORS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (12, 200, 180), (128, 128, 128)]


def flat(height: int = 32, width: int = 48) -> Clip:
    frames = torch.tensor(COLORS, dtype=torch.uint8)[:, None, None].expand(-1, height, width, 3)
    return Clip.from_frames(frames.contiguous(), fps=6)


@pytest.mark.parametrize(("suffix", "codec"), [("mp4", None), ("webm", None), ("mkv", "hevc")])
def test_colours_do_not_shift(tmp_path, suffix, codec):
    path = write_video(flat(64, 96), tmp_path / f"c.{suffix}", codec=codec, crf=4)
    got = read_clip(path).frames.float().mean((1, 2))
    assert (got - torch.tensor(COLORS).float()).abs().max() <= 3  # BT.601 would be 20 off in green
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert stream.codec_context.colorspace == 1 and stream.codec_context.color_range == 1
        if suffix != "webm":
            assert stream.codec_context.color_primaries == stream.codec_context.color_trc == 1


def test_mp4_begins_with_its_index(tmp_path):
    data = write_video(flat(), tmp_path / "c.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


@pytest.mark.parametrize("fps", [0.5, 2, 7.3, 23.976, 29.97, 60])
def test_constant_rates_stay_what_they_are(tmp_path, fps):
    frames = torch.randint(0, 256, (9, 16, 16, 3), dtype=torch.uint8)
    path = write_video(Clip.from_frames(frames, fps), tmp_path / "c.mp4")
    clip = read_clip(path)
    assert clip.times.tolist() == pytest.approx(
        [i / fps for i in range(9)], abs=1e-5 + 1e-5 * 9 / fps
    )
    with VideoWriter(tmp_path / "d.mp4", fps=fps) as writer:
        writer.write(frames[:4])
        writer.write(frames[4:].float() / 255)
    times = read_clip(tmp_path / "d.mp4").times
    assert times.tolist() == pytest.approx([i / fps for i in range(9)], rel=2e-5)


def test_uneven_times_are_kept_and_the_last_frame_lasts(tmp_path):
    times = torch.tensor([3.0, 3.04, 3.5, 3.51, 4.25], dtype=torch.float64)
    path = write_video(Clip(flat().frames[:5], times, 4.0), tmp_path / "v.mp4")
    assert torch.allclose(read_clip(path).times, times - 3.0, atol=1e-5)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        # The container counts in decoding order, so the last frame's share is not exact.
        assert 1.25 + 0.1 < float(stream.duration * stream.time_base) < 2.1


def test_odd_sizes_are_padded_and_said(tmp_path):
    with pytest.warns(UserWarning, match="33x47 pixels padded to 34x48"):
        path = write_video(flat(33, 47), tmp_path / "o.mp4", crf=4)
    clip = read_clip(path)
    assert clip.frames.shape[1:3] == (34, 48)
    error = (clip.frames.float() - torch.tensor(COLORS)[:, None, None].float()).abs()
    assert error.max() <= 8  # padding repeats the edge: no dark line
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_video(flat(32, 48), tmp_path / "e.mp4")


def test_lossless_keeps_every_value(tmp_path):
    frames = torch.randint(0, 256, (5, 17, 23, 3), dtype=torch.uint8)
    path = write_video(Clip.from_frames(frames), tmp_path / "l.mkv", lossless=True)
    assert torch.equal(read_clip(path).frames, frames)


def test_sound_is_copied_and_cut_to_the_clip(tmp_path, tools):
    source = tools.with_sound(tmp_path / "s.mp4", seconds=2.0)
    clip = read_clip(source, start=0.5, end=1.5)
    path = write_video(clip, tmp_path / "out.mp4", audio=True)

    def sound(file):
        with av.open(str(file)) as container:
            stream = container.streams.audio[0]
            return [
                (float(p.pts * p.time_base), bytes(p)) for p in container.demux(stream) if p.size
            ]

    original = {data: time for time, data in sound(source)}
    copied = sound(path)
    assert 0.85 < copied[-1][0] - copied[0][0] <= 1.0
    zero = float(clip.times[0])
    for time, data in copied:  # the same packets, earlier by the start of the first frame
        assert original[data] - time == pytest.approx(zero, abs=1e-3)
    with av.open(str(path)) as container:
        assert {s.type for s in container.streams} == {"audio", "video"}
    with pytest.raises(ValueError, match="no sound"):
        write_video(flat(), tmp_path / "n.mp4", audio=True)
    with pytest.raises(ValueError, match="cannot hold the aac sound"):
        write_video(clip, tmp_path / "n.webm", audio=AudioTrack(source))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.mp4", "s.mp4"]


def test_an_error_leaves_nothing_and_keeps_the_old_file(tmp_path):
    path = tmp_path / "v.mp4"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), VideoWriter(path, fps=5) as writer:
        writer.write(flat())
        raise RuntimeError
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    with VideoWriter(path, fps=5) as writer:
        writer.write(flat())
        assert path.read_bytes() == b"old"
    assert len(read_clip(path)) == len(COLORS) and list(tmp_path.iterdir()) == [path]


def test_bad_requests_are_one_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"suffix '.txt'"):
        VideoWriter(tmp_path / "a.txt", fps=5)
    with pytest.raises(ValueError, match="codec is 'nope'"):
        VideoWriter(tmp_path / "a.mp4", fps=5, codec="nope")
    with pytest.raises(ValueError, match="fps is -1"):
        VideoWriter(tmp_path / "a.mp4", fps=-1)
    with pytest.raises(ValueError, match="no frames were written"), VideoWriter(tmp_path / "a.mp4"):
        pass
    with pytest.raises(ValueError, match="times must ascend"), VideoWriter(tmp_path / "a.mp4") as w:
        w.write(flat().frames, times=[0, 1, 2, 2, 3, 4])
    with pytest.raises(ValueError, match="32x48"), VideoWriter(tmp_path / "a.mp4", fps=3) as w:
        w.write(flat())
        w.write(flat(16, 16))
    with pytest.raises(ValueError, match="need VideoWriter"), VideoWriter(tmp_path / "a.mp4") as w:
        w.write(flat().frames)
    assert not list(tmp_path.iterdir())


def test_gif_keeps_times_and_still_parts_still(tmp_path):
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (1, 20, 20, 3), dtype=torch.uint8, generator=generator).repeat(
        6, 1, 1, 1
    )
    for i in range(6):
        frames[i, :4, 3 * i : 3 * i + 4] = torch.tensor([255, 0, 0], dtype=torch.uint8)
    times = torch.tensor([0, 0.1, 0.133, 0.2, 0.5, 0.6], dtype=torch.float64)
    path = write_gif(Clip(frames, times, 5.0), tmp_path / "a.gif", colors=64)
    got = as_clip(path)
    assert torch.allclose(got.times, times, atol=0.0051)
    assert torch.equal(got.frames[0, 8:], got.frames[5, 8:])
    error = (got.frames.float() - frames.float()).abs().mean()
    assert error < 40  # 64 colours for noise; another frame's square would not show here
    assert (got.frames[:, 1, :].float()[..., 0] - frames[:, 1, :].float()[..., 0]).abs().mean() < 40


def test_frames_folder_is_lossless_and_reads_back_in_order(tmp_path):
    frames = torch.randint(0, 256, (12, 6, 7, 3), dtype=torch.uint8)
    paths = write_frames(Clip.from_frames(frames), tmp_path / "f", pattern="x{}.png")
    assert [p.name for p in paths] == [f"x{i}.png" for i in range(12)]
    assert torch.equal(as_clip(tmp_path / "f").frames, frames)  # x2 before x10
    with pytest.raises(ValueError, match="pattern"):
        write_frames(Clip.from_frames(frames), tmp_path / "g", pattern="x.png")
    assert list(tmp_path.iterdir()) == [tmp_path / "f"]


def test_strip_lays_rows_of_frames_side_by_side(tmp_path):
    clip = flat(10, 12)
    path = write_strip([clip, clip[:3]], tmp_path / "s.png", gap=2)
    image = np.asarray(Image.open(path))
    assert image.shape == (2 * 12 + 2, 6 * 14 + 2, 3)
    for column, color in enumerate(COLORS):
        assert tuple(image[2 + 5, 2 + 14 * column + 6]) == color
        second = tuple(image[14 + 5, 2 + 14 * column + 6])
        assert second == (color if column < 3 else (255, 255, 255))
    labelled = Image.open(write_strip([clip], tmp_path / "l.png", labels=["truth"], times=True))
    assert labelled.width > image.shape[1] + 20 and labelled.height > 14
    with pytest.raises(ValueError, match="1 labels for 2 rows"):
        write_strip([clip, clip], tmp_path / "x.png", labels=["a"])


def test_save_clip_chooses_by_suffix(tmp_path):
    for name in ("a.mp4", "a.gif", "a.png", "folder"):
        assert save_clip(flat(), tmp_path / name) == tmp_path / name
        assert (tmp_path / name).exists()
    with open_video(tmp_path / "a.mp4") as reader:
        assert len(reader) == len(COLORS)
    with pytest.raises(ValueError, match=r"'.doc'"):
        save_clip(flat(), tmp_path / "a.doc")
