"""COIN in its published layout: one JSON database, a workbook beside it, videos by task."""

import json
import zipfile
from pathlib import Path
from xml.sax.saxutils import escape

import pytest
from support_labelled import facts, shade, shown, tiny_video

from stvision.datasets.coin import COIN
from stvision.train.data import DataConfig, open_reader

TAXONOMY = [
    [("Domains", "Targets"), ("Gadgets", "ReplaceCDDriveWithSSD"), ("Vehicle", "ChangeCarTire")],
    [
        ("Target Id", "Target Label", "Action Id", "Action Label"),
        ("0", "MakeTea", "1", "boil water"),
        ("1", "ChangeCarTire", "2", "remove the tire"),
        ("1", "ChangeCarTire", "3", "put on the tire"),
        ("2", "ReplaceCDDriveWithSSD", "4", "take out the laptop CD drive"),
        ("2", "ReplaceCDDriveWithSSD", "5", "remove the tire"),
    ],
]


def workbook(path: Path) -> None:
    """A workbook as the published one is stored: shared texts, numbers as such."""
    texts = list(dict.fromkeys(cell for sheet in TAXONOMY for row in sheet for cell in row))
    space = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
    with zipfile.ZipFile(path, "w") as archive:
        items = "".join(f"<si><t>{escape(text)}</t></si>" for text in texts)
        archive.writestr("xl/sharedStrings.xml", f'<sst xmlns="{space}">{items}</sst>')
        for number, sheet in enumerate(TAXONOMY, 1):
            rows = ""
            for place, row in enumerate(sheet, 1):
                rows += f'<row r="{place}">'
                for column, cell in zip("ABCD", row, strict=False):
                    kind, value = ("", cell) if cell.isdecimal() else ('t="s"', texts.index(cell))
                    rows += f'<c r="{column}{place}" {kind}><v>{value}</v></c>'
                rows += "</row>"
            archive.writestr(
                f"xl/worksheets/sheet{number}.xml",
                f'<worksheet xmlns="{space}"><sheetData>{rows}</sheetData></worksheet>',
            )


def entry(label: str, number: int, subset: str, start: float, end: float, *steps) -> dict:
    return {
        "duration": 9.0,
        "class": label,
        "video_url": "https://www.youtube.com/embed/x",
        "start": start,
        "annotation": [
            {"id": str(n), "segment": [first, last], "label": text}
            for n, text, first, last in steps
        ],
        "subset": subset,
        "end": end,
        "recipe_type": number,
    }


def database() -> dict[str, dict]:
    drive, tire = ("ReplaceCDDriveWithSSD", 2), ("ChangeCarTire", 1)
    return {
        "LtRSn-ntcLY": entry(
            *drive, "training", 1.0, 4.0,
            (4, "take out the laptop CD drive", 1.0, 2.0),
            (5, "remove the tire", 2.5, 4.0),
        ),
        "-Abcdefghij": entry(
            *tire, "testing", 0.5, 3.0,
            (2, "remove  the tire ", 0.0, 1.5),
            (3, "put on the tire", 2.0, 2.0),
        ),
        "_gone_gone_": entry(*tire, "training", 0.0, 2.0, (2, "remove the tire", 0.0, 1.0)),
        "backwards01": entry(*tire, "training", 3.0, 2.0, (3, "put on the tire", 0.0, 1.0)),
    }  # fmt: skip


@pytest.fixture
def coin(tmp_path: Path) -> Path:
    (tmp_path / "COIN.json").write_text(json.dumps({"database": database()}))
    workbook(tmp_path / "taxonomy.xlsx")
    tiny_video(tmp_path / "videos" / "2" / "LtRSn-ntcLY.mp4", 50, frames=50)
    tiny_video(tmp_path / "videos" / "1" / "-Abcdefghij.mp4", 100, frames=50)
    tiny_video(tmp_path / "videos" / "1" / "backwards01.mp4", 150, frames=50)
    return tmp_path


def test_tasks_in_their_regions(coin: Path) -> None:
    data = COIN(coin)
    assert data.class_names == ("MakeTea", "ChangeCarTire", "ReplaceCDDriveWithSSD")
    assert facts(data, "recipe_type", "domain", "split") == [
        ("LtRSn-ntcLY", 2, 2, "Gadgets", "train")
    ]
    assert dict(data.tally.reasons) == {"missing": 1, "too short": 1}
    assert data.tally.examples == {"missing": "_gone_gone_", "too short": "backwards01"}
    record = data[0]
    assert record.text == "replace CD drive with SSD" and shade(record) == 50
    assert shown(record) == list(range(10, 40)) and record.times[0] == pytest.approx(1.0)
    test = COIN(coin, split="test", num_frames=3)
    assert test.class_names == data.class_names and facts(test) == [("-Abcdefghij", 1)]
    assert shown(test[0]) == [5, 17, 29]
    whole = COIN(coin, region=False)
    assert shown(whole[0]) == list(range(50))
    assert [e.key for e in whole.entries] == ["LtRSn-ntcLY", "backwards01"]


def test_steps_are_pieces_with_classes_of_their_own(coin: Path) -> None:
    data = COIN(coin, level="step")
    assert data.class_names == (
        "boil water",
        "remove the tire (2)",
        "put on the tire",
        "take out the laptop CD drive",
        "remove the tire (5)",
    )
    assert facts(data, "step_id", "task") == [
        ("LtRSn-ntcLY/0", 3, 4, "ReplaceCDDriveWithSSD"),
        ("LtRSn-ntcLY/1", 4, 5, "ReplaceCDDriveWithSSD"),
        ("backwards01/0", 2, 3, "ChangeCarTire"),
    ]
    assert shown(data[0]) == list(range(10, 20)) and shown(data[1]) == list(range(25, 40))
    # words are said as they are, without the number that tells classes apart
    assert data[1].text == "remove the tire"
    test = COIN(coin, split="testing", level="step")
    assert facts(test, "step_id") == [("-Abcdefghij/0", 1, 2)]
    assert dict(test.tally.reasons) == {"too short": 1} and shade(test[0]) == 100


def test_without_the_workbook_numbers_are_those_of_the_database(coin: Path) -> None:
    (coin / "taxonomy.xlsx").unlink()
    data = COIN(coin, split="test")
    assert data.class_names == ("ChangeCarTire", "ReplaceCDDriveWithSSD")
    assert facts(data, "recipe_type") == [("-Abcdefghij", 0, 1)]
    assert "domain" not in data.entries[0].meta
    assert COIN(coin, level="step").class_names[0] == "remove the tire (2)"


def test_flat_folders_and_other_places(coin: Path) -> None:
    (coin / "videos" / "2" / "LtRSn-ntcLY.mp4").rename(coin / "LtRSn-ntcLY.webm")
    (coin / "annotations").mkdir()
    for name in ("COIN.json", "taxonomy.xlsx"):
        (coin / name).rename(coin / "annotations" / name)
    data = COIN(coin, videos=coin)
    assert facts(data) == [("LtRSn-ntcLY", 2)] and shade(data[0]) == 50
    moved = (coin / "annotations" / "COIN.json").rename(coin / "mine.json")
    assert len(COIN(coin, annotations=moved, videos=coin)) == 1


def test_validation_holds_out_training_videos_of_each_task(coin: Path) -> None:
    with pytest.raises(ValueError, match="COIN publishes no validation split"):
        COIN(coin, split="validation")
    names = {
        label: [f"{label[:4]}{n:07d}" for n in range(10)] for label in ("MakeTea", "ChangeCarTire")
    }
    rows = {
        name: entry(label, number, "training", 0.0, 2.0)
        for number, label in enumerate(names)
        for name in names[label]
    }
    rows["-Abcdefghij"] = database()["-Abcdefghij"]
    (coin / "COIN.json").write_text(json.dumps({"database": rows}))
    for name in rows:
        tiny_video(coin / "videos" / f"{name}.mp4")
    train, held, test = (
        COIN(coin, split=split, validation=0.2) for split in ("train", "validation", "test")
    )
    assert [len(part) for part in (train, held, test)] == [16, 4, 1]
    assert not {e.key for e in train.entries} & {e.key for e in held.entries}
    assert sorted(e.meta["class_id"] for e in held.entries) == [0, 0, 1, 1]
    # a database that has its own is taken at its word
    for name in names["MakeTea"]:
        rows[name]["subset"] = "validation"
    (coin / "COIN.json").write_text(json.dumps({"database": rows}))
    own = COIN(coin, split="val")
    assert {e.key for e in own.entries} == set(names["MakeTea"])


def test_bad_input_is_one_sentence(coin: Path) -> None:
    with pytest.raises(ValueError, match="level is 'domain'; allowed are task, step"):
        COIN(coin, level="domain")  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match="no annotations .*COIN.json"):
        COIN(coin / "videos")
    with pytest.raises(FileNotFoundError, match="no folder of videos"):
        COIN(coin, videos=coin / "absent")
    for change, said in (
        ({"class": "Tea"}, "recipe_type 1 of video .* is both 'ChangeCarTire' and 'Tea'"),
        ({"annotation": [{"id": "1", "label": "x"}]}, "a step of video .* is no id, label and seg"),
        ({"subset": None}, "video '_gone_gone_' has no subset"),
    ):
        rows = database()
        rows["_gone_gone_"].update(change)
        if change == {"subset": None}:
            del rows["_gone_gone_"]["subset"]
        (coin / "COIN.json").write_text(json.dumps({"database": rows}))
        with pytest.raises(ValueError, match=said):
            COIN(coin)
    (coin / "COIN.json").write_text("[]")
    with pytest.raises(ValueError, match="is no object with a 'database'"):
        COIN(coin)
    (coin / "COIN.json").write_text(json.dumps({"database": database()}))
    (coin / "taxonomy.xlsx").write_bytes(b"no workbook")
    with pytest.raises(ValueError, match="taxonomy.xlsx is no workbook"):
        COIN(coin)


def test_it_is_reached_from_a_configuration(coin: Path) -> None:
    config = DataConfig(
        kind="coin", root=str(coin), num_frames=2, height=8, width=8, options={"level": "step"}
    )
    assert open_reader(config, "test")[0].meta["label"] == "remove the tire (2)"
