"""HMDB-51 in its published layout: one list a class and fold, tags 0, 1 and 2."""

from pathlib import Path

import pytest
from support_labelled import facts, shade, tiny_video

from stvision.datasets.hmdb51 import HMDB51
from stvision.train.data import DataConfig, open_reader

#: names as published, with the signs that they have
CLIPS = {
    "brush_hair": [
        "April_09_brush_hair_u_nm_np1_ba_goo_0",
        "April_09_brush_hair_u_nm_np1_ba_goo_1",
        "Brushing_hair__the_right_way_brush_hair_u_nm_np1_fr_goo_2",
        "My_Hair_Routine_brush_hair_h_nm_np1_le_goo_0",
    ],
    "cartwheel": [
        "(Rad)Schlag_die_Bank!_cartwheel_f_cm_np1_le_med_0",
        "Acrobacias_de_un_fenomeno_cartwheel_f_cm_np1_ba_bad_8",
        "Acrobacias_de_un_fenomeno_cartwheel_f_cm_np1_ri_bad_1",
    ],
    "ride_bike": ["#437_How_To_Ride_A_Bike_ride_bike_f_cm_np1_ri_med_0"],
}
#: tags of the clips above, in order, by fold
TAGS = {1: "1102 120 1", 2: "2011 211 2", 3: "1120 011 1"}


@pytest.fixture
def hmdb(tmp_path: Path) -> Path:
    lists = tmp_path / "testTrainMulti_7030_splits"
    lists.mkdir()
    for fold, tags in TAGS.items():
        for (label, names), own in zip(CLIPS.items(), tags.split(), strict=True):
            # lines end with a space
            lines = [f"{name}.avi {tag} \n" for name, tag in zip(names, own, strict=True)]
            (lists / f"{label}_test_split{fold}.txt").write_text("".join(lines))
    count = 0
    for label, names in CLIPS.items():
        for name in names:
            count += 1
            tiny_video(tmp_path / "hmdb51_org" / label / f"{name}.avi", 10 * count)
    return tmp_path


@pytest.mark.parametrize("fold", [1, 2, 3])
@pytest.mark.parametrize(("split", "tag"), [("train", "1"), ("test", "2")])
def test_tags_choose_the_split_of_a_fold(hmdb: Path, fold: int, split: str, tag: str) -> None:
    data = HMDB51(hmdb, split=split, fold=fold)
    assert data.class_names == ("brush_hair", "cartwheel", "ride_bike")
    assert facts(data, "fold", "split") == [
        (f"{label}/{name}", number, fold, split)
        for number, (names, own) in enumerate(zip(CLIPS.values(), TAGS[fold].split(), strict=True))
        for label in [list(CLIPS)[number]]
        for name, given in zip(names, own, strict=True)
        if given == tag
    ]


def test_records_sources_and_sentences(hmdb: Path) -> None:
    data = HMDB51(hmdb, num_frames=2)
    assert [(record.text, shade(record)) for record in (data[0], data[2], data[3])] == [
        ("brush hair", 10),
        ("cartwheel", 50),
        ("ride bike", 80),
    ]
    assert [entry.meta["group"] for entry in data.entries] == [
        "April_09",
        "April_09",
        "(Rad)Schlag_die_Bank!",
        "#437_How_To_Ride_A_Bike",
    ]


def test_missing_videos_and_other_folders(hmdb: Path) -> None:
    name = CLIPS["cartwheel"][0]
    (hmdb / "hmdb51_org" / "cartwheel" / f"{name}.avi").unlink()
    data = HMDB51(hmdb)
    assert dict(data.tally.reasons) == {"missing": 1}
    assert data.tally.examples == {"missing": f"cartwheel/{name}"}
    (hmdb / "test_train_splits").mkdir()
    name = "testTrainMulti_7030_splits"
    (hmdb / name).rename(hmdb / "test_train_splits" / name)
    (hmdb / "hmdb51_org").rename(hmdb / "videos")
    assert facts(HMDB51(hmdb)) == facts(data)
    # a clip of one class's name in another's folder is none of the first
    taken = hmdb / "videos" / "ride_bike" / f"{CLIPS['ride_bike'][0]}.avi"
    taken.rename(hmdb / "videos" / "cartwheel" / taken.name)
    assert dict(HMDB51(hmdb).tally.reasons) == {"missing": 2}
    flat = hmdb / "flat"
    flat.mkdir()
    for path in (hmdb / "videos").rglob("*.avi"):
        path.rename(flat / path.name)
    assert len(HMDB51(hmdb, videos=flat)) == 3


def test_validation_holds_out_all_clips_of_a_source(hmdb: Path) -> None:
    with pytest.raises(ValueError, match="HMDB-51 publishes no validation split"):
        HMDB51(hmdb, split="validation")
    names = [
        f"film{source:02d}_brush_hair_u_nm_np1_ba_goo_{number}"
        for source in range(10)
        for number in range(3)
    ]
    lists = hmdb / "testTrainMulti_7030_splits" / "brush_hair_test_split1.txt"
    lists.write_text("".join(f"{name}.avi 1\n" for name in names))
    for name in names:
        tiny_video(hmdb / "hmdb51_org" / "brush_hair" / f"{name}.avi")
    train, held = (HMDB51(hmdb, split=s, validation=0.2) for s in ("train", "validation"))
    sources = [{(e.meta["label"], e.meta["group"]) for e in part.entries} for part in (train, held)]
    assert not sources[0] & sources[1]
    assert [len(part) for part in (train, held)] == [24 + 2, 6]
    assert {e.key for e in train.entries} | {e.key for e in held.entries} == {
        e.key for e in HMDB51(hmdb).entries
    }


def test_bad_input_is_one_sentence(hmdb: Path) -> None:
    with pytest.raises(ValueError, match="fold is 0; allowed are 1, 2, 3"):
        HMDB51(hmdb, fold=0)
    with pytest.raises(FileNotFoundError, match="no <class>_test_split1.txt in"):
        HMDB51(hmdb / "hmdb51_org")
    with pytest.raises(FileNotFoundError, match="no folder of videos"):
        HMDB51(hmdb, videos=hmdb / "absent")
    lists = hmdb / "testTrainMulti_7030_splits" / "cartwheel_test_split1.txt"
    lists.write_text("a.avi 1\nb.avi 3\n")
    with pytest.raises(ValueError, match="line 2: 'b.avi 3' is not <name>.avi and 0, 1 or 2"):
        HMDB51(hmdb)


def test_it_is_reached_from_a_configuration(hmdb: Path) -> None:
    config = DataConfig(
        kind="hmdb51", root=str(hmdb), num_frames=2, height=8, width=8, options={"fold": 3}
    )
    assert open_reader(config, "test")[0].key == f"brush_hair/{CLIPS['brush_hair'][2]}"
