"""Predictions of a classifier for a whole split, over several views of each clip."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from stvision.datasets.records import Skipped, worker_context
from stvision.datasets.views import ViewDataset
from stvision.models.classifier import VideoClassifier, view_probabilities
from stvision.train.data import DataConfig, open_reader
from stvision.train.sources import label_tensor


@dataclass
class SplitPredictions:
    """What a classifier says of the clips of a split.

    Args:
        keys: names of the clips.
        labels: (N,) int64, the true classes.
        probabilities: (N, classes) float32, mean over the views.
        skipped: clips that could not be read.
    """

    keys: list[str]
    labels: Tensor
    probabilities: Tensor
    skipped: list[Skipped]


def _collate(items: list[Any]) -> tuple[list[int], Tensor | None, list[Skipped]]:
    found = [item for item in items if not isinstance(item, Skipped)]
    views = torch.stack([item[1] for item in found]) if found else None
    return [item[0] for item in found], views, [x for x in items if isinstance(x, Skipped)]


def predict_split(
    model: VideoClassifier,
    data: DataConfig,
    split: str,
    label_key: str,
    *,
    clips: int = 1,
    crops: int = 1,
    batch_size: int = 32,
    dtype: torch.dtype | None = None,
    progress: Callable[[int], object] | None = None,
) -> SplitPredictions:
    """Read every clip of a split in all its views and predict its class.

    Args:
        model: in evaluation mode, on the device that computes.
        data: where the clips lie; ``num_frames``, ``height`` and ``width`` stand for a model that
            names no size.
        split: which part of them.
        label_key: entry of a clip's meta data that holds its class.
        clips: views in time of each clip.
        crops: views in space, 1 or 3.
        batch_size: views that are computed at once.
        dtype: of autocast; ``None`` for none.
        progress: called with the number of clips just done.

    Raises:
        FileNotFoundError: the data is not there.
        ValueError: no clip, a clip whose class the model does not know, or none that can be read.
    """
    reader = open_reader(data, split, model.frames)
    if not len(reader):
        raise ValueError(f"no clips of split {split!r} in {data.root}")
    labels = label_tensor(reader.entries, model.class_names, label_key)
    dataset = ViewDataset(reader, model.size or (data.height, data.width), clips, crops)
    loader = DataLoader(
        dataset,
        batch_size=max(1, batch_size // (clips * crops)),
        num_workers=data.workers,
        collate_fn=_collate,
        timeout=600.0 if data.workers else 0,
        multiprocessing_context=worker_context(data.workers),
    )
    rows: list[int] = []
    parts: list[Tensor] = []
    skipped: list[Skipped] = []
    for numbers, views, lost in loader:
        if views is not None:
            parts.append(view_probabilities(model, views, batch_size, dtype).cpu())
        rows += numbers
        skipped += lost
        if progress is not None:
            progress(len(numbers) + len(lost))
    if not rows:
        raise ValueError(
            f"none of the {len(reader)} clips of split {split!r} could be read, the first "
            f"({skipped[0].key}) for being {skipped[0].reason}"
        )
    entries = [reader.entries[row] for row in rows]
    keys = [entry["key"] if isinstance(entry, dict) else entry.key for entry in entries]
    return SplitPredictions(keys, labels[rows], torch.cat(parts), skipped)
