"""What readers of labelled videos share, on names and groups of the published collections."""

import json
from pathlib import Path

import pytest

from stvision.datasets.labelled import (
    held_out,
    names_by_number,
    plain,
    read_class_names,
    sentence_of,
    videos_below,
)


@pytest.mark.parametrize(
    ("label", "sentence"),
    [
        ("brush_hair", "brush hair"),
        ("ApplyEyeMakeup", "apply eye makeup"),
        ("Archery", "archery"),
        ("YoYo", "yo yo"),
        ("ReplaceCDDriveWithSSD", "replace CD drive with SSD"),
        ("MakeRJ45Cable", "make RJ45 cable"),
        ("PlayFrisbeeWithADog", "play frisbee with a dog"),
        ("ReplaceABulb", "replace a bulb"),
        ("UseEpinephrineAuto-injector", "use epinephrine auto-injector"),
        ("passing American football (in game)", "passing American football (in game)"),
    ],
)
def test_sentences_are_the_words_of_names(label: str, sentence: str) -> None:
    assert sentence_of(label) == sentence


def test_plain_names_are_those_of_every_way_to_write_a_folder() -> None:
    ways = ["massaging person's head", "massaging_persons_head", "Massaging_person's_head"]
    assert {plain(way) for way in ways} == {"massagingpersonshead"}
    assert plain("hugging baby") != plain("hugging (not baby)")


def test_groups_are_held_out_whole_from_every_class_and_the_same_each_time() -> None:
    groups = [(kind, f"g{n:02d}") for kind in ("YoYo", "TaiChi") for n in range(8, 26)]
    chosen = held_out(groups, 0.25)
    assert chosen == held_out([*reversed(groups), *groups], 0.25)
    assert {kind: sum(k == kind for k, _ in chosen) for kind in ("YoYo", "TaiChi")} == {
        "YoYo": 4,
        "TaiChi": 4,
    }
    assert {g for k, g in chosen if k == "YoYo"} != {g for k, g in chosen if k == "TaiChi"}
    assert held_out(groups, 0.1) < chosen
    assert held_out(groups, 0.0) == set()
    # at least one, never all
    assert len(held_out(groups, 0.001)) == 2 and len(held_out(groups, 0.999)) == 34
    assert held_out([("Archery", "g08")], 0.5) == set()


def test_class_names_of_every_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "plain.txt").write_text("abseiling\nair drumming\n\n")
    (tmp_path / "from_one.txt").write_bytes(b"1 ApplyEyeMakeup\r\n2 ApplyLipstick\r\n")
    (tmp_path / "from_zero.txt").write_text("1,b\n0,a\n")
    (tmp_path / "object.json").write_text(json.dumps({'"air drumming"': 1, "abseiling": 0}))
    (tmp_path / "list.json").write_text(json.dumps(["x", "y"]))
    assert read_class_names(tmp_path / "plain.txt") == ("abseiling", "air drumming")
    assert read_class_names(tmp_path / "from_one.txt") == ("ApplyEyeMakeup", "ApplyLipstick")
    assert read_class_names(tmp_path / "from_zero.txt") == ("a", "b")
    assert read_class_names(tmp_path / "object.json") == ("abseiling", "air drumming")
    assert read_class_names(tmp_path / "list.json") == ("x", "y")
    assert read_class_names(["p", " q"]) == ("p", "q")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0 a\n2 c\n", "without gaps"),
        ("5 a\n6 b\n", "begin at 0 or 1, got 5"),
        ("tai chi\nTai_Chi\n", "all different"),
        ("", "all different, got 0"),
    ],
)
def test_class_names_that_cannot_number_anything_are_refused(
    tmp_path: Path, text: str, said: str
) -> None:
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(ValueError, match=said):
        read_class_names(tmp_path / "classes.txt")
    with pytest.raises(FileNotFoundError, match="no file of class names"):
        read_class_names(tmp_path / "absent.txt")


def test_names_keep_the_places_of_their_numbers() -> None:
    assert names_by_number({2: "c", 0: "a"}) == ("a", "class 1", "c")
    assert names_by_number({}) == ()


def test_videos_are_found_at_any_depth_and_hidden_files_are_none(tmp_path: Path) -> None:
    for name in ("a.avi", "x/b.MP4", "x/y/c.webm", "x/._b.MP4", "x/b.avi.labels", "x/d.jpg"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    assert list(videos_below(tmp_path)) == ["a.avi", "x/b.MP4", "x/y/c.webm"]
