"""Bad input: one sentence that names the file."""

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


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_truncated_gives_what_decodes_and_a_warning(tmp_path, tools, suffix):
    path = tools.encode(tmp_path / f"t.{suffix}", count=40, g="10", bf="2", movflags="")
    if suffix == "mp4":
        path = tools.faststart(path, tmp_path / "f.mp4")
    frames, _ = tools.sequential(path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 6 // 10])
    if suffix == "ts":  # a transport stream announces no length: what is left is all there is
        clip = read_clip(path)
    else:
        with pytest.warns(UserWarning, match=rf"{path.name}: .*truncated.* \d+.* frames") as caught:
            clip = read_clip(path)
        assert f" {len(clip)} " in str(caught[0].message) + str(caught[-1].message)
    assert 5 < len(clip) < 40
    for row in range(len(clip) - 1):
        index = round(float(clip.times[row] - clip.times[0]) * 25)
        assert np.abs(clip.frames[row].numpy().astype(int) - frames[index]).mean() < 3


def test_truncated_is_refused_by_decord(tmp_path, tools):
    pytest.importorskip("decord")
    path = tools.faststart(tools.encode(tmp_path / "t.mp4"), tmp_path / "f.mp4")
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    with pytest.warns(UserWarning, match="truncated"):
        assert "pyav" in refuse(path, "decord")


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
