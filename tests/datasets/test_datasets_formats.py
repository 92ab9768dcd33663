"""Readers of published sets, on small fixtures in exactly their formats."""

import csv
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stvision.datasets.bridge import BridgeData
from stvision.datasets.epic_kitchens import EpicKitchens
from stvision.datasets.records import ClipError
from stvision.datasets.something_something import SomethingSomething
from stvision.io import Clip, VideoWriter
from stvision.train.buckets import open_parts
from stvision.train.data import DataConfig


def grey(value: int, height: int = 24, width: int = 32) -> Image.Image:
    return Image.fromarray(np.full((height, width, 3), value, np.uint8))


@pytest.fixture
def ssv2(tmp_path: Path) -> Path:
    videos = tmp_path / "20bn-something-something-v2"
    for number in (78687, 42326):
        frames = torch.full((14, 32, 48, 3), 90, dtype=torch.uint8)
        videos.mkdir(exist_ok=True)
        with VideoWriter(videos / f"{number}.webm", codec="vp9", threads=1) as writer:
            writer.write(Clip.from_frames(frames, 12.0))
    labels = tmp_path / "labels"
    labels.mkdir()
    rows = [
        {
            "id": "78687",
            "label": "holding potato next to vicks vaporub bottle",
            "template": "Holding [something] next to [something]",
            "placeholders": ["potato", "vicks vaporub bottle"],
        },
        {
            "id": "1",
            "label": "moving a cup",
            "template": "Moving [something]",
            "placeholders": ["a cup"],
        },
    ]
    (labels / "train.json").write_text(json.dumps(rows))
    (labels / "validation.json").write_text(json.dumps([{**rows[0], "id": "42326"}]))
    (labels / "test.json").write_text(json.dumps([{"id": "78687"}]))
    (labels / "labels.json").write_text(json.dumps({"Holding something next to something": "41"}))
    return tmp_path


@pytest.mark.parametrize("prefix", ["", "something-something-v2-"])
def test_something_something(ssv2: Path, prefix: str) -> None:
    for file in (ssv2 / "labels").iterdir():
        file.rename(file.with_name(prefix + file.name))
    data = SomethingSomething(ssv2, split="train", num_frames=12, size=(16, 16))
    assert dict(data.tally.reasons) == {"missing": 1}
    record = data[0]
    assert record.text == "holding potato next to vicks vaporub bottle"
    assert record.meta["class_id"] == 41 and record.meta["placeholders"][0] == "potato"
    assert record.meta["label"] == data.class_names[41] == "Holding something next to something"
    assert len(data.class_names) == 42 and len(set(data.class_names)) == 42
    assert record.frames.shape == (12, 16, 16, 3) and record.key == "78687"
    assert [entry.key for entry in SomethingSomething(ssv2, split="val").entries] == ["42326"]
    assert dict(SomethingSomething(ssv2, split="test").tally.reasons) == {"without a sentence": 1}


@pytest.fixture
def bridge(tmp_path: Path) -> Path:
    group = (
        tmp_path / "bridge_data_v2/datacol2_tabletop_dark_wood/many_skills/14"
        "/2023-04-04_11-49-52/raw/traj_group0"
    )
    for number, text in enumerate(
        ["put the sushi on the plate\nconfidence: 0.9\n", "open the drawer", None, "close it\n"]
    ):
        images = group / f"traj{number}" / "images0"
        images.mkdir(parents=True)
        (group / f"traj{number}" / "obs_dict.pkl").write_bytes(b"never opened")
        for step in range(2 if number == 3 else 12):
            grey(step * 20).save(images / f"im_{step}.jpg", quality=95)
        if text is not None:
            (group / f"traj{number}" / "lang.txt").write_text(text)
    return tmp_path


def test_bridge_orders_frames_by_number(bridge: Path) -> None:
    data = BridgeData(bridge, num_frames=12, validation=0.0)
    assert len(data) == 2
    assert dict(data.tally.reasons) == {"without a sentence": 1, "too short": 1}
    first = data[0]
    assert first.text == "put the sushi on the plate" and first.meta["confidence"] == 0.9
    values = first.frames.float().mean((1, 2, 3))
    # im_10.jpg follows im_9.jpg, although its name sorts before im_2.jpg
    torch.testing.assert_close(values, torch.arange(12.0) * 20, atol=2, rtol=0)
    torch.testing.assert_close(first.times, torch.arange(12).double() / 5)


def test_bridge_splits_and_refuses_rlds(bridge: Path, tmp_path: Path) -> None:
    parts = [BridgeData(bridge, split=s, validation=0.5).entries for s in ("train", "val")]
    keys = [{entry.key for entry in part} for part in parts]
    assert not keys[0] & keys[1] and len(keys[0] | keys[1]) == 3
    export = tmp_path / "rlds"
    export.mkdir()
    (export / "bridge_dataset-train.tfrecord-00000-of-01024").write_bytes(b"")
    with pytest.raises(ValueError, match="TensorFlow Datasets"):
        BridgeData(export)


COLUMNS = [
    "narration_id",
    "participant_id",
    "video_id",
    "narration_timestamp",
    "start_timestamp",
    "stop_timestamp",
    "start_frame",
    "stop_frame",
    "narration",
    "verb",
    "verb_class",
    "noun",
    "noun_class",
    "all_nouns",
    "all_noun_classes",
]


def epic_row(name: str, video: str, start: str, stop: str, first: int, last: int, text: str):
    values = [name, "P01", video, "00:00:00.100", start, stop, first, last, text]
    return dict(zip(COLUMNS, [*values, "open", 3, "door", 3, "['door']", "[3]"], strict=True))


@pytest.fixture
def epic(tmp_path: Path) -> Path:
    rows = [
        epic_row("P01_101_0", "P01_101", "00:00:00.20", "00:00:00.60", 11, 30, "open door"),
        epic_row("P01_01_0", "P01_01", "00:00:00.20", "00:00:00.40", 12, 24, "take plate"),
        epic_row("P01_02_0", "P01_02", "00:00:01.00", "00:00:02.00", 60, 120, "close tap"),
        epic_row("P01_09_0", "P01_09", "00:00:01.00", "00:00:02.00", 60, 120, "not there"),
    ]
    annotations = tmp_path / "epic-kitchens-100-annotations"
    annotations.mkdir()
    with (annotations / "EPIC_100_train.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    home = tmp_path / "EPIC-KITCHENS" / "P01"
    frames = home / "rgb_frames" / "P01_101"
    frames.mkdir(parents=True)
    for number in range(1, 41):
        grey(number * 6).save(frames / f"frame_{number:010d}.jpg", quality=95)
    with tarfile.open(home / "rgb_frames" / "P01_01.tar", "w") as archive:
        for number in range(1, 31):
            content = io.BytesIO()
            grey(number * 8).save(content, "JPEG", quality=95)
            member = tarfile.TarInfo(f"./frame_{number:010d}.jpg")
            member.size = content.tell()
            content.seek(0)
            archive.addfile(member, content)
    (home / "videos").mkdir()
    block = (torch.arange(50, dtype=torch.uint8) * 5)[:, None, None, None].expand(50, 32, 32, 3)
    with VideoWriter(home / "videos" / "P01_02.mp4", lossless=True, threads=1) as writer:
        writer.write(Clip.from_frames(block.contiguous(), 20.0))
    (home / "videos" / "P01_02.mp4").rename(home / "videos" / "P01_02.MP4")
    return tmp_path


def test_epic_reads_frames_tars_and_videos(epic: Path) -> None:
    data = EpicKitchens(epic, split="train", num_frames=4)
    assert dict(data.tally.reasons) == {"missing": 1}
    from_folder, from_tar, from_video = (data[index] for index in range(3))
    assert [r.text for r in (from_folder, from_tar, from_video)] == [
        "open door",
        "take plate",
        "close tap",
    ]
    numbers = (from_folder.frames.float().mean((1, 2, 3)) / 6).round().int().tolist()
    assert numbers[0] == 11 and numbers[-1] == 30
    torch.testing.assert_close(from_folder.times, (torch.tensor(numbers).double() - 1) / 50)
    numbers = (from_tar.frames.float().mean((1, 2, 3)) / 8).round().int().tolist()
    assert numbers == [12, 16, 20, 24]
    torch.testing.assert_close(from_tar.times, (torch.tensor(numbers).double() - 1) * 1001 / 60000)
    numbers = (from_video.frames[:, 0, 0, 0].int() // 5).tolist()
    assert numbers[0] == 20 and numbers[-1] == 39
    assert from_video.meta["noun_class"] == 3


def test_epic_shapes_are_known_without_decoding(epic: Path, monkeypatch) -> None:
    data = EpicKitchens(epic, split="train", num_frames=4)
    shapes = [tuple(EpicKitchens(epic)[index].frames.shape[:3]) for index in range(3)]
    monkeypatch.setattr(EpicKitchens, "_decode", lambda *_: pytest.fail("decoded"))
    assert [data.measure(index) for index in range(3)] == shapes
    assert shapes == [(20, 24, 32), (13, 24, 32), (20, 32, 32)]
    (epic / "EPIC-KITCHENS/P01/rgb_frames/P01_101/frame_0000000011.jpg").write_text("no picture")
    with pytest.raises(ClipError, match="P01_101_0"):
        data.measure(0)


def test_epic_fills_buckets_whatever_it_is_stored_as(epic: Path, tmp_path: Path) -> None:
    shapes = ((8, 24, 32), (16, 24, 32), (16, 32, 32))
    data = DataConfig(
        kind="epic", root=str(epic), buckets=shapes, resident=False, workers=0,
        cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    found = {
        (cut.num_frames, cut.height, cut.width): [reader[i].key for i in range(len(reader))]
        for cut, reader in open_parts(data, "train")
    }
    assert found == dict(zip(shapes, [["P01_01_0"], ["P01_101_0"], ["P01_02_0"]], strict=True))


def test_epic_rates_come_from_the_video_list(epic: Path) -> None:
    table = epic / "epic-kitchens-100-annotations" / "EPIC_100_video_info.csv"
    table.write_text("video_id,duration,fps,resolution\nP01_101,10.0,25.0,1920x1080\n")
    record = EpicKitchens(epic, num_frames=4)[0]
    assert record.times[0] == pytest.approx(10 / 25)
