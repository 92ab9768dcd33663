"""Views of clips for a test: which frames, which cuts, the same from files and from packed clips."""

from pathlib import Path

import pytest
import torch

from stvision.datasets.clips import ClipFolder
from stvision.datasets.packed import PackedFolder, pack
from stvision.datasets.records import Skipped
from stvision.datasets.views import ViewDataset, spatial_crops
from stvision.io import Clip, save_clip
from stvision.io.sampling import segment_indices, uniform_indices, view_indices


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips of 20 frames whose grey value is four times the frame's number, and a broken one."""
    root = tmp_path_factory.mktemp("clips")
    for name in ("a", "b"):
        values = torch.arange(20, dtype=torch.uint8)[:, None, None, None] * 8
        frames = values.expand(20, 24, 48, 3).contiguous()
        save_clip(Clip.from_frames(frames, fps=10), root / f"{name}.mp4")
    (root / "c.mp4").write_bytes(b"no video")
    lines = "".join(f'{{"path": "{n}.mp4", "caption": "{n}", "label": "{n}"}}\n' for n in "abc")
    (root / "index.jsonl").write_text(lines)
    return root


def numbers(frames: torch.Tensor) -> list[int]:
    return (frames.float().mean((-3, -2, -1)) / 8).round().long().tolist()


def test_views_of_all_time_lie_between_each_other() -> None:
    times = torch.arange(100, dtype=torch.float64) / 25
    assert view_indices(times, 8, 0, 1) == uniform_indices(times, 8)
    views = torch.tensor([view_indices(times, 8, k, 3) for k in range(3)])
    order = views.T.flatten()  # first frames of all views, then second ones
    assert (order.diff() > 0).all()
    # part i of view k is at (i + (k + 1/2) / 3) / 8 of the time from the first to the last frame
    wanted = (torch.arange(24) + 0.5) / 24 * 99
    assert (order - wanted).abs().max() <= 0.5
    short = torch.tensor([0.0, 0.01, 0.02, 5.0], dtype=torch.float64)
    assert view_indices(short, 4, 0, 2) == [0, 1, 2, 3]  # never the same frame twice
    with pytest.raises(ValueError, match="the clip has 4 frames"):
        view_indices(short, 5, 0, 2)
    with pytest.raises(ValueError, match="view 2 of 2"):
        view_indices(short, 2, 2, 2)


def test_segments_draw_one_frame_of_each_part(folder: Path) -> None:
    data = ClipFolder(folder, num_frames=5, sampling="segments")
    drawn = torch.tensor([numbers(data[0, seed].frames) for seed in range(60)])
    parts = torch.tensor(range(5)) * 3.8  # fifths of the time from frame 0 to frame 19
    assert (drawn >= parts - 0.5).all() and (drawn <= parts + 3.8 + 0.5).all()
    assert all(len(column.unique()) >= 4 for column in drawn.T)
    assert (drawn.diff(dim=1) > 0).all()
    assert numbers(data[0, 3].frames) == drawn[3].tolist()
    assert numbers(data.temporal_view(0, 1)[0].frames) == [0, 5, 9, 14, 19]
    # a rate that varies: where two parts fall on one frame, parts of frames instead
    uneven = torch.tensor([0.0, 0.01, 0.02, 0.03, 5.0, 5.01], dtype=torch.float64)
    for place, wanted in ((0.0, [0, 3, 4]), (0.5, [1, 3, 5]), (1.0, [3, 4, 5])):
        assert segment_indices(uneven, torch.full((3,), place, dtype=torch.float64)) == wanted
    with pytest.raises(ValueError, match="num_frames is 7; the clip has 6 frames"):
        segment_indices(uneven, torch.zeros(7))


def test_views_of_stretches_reach_from_the_beginning_to_the_end(folder: Path) -> None:
    data = ClipFolder(folder, num_frames=4, sampling="random")
    found = [numbers(data.temporal_view(k, 3)[0].frames) for k in range(3)]
    assert found == [[0, 1, 2, 3], [8, 9, 10, 11], [16, 17, 18, 19]]
    middle = data.temporal_view(0, 1)
    assert all(numbers(middle[0].frames) == [8, 9, 10, 11] for _ in range(3))  # nothing is drawn
    assert (
        middle.fingerprint()
        != data.fingerprint()
        == ClipFolder(folder, num_frames=4, sampling="random").fingerprint()
    )
    with pytest.raises(ValueError, match="views need num_frames"):
        ClipFolder(folder).temporal_view(0, 1)


def test_cuts_lie_along_the_longer_side() -> None:
    columns = torch.arange(48, dtype=torch.uint8).expand(2, 24, 48)[..., None].repeat(1, 1, 1, 3)
    left, middle, right = spatial_crops(columns, (24, 24), 3)
    for cut, first in ((left, 0), (middle, 12), (right, 24)):
        assert torch.equal(cut, columns[:, :, first : first + 24])
    tall = columns.transpose(1, 2)
    assert torch.equal(spatial_crops(tall, (24, 24), 3)[2], tall[:, 24:])
    assert torch.equal(spatial_crops(columns, (24, 24))[0], middle)
    # scaled until the shorter side fits
    small = spatial_crops(columns, (12, 12), 3)
    whole = Clip(columns, torch.arange(2.0)).resize(12, 24).frames
    assert torch.equal(small[2], whole[:, :, 12:])
    with pytest.raises(ValueError, match="crops must be 1 or 3, got 2"):
        spatial_crops(columns, (24, 24), 2)


def test_all_views_of_a_clip_and_what_cannot_be_read(folder: Path, tmp_path: Path) -> None:
    data = ClipFolder(folder, num_frames=4, size=(16, 16))
    views = ViewDataset(data, (24, 20), clips=2, crops=3)
    index, frames = views[1]
    assert index == 1 and frames.shape == (6, 4, 24, 20, 3)
    for k in range(2):
        wanted = data.temporal_view(k, 2)
        wanted.size = None
        assert torch.equal(frames[3 * k : 3 * k + 3], spatial_crops(wanted[1].frames, (24, 20), 3))
    assert views[2] == Skipped("c.mp4", "broken")
    assert data.size == (16, 16) and data.view is None
    pack(ClipFolder(folder, num_frames=10, size=(24, 48)), tmp_path / "packed", progress=False)
    packed = PackedFolder(tmp_path / "packed", num_frames=4)
    _, stored = ViewDataset(packed, (24, 48), clips=2)[0]
    times = torch.tensor(packed.entries[0]["times"])
    rows = [view_indices(times, 4, k, 2) for k in range(2)]
    assert torch.equal(stored, torch.tensor(packed.frames[0])[torch.tensor(rows)])
    assert packed.temporal_view(1, 2).fingerprint() != packed.fingerprint()
    for options, message in (
        ({"clips": 0}, "clips must be at least 1"),
        ({"crops": 2}, "crops must be 1 or 3"),
    ):
        with pytest.raises(ValueError, match=message):
            ViewDataset(data, (24, 24), **options)
