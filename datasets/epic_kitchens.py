"""EPIC-KITCHENS-100: narrated actions in egocentric kitchen videos.

Format (Damen et al., "Rescaling Egocentric Vision", IJCV 2022, annotations v1): one CSV a split
(``EPIC_100_train.csv``, ``EPIC_100_validation.csv``; the test set, ``EPIC_100_test_timestamps.csv``,
has no narrations) with ``narration_id``, ``participant_id``, ``video_id``, ``start_timestamp`` and
``stop_timestamp`` (HH:MM:SS.ss), ``start_frame``, ``stop_frame``, ``narration``, ``verb_class``,
``noun_class`` and more. Below ``<participant>/`` lie ``videos/<video_id>.MP4``, or
``rgb_frames/<video_id>/frame_0000000001.jpg`` (numbers from 1), or the same as
``rgb_frames/<video_id>.tar``. Released frames are 50 a second in the extension (``P01_101``) and 60
(59.94) in the older videos (``P01_01``); ``EPIC_100_video_info.csv`` states each video's rate.
"""

import csv
import io
import os
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stvision.datasets.records import (
    ClipDataset,
    ClipError,
    Entry,
    Tally,
    canonical_split,
    clean_captions,
)
from stvision.io import Clip
from stvision.io.sampling import mean_rate

_FILES = {
    "train": "EPIC_100_train.csv",
    "validation": "EPIC_100_validation.csv",
    "test": "EPIC_100_test_timestamps.csv",
}
_COLUMNS = ("narration_id", "participant_id", "video_id", "start_timestamp", "stop_timestamp")
_VIDEO_SUFFIXES = (".MP4", ".mp4")


class EpicKitchens(ClipDataset):
    """Clips of EPIC-KITCHENS-100, one a narrated action.

    ``meta`` holds ``participant_id``, ``video_id``, ``verb``, ``verb_class``, ``noun``,
    ``noun_class`` and ``split``. Times of a record are those in the whole video. Actions whose
    video is missing and those without a narration (the test set's) are left out and counted.

    Args:
        root: folder of the participants' folders (``P01`` to ``P37``), or one with
            ``EPIC-KITCHENS`` in it.
        split: "train", "validation" or "test".
        annotations: folder of the CSV files; ``root`` and its subfolder
            ``epic-kitchens-100-annotations`` are searched when None.
        source: read "videos", "frames" (folders or tars of frames), or "auto" for what is there,
            frames first.
        **options: see :class:`~stvision.datasets.records.ClipDataset`.

    Raises:
        FileNotFoundError: no such folder or annotations.
        ValueError: an unknown split, or a CSV of other columns.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        split: str = "train",
        annotations: str | os.PathLike[str] | None = None,
        source: Literal["auto", "videos", "frames"] = "auto",
        **options: Any,
    ) -> None:
        folder = Path(root)
        name = canonical_split(split)
        if name not in _FILES:
            raise ValueError(f"split is {split!r}; allowed are {', '.join(_FILES)}")
        if source not in ("auto", "videos", "frames"):
            raise ValueError(f"source is {source!r}; allowed are auto, videos, frames")
        if not folder.is_dir():
            raise FileNotFoundError(f"no folder {str(folder)!r}")
        places = [folder, folder / "epic-kitchens-100-annotations", folder / "annotations"]
        if annotations is not None:
            places = [Path(annotations)]
        table = next((p / _FILES[name] for p in places if (p / _FILES[name]).is_file()), None)
        if table is None:
            raise FileNotFoundError(
                f"no {_FILES[name]} in {', '.join(str(place) for place in places)}"
            )
        base = folder / "EPIC-KITCHENS" if (folder / "EPIC-KITCHENS").is_dir() else folder
        self._source = source
        self._rates = _read_rates(table.parent / "EPIC_100_video_info.csv")
        tally = Tally(f"EPIC-KITCHENS-100 [{name}]")
        entries = []
        media: dict[str, Path | None] = {}
        with table.open(encoding="utf-8-sig", newline="") as lines:
            rows = csv.DictReader(lines)
            missing = [c for c in _COLUMNS if c not in (rows.fieldnames or [])]
            if missing:
                raise ValueError(f"{table} has no column {', '.join(missing)}")
            for row in rows:
                key, video = row["narration_id"], row["video_id"]
                captions = clean_captions([row.get("narration")])
                if not captions:
                    tally.skip("without a sentence", key)
                    continue
                if video not in media:
                    media[video] = self._find(base / row["participant_id"], video)
                found = media[video]
                if found is None:
                    tally.skip("missing", key)
                    continue
                meta: dict[str, Any] = {"split": name, "source": found.suffix or "frames"}
                for column in ("participant_id", "video_id", "verb", "noun"):
                    meta[column] = row.get(column, "")
                for column in ("verb_class", "noun_class", "start_frame", "stop_frame"):
                    if row.get(column, ""):
                        meta[column] = int(row[column])
                start, end = seconds(row["start_timestamp"]), seconds(row["stop_timestamp"])
                if not end > start:
                    tally.skip("too short", key)
                    continue
                entries.append(Entry(found, captions, key, meta, start=start, end=end))
        self._tars: dict[Path, dict[int, tuple[int, int]]] = {}
        super().__init__(tally.name, entries, tally=tally, **options)

    def _find(self, participant: Path, video: str) -> Path | None:
        candidates: list[Path] = []
        if self._source in ("auto", "frames"):
            frames = participant / "rgb_frames"
            candidates += [frames / video, frames / f"{video}.tar"]
        if self._source in ("auto", "videos"):
            videos = participant / "videos"
            candidates += [videos / f"{video}{suffix}" for suffix in _VIDEO_SUFFIXES]
        return next((path for path in candidates if path.exists()), None)

    def rate(self, video: str) -> float:
        """Frames a second of a video's released frames."""
        if video in self._rates:
            return self._rates[video]
        # numbers of three digits name the videos of the extension
        return 50.0 if re.fullmatch(r"P\d+_\d{3}", video) else 60000 / 1001

    def measure(self, index: int) -> tuple[int, int, int]:
        """As in the base class; frames that lie as files give their size in their headers."""
        entry = self.entries[index]
        if _is_video(entry):
            return super().measure(index)
        present, times = self._present(entry)
        count = len(self._candidates(_whole(entry), times))
        try:
            with self._stored(entry)(present[0]) as file, Image.open(file) as image:
                return count, image.height, image.width
        except OSError as error:
            raise ClipError("broken", f"{entry.key}: {error}") from error

    def _decode(self, entry: Entry, generator: Any) -> Any:
        if _is_video(entry):
            return super()._decode(entry, generator)
        present, times = self._present(entry)
        picks = self._choose(_whole(entry), times, generator)
        frames = []
        try:
            stored = self._stored(entry)
            for pick in picks:
                with stored(present[pick]) as file, Image.open(file) as image:
                    frames.append(torch.from_numpy(np.array(image.convert("RGB"))))
            clip = Clip(torch.stack(frames), times[picks], mean_rate(times[picks]))
        except (ValueError, OSError, RuntimeError) as error:
            raise ClipError("broken", f"{entry.key}: {error}") from error
        return self._fit(clip)

    def _present(self, entry: Entry) -> tuple[list[int], Tensor]:
        """Numbers of an action's frames that are there, and the seconds at which they are shown.

        Raises:
            ClipError: there are none.
        """
        assert isinstance(entry.source, Path) and entry.start is not None and entry.end is not None
        rate = self.rate(entry.meta["video_id"])
        # frame n (from 1) is shown at (n - 1) / rate
        first = int(entry.meta.get("start_frame") or round(entry.start * rate) + 1)
        last = int(entry.meta.get("stop_frame") or round(entry.end * rate) + 1)
        present = self._frames_of(entry.source, first, last)
        if not present:
            raise ClipError("missing", f"{entry.key}: no frames {first} to {last}")
        times = torch.tensor([(n - 1) / rate for n in present], dtype=torch.float64)
        return present, times

    def _stored(self, entry: Entry) -> Callable[[int], BinaryIO]:
        """Opens the file of a frame by its number."""
        source = entry.source
        assert isinstance(source, Path)

        def from_folder(number: int) -> BinaryIO:
            return (source / f"frame_{number:010d}.jpg").open("rb")

        def from_tar(number: int) -> BinaryIO:
            offset, size = self._tars[source][number]
            with source.open("rb") as archive:
                archive.seek(offset)
                return io.BytesIO(archive.read(size))

        return from_folder if source.is_dir() else from_tar

    def _frames_of(self, source: Path, first: int, last: int) -> list[int]:
        if source.is_dir():
            return [n for n in range(first, last + 1) if (source / f"frame_{n:010d}.jpg").is_file()]
        if source not in self._tars:
            members: dict[int, tuple[int, int]] = {}
            with tarfile.open(source, "r:") as archive:
                for member in archive:
                    match = re.search(r"frame_(\d+)\.jpe?g$", member.name)
                    if match and member.isfile():
                        members[int(match[1])] = (member.offset_data, member.size)
            self._tars[source] = members
        return [n for n in range(first, last + 1) if n in self._tars[source]]


def _is_video(entry: Entry) -> bool:
    return isinstance(entry.source, Path) and entry.source.suffix in _VIDEO_SUFFIXES


def _whole(entry: Entry) -> Entry:
    """The same clip where its frames have been picked out of the video already."""
    return Entry(entry.source, entry.captions, entry.key)


def seconds(timestamp: str) -> float:
    """Seconds of a ``HH:MM:SS.ss`` timestamp.

    Raises:
        ValueError: another form.
    """
    parts = timestamp.strip().split(":")
    if len(parts) != 3:
        raise ValueError(f"timestamp {timestamp!r} is not HH:MM:SS.ss")
    return int(parts[0]) * 3600 + int(parts[1]) * 60 + float(parts[2])


def _read_rates(path: Path) -> dict[str, float]:
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8-sig", newline="") as lines:
        return {row["video_id"]: float(row["fps"]) for row in csv.DictReader(lines)}
