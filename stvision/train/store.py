"""Tensors of many clips on disk, in shards that are whole or not there."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

#: clips in a shard
SHARD = 256
COMPLETE = "complete.json"

#: makes the tensors (name -> (n, ...)) and the entries of some indices; unusable ones are left out
Maker = Callable[[Sequence[int]], tuple[dict[str, Tensor], list[dict[str, Any]]]]


def digest(value: Any) -> str:
    """Short hash of plain data."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=10).hexdigest()


def files_digest(*folders: Path) -> str:
    """Short hash of the names and contents of files, or of all files in folders."""
    state = hashlib.blake2b(digest_size=10)
    for folder in folders:
        found = [folder] if folder.is_file() else folder.rglob("*")
        for file in sorted(path for path in found if path.is_file()):
            state.update(file.relative_to(folder).as_posix().encode())
            with file.open("rb") as stream:
                state.update(hashlib.file_digest(stream, "blake2b").digest())
    return state.hexdigest()


class Store:
    """A finished folder of shards.

    Args:
        folder: where it lies.

    Raises:
        FileNotFoundError: the folder is not there or not finished.
    """

    def __init__(self, folder: Path) -> None:
        marker = folder / COMPLETE
        if not marker.is_file():
            raise FileNotFoundError(f"{folder} holds no finished cache")
        self.folder = folder
        self.spec = json.loads(marker.read_text())["spec"]
        self._shards = sorted(folder.glob("shard_*.safetensors"))
        self.entries: list[dict[str, Any]] = []
        self._place: list[tuple[int, int]] = []
        for number, shard in enumerate(self._shards):
            lines = shard.with_suffix(".jsonl").read_text().splitlines()
            self.entries += [json.loads(line) for line in lines]
            self._place += [(number, row) for row in range(len(lines))]

    def __len__(self) -> int:
        return len(self.entries)

    def load(self) -> dict[str, Tensor]:
        """All tensors, (N, ...) each, in host memory."""
        parts = [load_file(shard) for shard in self._shards]
        parts = [part for part in parts if part]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def row(self, index: int) -> dict[str, Tensor]:
        """The tensors of one clip, read from the disk."""
        number, row = self._place[index]
        with safe_open(self._shards[number], framework="pt") as file:
            return {name: file.get_slice(name)[row] for name in file.keys()}  # noqa: SIM118


def build(folder: Path, count: int, make: Maker, spec: dict[str, Any], title: str) -> Store:
    """Make a store, or finish one whose making was interrupted, or open a finished one.

    Args:
        folder: where it shall lie; its name should depend on ``spec``.
        count: number of indices that ``make`` is asked for.
        make: see :data:`Maker`.
        spec: plain data, kept beside the tensors.
        title: shown by the progress bar.

    Raises:
        ValueError: not a single clip was usable.
    """
    if (folder / COMPLETE).is_file():
        return Store(folder)
    folder.mkdir(parents=True, exist_ok=True)
    kept = 0
    with tqdm(total=count, desc=title, unit="clip", dynamic_ncols=True) as bar:
        for number, first in enumerate(range(0, count, SHARD)):
            indices = range(first, min(first + SHARD, count))
            shard = folder / f"shard_{number:06d}.safetensors"
            listing = shard.with_suffix(".jsonl")
            if not shard.is_file():
                tensors, entries = make(indices)
                lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
                _write(listing, partial(_write_text, lines))
                contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
                _write(shard, partial(save_file, contiguous))
            kept += len(listing.read_text().splitlines())
            bar.update(len(indices))
    if not kept:
        raise ValueError(f"none of the {count} clips could be used")
    if kept < count:
        tqdm.write(f"{title}: {count - kept} of {count} clips could not be used and are left out")
    text = json.dumps({"count": kept, "spec": spec}, indent=2)
    _write(folder / COMPLETE, partial(_write_text, text))
    return Store(folder)


def _write_text(text: str, path: Path) -> None:
    path.write_text(text)


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    write(temporary)
    os.replace(temporary, path)
