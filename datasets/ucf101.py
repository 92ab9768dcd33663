"""UCF-101: short web videos of 101 human actions, in three published folds.

Format (Soomro et al., "UCF101: A Dataset of 101 Human Actions Classes from Videos in the Wild",
2012, lists for action recognition): videos ``UCF-101/<Class>/v_<Class>_g<GG>_c<CC>.avi``; 25
groups a class, whose clips share scenery and people; ``ucfTrainTestlist/classInd.txt`` with lines
``<number from 1> <Class>``; ``trainlist01.txt`` to ``trainlist03.txt`` with lines
``<Class>/<file> <number>`` and ``testlist01.txt`` to ``testlist03.txt`` with lines
``<Class>/<file>``. Files of the class ``HandstandPushups`` are named ``v_HandStandPushups_...``.
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
    read_class_names,
    sentence_of,
    video_home,
    videos_below,
)
from stvision.datasets.records import ClipDataset, Entry, Tally

_VIDEO_FOLDERS = ("UCF-101", "UCF101", "videos")
_LIST_FOLDERS = ("ucfTrainTestlist", "annotations", "splits", ".")


class UCF101(ClipDataset):
    """Clips of UCF-101 in one of its folds.

    No validation split is published. With ``validation`` above 0, whole groups of each class of
    the fold's training list are held out of "train" and make up "validation", chosen by a hash of
    their names. ``meta`` holds ``label``, ``class_id`` (0 to 100), ``group``, ``fold`` and
    ``split``; ``class_names`` the names in the order of ``class_id``. Videos that are missing are
    left out and counted. They may lie in their class's folder or all in one, with any suffix.

    Args:
        root: folder that holds lists and videos.
        split: "train", "validation" or "test".
        fold: 1, 2 or 3.
        validation: share of each class's training groups held out.
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
        checked_share(validation, name, "UCF-101")
        bases = [Path(annotations)] if annotations else [folder / f for f in _LIST_FOLDERS]
        listed = f"{'test' if name == 'test' else 'train'}list{fold:02d}.txt"
        base = next((b for b in bases if (b / listed).is_file()), None)
        if base is None:
            raise FileNotFoundError(f"no {listed} in {', '.join(str(base) for base in bases)}")
        self.class_names = read_class_names(base / "classInd.txt")
        numbers = {label: number for number, label in enumerate(self.class_names)}
        home = video_home(folder, videos, _VIDEO_FOLDERS)

        rows = _read_list(base / listed, numbers)
        groups = {stem: (label, _group(stem)) for label, stem in rows}
        kept_back = held_out(groups.values(), validation)
        # names of files and of folders differ in capitals here and there
        present = {path.stem.lower(): path for path in videos_below(home).values()}
        tally = Tally(f"UCF-101 [{name}, fold {fold}]")
        entries = []
        for label, stem in rows:
            if name != "test" and (groups[stem] in kept_back) != (name == "validation"):
                continue
            path = present.get(stem.lower())
            if path is None:
                tally.skip("missing", stem)
                continue
            meta: dict[str, Any] = {
                "label": label,
                "class_id": numbers[label],
                "group": _group(stem),
                "fold": fold,
                "split": name,
            }
            entries.append(Entry(path, [sentence_of(label)], stem, meta))
        super().__init__(tally.name, entries, tally=tally, **options)


def _group(stem: str) -> str:
    """``g08`` of ``v_YoYo_g08_c02``; the whole name where it has none."""
    match = re.search(r"_(g\d+)_c\d+$", stem)
    return match[1] if match else stem


def _read_list(file: Path, numbers: dict[str, int]) -> list[tuple[str, str]]:
    """Class and name without suffix of each line."""
    rows = []
    for place, line in enumerate(file.read_text(encoding="utf-8-sig").splitlines(), 1):
        if not line.strip():
            continue
        match = re.fullmatch(r"([^/\s]+)/(\S+)\.\w+(?:\s+(\d+))?", line.strip())
        if match is None:
            raise ValueError(f"{file}, line {place}: {line!r} is not <Class>/<file> [<number>]")
        label = match[1]
        if label not in numbers or match[3] not in (None, str(numbers[label] + 1)):
            raise ValueError(
                f"{file}, line {place}: class {label!r} with number {match[3]} is not as in "
                "classInd.txt"
            )
        rows.append((label, match[2]))
    return rows
