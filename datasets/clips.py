"""Any folder of clips: with a JSON-lines or CSV index, or with names that are the sentences."""

import csv
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from stvision.datasets.records import (
    ClipDataset,
    ClipError,
    Entry,
    Record,
    Sampling,
    Skipped,
    Tally,
    canonical_split,
    clean_captions,
)

__all__ = ["ClipDataset", "ClipError", "ClipFolder", "Entry", "Record", "Skipped", "Tally"]

#: suffixes of files that are clips
CLIP_SUFFIXES = frozenset({".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif"})
#: index files that are found without being named
INDEX_NAMES = ("index.jsonl", "index.csv", "metadata.jsonl", "metadata.csv")
#: columns that hold the path of a clip, and its sentence
PATH_COLUMNS = ("path", "file_name", "video", "video_path", "file")
TEXT_COLUMNS = ("caption", "text", "prompt", "sentence", "label")


class ClipFolder(ClipDataset):
    """Clips of a folder with an index, such as :func:`stvision.datasets.metaworld.render` writes.

    An index has one line a clip. ``path`` is relative to the folder; ``caption`` (one sentence) or
    ``captions`` (a list) says what is seen; ``split``, ``num_frames``, ``start`` and ``end``
    (seconds) are heeded where they are there; everything else goes into ``meta``. Without an index
    the names of files or of their folders are the sentences, with ``_`` and ``-`` as spaces.

    Lines without a sentence, whose file is missing, or that say they have fewer frames than asked
    for are left out and counted in one logged line.

    Args:
        root: the folder.
        index: index file, absolute or relative to the folder; one of :data:`INDEX_NAMES` when
            None; "stem" or "folder" for no index and sentences from names.
        split: keep only this split ("val" is "validation"); all when None. Lines without a split
            belong to "train".
        where: keep only lines whose column has this value, or one of these values.
        **options: see :class:`~stvision.datasets.records.ClipDataset`.

    Raises:
        FileNotFoundError: no such folder or index.
        ValueError: an index line that is no JSON object, or an index without the columns above.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        index: str | os.PathLike[str] | None = None,
        split: str | None = None,
        where: Mapping[str, Any] | None = None,
        num_frames: int | None = None,
        fps: float | None = None,
        sampling: Sampling = "uniform",
        size: int | tuple[int, int] | None = None,
        caption: Literal["first", "random"] = "first",
        **options: Any,
    ) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise FileNotFoundError(f"no folder {str(self.root)!r}")
        self.index = _find_index(self.root, index)
        tally = Tally(str(self.root) if split is None else f"{self.root} [{split}]")
        if isinstance(self.index, Path):
            lines = read_index(self.index)
        else:
            lines = _name_lines(self.root, self.index)
        entries = list(self._entries(lines, split, where or {}, num_frames, tally))
        super().__init__(
            tally.name,
            entries,
            num_frames=num_frames,
            fps=fps,
            sampling=sampling,
            size=size,
            caption=caption,
            tally=tally,
            **options,
        )

    def _entries(
        self,
        lines: Iterator[dict[str, Any]],
        split: str | None,
        where: Mapping[str, Any],
        num_frames: int | None,
        tally: Tally,
    ) -> Iterator[Entry]:
        wanted = None if split is None else canonical_split(split)
        present = _listing(self.root)
        for line in lines:
            path = next((str(line[c]) for c in PATH_COLUMNS if line.get(c)), None)
            if path is None:
                raise ValueError(
                    f"{self.index}: a line without a path; one of the columns "
                    f"{', '.join(PATH_COLUMNS)} must name the clip's file: {line}"
                )
            if wanted is not None and canonical_split(str(line.get("split") or "train")) != wanted:
                continue
            if any(not matches(line.get(column), value) for column, value in where.items()):
                continue
            texts = _as_list(line.get("captions"))
            text = next((line[c] for c in TEXT_COLUMNS if line.get(c)), None)
            captions = clean_captions([text, *texts])
            file = self.root / path
            if not captions:
                tally.skip("without a sentence", path)
                continue
            if os.path.normpath(path) not in present and not file.exists():
                tally.skip("missing", path)
                continue
            count = _number(line.get("num_frames"))
            if num_frames is not None and count is not None and count < num_frames:
                tally.skip("too short", path)
                continue
            meta = {k: v for k, v in line.items() if k not in {"captions", *PATH_COLUMNS}}
            yield Entry(
                file,
                captions,
                path,
                meta,
                start=_number(line.get("start")),
                end=_number(line.get("end")),
                fps=_number(line.get("fps")) if file.suffix == "" else None,
            )


def read_index(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """Lines of a .jsonl or .csv index as dicts.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another suffix, or a line that is no JSON object.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no index {str(file)!r}")
    if file.suffix in {".jsonl", ".ndjson"}:
        with file.open(encoding="utf-8") as lines:
            for number, text in enumerate(lines, 1):
                if not text.strip():
                    continue
                try:
                    line = json.loads(text)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{file}, line {number}: no JSON ({error})") from error
                if not isinstance(line, dict):
                    raise ValueError(f"{file}, line {number}: no JSON object")  # noqa: TRY004
                yield line
    elif file.suffix in {".csv", ".tsv"}:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            delimiter = "\t" if file.suffix == ".tsv" else ","
            yield from (dict(row) for row in csv.DictReader(lines, delimiter=delimiter))
    else:
        raise ValueError(
            f"index {str(file)!r}: suffix {file.suffix!r} is none of .jsonl, .csv, .tsv"
        )


def _find_index(root: Path, index: str | os.PathLike[str] | None) -> Path | str:
    if index in ("stem", "folder"):
        return str(index)
    if index is not None:
        found = Path(index) if Path(index).is_absolute() else root / index
        if not found.is_file():
            raise FileNotFoundError(f"no index {str(found)!r}")
        return found
    for name in INDEX_NAMES:
        if (root / name).is_file():
            return root / name
    raise FileNotFoundError(
        f"{str(root)!r} has none of {', '.join(INDEX_NAMES)}; name the index, or say index='stem' "
        "or index='folder' to take sentences from the names of files or folders"
    )


def _name_lines(root: Path, how: str) -> Iterator[dict[str, Any]]:
    for file in sorted(root.rglob("*")):
        if file.suffix.lower() in CLIP_SUFFIXES and not file.name.startswith("."):
            name = file.stem if how == "stem" else file.parent.name
            text = name.replace("_", " ").replace("-", " ")
            yield {"path": file.relative_to(root).as_posix(), "caption": text}


def _listing(root: Path) -> set[str]:
    # one walk instead of one question a file: data sets lie on slow network disks
    found: set[str] = set()
    for folder, _, files in os.walk(root):
        base = os.path.relpath(folder, root)
        found.update(files if base == "." else (f"{base}/{name}" for name in files))
    return found


def _as_list(value: Any) -> list[Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            return [value]
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else []


def _number(value: Any) -> float | None:
    if value is None or value == "":
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def matches(value: Any, wanted: Any) -> bool:
    """Whether a column has the wanted value, or one of several."""
    if isinstance(wanted, list | tuple | set | frozenset):
        return value in wanted or str(value) in {str(item) for item in wanted}
    return bool(value == wanted) or str(value) == str(wanted)
