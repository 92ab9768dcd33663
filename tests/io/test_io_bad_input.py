"""Bad input: one sentence that names the file."""

import warnings

import av
import numpy as np
import pytest

from stvision.io import as_clip, open_video, read_clip


def refuse(path, backend, kind=ValueError):
    with pytest.raises(kind) as caught:
        open_video(path, backend)
    sentence = str(caught.value)
    assert str(path) in sentence and "\n" not in sentence
    return sentence


def test_missing(tmp_path, backend):
    refuse(tmp_path / "none.mp4", backend, FileNotFoundError)


def test_empty(tmp_path, backend):
    path = tmp_path / "empty.mp4"
    path.touch()
    assert "empty" in refuse(path, backend)
    with pytest.raises(ValueError, match="empty bytes"):
        open_video(b"", backend)


def test_text_with_a_video_name(tmp_path, backend):
    path = tmp_path / "text.mp4"
    path.write_text("this is no video\n" * 50)
    assert "not a video" in refuse(path, backend)


def test_audio_only(tmp_path, backend, tools):
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        tools.add_tone(container, 0.5)
    assert "only sound" in refuse(path, backend)


def test_zero_frames(tmp_path, backend):
    path = tmp_path / "none.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width = stream.height = 16
        stream.pix_fmt = "yuv420p"
        container.start_encoding()
    assert "no frames" in refuse(path, backend)


def test_cut_before_its_index(tmp_path, backend, tools):
    path = tools.encode(tmp_path / "cut.mp4")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert "cut off" in refuse(path, backend)


def test_unknown_codec(tmp_path, backend, tools):
    path = tools.encode(tmp_path / "codec.mp4", count=3)
    path.write_bytes(path.read_bytes().replace(b"avc1", b"zzzz"))
    assert "codec" in refuse(path, backend)


def cut_file(tools, path, part, **options):
    """The first ``part`` of a file whose index lies at its head, and its sequential decode."""
    whole = tools.encode(path, count=40, g="10", bf="2", **options)
    if path.suffix == ".mp4":
        whole = tools.faststart(whole, path.with_stem("head"))
    frames, times = tools.sequential(whole)
    data = whole.read_bytes()
    whole.write_bytes(data[: int(len(data) * part)])
    return whole, frames, times


@pytest.mark.parametrize("part", [0.6, 0.77, 0.9])
@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi"])
@pytest.mark.parametrize("threads", [1, 3])
def test_truncated_gives_what_decodes_and_one_warning(tmp_path, tools, suffix, part, threads):
    clock = 25 if suffix == "avi" else 1000
    height = 160  # large enough for decoding threads
    path, frames, times = cut_file(
        tools, tmp_path / f"t.{suffix}", part, clock=clock, height=height, width=160
    )
    with pytest.warns(UserWarning) as caught:
        clip = read_clip(path, threads=threads)
    assert len(caught) == 1, [str(w.message) for w in caught]
    sentence = str(caught[0].message)
    announced = "" if suffix == "mkv" else " of 40"
    assert f"{path.name}: the file is truncated" in sentence
    assert f" {len(clip)}{announced} frames" in sentence
    assert 0 < len(clip) < 40
    if suffix != "avi":  # whose times are lost with its index
        for row, time in enumerate(clip.times.tolist()):
            index = int(np.abs(np.array(times) - time).argmin())
            assert time == pytest.approx(times[index], abs=1e-3)
            if row < len(clip) - 3:  # in Matroska the last packet may be cut
                assert np.array_equal(clip.frames[row].numpy(), frames[index])


@pytest.mark.parametrize("threads", [1, 3])
def test_truncated_keeps_every_whole_packet(tmp_path, tools, threads):
    """All packets before the cut are whole, so all their frames are there, reordered or not."""
    path, frames, times = cut_file(tools, tmp_path / "t.mp4", 0.7, height=160, width=160)
    with av.open(str(path)) as container:
        whole = sorted(
            float(p.pts * p.time_base)
            for p in container.demux(video=0)
            if p.size and not p.is_corrupt
        )
    with pytest.warns(UserWarning, match=f" {len(whole)} of 40 frames can be read"):
        reader = open_video(path, threads=threads)
    with reader, warnings.catch_warnings():
        warnings.simplefilter("error")  # told once
        assert len(reader) == len(whole)
        clip = reader.get(slice(None))
        assert clip.times.tolist() == pytest.approx(whole)
        for row, time in enumerate(clip.times.tolist()):
            index = int(np.abs(np.array(times) - time).argmin())
            assert np.array_equal(clip.frames[row].numpy(), frames[index])
        assert sum(len(c) for c in reader.iter_clips(5)) == len(whole)


def test_a_cut_transport_stream_is_read_to_its_end(tmp_path, tools):
    """It announces no length: what is left is all there is."""
    path, frames, _ = cut_file(tools, tmp_path / "t.ts", 0.6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clip = read_clip(path)
    assert 5 < len(clip) < 40
    assert np.array_equal(clip.frames[:-3].numpy(), frames[: len(clip) - 3])


@pytest.mark.parametrize("backend", ["torchcodec"], indirect=True)
def test_truncated_in_torchcodec_warns_once_with_the_number_read(tmp_path, tools, backend):
    path, frames, times = cut_file(tools, tmp_path / "t.mp4", 0.7)
    with pytest.warns(UserWarning) as caught:
        clip = read_clip(path, backend=backend)
    assert len(caught) == 1 and f" {len(clip)} of 40 frames" in str(caught[0].message)
    for row, time in enumerate(clip.times.tolist()):
        index = int(np.abs(np.array(times) - time).argmin())
        assert np.abs(clip.frames[row].numpy().astype(int) - frames[index]).mean() < 1.5


def test_truncated_is_refused_by_decord(tmp_path, tools):
    pytest.importorskip("decord")
    path = tools.faststart(tools.encode(tmp_path / "t.mp4"), tmp_path / "f.mp4")
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    sentence = refuse(path, "decord")
    assert "truncated" in sentence and "pyav" in sentence


def test_folder_without_images(tmp_path, backend):
    (tmp_path / "notes.txt").write_text("x")
    assert "no images" in refuse(tmp_path, backend)


def test_broken_image(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    with pytest.raises(ValueError, match="a.png"):
        as_clip(path)


def test_unknown_backend_and_type(tmp_path):
    with pytest.raises(ValueError, match="'opencv'; allowed are pyav, torchcodec, decord"):
        open_video(tmp_path / "x.mp4", "opencv")
    with pytest.raises(TypeError, match="int"):
        open_video(3)
