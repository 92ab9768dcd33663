"""Kinetics in the layouts in which it is published, mirrored and prepared by common recipes."""

from pathlib import Path

import pytest
from support_labelled import facts, shade, tiny_video

from stvision.datasets.kinetics import Kinetics
from stvision.train.data import DataConfig, open_reader

TRAIN = """label,youtube_id,time_start,time_end,split
skiing (not slalom or crosscountry),--aaaaaaaa1,84,94,train
"massaging person's head",bbbb_bbbbb2,0,10,train
air drumming,ccccccccccc,104,114,train
ski jumping,ddddddddddd,3,13,train
skiing slalom,eeeeeeeeeee,7,17,train
"""
VAL = """label,youtube_id,time_start,time_end,split
air drumming,fffffffffff,1,11,{0}
zumba,ggggggggggg,12,22,{0}
"""
NAMES = (
    "air drumming",
    "massaging person's head",
    "ski jumping",
    "skiing (not slalom or crosscountry)",
    "skiing slalom",
    "zumba",
)
STEMS = {
    "--aaaaaaaa1_000084_000094": NAMES[3],
    "bbbb_bbbbb2_000000_000010": NAMES[1],
    "ccccccccccc_000104_000114": NAMES[0],
    "ddddddddddd_000003_000013": NAMES[2],
}


def annotate(folder: Path, validation: str = "val") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.csv").write_text(TRAIN)
    (folder / f"{validation}.csv").write_text(VAL.format(validation))


def spaces(label: str) -> str:
    return label


def underscores(label: str) -> str:
    return label.replace(" ", "_")


def stripped(label: str) -> str:
    """Folders as torchvision names them."""
    return underscores(label).replace("'", "").replace("(", "").replace(")", "")


@pytest.mark.parametrize("named", [spaces, underscores, stripped])
@pytest.mark.parametrize("home", ["train", "videos_train", "videos/train", "anywhere"])
def test_folders_of_labels_however_they_are_named(tmp_path: Path, named, home: str) -> None:
    annotate(tmp_path / "annotations")
    for number, (stem, label) in enumerate(STEMS.items()):
        tiny_video(tmp_path / home / named(label) / f"{stem}.mp4", 50 * number)
    data = Kinetics(tmp_path, num_frames=2)
    assert data.class_names == NAMES
    assert facts(data, "youtube_id", "time_start", "time_end", "split") == [
        ("--aaaaaaaa1_000084_000094", 3, "--aaaaaaaa1", 84, 94, "train"),
        ("bbbb_bbbbb2_000000_000010", 1, "bbbb_bbbbb2", 0, 10, "train"),
        ("ccccccccccc_000104_000114", 0, "ccccccccccc", 104, 114, "train"),
        ("ddddddddddd_000003_000013", 2, "ddddddddddd", 3, 13, "train"),
    ]
    assert [shade(data[index]) for index in range(4)] == [0, 50, 100, 150]
    assert data[1].text == "massaging person's head"
    assert dict(data.tally.reasons) == {"missing": 1}
    assert data.tally.examples["missing"] == "eeeeeeeeeee_000007_000017"


@pytest.mark.parametrize(
    ("place", "validation"),
    [
        (".", "val"),
        ("annotations", "validate"),
        ("annotations/deepmind/kinetics700_2020", "validate"),
        ("kinetics600", "validate"),
    ],
)
def test_flat_mirror_and_every_name_of_the_validation_split(
    tmp_path: Path, place: str, validation: str
) -> None:
    annotate(tmp_path / place, validation)
    tiny_video(tmp_path / "val" / "fffffffffff_000001_000011.mp4", 60)
    tiny_video(tmp_path / "val" / "ggggggggggg_000012_000022.mp4", 70)
    for split in ("val", "validation", "validate"):
        data = Kinetics(tmp_path, split=split)
        # numbers are those of all splits together, and so the same in each
        assert facts(data) == [
            ("fffffffffff_000001_000011", 0),
            ("ggggggggggg_000012_000022", 5),
        ]
        assert shade(data[1]) == 70
    assert len(Kinetics(tmp_path)) == 0


def test_one_file_for_all_splits_and_files_with_the_release_in_their_names(tmp_path: Path) -> None:
    table = tmp_path / "everything.csv"
    table.write_text(TRAIN + VAL.format("validate").split("\n", 1)[1])
    tiny_video(tmp_path / "zumba" / "ggggggggggg_000012_000022.mp4")
    tiny_video(tmp_path / "skiing_slalom" / "eeeeeeeeeee_000007_000017.mkv")
    keys = {
        split: [e.key for e in Kinetics(tmp_path, split=split, annotations=table).entries]
        for split in ("train", "val", "test")
    }
    assert keys == {
        "train": ["eeeeeeeeeee_000007_000017"],
        "val": ["ggggggggggg_000012_000022"],
        "test": [],
    }
    table.rename(tmp_path / "kinetics-400_train.csv")
    assert len(Kinetics(tmp_path)) == 1


def test_sound_copies_take_the_place_of_broken_videos(tmp_path: Path) -> None:
    annotate(tmp_path / "annotations")
    for number, stem in enumerate(STEMS):
        tiny_video(tmp_path / "train" / f"{stem}.mp4", 10 * number)
    (tmp_path / "train" / "ccccccccccc_000104_000114.mp4").write_bytes(b"broken")
    copies = tmp_path / "replacement" / "replacement_for_corrupted_k400"
    tiny_video(copies / "ccccccccccc_000104_000114.mp4", 200)
    for place in (None, tmp_path):
        data = Kinetics(tmp_path, videos=place)
        assert [shade(data[index]) for index in range(4)] == [0, 10, 200, 30]


def test_a_piece_with_two_labels_is_read_from_each_label_s_folder(tmp_path: Path) -> None:
    rows = "zumba,hhhhhhhhhhh,1,11,train\nyoga,hhhhhhhhhhh,1,11,train\n"
    (tmp_path / "train.csv").write_text(TRAIN.split("\n", 1)[0] + "\n" + rows)
    tiny_video(tmp_path / "train" / "yoga" / "hhhhhhhhhhh_000001_000011.mp4", 40)
    tiny_video(tmp_path / "train" / "zumba" / "hhhhhhhhhhh_000001_000011.mp4", 80)
    data = Kinetics(tmp_path)
    assert [(data[i].text, shade(data[i])) for i in range(2)] == [("zumba", 80), ("yoga", 40)]


def test_test_files_without_labels_are_counted(tmp_path: Path) -> None:
    (tmp_path / "test.csv").write_text(
        "youtube_id,time_start,time_end,split\nhhhhhhhhhhh,1,11,test\n"
    )
    tiny_video(tmp_path / "test" / "hhhhhhhhhhh_000001_000011.mp4")
    data = Kinetics(tmp_path, split="test")
    assert len(data) == 0 and dict(data.tally.reasons) == {"without a label": 1}


def test_times_may_be_written_as_fractions_and_the_cc_column_is_no_trouble(tmp_path: Path) -> None:
    (tmp_path / "kinetics_val.csv").write_text(
        'label,youtube_id,time_start,time_end,split,is_cc\n"air drumming",_dbcJuKJQNs,40.0,50.0,val,0\n'
    )
    tiny_video(tmp_path / "videos_val" / "air_drumming" / "_dbcJuKJQNs_000040_000050.mp4")
    assert facts(Kinetics(tmp_path, split="val")) == [("_dbcJuKJQNs_000040_000050", 0)]


def test_class_numbers_follow_the_names_that_are_given(tmp_path: Path) -> None:
    annotate(tmp_path)
    for stem in STEMS:
        tiny_video(tmp_path / "train" / f"{stem}.mp4")
    order = ["Skiing_slalom", "zumba", *NAMES[:4]]
    data = Kinetics(tmp_path, classes=order)
    assert data.class_names == tuple(order)
    assert [row[1] for row in facts(data)] == [5, 3, 2, 4]
    (tmp_path / "label_map.txt").write_text("\n".join(order))
    assert Kinetics(tmp_path, classes=tmp_path / "label_map.txt").class_names == tuple(order)
    with pytest.raises(ValueError, match="line 2: label 'skiing .not.*is none of the classes"):
        Kinetics(tmp_path, classes=["zumba"])


@pytest.mark.parametrize("parting", [" ", ",", "  ", ", "])
def test_lists_number_classes_and_folders_name_them(tmp_path: Path, parting: str) -> None:
    lines = [
        ("air drumming/ccccccccccc_000104_000114.mp4", 1),
        ("ski_jumping/ddddddddddd_000003_000013.mp4", 0),
        ("zumba/absent_000003_000013.mp4", 3),
    ]
    for number, (path, _) in enumerate(lines[:2]):
        tiny_video(tmp_path / "videos_train" / path, 90 + number)
    text = "".join(f"{path}{parting}{label}\n" for path, label in lines)
    (tmp_path / "kinetics400_train_list_videos.txt").write_text(text)
    data = Kinetics(tmp_path)
    assert data.class_names == ("ski jumping", "air drumming", "class 2", "zumba")
    assert facts(data, "split") == [(lines[0][0], 1, "train"), (lines[1][0], 0, "train")]
    assert [shade(data[0]), shade(data[1])] == [90, 91]
    assert data.tally.examples == {"missing": lines[2][0]}


def test_lists_of_whole_paths_need_names(tmp_path: Path) -> None:
    inside = tiny_video(tmp_path / "clips" / "a.mp4", 11)
    outside = tiny_video(tmp_path / "elsewhere" / "b c.mp4", 12)
    root = tmp_path / "clips"
    (root / "val.csv").write_text(f"{inside} 1\n{outside} 0\n{root}/absent.mp4 0\n")
    with pytest.raises(ValueError, match="give their names by classes="):
        Kinetics(root, split="val")
    data = Kinetics(root, split="val", classes=["yoga", "zumba"])
    assert facts(data) == [(str(inside), 1), (str(outside), 0)]
    assert [shade(data[0]), data[1].text] == [11, "yoga"]
    assert dict(data.tally.reasons) == {"missing": 1}
    with pytest.raises(ValueError, match="class 1 is none of the 1 classes"):
        Kinetics(root, split="val", classes=["yoga"])


def test_lists_of_names_share_their_numbers_between_splits(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("a.mp4 yoga\nb.mp4 air_drumming\n")
    (tmp_path / "val.csv").write_text("a.mp4 zumba\nb.mp4 yoga\n")
    for name in ("a.mp4", "b.mp4"):
        tiny_video(tmp_path / name)
    for split, numbers in (("train", [1, 0]), ("val", [2, 1])):
        data = Kinetics(tmp_path, split=split)
        assert data.class_names == ("air drumming", "yoga", "zumba")
        assert [row[1] for row in facts(data)] == numbers


@pytest.mark.parametrize(
    "line", ["frames/video_1 300 4", "a.mp4 1 2", "a.mp4", "label,id,start", "video.jpg 3"]
)
def test_lists_of_another_form_are_refused(tmp_path: Path, line: str) -> None:
    tiny_video(tmp_path / "a.mp4")
    (tmp_path / "list.txt").write_text(f"a.mp4 0\n{line}\n")
    with pytest.raises(ValueError, match=r"list.txt, line 2: .* is not the path of a video"):
        Kinetics(tmp_path, annotations=tmp_path / "list.txt", classes=["yoga"])


def test_folders_alone(tmp_path: Path) -> None:
    tiny_video(tmp_path / "train" / "yoga" / "1.mp4", 5)
    tiny_video(tmp_path / "train" / "air_drumming" / "2.mp4", 6)
    tiny_video(tmp_path / "val" / "zumba" / "3.mp4", 7)
    data = Kinetics(tmp_path, annotations="folders")
    assert facts(data) == [("air_drumming/2.mp4", 0), ("yoga/1.mp4", 1)]
    held = Kinetics(tmp_path, split="val", annotations="folders")
    assert held.class_names == data.class_names == ("air drumming", "yoga", "zumba")
    assert facts(held) == [("zumba/3.mp4", 2)] and shade(held[0]) == 7
    with pytest.raises(FileNotFoundError, match="no folder 'test'"):
        Kinetics(tmp_path, split="test", annotations="folders")


def test_bad_input_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no train.csv .*name it by annotations="):
        Kinetics(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder "):
        Kinetics(tmp_path / "absent")
    annotate(tmp_path)
    with pytest.raises(ValueError, match="split is 'holdout'; allowed are train, validation, test"):
        Kinetics(tmp_path, split="holdout")
    with pytest.raises(FileNotFoundError, match="no folder of videos"):
        Kinetics(tmp_path, videos=tmp_path / "absent")
    (tmp_path / "train.csv").write_text("label,youtube_id,start,end\nyoga,a,1,2\n")
    with pytest.raises(ValueError, match="has no column time_start, time_end"):
        Kinetics(tmp_path)
    (tmp_path / "train.csv").write_text("label,youtube_id,time_start,time_end\nyoga,a,one,2\n")
    with pytest.raises(ValueError, match="line 2: time_start and time_end must be seconds"):
        Kinetics(tmp_path)


def test_it_is_reached_from_a_configuration(tmp_path: Path) -> None:
    annotate(tmp_path)
    for stem in STEMS:
        tiny_video(tmp_path / "train" / f"{stem}.mp4", 33)
    config = DataConfig(kind="kinetics", root=str(tmp_path), num_frames=3, height=8, width=8)
    record = open_reader(config, "train")[0]
    assert record.frames.shape == (3, 8, 8, 3) and record.meta["label"] == NAMES[3]
