"""Tensors of many clips on disk, in shards that are whole or not there."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
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


def weights_digest(module: nn.Module) -> str:
    """Short hash of a network's weights."""
    state = hashlib.blake2b(digest_size=10)
    for name, tensor in sorted(module.state_dict().items()):
        state.update(name.encode())
        state.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
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


@dataclass(frozen=True)
class PackedRecord:
    """A clip of :class:`PackedClips`; see the readers of ``stvision.datasets``."""

    frames: Tensor
    times: Tensor
    text: str
    key: str
    meta: dict[str, Any]


class PackedClips:
    """Decoded frames that lie in ``root/<split>`` as one store, read as a data set.

    Args:
        root: folder of the splits.
        split: name of one.
        num_frames: frames of a record, spread evenly over those stored, first and last included.
        size: (height, width) in pixels; must be that of the stored frames.

    Raises:
        FileNotFoundError: no such split.
        ValueError: other sizes, or fewer frames than asked for.
    """

    def __init__(self, root: str, *, split: str, num_frames: int, size: tuple[int, int]) -> None:
        self.store = Store(Path(root) / split)
        self.frames = self.store.load()["frames"]
        stored = tuple(self.frames.shape[1:4])
        if stored[1:] != tuple(size) or stored[0] < num_frames:
            raise ValueError(
                f"{root} holds clips of {stored[0]} frames of {stored[1]} x {stored[2]} pixels; "
                f"{num_frames} frames of {size[0]} x {size[1]} cannot be taken from them"
            )
        self.indices = torch.linspace(0, stored[0] - 1, num_frames).round().long()

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, index: int) -> PackedRecord:
        entry = self.store.entries[index]
        meta = {**entry["meta"], "captions": entry["captions"]}
        times = self.indices.double() / float(meta.get("fps", 8.0))
        frames = self.frames[index][self.indices]
        return PackedRecord(frames, times, entry["captions"][0], entry["key"], meta)

    def fingerprint(self) -> str:
        """Hash of the stored clips' origin."""
        return digest([self.store.spec, len(self), self.indices.tolist()])


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
