"""Clips decoded once into one memory-mapped file of uint8 frames, for fast training.

A packed folder holds ``frames.npy`` (N, T, H, W, 3) and ``index.jsonl`` (key, captions, times,
row, meta). :func:`pack` makes it from any reader of this package and can be interrupted at any
moment; :class:`PackedFolder` reads it with the same records.
"""

import copy
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import Dataset

from stvision.datasets.clips import matches
from stvision.datasets.records import ClipDataset, Record, Tally, canonical_split

FRAMES_NAME = "frames.npy"
INDEX_NAME = "index.jsonl"
_PARTIAL_FRAMES = ".frames.partial.npy"
_PARTIAL_INDEX = ".index.partial.jsonl"
#: clips between two points at which an interrupted call goes on
_BLOCK = 256


def pack(
    dataset: ClipDataset,
    out: str | os.PathLike[str],
    *,
    workers: int = 0,
    progress: bool = True,
) -> Tally:
    """Decode every clip of a reader once into a packed folder.

    A call that was interrupted goes on at its last block of 256 clips; a finished folder of the
    same clips is left as it is. Nothing lies under the final names before all is done.

    Args:
        dataset: a reader with ``num_frames`` and ``size``, so that all records have one shape.
        out: folder to write.
        workers: processes that decode.
        progress: show a bar.

    Returns:
        Counts of clips packed and left out.

    Raises:
        ValueError: the reader gives records of unequal shapes, or ``out`` holds other clips.
    """
    from tqdm import tqdm

    if dataset.num_frames is None or dataset.size is None:
        raise ValueError(
            "packing needs a reader with num_frames and size, so that shapes are equal"
        )
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    shape = (len(dataset), dataset.num_frames, *dataset.size, 3)
    spec = {"fingerprint": dataset.fingerprint(), "shape": list(shape)}
    tally = Tally(str(folder))
    finished = folder / INDEX_NAME
    if finished.exists() and (folder / FRAMES_NAME).exists():
        if json.loads(finished.open(encoding="utf-8").readline()).get("spec") != spec:
            raise ValueError(f"{folder} holds other packed clips; choose another folder")
        tally.kept = len(_lines(finished)) - 1
        return tally
    if not len(dataset):
        raise ValueError(f"{dataset.name} holds no clips")

    partial, journal = folder / _PARTIAL_FRAMES, folder / _PARTIAL_INDEX
    lines = _lines(journal) if journal.exists() and partial.exists() else []
    if not lines or lines[0].get("spec") != spec:
        frames = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=shape)
        lines = [{"spec": spec}]
        journal.write_text(json.dumps(lines[0]) + "\n", encoding="utf-8")
    else:
        frames = np.lib.format.open_memmap(partial, mode="r+")
    blocks = {line["block"]: line for line in lines[1:]}
    with tqdm(total=shape[0], unit="clip", disable=not progress, desc="pack") as bar:
        todo: list[int] = []
        for start in range(0, shape[0], _BLOCK):
            if start in blocks:
                bar.update(min(_BLOCK, shape[0] - start))
            else:
                todo += range(start, min(start + _BLOCK, shape[0]))
        entries: list[dict[str, Any]] = []
        skipped: list[list[str]] = []
        # one stream over all blocks, so that the workers never run dry between them
        for number, item in zip(todo, dataset.iter_items(workers, indices=todo), strict=True):
            if isinstance(item, Record):
                if tuple(item.frames.shape) != shape[1:]:
                    raise ValueError(
                        f"{item.key} has frames {tuple(item.frames.shape)}, not {shape[1:]}"
                    )
                frames[number] = item.frames.numpy()
                entries.append(
                    {
                        "row": number,
                        "key": item.key,
                        "captions": item.meta.get("captions") or [item.text],
                        "times": item.times.tolist(),
                        "meta": {k: v for k, v in item.meta.items() if k != "captions"},
                    }
                )
            else:
                skipped.append([item.reason, item.key])
            bar.update()
            if number == shape[0] - 1 or (number + 1) % _BLOCK == 0:
                frames.flush()
                start = number // _BLOCK * _BLOCK
                blocks[start] = {"block": start, "entries": entries, "skipped": skipped}
                with journal.open("a", encoding="utf-8") as sink:
                    sink.write(json.dumps(blocks[start], default=str) + "\n")
                entries, skipped = [], []
    del frames
    rows = [entry for start in sorted(blocks) for entry in blocks[start]["entries"]]
    for start in sorted(blocks):
        for reason, key in blocks[start]["skipped"]:
            tally.skip(reason, key)
    tally.kept = len(rows)
    text = "".join(json.dumps(line, default=str) + "\n" for line in [{"spec": spec}, *rows])
    whole = folder / f".{INDEX_NAME}.{os.getpid()}"
    whole.write_text(text, encoding="utf-8")
    os.replace(partial, folder / FRAMES_NAME)
    os.replace(whole, finished)
    journal.unlink()
    tally.report()
    return tally


def _lines(path: Path) -> list[dict[str, Any]]:
    found = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            found.append(json.loads(text))
        except json.JSONDecodeError:
            break  # the end of a write that was killed
    return found


class PackedFolder(Dataset):
    """Records of a packed folder; frames come from a memory map, so opening it costs nothing.

    Args:
        root: folder that :func:`pack` wrote.
        split: keep only this split ("val" is "validation"); all when None.
        where: keep only clips whose ``meta`` has this value (or one of these) in a column.
        num_frames: frames of a record, spread evenly over those stored; all when None.
        size: (height, width) or side of a square, pixels; must be the stored size when given.
        caption: "first" or "random" of a clip's sentences.

    Raises:
        FileNotFoundError: no packed folder, or one whose packing is not finished.
        ValueError: more frames than are stored, or another size.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        split: str | None = None,
        where: Mapping[str, Any] | None = None,
        num_frames: int | None = None,
        size: int | tuple[int, int] | None = None,
        caption: Literal["first", "random"] = "first",
    ) -> None:
        self.root = Path(root)
        if not (self.root / INDEX_NAME).is_file() or not (self.root / FRAMES_NAME).is_file():
            raise FileNotFoundError(f"{str(self.root)!r} holds no finished packed clips")
        if caption not in ("first", "random"):
            raise ValueError(f"caption is {caption!r}; allowed are first, random")
        lines = _lines(self.root / INDEX_NAME)
        self._spec = lines[0]["spec"]
        _, stored, height, width, _ = self._spec["shape"]
        pair = (size, size) if isinstance(size, int) else size
        if pair is not None and tuple(pair) != (height, width):
            raise ValueError(
                f"{self.root} holds frames of {height}x{width} pixels, not {pair[0]}x{pair[1]}"
            )
        if num_frames is not None and not 1 <= num_frames <= stored:
            raise ValueError(f"num_frames is {num_frames}; {self.root} holds {stored} a clip")
        self.num_frames, self.size, self.caption = num_frames or stored, (height, width), caption
        wanted = None if split is None else canonical_split(split)
        self.entries = [
            line
            for line in lines[1:]
            if (
                wanted is None
                or canonical_split(str(line["meta"].get("split") or "train")) == wanted
            )
            and all(matches(line["meta"].get(k), v) for k, v in (where or {}).items())
        ]
        self.view = (0, 1)
        self._frames: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.entries)

    def __getstate__(self) -> dict[str, Any]:
        # a worker maps the file itself instead of being sent its contents
        return {**self.__dict__, "_frames": None}

    @property
    def frames(self) -> np.ndarray:
        """The whole file, (N, T, H, W, 3) uint8, mapped read-only; see ``entries`` for rows."""
        if self._frames is None:
            self._frames = np.load(self.root / FRAMES_NAME, mmap_mode="r")
        return self._frames

    def __getitem__(self, index: int | tuple[int, int]) -> Record:
        from stvision.io.sampling import mean_rate, view_indices

        number, seed = index if isinstance(index, tuple) else (index, None)
        entry = self.entries[number]
        times = torch.tensor(entry["times"], dtype=torch.float64)
        picks = view_indices(times, self.num_frames, *self.view)
        frames = torch.from_numpy(np.array(self.frames[entry["row"]][picks]))
        pick = 0
        if self.caption == "random":
            generator = torch.Generator()
            generator.manual_seed(seed) if seed is not None else generator.seed()
            pick = int(torch.randint(len(entry["captions"]), (1,), generator=generator))
        times = times[picks]
        meta = {**entry["meta"], "captions": list(entry["captions"])}
        rate = mean_rate(times)
        if rate is not None:
            meta["fps"] = rate
        return Record(frames, times, entry["captions"][pick], entry["key"], meta)

    def temporal_view(self, number: int, count: int) -> "PackedFolder":
        """One of several views in time of each clip, which lie between each other.

        Args:
            number: of the view, from 0.
            count: of views.

        Raises:
            ValueError: no such view.
        """
        if not 0 <= number < count:
            raise ValueError(f"view {number} of {count}: views are numbered from 0")
        twin = copy.copy(self)
        twin.view = (number, count)
        return twin

    def fingerprint(self) -> str:
        """Hash of the packed clips and of the choice among them."""
        keys = [entry["key"] for entry in self.entries]
        how = [self._spec, keys, self.num_frames, self.caption]
        text = json.dumps(how if self.view == (0, 1) else [*how, self.view])
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
