"""Breakfast in its published layout: people, cameras, two channels of one of them, coarse steps."""

from pathlib import Path

import pytest
from support_labelled import facts, shade, shown, tiny_video

from stvision.datasets.breakfast import Breakfast
from stvision.train.data import DataConfig, open_reader

HOME = "BreakfastII_15fps_qvga_sync"
#: person, camera, file without suffix
VIDEOS = [
    ("P03", "cam01", "P03_cereals"),
    ("P03", "webcam01", "P03_cereals"),
    ("P03", "stereo", "P03_cereals_ch0"),
    ("P03", "stereo", "P03_cereals_ch1"),
    ("P15", "cam01", "P15_tea"),
    ("P16", "cam01", "P16_friedegg"),
    ("P29", "webcam02", "P29_salat"),
    ("P42", "cam02", "P42_scrambledegg"),
    ("P54", "cam01", "P54_coffee"),
]
#: frames are counted from 1 and both ends belong to a step; lines end with spaces
CEREALS = "1-5 SIL  \n6-12 take_bowl  \n13-30 pour_cereals  \n31-36 SIL  \n"


@pytest.fixture
def breakfast(tmp_path: Path) -> Path:
    for number, (person, camera, name) in enumerate(VIDEOS):
        path = tmp_path / HOME / person / camera / f"{name}.avi"
        tiny_video(path, 20 * number, frames=36, fps=15.0)
        path.with_name(f"._{name}.avi").write_bytes(b"")
    return tmp_path


def coarse(root: Path, name: str, text: str) -> None:
    folder = root / "segmentation_coarse" / name.rsplit("_", 1)[1]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.txt").write_text(text)
    (folder / f"{name}.xml").write_text("<x/>")


@pytest.mark.parametrize(
    ("fold", "people"),
    [(1, {"P03", "P15"}), (2, {"P16"}), (3, {"P29"}), (4, {"P42", "P54"})],
)
def test_published_splits_test_on_people(breakfast: Path, fold: int, people: set[str]) -> None:
    test = Breakfast(breakfast, split="test", fold=fold)
    assert {e.meta["person"] for e in test.entries} == people
    train = Breakfast(breakfast, fold=fold)
    everybody = {person for person, _, _ in VIDEOS}
    assert {e.meta["person"] for e in train.entries} == everybody - people
    assert len(train) + len(test) == len(VIDEOS) - 1  # one channel of the stereo camera


def test_activities_cameras_and_channels(breakfast: Path) -> None:
    data = Breakfast(breakfast, split="test", num_frames=2)
    assert data.class_names[0] == "cereals" and len(data.class_names) == 10
    assert facts(data, "camera", "activity", "fold") == [
        ("P03/cam01/P03_cereals", 0, "cam01", "cereals", 1),
        ("P03/stereo/P03_cereals_ch0", 0, "stereo", "cereals", 1),
        ("P03/webcam01/P03_cereals", 0, "webcam01", "cereals", 1),
        ("P15/cam01/P15_tea", 2, "cam01", "tea", 1),
    ]
    assert [shade(data[i]) for i in range(4)] == [0, 40, 20, 80]
    assert data[0].text == "bowl of cereals"
    both = Breakfast(breakfast, split="test", channels=(0, 1), cameras=["stereo"])
    assert [e.key[-3:] for e in both.entries] == ["ch0", "ch1"]
    (breakfast / HOME / "P03" / "stereo").rename(breakfast / HOME / "P03" / "stereo01")
    right = Breakfast(breakfast, split="test", channels=[1], cameras=("stereo", "webcam01"))
    assert [e.key for e in right.entries] == [
        "P03/stereo/P03_cereals_ch1",
        "P03/webcam01/P03_cereals",
    ]
    # the ten published names in the order in which public classifiers number them
    scrambled = Breakfast(breakfast, split="test", fold=4)
    assert [(e.meta["class_id"], e.captions) for e in scrambled.entries] == [
        (5, ["scrambled eggs"]),
        (1, ["coffee"]),
    ]


def test_other_people_may_be_tested_on_and_some_held_out(breakfast: Path) -> None:
    test = Breakfast(breakfast, split="test", test_people=range(47, 55))
    assert [(e.meta["person"], e.meta["fold"]) for e in test.entries] == [("P54", None)]
    with pytest.raises(ValueError, match="Breakfast publishes no validation split"):
        Breakfast(breakfast, split="val", fold=4)
    for number in range(3, 42):
        tiny_video(breakfast / HOME / f"P{number:02d}" / "cam01" / f"P{number:02d}_milk.avi")
        tiny_video(breakfast / HOME / f"P{number:02d}" / "cam02" / f"P{number:02d}_milk.avi")
    parts = [
        {e.meta["person"] for e in Breakfast(breakfast, split=s, fold=4, validation=0.25).entries}
        for s in ("train", "validation", "test")
    ]
    # of all 39 people who are not tested on, whoever has videos
    assert [len(part) for part in parts] == [29, 10, 2]
    assert len(set.union(*parts)) == 41


def test_steps_come_from_the_coarse_files(breakfast: Path) -> None:
    coarse(breakfast, "P03_cam01_P03_cereals", CEREALS)
    coarse(breakfast, "P03_cam01_P03_cereals 2", "1-2 never_read\n")
    coarse(breakfast, "P03_stereo01_P03_cereals", "1-9 stir_cereals\n10-9 take_bowl\n")
    coarse(breakfast, "P16_cam01_P16_friedegg", "1-3 crack_egg\n")
    beside = breakfast / HOME / "P15" / "cam01" / "P15_tea.avi.labels"
    beside.write_text("2-4 add_teabag \n")
    data = Breakfast(breakfast, split="test", level="step", channels=(0, 1))
    # steps of everybody, so that each split numbers them alike
    names = ("add_teabag", "crack_egg", "pour_cereals", "stir_cereals", "take_bowl")
    assert data.class_names == names
    assert facts(data, "activity") == [
        ("P03/cam01/P03_cereals/1", 4, "cereals"),
        ("P03/cam01/P03_cereals/2", 2, "cereals"),
        ("P03/stereo/P03_cereals_ch0/0", 3, "cereals"),
        ("P03/stereo/P03_cereals_ch1/0", 3, "cereals"),
        ("P15/cam01/P15_tea/0", 0, "tea"),
    ]
    assert dict(data.tally.reasons) == {"without a segmentation": 1, "too short": 2}
    assert data.tally.examples["without a segmentation"] == "P03/webcam01/P03_cereals"
    assert shown(data[0]) == list(range(5, 12)) and data[0].text == "take bowl"
    assert shown(data[1]) == list(range(12, 30))
    assert shown(data[2]) == list(range(9)) and shown(data[4]) == [1, 2, 3]
    assert Breakfast(breakfast, level="step").class_names == names
    silent = Breakfast(breakfast, split="test", level="step", silence=True, cameras=["cam01"])
    assert silent.class_names[0] == "SIL"
    assert [e.key for e in silent.entries][:2] == [f"P03/cam01/P03_cereals/{n}" for n in (0, 1)]
    assert silent[0].text == "nothing" and shown(silent[0]) == list(range(5))


def test_a_mapping_numbers_the_steps(breakfast: Path) -> None:
    coarse(breakfast, "P03_cam01_P03_cereals", CEREALS)
    (breakfast / "mapping.txt").write_text("0 SIL\n3 pour_cereals\n2 spoon_flour\n1 take_bowl\n")
    options = {"split": "test", "level": "step", "cameras": ["cam01"]}
    data = Breakfast(breakfast, silence=True, **options)
    assert data.class_names == ("SIL", "take_bowl", "spoon_flour", "pour_cereals")
    assert [row[1] for row in facts(data)] == [0, 1, 3, 0]
    assert [row[1] for row in facts(Breakfast(breakfast, **options))] == [0, 2]
    (breakfast / "mapping.txt").write_text("0 SIL\n1 pour_cereals\n")
    with pytest.raises(ValueError, match="does not number the step 'take_bowl'"):
        Breakfast(breakfast, **options)


def test_segmentations_without_videos_and_unknown_activities_are_counted(breakfast: Path) -> None:
    for name in (
        "P03_cam01_P03_cereals",
        "P03_stereo01_P03_cereals",
        "P03_stereo01_P03_milk",
        "P04_webcam01_P04_tea",
        "P20_cam01_P20_tea",
    ):
        coarse(breakfast, name, CEREALS)
    tiny_video(breakfast / HOME / "P03" / "cam01" / "P03_soup.avi")
    data = Breakfast(breakfast, split="test")
    assert dict(data.tally.reasons) == {"missing": 2, "of an unknown activity": 1}
    assert data.tally.examples["missing"] == "P03_stereo01_P03_milk"
    only = Breakfast(breakfast, split="test", cameras=["stereo"])
    assert dict(only.tally.reasons) == {"missing": 1}
    # of the other channel there is none
    (breakfast / HOME / "P03" / "stereo" / "P03_cereals_ch0.avi").unlink()
    assert dict(Breakfast(breakfast, split="test", cameras=["stereo"]).tally.reasons) == {
        "missing": 2
    }


def test_bad_input_is_one_sentence(breakfast: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="fold is 5; allowed are 1, 2, 3, 4"):
        Breakfast(breakfast, fold=5)
    with pytest.raises(ValueError, match="level is 'fine'; allowed are activity, step"):
        Breakfast(breakfast, level="fine")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"channels are \(2,\); allowed are 0 and 1"):
        Breakfast(breakfast, channels=[2])
    with pytest.raises(ValueError, match=r"test_people are \(2, 9\); .* 3 to 54"):
        Breakfast(breakfast, test_people=[2, 9])
    with pytest.raises(ValueError, match="there are cam01, cam02, stereo, webcam01, webcam02"):
        Breakfast(breakfast, cameras=["cam03"])
    with pytest.raises(FileNotFoundError, match="no folder of segmentations"):
        Breakfast(breakfast, annotations=breakfast / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no videos P<NN>/<camera>"):
        Breakfast(tmp_path / "empty")
    coarse(breakfast, "P03_cam01_P03_cereals", "1-5 SIL\nsix-7 take_bowl\n")
    with pytest.raises(ValueError, match="line 2: .* is not <first>-<last> <step>"):
        Breakfast(breakfast, level="step")


def test_it_is_reached_from_a_configuration(breakfast: Path) -> None:
    config = DataConfig(
        kind="breakfast", root=str(breakfast), num_frames=2, height=8, width=8, options={"fold": 3}
    )
    assert open_reader(config, "test")[0].meta["label"] == "salat"
