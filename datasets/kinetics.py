"""Kinetics-400, -600, -700 and -700-2020: ten seconds of a web video and one of its human actions.

Format (Kay et al., "The Kinetics Human Action Video Dataset", 2017; Carreira et al., 2018, 2019;
Smaira et al., 2020): one CSV a split with the columns ``label``, ``youtube_id``, ``time_start``,
``time_end``, ``split`` and sometimes ``is_cc``; some test files have no ``label``. The release
names its files ``train.csv``, ``validate.csv``, ``test.csv``, copies of it ``val.csv`` or
``kinetics_val.csv``. A clip is ``<youtube_id>_<start>_<end>.mp4``, seconds with six digits, and
lies

- in a folder of its label below one of its split (``train/air drumming/``, ``train/air_drumming/``;
  so does the common mirror of 700-2020; MMAction has ``videos_train/``), or
- straight in its split's folder (the mirror's 400 and 600, whose ``replacement/`` holds sound
  copies of clips that are broken in the archives).

Recipes of MMAction, VideoMAE and others have lists instead: a line ``path label`` or
``path,label`` a video, the label mostly a number, in ``train.csv`` or
``kinetics400_train_list_videos.txt``.
"""

import csv
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from stvision.datasets.clips import CLIP_SUFFIXES
from stvision.datasets.labelled import (
    checked_split,
    first_folder,
    names_by_number,
    plain,
    read_class_names,
    sentence_of,
    videos_below,
)
from stvision.datasets.records import ClipDataset, Entry, Tally, canonical_split

#: split -> names that its files and folders have
_ALIASES = {
    "train": ("train", "training"),
    "validation": ("val", "validate", "validation", "valid"),
    "test": ("test", "testing"),
}
_COLUMNS = ("youtube_id", "time_start", "time_end")


class Kinetics(ClipDataset):
    """Clips of a Kinetics release, each with one of its classes.

    Class names are those of the annotations with spaces for underscores, whichever way the
    folders are named, and numbers follow the alphabet (over all annotation files that lie side by
    side), as in MMAction's lists and most public checkpoints; or they come from ``classes``, or
    from a list that has numbers. ``meta`` holds ``label``, ``class_id``, ``split`` and, with
    annotations, ``youtube_id``, ``time_start`` and ``time_end``; ``class_names`` the names in the
    order of ``class_id``. Clips whose video is missing, and those without a label, are left out
    and counted.

    Args:
        root: folder of annotations and videos.
        split: "train", "validation" or "test".
        annotations: the CSV or the list; found in ``root`` or its ``annotations`` when None.
            "folders" for no such file: every video belongs to the class that its folder names.
        videos: folder of the split's videos, at any depth; found below ``root`` when None. Paths
            of a list are relative to it, to ``root`` or to the list's own folder.
        classes: names in the order of their numbers, or a file of them; needed by a list of
            numbers whose videos do not lie in folders of their labels.
        **options: see :class:`~stvision.datasets.records.ClipDataset`.

    Raises:
        FileNotFoundError: no such folder, annotations or classes.
        ValueError: an unknown split, a file of another form, or a label that is none of
            ``classes``.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        split: str = "train",
        annotations: str | os.PathLike[str] | None = None,
        videos: str | os.PathLike[str] | None = None,
        classes: str | os.PathLike[str] | Sequence[str] | None = None,
        **options: Any,
    ) -> None:
        folder = Path(root)
        name = checked_split(_full(split))
        if not folder.is_dir():
            raise FileNotFoundError(f"no folder {str(folder)!r}")
        home = _home(folder, name) if videos is None else Path(videos)
        if not home.is_dir():
            raise FileNotFoundError(f"no folder of videos {str(home)!r}")
        names = None if classes is None else read_class_names(classes)
        tally = Tally(f"Kinetics [{name}]")
        if annotations == "folders":
            if videos is None and home in (folder, folder / "videos"):
                raise FileNotFoundError(
                    f"no folder {_ALIASES[name][0]!r} (nor videos_{_ALIASES[name][0]}) in "
                    f"{str(folder)!r}, and without annotations folders alone say the split"
                )
            rows, self.class_names = _from_folders(folder, home, videos is None, names)
        else:
            file = _find(folder, name) if annotations is None else Path(annotations)
            if not file.is_file():
                raise FileNotFoundError(f"no annotations {str(file)!r}")
            beside = [f for s in _ALIASES if (f := _match(file.parent, s)) and f != file]
            if _is_list(file):
                lists = [f for f in beside if _is_list(f)]
                rows, self.class_names = _from_list(file, lists, (home, folder), names, tally)
            else:
                tables = [f for f in beside if not _is_list(f)]
                files = _by_stem(home, folder)
                rows, self.class_names = _from_table(file, tables, files, names, name, tally)
        numbers = {plain(label): number for number, label in enumerate(self.class_names)}
        entries = []
        for path, key, label, facts in rows:
            number = numbers[plain(label)]
            label = self.class_names[number]
            meta = {"label": label, "class_id": number, "split": name, **facts}
            entries.append(Entry(path, [sentence_of(label)], key, meta))
        super().__init__(tally.name, entries, tally=tally, **options)


#: a usable clip: its file, name, label and further facts
Row = tuple[Path, str, str, dict[str, Any]]


def _home(root: Path, split: str) -> Path:
    """The folder of a split's videos; the root where it has none."""
    patterns = ("{}", "videos_{}", "videos/{}", "{}_256", "videos")
    places = [root / p.format(alias) for p in patterns for alias in _ALIASES[split]]
    return first_folder(places) or root


def _match(folder: Path, split: str) -> Path | None:
    """A split's annotations in a folder: those with the shortest name where there are several."""
    name = re.compile(
        rf"(?:(?:kinetics|k)[-_]?\d*(?:[-_]2020)?[-_])?(?:{'|'.join(_ALIASES[split])})"
        r"(?:_list)?(?:_videos)?\.(?:csv|txt)",
        re.IGNORECASE,
    )
    if not folder.is_dir():
        return None
    found = [f for f in folder.iterdir() if name.fullmatch(f.name) and f.is_file()]
    return min(found, key=lambda f: (f.suffix != ".csv", len(f.name), f.name), default=None)


def _find(root: Path, split: str) -> Path:
    places = [root, root / "annotations"]
    for pattern in ("annotations/kinetics*", "annotations/*/kinetics*", "kinetics*", "labels"):
        places += sorted(place for place in root.glob(pattern) if place.is_dir())
    found = next((file for place in places if (file := _match(place, split))), None)
    if found is None:
        raise FileNotFoundError(
            f"no {_ALIASES[split][0]}.csv (nor kinetics_{_ALIASES[split][0]}.csv, "
            f"kinetics400_{_ALIASES[split][0]}_list_videos.txt or alike) in "
            f"{', '.join(str(place) for place in places[:2])}; name it by annotations="
        )
    return found


def _is_list(file: Path) -> bool:
    """Whether the first line is one of a list and no heading of annotations."""
    with file.open(encoding="utf-8-sig") as lines:
        first = next((line for line in lines if line.strip()), "")
    return "youtube_id" not in first and not first.lower().startswith("label,")


def _named(label: str) -> str:
    return " ".join(label.strip().strip('"').replace("_", " ").split())


def _from_table(
    file: Path,
    beside: list[Path],
    files: dict[str, list[Path]],
    names: tuple[str, ...] | None,
    split: str,
    tally: Tally,
) -> tuple[list[Row], tuple[str, ...]]:
    """Clips and class names of annotations as they are published."""
    table = list(_read_table(file))
    if names is None:
        labels = {_named(row.get("label") or "") for row in table}
        for other in beside:
            labels |= {_named(row.get("label") or "") for row in _read_table(other)}
        names = _alphabet(labels - {""})
    known = {plain(name) for name in names}
    rows: list[Row] = []
    for number, row in enumerate(table, 2):
        if row.get("split") and canonical_split(_full(row["split"])) != split:
            continue
        try:
            start, end = (int(float(row[column])) for column in _COLUMNS[1:])
        except (TypeError, ValueError):
            raise ValueError(
                f"{file}, line {number}: time_start and time_end must be seconds, got "
                f"{row['time_start']!r} and {row['time_end']!r}"
            ) from None
        stem = f"{row['youtube_id'].strip()}_{start:06d}_{end:06d}"
        label = _named(row.get("label") or "")
        if not label:
            tally.skip("without a label", stem)
            continue
        if plain(label) not in known:
            raise ValueError(f"{file}, line {number}: label {label!r} is none of the classes")
        found = files.get(stem)
        if not found:
            tally.skip("missing", stem)
            continue
        # some releases give one piece of a video two labels; each label's folder has its copy
        path = next((p for p in found if plain(p.parent.name) == plain(label)), found[0])
        facts = {"youtube_id": row["youtube_id"].strip(), "time_start": start, "time_end": end}
        rows.append((path, stem, label, facts))
    return rows, names


def _full(split: str) -> str:
    """The name of a split from those that only this release has."""
    lowered = split.strip().lower()
    return next((full for full, aliases in _ALIASES.items() if lowered in aliases), lowered)


def _read_table(file: Path) -> Iterator[dict[str, str]]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        rows = csv.DictReader(lines)
        missing = [column for column in _COLUMNS if column not in (rows.fieldnames or [])]
        if missing:
            raise ValueError(f"{file} has no column {', '.join(missing)}")
        yield from rows


def _alphabet(labels: set[str]) -> tuple[str, ...]:
    """Names in their order, one for each way of writing a name with other signs or capitals."""
    once = {plain(label): label for label in sorted(labels, reverse=True)}
    return tuple(sorted(once.values(), key=lambda label: label.replace(" ", "_")))


def _by_stem(home: Path, root: Path) -> dict[str, list[Path]]:
    """Videos by their names without suffix; sound copies in the place of broken ones."""
    found: dict[str, list[Path]] = {}
    for path in videos_below(home).values():
        found.setdefault(path.stem, []).append(path)
    replacement = root / "replacement"
    if replacement.is_dir():
        found.update({p.stem: [p] for p in videos_below(replacement).values()})
    return found


def _from_list(
    file: Path,
    beside: list[Path],
    bases: tuple[Path, Path],
    names: tuple[str, ...] | None,
    tally: Tally,
) -> tuple[list[Row], tuple[str, ...]]:
    """Clips and class names of a list of paths and labels."""
    lines = list(_read_list(file))
    every = [*lines, *(line for other in beside for line in _read_list(other))]
    if all(label.isdecimal() for _, label in every):
        names = names or _folder_names(file, every)
        over = next((label for _, label in every if int(label) >= len(names)), None)
        if over is not None:
            raise ValueError(f"{file}: class {over} is none of the {len(names)} classes")
        label_of = {label: names[int(label)] for _, label in every}
    else:
        label_of = {label: _named(label) for _, label in every}
        names = names or _alphabet(set(label_of.values()))
        known = {plain(name) for name in names}
        unknown = next((n for n in label_of.values() if plain(n) not in known), None)
        if unknown is not None:
            raise ValueError(f"{file}: label {unknown!r} is none of the classes")
    places = [*dict.fromkeys((*bases, file.parent))]
    present = [videos_below(place) for place in places]
    rows: list[Row] = []
    for text, label in lines:
        wanted = os.path.normpath(text)
        path = next((found[wanted] for found in present if wanted in found), None)
        if path is None and os.path.isabs(wanted) and os.path.isfile(wanted):
            path = Path(wanted)
        if path is None:
            tally.skip("missing", text)
        else:
            rows.append((path, text, label_of[label], {}))
    return rows, names


def _read_list(file: Path) -> Iterator[tuple[str, str]]:
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            # paths may have spaces of their own: the last one parts path and label
            match = re.fullmatch(r"(.*[^\s,])[\s,]+(\S+)", line.strip())
            if match is None or os.path.splitext(match[1])[1].lower() not in CLIP_SUFFIXES:
                raise ValueError(
                    f"{file}, line {number}: {line.strip()!r} is not the path of a video and one "
                    "label (lists of frame folders and of several labels are not read)"
                )
            yield match[1], match[2]


def _folder_names(file: Path, lines: list[tuple[str, str]]) -> tuple[str, ...]:
    """Names of numbered classes from the folders that their videos lie in."""
    found: dict[int, set[str]] = {}
    for text, label in lines:
        found.setdefault(int(label), set()).add(_named(Path(text).parent.name))
    single = {number: next(iter(names)) for number, names in found.items() if len(names) == 1}
    different = {plain(name) for name in single.values()}
    if (
        len(single) != len(found)
        or len(found) < 2
        or "" in different
        or len(different) != len(found)
    ):
        raise ValueError(
            f"{file} numbers its classes and its videos lie in no folders named by them: give "
            "their names by classes="
        )
    return names_by_number(single)


def _from_folders(
    root: Path, home: Path, siblings: bool, names: tuple[str, ...] | None
) -> tuple[list[Row], tuple[str, ...]]:
    """Clips and class names where folders alone say the label."""
    found = videos_below(home)
    labels = {_named(path.parent.name) for path in found.values() if path.parent != home}
    if not labels:
        raise FileNotFoundError(f"no folders of labels with videos in {str(home)!r}")
    if names is None:
        others = [_home(root, split) for split in _ALIASES] if siblings else []
        for other in others:
            if other not in (root, home):
                labels |= {_named(place.name) for place in other.iterdir() if place.is_dir()}
        names = _alphabet(labels)
    known = {plain(name) for name in names}
    rows: list[Row] = []
    for key, path in found.items():
        label = _named(path.parent.name)
        if path.parent == home:
            continue
        if plain(label) not in known:
            raise ValueError(f"folder {str(path.parent)!r} is named by none of the classes")
        rows.append((path, key, label, {}))
    return rows, names
