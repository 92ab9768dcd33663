"""ClipFolder, packing and batching on clips whose frames say which frame they are."""

import json
from pathlib import Path

import pytest
import torch

from stvision.datasets.batching import BucketBatchSampler, collate, make_loader, nearest_bucket
from stvision.datasets.clips import ClipError, ClipFolder
from stvision.datasets.packed import PackedFolder, pack
from stvision.datasets.records import Skipped
from stvision.io import Clip, VideoWriter


def write_counted(path: Path, frames: int, *, height: int = 32, width: int = 48, fps: float = 10.0):
    """A video whose frame t is grey of value 8 * t."""
    grey = torch.arange(frames, dtype=torch.uint8) * 8
    block = grey[:, None, None, None].expand(frames, height, width, 3).contiguous()
    with VideoWriter(path, lossless=True, threads=1) as writer:
        writer.write(Clip.from_frames(block, fps))


def shown(record) -> list[int]:
    """Which frames of the video a record holds."""
    return (record.frames[:, 0, 0, 0].int() // 8).tolist()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_counted(tmp_path / "a.mp4", 16)
    write_counted(tmp_path / "b.mp4", 20, fps=7.3)
    write_counted(tmp_path / "short.mp4", 3)
    (tmp_path / "broken.mp4").write_bytes(b"no video at all")
    lines = [
        {"path": "a.mp4", "caption": "open it", "captions": ["open it", " pull  it "], "seed": 1},
        {"path": "b.mp4", "caption": "close it", "split": "val", "task": "close"},
        {"path": "short.mp4", "caption": "too little"},
        {"path": "broken.mp4", "caption": "nothing there"},
        {"path": "absent.mp4", "caption": "not there"},
        {"path": "a.mp4", "caption": "   "},
    ]
    text = "\n".join(json.dumps(line) for line in lines)
    (tmp_path / "index.jsonl").write_text(text + "\n")
    return tmp_path


def test_index_problems_are_counted_in_one_line(folder: Path, caplog) -> None:
    data = ClipFolder(folder, num_frames=8)
    assert [entry.key for entry in data.entries] == ["a.mp4", "b.mp4", "short.mp4", "broken.mp4"]
    assert dict(data.tally.reasons) == {"without a sentence": 1, "missing": 1}
    assert len(caplog.records) == 1 and "2 left out" in caplog.text


def test_reading_counts_broken_and_short(folder: Path) -> None:
    data = ClipFolder(folder, num_frames=8)
    with pytest.raises(ClipError, match="short.mp4: 3 frames, 8 are asked for"):
        data[2]
    kept = [record.key for record in data.iter_records()]
    assert kept == ["a.mp4", "b.mp4"]
    assert dict(data.last_tally.reasons) == {"too short": 1, "broken": 1}
    skipping = ClipFolder(folder, num_frames=8, on_error="skip")
    assert skipping[3] == Skipped("broken.mp4", "broken")


def test_uniform_window_and_rate(folder: Path) -> None:
    uniform = ClipFolder(folder, num_frames=6)[0]
    assert shown(uniform) == [0, 3, 6, 9, 12, 15]
    torch.testing.assert_close(uniform.times, torch.tensor(shown(uniform)).double() / 10)
    assert shown(ClipFolder(folder, num_frames=4, sampling="center")[0]) == [6, 7, 8, 9]
    assert shown(ClipFolder(folder, num_frames=3, fps=5, sampling="center")[0]) == [4, 6, 8]
    data = ClipFolder(folder, num_frames=4, sampling="random")
    starts = {shown(data[0, seed])[0] for seed in range(40)}
    assert len(starts) > 6 and shown(data[0, 3]) == shown(data[0, 3])


def test_splits_where_sentences_and_size(folder: Path) -> None:
    assert [e.key for e in ClipFolder(folder, split="validation").entries] == ["b.mp4"]
    assert [e.key for e in ClipFolder(folder, where={"seed": "1"}).entries] == ["a.mp4"]
    data = ClipFolder(folder, num_frames=4, size=(16, 16), caption="random")
    assert data[0].frames.shape == (4, 16, 16, 3)
    assert {data[0, seed].text for seed in range(20)} == {"open it", "pull it"}
    assert ClipFolder(folder, num_frames=4)[1].meta["fps"] == pytest.approx(3 * 7.3 / 19, rel=1e-3)


def test_csv_and_names_as_sentences(tmp_path: Path) -> None:
    write_counted(tmp_path / "open_drawer" / "open-the_box.mp4", 4)
    (tmp_path / "list.csv").write_text(
        'path,text\nopen_drawer/open-the_box.mp4,"lift, then turn"\n'
    )
    assert ClipFolder(tmp_path, index="list.csv")[0].text == "lift, then turn"
    assert ClipFolder(tmp_path, index="stem")[0].text == "open the box"
    assert ClipFolder(tmp_path, index="folder")[0].text == "open drawer"
    with pytest.raises(FileNotFoundError, match="index='stem'"):
        ClipFolder(tmp_path)


def test_packing_resumes_and_equals_the_folder(folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("stvision.datasets.packed._BLOCK", 1)
    data = ClipFolder(folder, num_frames=8, size=(32, 32))
    out = tmp_path / "packed"

    real = type(data)._record

    def dies_at_second(self, entry, generator):
        if entry.key == "b.mp4":
            raise KeyboardInterrupt
        return real(self, entry, generator)

    monkeypatch.setattr(type(data), "_record", dies_at_second)
    with pytest.raises(KeyboardInterrupt):
        pack(data, out, progress=False)
    with pytest.raises(FileNotFoundError, match="finished"):
        PackedFolder(out)

    read = []

    def counted(self, entry, generator):
        read.append(entry.key)
        return real(self, entry, generator)

    monkeypatch.setattr(type(data), "_record", counted)
    tally = pack(data, out, progress=False)
    assert "a.mp4" not in read and tally.kept == 2 and tally.skipped == 2
    packed = PackedFolder(out, num_frames=5)
    direct = ClipFolder(folder, num_frames=5, size=(32, 32))
    for index in range(2):
        assert packed[index].key == direct[index].key and packed[index].text == direct[index].text
    whole = PackedFolder(out)
    assert torch.equal(whole[0].frames, data[0].frames)
    assert torch.equal(whole[1].times, data[1].times)
    assert [entry["key"] for entry in PackedFolder(out, split="val").entries] == ["b.mp4"]


def test_collate_refuses_unequal_and_counts_skipped(folder: Path) -> None:
    data = ClipFolder(folder, num_frames=8, on_error="skip")
    batch = collate([data[index] for index in range(4)])
    assert batch["frames"].shape == (2, 8, 32, 48, 3)
    assert [skip.reason for skip in batch["skipped"]] == ["too short", "broken"]
    other = ClipFolder(folder, num_frames=5)[0]
    with pytest.raises(ValueError, match="unequal clips"):
        collate([data[0], other])


SHAPES = [(8, 32, 32)] * 11 + [(16, 32, 32)] * 6 + [(8, 64, 32)] * 3


@pytest.mark.parametrize("leftover", ["drop", "pad", "keep"])
@pytest.mark.parametrize("world", [1, 3])
def test_buckets_never_mix_and_ranks_agree(leftover: str, world: int) -> None:
    samplers = [
        BucketBatchSampler(SHAPES, 2, leftover=leftover, rank=rank, world_size=world, seed=4)
        for rank in range(world)
    ]
    epochs = [[list(sampler) for sampler in samplers] for _ in range(2)]
    assert epochs[0] != epochs[1]
    for ranks in epochs:
        assert len({len(batches) for batches in ranks}) == 1
        batches = [batch for batches in ranks for batch in batches]
        assert all(len({SHAPES[i] for i in batch}) == 1 for batch in batches)
        seen = [i for batch in batches for i in batch]
        if leftover == "drop":
            assert len(seen) == len(set(seen))
            assert all(len(batch) == 2 for batch in batches)
        else:
            assert set(seen) == set(range(len(SHAPES)))
            assert leftover == "keep" or all(len(batch) == 2 for batch in batches)


def test_sampler_resumes_exactly() -> None:
    whole = BucketBatchSampler(SHAPES, 2, seed=1)
    expected = [*whole, *whole]
    first = BucketBatchSampler(SHAPES, 2, seed=1)
    steps = iter(first)
    head = [next(steps) for _ in range(4)]
    state = first.state_dict()
    second = BucketBatchSampler(SHAPES, 2, seed=1)
    second.load_state_dict(state)
    assert head + list(second) + list(second) == expected
    with pytest.raises(ValueError, match="seed"):
        BucketBatchSampler(SHAPES, 2, seed=2).load_state_dict(state)


def test_bucket_choice_and_loader(folder: Path) -> None:
    buckets = [(8, 64, 64), (16, 64, 64), (16, 32, 96)]
    assert nearest_bucket(20, 60, 60, buckets) == (16, 64, 64)
    assert nearest_bucket(20, 30, 100, buckets) == (16, 32, 96)
    assert nearest_bucket(9, 30, 100, buckets) == (8, 64, 64)
    assert nearest_bucket(4, 30, 100, buckets) is None
    data = ClipFolder(folder, num_frames=3)
    sampler = BucketBatchSampler([(3, 32, 48)] * 2, 2, shuffle=False)
    (batch,) = list(make_loader(data, sampler))
    assert batch["text"] == ["open it", "close it"]
