"""What readers of labelled videos share: class names, sentences of them, files, groups held out.

Each such reader gives ``meta["label"]``, the class's name, and ``meta["class_id"]``, its place in
the reader's ``class_names``; the same numbers in every split of a collection.
"""

import json
import os
import re
import zlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from stvision.datasets.clips import CLIP_SUFFIXES
from stvision.datasets.records import canonical_split

#: words of a name such as ``ReplaceCDDriveWithSSD``; runs of capitals stay together
_WORDS = re.compile(r"[A-Z]+\d*(?=[A-Z][a-z]|$|-)|-?[A-Z]?[a-z]+|[A-Z]+|-?\d+")
_JOINED = re.compile(r"[A-Z][A-Za-z0-9-]*")


@lru_cache(4096)
def sentence_of(label: str) -> str:
    """A class's name as words: ``brush_hair`` and ``BrushHair`` are "brush hair".

    Underscores become spaces. Names of joined words are taken apart, in small letters but for
    runs of capitals: ``ReplaceCDDriveWithSSD`` is "replace CD drive with SSD".
    """
    text = " ".join(label.replace("_", " ").split())
    if not _JOINED.fullmatch(text):
        return text
    words = _WORDS.findall(text)
    small = [w if len(w) > 1 and w[:2].isupper() else w.lower() for w in words]
    return " ".join(small).replace(" -", "-")


@lru_cache(4096)
def plain(label: str) -> str:
    """What stays the same of a class's name however its folder is written: letters and digits."""
    return re.sub(r"[\W_]+", "", label).lower()


def checked_split(split: str, allowed: Sequence[str] = ("train", "validation", "test")) -> str:
    """The split's own name, from any under which it is known.

    Raises:
        ValueError: it is none of those allowed.
    """
    name = canonical_split(split)
    if name not in allowed:
        raise ValueError(f"split is {split!r}; allowed are {', '.join(allowed)}")
    return name


def checked_share(share: float, name: str, collection: str) -> None:
    """See that the share of training groups held out for validation fits the split asked for.

    Raises:
        ValueError: no share, or a validation split without any.
    """
    if not 0 <= share < 1:
        raise ValueError(f"validation is {share}; it is a share of at least 0 and below 1")
    if name == "validation" and share == 0:
        raise ValueError(
            f"{collection} publishes no validation split: say validation=0.1, in training too, to "
            "hold out that share of the training groups, or validate on split='test'"
        )


def held_out(groups: Iterable[tuple[str, str]], share: float) -> set[tuple[str, str]]:
    """The (class, group) pairs that training leaves to validation.

    Of each class, whole groups are taken in the order of a hash of their names, the same on every
    machine: the nearest number to ``share`` of them, but at least one and never all.
    """
    kinds: dict[str, set[str]] = defaultdict(set)
    for kind, group in groups:
        kinds[kind].add(group)
    chosen: set[tuple[str, str]] = set()
    if share > 0:
        for kind, names in kinds.items():
            order = sorted(names, key=lambda group: (zlib.crc32(f"{kind}/{group}".encode()), group))
            count = min(max(1, round(share * len(order))), len(order) - 1)
            chosen.update((kind, group) for group in order[:count])
    return chosen


def first_folder(places: Iterable[Path]) -> Path | None:
    """The first of the folders that is there."""
    return next((place for place in places if place.is_dir()), None)


def checked_fold(fold: int, allowed: Iterable[int]) -> int:
    """The fold of a collection that publishes several.

    Raises:
        ValueError: it is none of those allowed.
    """
    numbers = tuple(allowed)
    if fold not in numbers:
        raise ValueError(f"fold is {fold!r}; allowed are {', '.join(map(str, numbers))}")
    return fold


def video_home(root: Path, given: str | os.PathLike[str] | None, names: Iterable[str]) -> Path:
    """Folder of a collection's videos: the given one, else one of these below its root, or the root.

    Raises:
        FileNotFoundError: none of them is a folder.
    """
    places = [Path(given)] if given else [*(root / name for name in names), root]
    home = first_folder(places)
    if home is None:
        raise FileNotFoundError(f"no folder of videos {', '.join(str(p) for p in places)}")
    return home


def videos_below(folder: Path) -> dict[str, Path]:
    """Every video at any depth, by its path below the folder with ``/``; hidden files left out."""
    found = {}
    # one walk instead of one question a file: data sets lie on slow network disks
    for place, folders, files in os.walk(folder, followlinks=True):
        folders.sort()
        base = Path(place)
        below = base.relative_to(folder).as_posix()
        for name in sorted(files):
            if os.path.splitext(name)[1].lower() in CLIP_SUFFIXES and not name.startswith("."):
                found[name if below == "." else f"{below}/{name}"] = base / name
    return found


def read_class_names(source: str | os.PathLike[str] | Sequence[str]) -> tuple[str, ...]:
    """Names of classes in the order of their numbers.

    Args:
        source: the names; or a file: JSON (a list, or an object of name and number), or text with
            one name a line, alone or behind its number, which is then heeded from 0 or from 1.

    Raises:
        FileNotFoundError: no such file.
        ValueError: names that are not all different, or numbers with gaps.
    """
    if not isinstance(source, str | os.PathLike):
        names = [str(name).strip() for name in source]
        where = "classes"
    else:
        path = Path(source)
        if not path.is_file():
            raise FileNotFoundError(f"no file of class names {str(path)!r}")
        where, text = str(path), path.read_text(encoding="utf-8-sig")
        if path.suffix == ".json":
            data = json.loads(text)
            pairs = data.items() if isinstance(data, dict) else [(n, i) for i, n in enumerate(data)]
            names = _in_order([(str(n).strip().strip('"'), int(i)) for n, i in pairs], where)
        else:
            lines = [line.strip() for line in text.splitlines() if line.strip()]
            numbered = [re.fullmatch(r"(\d+)[\s,]+(.+)", line) for line in lines]
            if lines and all(numbered):
                names = _in_order([(m[2], int(m[1])) for m in numbered if m], where)
            else:
                names = [line.strip('"') for line in lines]
    if not names or len({plain(name) for name in names}) != len(names):
        raise ValueError(f"{where} must hold names of classes, all different, got {len(names)}")
    return tuple(names)


def names_by_number(names: Mapping[int, str]) -> tuple[str, ...]:
    """Names at the places of their numbers; "class 7" where a number is not known."""
    return tuple(
        names.get(number, f"class {number}") for number in range(max(names, default=-1) + 1)
    )


def _in_order(pairs: list[tuple[str, int]], where: str) -> list[str]:
    pairs = sorted(pairs, key=lambda pair: pair[1])
    numbers = [number for _, number in pairs]
    if not numbers or numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        raise ValueError(f"{where}: numbers of classes must follow each other without gaps")
    if numbers[0] not in (0, 1):
        raise ValueError(f"{where}: numbers of classes begin at 0 or 1, got {numbers[0]}")
    return [name for name, _ in pairs]
