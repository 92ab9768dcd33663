"""Several views of each clip for a test: K stretches or strides of time, one or three cuts of space.

As video recognition is tested since TSN (Wang et al. 2016) and in VideoMAE (Tong et al. 2022): the
shorter side is scaled to the network's, cuts lie along the longer one, and a classifier's
probabilities are averaged over all views.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from stvision.datasets.records import ClipDataset, ClipError, Record, Skipped

#: numbers of cuts in space
CROPS = (1, 3)


def spatial_crops(frames: Tensor, size: Sequence[int], count: int = 1) -> Tensor:
    """Scale frames until they cover ``size`` and cut them along the side that is left over.

    Args:
        frames: (T, H, W, C) uint8.
        size: rows and columns of the cuts.
        count: 1 for the middle, 3 for the beginning, the middle and the end.

    Returns:
        (count, T, rows, columns, C) uint8. Frames of the shape of ``size`` give equal cuts.

    Raises:
        ValueError: another count.
    """
    from stvision.io import Clip

    if count not in CROPS:
        raise ValueError(f"crops must be 1 or 3, got {count}")
    rows, columns = size
    clip = Clip(frames, torch.arange(len(frames), dtype=torch.float64))
    scale = max(rows / clip.height, columns / clip.width)
    height, width = max(rows, round(clip.height * scale)), max(columns, round(clip.width * scale))
    frames = clip.resize(height, width).frames
    room = (height - rows, width - columns)
    places = [(room[0] // 2, room[1] // 2)]
    if count == 3:
        middle = places[0]
        long_rows = room[0] > room[1]
        ends = [(0, middle[1]), (room[0], middle[1])] if long_rows else []
        ends = ends or [(middle[0], 0), (middle[0], room[1])]
        places = [ends[0], middle, ends[1]]
    return torch.stack([frames[:, y : y + rows, x : x + columns] for y, x in places])


class ViewDataset(Dataset):
    """All views of each clip of a data set, without any draw.

    Args:
        dataset: with ``temporal_view``; one that decodes is read at its sources' own size.
        size: rows and columns of the views.
        clips: views in time K.
        crops: views in space, 1 or 3.

    Raises:
        ValueError: numbers that do not fit.
    """

    def __init__(self, dataset: Any, size: Sequence[int], clips: int = 1, crops: int = 1) -> None:
        if clips < 1:
            raise ValueError(f"clips must be at least 1, got {clips}")
        if crops not in CROPS:
            raise ValueError(f"crops must be 1 or 3, got {crops}")
        if min(size) < 1:
            raise ValueError(f"size must be at least 1 pixel, got {tuple(size)}")
        self.entries, self.size, self.crops = dataset.entries, tuple(size), crops
        self.parts = [dataset.temporal_view(number, clips) for number in range(clips)]
        for part in self.parts:
            if isinstance(part, ClipDataset):
                part.size, part.on_error = None, "raise"

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> tuple[int, Tensor] | Skipped:
        """(index, (K * crops, T, rows, columns, 3) uint8), or why a clip cannot be used."""
        views = []
        for part in self.parts:
            try:
                record: Record = part[index]
            except ClipError as error:
                entry = self.entries[index]
                key = entry["key"] if isinstance(entry, dict) else entry.key
                return Skipped(key, error.reason)
            views.append(spatial_crops(record.frames, self.size, self.crops))
        return index, torch.cat(views)
