"""BridgeData V2: robot arms in toy kitchens, in the release's raw folders.

Format (Walke et al., "BridgeData V2", CoRL 2023): trajectories lie at any depth as
``.../raw/traj_group<G>/traj<K>/`` with one folder of JPEG frames a camera (``images0/im_0.jpg``,
``im_1.jpg``, ...), recorded at 5 steps a second, and ``lang.txt``: one instruction a line and,
last, a line ``confidence: <number>``. Trajectories without ``lang.txt`` were never described.
"""

import os
import re
import zlib
from pathlib import Path
from typing import Any

from stvision.datasets.records import ClipDataset, Entry, Tally, canonical_split, clean_captions

#: steps a second of the release
RATE = 5.0
_FRAME = re.compile(r"im_(\d+)\.(?:jpe?g|png)", re.IGNORECASE)
_CONFIDENCE = re.compile(r"\s*confidence\s*:\s*([-+.\deE]+)\s*", re.IGNORECASE)


class BridgeData(ClipDataset):
    """Clips of BridgeData V2, one a trajectory and camera.

    The raw release has no splits: a trajectory belongs to "validation" by a hash of its path below
    ``root``, the same on every machine. ``meta`` holds ``camera``, ``trajectory``, ``confidence``
    (of the instruction, where given), ``split`` and ``num_frames``.

    Args:
        root: folder of the raw release, or any folder below it.
        split: "train" or "validation"; both when None.
        cameras: numbers of the ``images<N>`` folders that are read.
        validation: share of trajectories in the validation split.
        **options: see :class:`~stvision.datasets.records.ClipDataset`.

    Raises:
        FileNotFoundError: no such folder, or no trajectories in it.
        ValueError: ``root`` is an RLDS (TFDS) export, which is refused, or an unknown split.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        split: str | None = None,
        cameras: tuple[int, ...] | list[int] = (0,),
        validation: float = 0.1,
        num_frames: int | None = None,
        **options: Any,
    ) -> None:
        folder = Path(root)
        if not folder.is_dir():
            raise FileNotFoundError(f"no folder {str(folder)!r}")
        name = None if split is None else canonical_split(split)
        if name not in (None, "train", "validation"):
            raise ValueError(f"split is {split!r}; allowed are train, validation")
        if not 0 <= validation <= 1:
            raise ValueError(f"validation is {validation}; it is a share between 0 and 1")
        tally = Tally("BridgeData V2" if name is None else f"BridgeData V2 [{name}]")
        entries = []
        found = False
        for trajectory, names in _trajectories(folder):
            found = True
            key = trajectory.relative_to(folder).as_posix()
            place = zlib.crc32(key.encode()) / 2**32
            belongs = "validation" if place < validation else "train"
            if name is not None and belongs != name:
                continue
            captions, confidence = read_instruction(trajectory / "lang.txt")
            for camera in cameras:
                label = f"{key}/images{camera}"
                if not captions:
                    tally.skip("without a sentence", label)
                    continue
                if f"images{camera}" not in names:
                    tally.skip("missing", label)
                    continue
                frames = frame_files(trajectory / f"images{camera}")
                if not frames or (num_frames is not None and len(frames) < num_frames):
                    tally.skip("too short", label)
                    continue
                meta: dict[str, Any] = {
                    "camera": f"images{camera}",
                    "trajectory": key,
                    "split": belongs,
                    "num_frames": len(frames),
                }
                if confidence is not None:
                    meta["confidence"] = confidence
                entries.append(Entry(frames, captions, label, meta, fps=RATE))
        if not found:
            raise FileNotFoundError(
                f"no trajectories (folders traj<K> with images<N>/im_<T>.jpg) below {str(folder)!r}"
            )
        super().__init__(tally.name, entries, tally=tally, num_frames=num_frames, **options)


def _trajectories(folder: Path) -> list[tuple[Path, list[str]]]:
    found = []
    for place, names, files in os.walk(folder):
        names.sort()
        if any(".tfrecord" in file for file in files) or {
            "features.json",
            "dataset_info.json",
        } <= set(files):
            raise ValueError(
                f"{place} is an RLDS (TFDS) export; its records need TensorFlow Datasets to be "
                "read. Use the raw release (demos and scripted folders with traj<K>/images<N>), "
                "or export the episodes to videos with an index.jsonl and read them as ClipFolder"
            )
        images = [name for name in names if re.fullmatch(r"images\d+", name)]
        if images:
            found.append((Path(place), images))
            names.clear()  # nothing of interest lies deeper
    return found


def read_instruction(path: Path) -> tuple[list[str], float | None]:
    """Sentences and the confidence of a ``lang.txt``; no sentences when there is no such file."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return [], None
    confidence = None
    texts = []
    for line in lines:
        match = _CONFIDENCE.fullmatch(line)
        if match is None:
            texts.append(line)
            continue
        try:
            confidence = float(match[1])
        except ValueError:
            confidence = None
    return clean_captions(texts), confidence


def frame_files(folder: Path) -> list[Path]:
    """Frames ``im_<number>`` of a folder in the order of their numbers."""
    numbered = []
    for entry in os.scandir(folder):
        match = _FRAME.fullmatch(entry.name)
        if match is not None:
            numbered.append((int(match[1]), Path(entry.path)))
    return [path for _, path in sorted(numbered)]
