"""Clips of mixed lengths and sizes, sorted into the shapes that a configuration lists."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from stvision.datasets.batching import Shape, nearest_bucket
from stvision.datasets.records import Skipped, Tally
from stvision.train.data import DataConfig, open_reader
from stvision.train.store import build, digest

#: a data set whose clips all have the shape of its configuration
Part = tuple[DataConfig, Any]


def open_parts(config: DataConfig, split: str) -> list[Part]:
    """The data set of a split, or one for each bucket that got clips.

    Lengths and sizes of the clips are read once from the files' headers and kept in the cache
    folder. A clip shorter than every bucket is counted and left out.

    Raises:
        FileNotFoundError: no such folder or index.
        ValueError: no clip fits a bucket.
    """
    if not config.buckets:
        return [(config, open_reader(config, split))]
    reader = open_reader(config, split, min(bucket[0] for bucket in config.buckets))
    members: dict[Shape, list[int]] = {bucket: [] for bucket in config.buckets}
    tally = Tally(f"{reader.name}, buckets")
    for index, shape in enumerate(_shapes(config, split, reader)):
        if shape is None:
            tally.skip("unreadable", reader.entries[index].key)
        elif (bucket := nearest_bucket(*shape, config.buckets)) is None:
            tally.skip("too short", reader.entries[index].key)
        else:
            members[bucket].append(index)
            tally.kept += 1
    tally.report()
    parts = []
    for (frames, height, width), indices in members.items():
        if indices:
            cut = replace(config, buckets=(), num_frames=frames, height=height, width=width)
            parts.append((cut, reader.reshaped(frames, (height, width), indices)))
    if not parts:
        raise ValueError(f"no clip of {config.root} ({split}) fits one of {list(config.buckets)}")
    return parts


def _shapes(config: DataConfig, split: str, reader: Any) -> list[Shape | None]:
    """(frames, height, width) of every clip, None where it cannot be read."""
    spec = {"split": split, "files": reader.fingerprint(), "measured": "shape"}
    folder = Path(config.cache_dir) / f"shapes-{split}-{digest(spec)}"

    def make(indices: Sequence[int]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        found = reader.iter_shapes(config.workers, indices=indices)
        return {}, [
            {"index": index, "shape": list(shape)}
            for index, shape in zip(indices, found, strict=True)
            if not isinstance(shape, Skipped)
        ]

    store = build(folder, len(reader), make, spec, f"shapes of {split}")
    known = {entry["index"]: tuple(entry["shape"]) for entry in store.entries}
    return [known.get(index) for index in range(len(reader))]
