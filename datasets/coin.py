"""COIN: instructional web videos of 180 tasks, with the steps that are taken in them.

Format (Tang et al., "COIN: A Large-scale Dataset for Comprehensive Instructional Video Analysis",
CVPR 2019): ``COIN.json`` holds ``{"database": {<youtube id>: {"class", "recipe_type", "subset",
"start", "end", "duration", "annotation", ...}}}``; ``recipe_type`` is the number of the task (0 to
179), ``subset`` is "training" or "testing", ``start`` and ``end`` are the seconds between which
the video shows the task, and ``annotation`` lists its steps as ``{"id", "label", "segment"}``: a
number from 1 to 778 (as text), words, and [first, last] second. ``taxonomy.xlsx`` beside it names
each task's domain (sheet 1) and numbers tasks and steps (sheet 2). The authors' script stores
videos as ``videos/<recipe_type>/<youtube id>.mp4``.
"""

import json
import os
import re
import zipfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

from stvision.datasets.labelled import (
    checked_share,
    checked_split,
    first_folder,
    held_out,
    sentence_of,
    videos_below,
)
from stvision.datasets.records import ClipDataset, Entry, Tally, canonical_split

_NAMESPACE = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"


class COIN(ClipDataset):
    """Videos of COIN with their tasks, or pieces of them with their steps.

    A task's class is its ``recipe_type``, a step's its place among all step numbers (number minus
    1 where all are known), both counted over the whole database and the taxonomy where it is
    there, so that they are the same in every split. Steps of the same words are told apart in
    ``class_names`` by their number behind them. ``meta`` holds ``label``, ``class_id``, ``split``,
    ``video``, ``task``, ``recipe_type`` and, where known, ``domain``; of a step ``step_id`` as
    well. Videos that are missing and pieces without a length are left out and counted.

    Args:
        root: folder of ``COIN.json``, ``taxonomy.xlsx`` and ``videos``.
        split: "train" ("training"), "test" ("testing") or "validation". No validation split is
            published; it is made of the share ``validation`` of each task's training videos,
            chosen by a hash of their names and held out of "train".
        level: "task", a whole video and its task; or "step", a piece and its step.
        region: of a task take only the seconds between its ``start`` and ``end``, as ViS4mer
            does; the whole video when False.
        validation: share of each task's training videos held out.
        annotations: the JSON file; ``COIN.json`` in ``root`` or its ``annotations`` when None.
        videos: folder of the videos, at any depth; found below ``root`` when None.
        **options: see :class:`~stvision.datasets.records.ClipDataset`.

    Raises:
        FileNotFoundError: no such folder or annotations.
        ValueError: an unknown split or level, a validation split without a share, or annotations
            of another form.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        split: str = "train",
        level: Literal["task", "step"] = "task",
        region: bool = True,
        validation: float = 0.0,
        annotations: str | os.PathLike[str] | None = None,
        videos: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> None:
        folder = Path(root)
        name = checked_split(split)
        if level not in ("task", "step"):
            raise ValueError(f"level is {level!r}; allowed are task, step")
        places = [folder / "COIN.json", folder / "annotations" / "COIN.json"]
        places = [Path(annotations)] if annotations is not None else places
        file = next((place for place in places if place.is_file()), None)
        if file is None:
            raise FileNotFoundError(f"no annotations {', '.join(str(place) for place in places)}")
        database = _read(file)
        home = first_folder([folder / "videos", folder]) if videos is None else Path(videos)
        if home is None or not home.is_dir():
            raise FileNotFoundError(f"no folder of videos {str(home or folder)!r}")

        subsets = {video: canonical_split(facts["subset"]) for video, facts in database.items()}
        if "validation" not in subsets.values():
            checked_share(validation, name, "COIN")
            pool = [
                (str(facts["recipe_type"]), video)
                for video, facts in database.items()
                if subsets[video] == "train"
            ]
            for _, video in held_out(pool, validation):
                subsets[video] = "validation"
        domains, tasks, steps = _taxonomy(file.parent / "taxonomy.xlsx")
        for facts in database.values():
            tasks[facts["recipe_type"]] = facts["class"]
            for step in facts.get("annotation", ()):
                steps[int(step["id"])] = " ".join(str(step["label"]).split())
        known = steps if level == "step" else tasks
        rank = {number: place for place, number in enumerate(sorted(known))}
        self.class_names = _told_apart([known[number] for number in rank], rank)

        present = {path.stem: path for path in videos_below(home).values()}
        tally = Tally(f"COIN [{name}, {level}s]")
        entries = []
        for video, facts in database.items():
            if subsets[video] != name:
                continue
            path = present.get(video)
            if path is None:
                tally.skip("missing", video)
                continue
            meta: dict[str, Any] = {
                "split": name,
                "video": video,
                "task": facts["class"],
                "recipe_type": facts["recipe_type"],
            }
            if facts["class"] in domains:
                meta["domain"] = domains[facts["class"]]
            if level == "task":
                meta["class_id"] = rank[facts["recipe_type"]]
                meta["label"] = self.class_names[meta["class_id"]]
                start, end = (facts.get("start"), facts.get("end")) if region else (None, None)
                if start is not None and end is not None and not end > start:
                    tally.skip("too short", video)
                    continue
                entries.append(
                    Entry(path, [sentence_of(facts["class"])], video, meta, start=start, end=end)
                )
                continue
            for place, step in enumerate(facts.get("annotation", ())):
                key = f"{video}/{place}"
                start, end = (float(second) for second in step["segment"])
                if not end > start:
                    tally.skip("too short", key)
                    continue
                number = int(step["id"])
                own = {
                    "label": self.class_names[rank[number]],
                    "class_id": rank[number],
                    "step_id": number,
                }
                entries.append(
                    Entry(path, [steps[number]], key, {**meta, **own}, start=start, end=end)
                )
        super().__init__(tally.name, entries, tally=tally, **options)


def _read(file: Path) -> dict[str, dict[str, Any]]:
    """The database, once it is seen to have what is read of it."""
    data = json.loads(file.read_text(encoding="utf-8"))
    database = data.get("database") if isinstance(data, dict) else None
    if not isinstance(database, dict):
        raise ValueError(f"{file} is no object with a 'database'")  # noqa: TRY004
    names: dict[int, str] = {}
    for video, facts in database.items():
        missing = [key for key in ("class", "recipe_type", "subset") if key not in facts]
        if missing:
            raise ValueError(f"{file}: video {video!r} has no {', '.join(missing)}")
        facts["recipe_type"] = int(facts["recipe_type"])
        other = names.setdefault(facts["recipe_type"], facts["class"])
        if other != facts["class"]:
            raise ValueError(
                f"{file}: recipe_type {facts['recipe_type']} of video {video!r} is both {other!r} "
                f"and {facts['class']!r}"
            )
        for step in facts.get("annotation", ()):
            if not {"id", "label", "segment"} <= step.keys() or len(step["segment"]) != 2:
                raise ValueError(
                    f"{file}: a step of video {video!r} is no id, label and segment of two seconds"
                )
    return database


def _told_apart(names: Iterable[str], numbers: Iterable[int]) -> tuple[str, ...]:
    """The names, with their number behind those that are the same."""
    pairs = list(zip(names, numbers, strict=True))
    counts = Counter(name for name, _ in pairs)
    return tuple(f"{name} ({number})" if counts[name] > 1 else name for name, number in pairs)


def _taxonomy(file: Path) -> tuple[dict[str, str], dict[int, str], dict[int, str]]:
    """Task -> domain, and the names of tasks and of steps by number; empty without the file."""
    domains: dict[str, str] = {}
    tasks: dict[int, str] = {}
    steps: dict[int, str] = {}
    if file.is_file():
        by_domain, by_task = _sheets(file, 2)
        domains = {row["B"]: row["A"] for row in by_domain[1:]}
        for row in by_task[1:]:
            tasks[int(float(row["A"]))] = row["B"]
            steps[int(float(row["C"]))] = " ".join(row["D"].split())
    return domains, tasks, steps


def _sheets(file: Path, count: int) -> list[list[dict[str, str]]]:
    """The first sheets of a workbook as rows of column -> text.

    Raises:
        ValueError: it is no workbook with so many sheets.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            shared = ElementTree.fromstring(archive.read("xl/sharedStrings.xml"))
            texts = [
                "".join(part.text or "" for part in item.iter(f"{_NAMESPACE}t"))
                for item in shared.iter(f"{_NAMESPACE}si")
            ]
            sheets = []
            for number in range(1, count + 1):
                root = ElementTree.fromstring(archive.read(f"xl/worksheets/sheet{number}.xml"))
                rows = []
                for row in root.iter(f"{_NAMESPACE}row"):
                    cells = {}
                    for cell in row.iter(f"{_NAMESPACE}c"):
                        value = cell.findtext(f"{_NAMESPACE}v")
                        if value is not None:
                            column = re.sub(r"\d", "", cell.get("r", ""))
                            cells[column] = texts[int(value)] if cell.get("t") == "s" else value
                    rows.append(cells)
                sheets.append(rows)
            return sheets
    except (KeyError, zipfile.BadZipFile, ElementTree.ParseError) as error:
        raise ValueError(
            f"{file} is no workbook of a sheet of domains and one of steps: {error}"
        ) from error
