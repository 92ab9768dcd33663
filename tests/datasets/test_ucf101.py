"""UCF-101 in its published layout: classes, three folds, groups."""

from pathlib import Path

import pytest
from support_labelled import facts, shade, tiny_video

from stvision.datasets.ucf101 import UCF101
from stvision.train.data import DataConfig, open_reader

CLASSES = ("ApplyEyeMakeup", "HandstandPushups", "YoYo")


def clip(label: str, group: int, number: int = 1) -> str:
    # files of this class are named with another capital than the class
    return f"v_{label.replace('stand', 'Stand')}_g{group:02d}_c{number:02d}.avi"


@pytest.fixture
def ucf(tmp_path: Path) -> Path:
    """Groups 1 to 3 are tested on in fold 1, 4 to 6 in fold 2; lists end lines as published."""
    lists = tmp_path / "ucfTrainTestlist"
    lists.mkdir()
    rows = [f"{number} {label}" for number, label in enumerate(CLASSES, 1)]
    (lists / "classInd.txt").write_bytes("".join(f"{row}\r\n" for row in rows).encode())
    for fold in (1, 2, 3):
        tested = range(3 * fold - 2, 3 * fold + 1)
        train, test = [], []
        for number, label in enumerate(CLASSES, 1):
            for group in range(1, 13):
                line = f"{label}/{clip(label, group)}"
                test.append(line) if group in tested else train.append(f"{line} {number}")
        (lists / f"trainlist{fold:02d}.txt").write_bytes("\r\n".join([*train, ""]).encode())
        (lists / f"testlist{fold:02d}.txt").write_bytes("\r\n".join([*test, ""]).encode())
    for number, label in enumerate(CLASSES):
        for group in range(1, 13):
            tiny_video(tmp_path / "UCF-101" / label / clip(label, group), 60 * number + 4 * group)
    return tmp_path


def test_folds_numbers_and_sentences(ucf: Path) -> None:
    for fold in (1, 2, 3):
        groups = [f"g{n:02d}" for n in range(3 * fold - 2, 3 * fold + 1)]
        test = UCF101(ucf, split="test", fold=fold)
        assert test.class_names == CLASSES
        assert facts(test, "group", "fold", "split") == [
            (clip(label, n)[:-4], number, group, fold, "test")
            for number, label in enumerate(CLASSES)
            for n, group in zip(range(3 * fold - 2, 3 * fold + 1), groups, strict=True)
        ]
        train = UCF101(ucf, fold=fold)
        assert len(train) == 27
        assert {e.key for e in train.entries}.isdisjoint(e.key for e in test.entries)
    record = UCF101(ucf, split="test", num_frames=2)[4]
    assert record.text == "handstand pushups" and shade(record) == 60 + 4 * 2


def test_missing_videos_and_another_layout(ucf: Path) -> None:
    (ucf / "UCF-101" / "YoYo" / clip("YoYo", 5)).unlink()
    (ucf / "UCF-101" / "YoYo" / clip("YoYo", 1)).unlink()
    data = UCF101(ucf)
    assert dict(data.tally.reasons) == {"missing": 1} and len(data) == 26
    assert data.tally.examples == {"missing": "v_YoYo_g05_c01"}
    flat = ucf / "flat"
    for path in (ucf / "UCF-101").rglob("*.avi"):
        flat.mkdir(exist_ok=True)
        path.rename(flat / path.name.replace(".avi", ".mp4"))
    lists = (ucf / "ucfTrainTestlist").rename(ucf / "elsewhere")
    moved = UCF101(ucf, videos=flat, annotations=lists)
    assert facts(moved) == facts(data) and shade(moved[0]) == 4 * 4
    for path in flat.glob("*HandStand*"):
        path.rename(flat / path.name.replace("HandStand", "Handstand"))
    assert facts(UCF101(ucf, videos=flat, annotations=lists)) == facts(data)


def test_validation_holds_out_whole_groups_of_the_training_list(ucf: Path) -> None:
    with pytest.raises(ValueError, match="publishes no validation split: say validation=0.1"):
        UCF101(ucf, split="val")
    for number in (2, 3):
        lines = ucf / "ucfTrainTestlist" / "trainlist01.txt"
        text = lines.read_text()
        for place, label in enumerate(CLASSES, 1):
            for group in range(4, 13):
                text += f"{label}/{clip(label, group, number)} {place}\n"
                tiny_video(ucf / "UCF-101" / label / clip(label, group, number))
        lines.write_text(text)
    whole = {e.key for e in UCF101(ucf).entries}
    parts = {
        split: UCF101(ucf, split=split, validation=0.3) for split in ("train", "validation", "test")
    }
    keys = {split: {e.key for e in part.entries} for split, part in parts.items()}
    assert keys["train"] | keys["validation"] == whole
    groups = {
        split: {(e.meta["label"], e.meta["group"]) for e in part.entries}
        for split, part in parts.items()
    }
    assert not groups["train"] & groups["validation"]
    held = [sum(label == kind for label, _ in groups["validation"]) for kind in CLASSES]
    assert held == [3, 3, 3] and len(keys["validation"]) == 27
    # what is tested on stays as published
    assert keys["test"] == {e.key for e in UCF101(ucf, split="test").entries}
    assert {e.meta["split"] for e in parts["validation"].entries} == {"validation"}


def test_bad_input_is_one_sentence(ucf: Path) -> None:
    with pytest.raises(ValueError, match="fold is 4; allowed are 1, 2, 3"):
        UCF101(ucf, fold=4)
    with pytest.raises(ValueError, match="split is 'holdout'"):
        UCF101(ucf, split="holdout")
    with pytest.raises(ValueError, match="validation is 1.0; it is a share"):
        UCF101(ucf, validation=1.0)
    with pytest.raises(FileNotFoundError, match="no trainlist01.txt in"):
        UCF101(ucf / "UCF-101")
    lists = ucf / "ucfTrainTestlist" / "trainlist01.txt"
    lists.write_text(f"YoYo/{clip('YoYo', 9)} 2\n")
    with pytest.raises(ValueError, match="line 1: class 'YoYo' with number 2 is not as in class"):
        UCF101(ucf)
    lists.write_text(f"YoYo/{clip('YoYo', 9)} 3\nv_YoYo_g09_c02.avi\n")
    with pytest.raises(ValueError, match="line 2: .* is not <Class>/<file>"):
        UCF101(ucf)
    (lists.parent / "classInd.txt").unlink()
    with pytest.raises(FileNotFoundError, match="no file of class names .*classInd.txt"):
        UCF101(ucf)


def test_it_is_reached_from_a_configuration(ucf: Path) -> None:
    config = DataConfig(
        kind="ucf101", root=str(ucf), num_frames=2, height=8, width=8, options={"fold": 2}
    )
    assert open_reader(config, "test")[0].meta["group"] == "g04"
