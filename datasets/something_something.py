"""Something-Something V2: short webm videos of hands with objects, and sentences about them.

Format (Goyal et al., "The 'something something' video database", ICCV 2017, version 2): a folder
of ``<id>.webm`` and JSON files ``train.json``, ``validation.json``, ``test.json`` and
``labels.json`` (older releases: ``something-something-v2-train.json`` and so on). An annotation is
``{"id", "label", "template", "placeholders"}``: the label is the template with its ``[something]``
filled in; ``labels.json`` numbers the templates, written there without brackets. The test set has
ids alone.
"""

import json
import os
from pathlib import Path
from typing import Any

from stvision.datasets.labelled import names_by_number
from stvision.datasets.records import ClipDataset, Entry, Tally, canonical_split, clean_captions

_PREFIXES = ("something-something-v2-", "")
_VIDEO_FOLDERS = ("20bn-something-something-v2", "videos", "webm", ".")
_LABEL_FOLDERS = (".", "labels", "annotations")


class SomethingSomething(ClipDataset):
    """Clips of Something-Something V2.

    ``meta`` holds ``template``, ``placeholders``, ``split``, ``label`` (the template as
    ``labels.json`` writes it, without brackets) and, with that file, ``class_id`` (0 to 173);
    ``class_names`` the labels in the order of ``class_id``, none without the file. Videos that are missing and annotations without a label (the test set's) are left
    out and counted.

    Args:
        root: folder that holds annotations and videos, in the release's own layout or side by side.
        split: "train", "validation" or "test".
        videos: folder of the webm files; found below ``root`` when None.
        annotations: folder of the JSON files; found below ``root`` when None.
        **options: see :class:`~stvision.datasets.records.ClipDataset`.

    Raises:
        FileNotFoundError: no annotations or no folder of videos.
        ValueError: an unknown split, or annotations of another form.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        split: str = "train",
        videos: str | os.PathLike[str] | None = None,
        annotations: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> None:
        folder = Path(root)
        name = canonical_split(split)
        if name not in ("train", "validation", "test"):
            raise ValueError(f"split is {split!r}; allowed are train, validation, test")
        bases = [Path(annotations)] if annotations else [folder / f for f in _LABEL_FOLDERS]
        file = _find(bases, name)
        if file is None:
            raise FileNotFoundError(
                f"no {name}.json or something-something-v2-{name}.json in "
                f"{', '.join(str(base) for base in bases)}"
            )
        labels = _find([file.parent], "labels")
        numbers = json.loads(labels.read_text(encoding="utf-8")) if labels else {}
        self.class_names = names_by_number({int(n): label for label, n in numbers.items()})
        places = [Path(videos)] if videos else [folder / f for f in _VIDEO_FOLDERS]
        clips = next((p for p in places if p.is_dir() and any(p.glob("*.webm"))), None)
        if clips is None:
            raise FileNotFoundError(f"no webm files in {', '.join(str(place) for place in places)}")
        present = {entry.name for entry in os.scandir(clips)}
        rows = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(rows, list) or any(
            not isinstance(r, dict) or "id" not in r for r in rows
        ):
            raise ValueError(f"{file} is no list of objects with an 'id'")

        tally = Tally(f"Something-Something V2 [{name}]")
        entries = []
        for row in rows:
            video = f"{row['id']}.webm"
            captions = clean_captions([row.get("label")])
            if not captions:
                tally.skip("without a sentence", video)
            elif video not in present:
                tally.skip("missing", video)
            else:
                template = str(row.get("template", ""))
                label = template.replace("[", "").replace("]", "")
                meta: dict[str, Any] = {
                    "label": label,
                    "template": template,
                    "placeholders": list(row.get("placeholders", [])),
                    "split": name,
                }
                number = numbers.get(label)
                if number is not None:
                    meta["class_id"] = int(number)
                entries.append(Entry(clips / video, captions, str(row["id"]), meta))
        super().__init__(tally.name, entries, tally=tally, **options)


def _find(folders: list[Path], name: str) -> Path | None:
    for folder in folders:
        for prefix in _PREFIXES:
            if (folder / f"{prefix}{name}.json").is_file():
                return folder / f"{prefix}{name}.json"
    return None
