"""HMDB-51: clips of films and web videos with 51 human motions, in three published folds.

Format (Kuehne et al., "HMDB: A Large Video Database for Human Motion Recognition", ICCV 2011):
videos ``<class>/<name>.avi``; for each class and fold ``testTrainMulti_7030_splits/
<class>_test_split<N>.txt`` with lines ``<name>.avi <tag>``, tag 1 for training (70 a class), 2 for
testing (30), 0 for clips that the fold does not use. A name is
``<source>_<class>_<body>_<camera motion>_<people>_<view>_<quality>_<number>``.
"""

import os
import re
from pathlib import Path
from typing import Any

from stvision.datasets.labelled import (
    checked_fold,
    checked_share,
    checked_split,
    held_out,
    sentence_of,
    video_home,
    videos_below,
)
from stvision.datasets.records import ClipDataset, Entry, Tally

_VIDEO_FOLDERS = ("hmdb51_org", "videos")
_LIST_FOLDERS = (
    "testTrainMulti_7030_splits",
    "test_train_splits/testTrainMulti_7030_splits",
    "test_train_splits",
    "annotations",
    "splits",
    ".",
)
#: what stands behind source and class in a name
_FACTS = re.compile(r"_[fhlu]_(?:cm|nm)_np\d+_(?:fr|ba|le|ri)_(?:goo|med|bad)_\d+$")


class HMDB51(ClipDataset):
    """Clips of HMDB-51 in one of its folds.

    No validation split is published. With ``validation`` above 0, all clips of some source videos
    of each class are held out of "train" and make up "validation", chosen by a hash of their
    names. Classes are numbered by the alphabet. ``meta`` holds ``label``, ``class_id`` (0 to 50),
    ``group`` (the source video), ``fold`` and ``split``; ``class_names`` the names in the order of
    ``class_id``. Videos that are missing are left out and counted. They may lie in their class's
    folder or all in one, with any suffix.

    Args:
        root: folder that holds lists and videos.
        split: "train", "validation" or "test".
        fold: 1, 2 or 3.
        validation: share of each class's training sources held out.
        videos: folder of the classes' folders; found below ``root`` when None.
        annotations: folder of the lists; found below ``root`` when None.
        **options: see :class:`~stvision.datasets.records.ClipDataset`.

    Raises:
        FileNotFoundError: no lists or no folder.
        ValueError: an unknown split or fold, a validation split without a share, or a list of
            another form.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        split: str = "train",
        fold: int = 1,
        validation: float = 0.0,
        videos: str | os.PathLike[str] | None = None,
        annotations: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> None:
        folder = Path(root)
        name = checked_split(split)
        checked_fold(fold, (1, 2, 3))
        checked_share(validation, name, "HMDB-51")
        bases = [Path(annotations)] if annotations else [folder / f for f in _LIST_FOLDERS]
        ending = f"_test_split{fold}.txt"
        lists = next((found for b in bases if (found := sorted(b.glob(f"*{ending}")))), None)
        if lists is None:
            raise FileNotFoundError(
                f"no <class>{ending} in {', '.join(str(base) for base in bases)}"
            )
        home = video_home(folder, videos, _VIDEO_FOLDERS)

        by_class = {file.name.removesuffix(ending): file for file in lists}
        self.class_names = tuple(sorted(by_class))
        wanted = 2 if name == "test" else 1
        rows = [
            (label, stem)
            for label in self.class_names
            for stem, tag in _read_list(by_class[label])
            if tag == wanted
        ]
        groups = [(label, _source(label, stem)) for label, stem in rows]
        kept_back = held_out(groups, validation)
        files = videos_below(home).values()
        present = {(path.parent.name, path.stem): path for path in files}
        loose = {path.stem: path for path in files if path.parent == home}
        tally = Tally(f"HMDB-51 [{name}, fold {fold}]")
        entries = []
        for (label, stem), group in zip(rows, groups, strict=True):
            if name != "test" and (group in kept_back) != (name == "validation"):
                continue
            path = present.get((label, stem)) or loose.get(stem)
            if path is None:
                tally.skip("missing", f"{label}/{stem}")
                continue
            meta: dict[str, Any] = {
                "label": label,
                "class_id": self.class_names.index(label),
                "group": group[1],
                "fold": fold,
                "split": name,
            }
            entries.append(Entry(path, [sentence_of(label)], f"{label}/{stem}", meta))
        super().__init__(tally.name, entries, tally=tally, **options)


def _source(label: str, stem: str) -> str:
    """The video that a clip was cut from: what stands before its class."""
    before = _FACTS.sub("", stem)
    return before.removesuffix(f"_{label}")


def _read_list(file: Path) -> list[tuple[str, int]]:
    """Name without suffix and tag of each line."""
    rows = []
    for place, line in enumerate(file.read_text(encoding="utf-8-sig").splitlines(), 1):
        if not line.strip():
            continue
        match = re.fullmatch(r"(.+)\.\w+\s+([012])", line.strip())
        if match is None:
            raise ValueError(f"{file}, line {place}: {line!r} is not <name>.avi and 0, 1 or 2")
        rows.append((match[1], int(match[2])))
    return rows
