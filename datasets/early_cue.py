"""Clips whose class is decided by a short event at their beginning, made on the fly.

Coloured shapes move through the whole clip and say nothing. A white shape stands still for a few
early frames and is gone; its kind is the class. Outside of those frames clips of all classes are the
same pixel by pixel, so whatever answers from the end of the clip has carried the cue all the way.

Clip i of a seed is always the same, alone or in a batch. Classes take turns, so that any run of
clips is balanced.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from stvision.datasets.moving_mnist import Split, bounce
from stvision.datasets.records import Record

#: kinds of shapes; those of the cue are the classes, in this order
KINDS: tuple[str, ...] = ("disc", "ring", "plus", "cross")
#: colours of what moves, none of them white
COLOURS: tuple[tuple[int, int, int], ...] = (
    (230, 60, 60),
    (60, 200, 60),
    (80, 100, 240),
    (210, 190, 50),
)
WHITE = (255, 255, 255)


def shape_masks(kind: Tensor, rows: Tensor, columns: Tensor, radius: float) -> Tensor:
    """Which pixels belong to shapes around the origin.

    Args:
        kind: (...) int64, places in :data:`KINDS`.
        rows: pixels below the centre, (..., H, 1).
        columns: pixels right of the centre, (..., 1, W).
        radius: of the circle around each shape, pixels.

    Returns:
        (..., H, W) bool.
    """
    far = (rows.square() + columns.square()).sqrt()
    width = 0.3 * radius
    straight = torch.minimum(rows.abs(), columns.abs())
    slanted = torch.minimum((rows + columns).abs(), (rows - columns).abs()) * 0.5**0.5
    inside = far <= radius
    of_kind = (
        inside,
        inside & (far >= 0.6 * radius),
        inside & (straight <= width),
        inside & (slanted <= width),
    )
    mask = torch.zeros_like(inside)
    for number, one in enumerate(of_kind):
        mask = mask | (one & (kind == number)[..., None, None])
    return mask


class EarlyCue(Dataset[Record]):
    """Clips of moving shapes with a cue near their beginning.

    Args:
        count: number of clips; class of clip i is ``i % 4``.
        frames: frames T of a clip.
        size: rows and columns of a frame.
        distractors: shapes that move.
        cue_frames: frames in which the cue shows.
        cue_start: first frame of the cue, drawn from the first number to below the second.
        radius: of a shape, pixels.
        speed: least and greatest pixels a frame.
        split: ``"train"`` or ``"test"``: other clips.
        seed: of all clips.
        fps: frames a second, for the times alone.

    Raises:
        ValueError: numbers that do not fit; the cue must be over before the last frame.
    """

    #: names of the classes, in the order of the labels
    classes: tuple[str, ...] = KINDS

    def __init__(
        self,
        count: int,
        frames: int = 64,
        *,
        size: int = 32,
        distractors: int = 3,
        cue_frames: int = 4,
        cue_start: tuple[int, int] = (2, 9),
        radius: float = 5.0,
        speed: Sequence[float] = (0.5, 1.5),
        split: Split = "train",
        seed: int = 0,
        fps: float = 16.0,
    ) -> None:
        if count < 0 or distractors < 0 or cue_frames < 1 or fps <= 0:
            raise ValueError(
                "count and distractors must be at least 0, cue_frames at least 1 and fps above 0, "
                f"got {count}, {distractors}, {cue_frames} and {fps}"
            )
        if radius <= 0 or size < 2 * radius + 1:
            raise ValueError(
                f"a shape of radius {radius} must be above 0 and fit into size={size} pixels"
            )
        first, end = cue_start
        if not 0 <= first < end or end - 1 + cue_frames >= frames:
            raise ValueError(
                f"cue_start must rise from 0 or more and the cue be over before the last of "
                f"{frames} frames, got {tuple(cue_start)} and cue_frames={cue_frames}"
            )
        if len(speed) != 2 or not 0 <= speed[0] <= speed[1]:
            raise ValueError(f"speed must be two numbers, 0 <= least <= greatest, got {speed}")
        if split not in ("train", "test"):
            raise ValueError(f"split must be 'train' or 'test', got {split!r}")
        self.count, self.frames, self.size, self.distractors = count, frames, size, distractors
        self.cue_frames, self.cue_start = cue_frames, (first, end)
        self.radius, self.speed = float(radius), (float(speed[0]), float(speed[1]))
        self.split, self.seed, self.fps = split, seed, fps

    def __len__(self) -> int:
        return self.count

    def label(self, index: int) -> int:
        """Class of clip ``index``."""
        return index % self.count % len(KINDS)

    def _draws(self, index: int) -> Tensor:
        """All random numbers of a clip, uniform in [0, 1): none depends on the class."""
        name = f"early-cue/{self.split}/{self.seed}/{index % self.count}".encode()
        seed = int.from_bytes(hashlib.sha256(name).digest()[:8], "big") >> 1
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(3 + 6 * self.distractors, generator=generator, dtype=torch.float64)

    def cue_times(self, index: int) -> range:
        """Frames in which the cue of clip ``index`` shows."""
        first, end = self.cue_start
        start = first + int(self._draws(index)[0] * (end - first))
        return range(start, start + self.cue_frames)

    def batch(
        self,
        indices: Sequence[int],
        labels: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Several clips at once.

        Args:
            indices: of the clips.
            labels: classes to show in place of the clips' own, all else unchanged.
            device: where they are drawn.

        Returns:
            (N, T, H, W, 3) uint8.

        Raises:
            IndexError: a clip that does not exist.
            ValueError: another number of labels than of clips, or an unknown class.
        """
        for index in indices:
            if not -self.count <= index < self.count:
                raise IndexError(f"index {index} is out of range for {self.count} clips")
        chosen = [self.label(index) for index in indices] if labels is None else list(labels)
        if len(chosen) != len(indices) or any(not 0 <= label < len(KINDS) for label in chosen):
            raise ValueError(
                f"labels must be {len(indices)} numbers from 0 to {len(KINDS) - 1}, got {chosen}"
            )
        if not len(indices):
            shape = (0, self.frames, self.size, self.size, 3)
            return torch.zeros(shape, dtype=torch.uint8, device=device)
        draws = torch.stack([self._draws(index) for index in indices])
        room = float(self.size - 1) - 2 * self.radius
        limits = torch.full((2,), room)
        canvas = torch.zeros(
            len(indices), self.frames, self.size, self.size, 3, dtype=torch.uint8, device=device
        )
        for number in range(self.distractors):
            y, x, angle, pace, what, colour = draws[:, 3 + 6 * number : 9 + 6 * number].unbind(1)
            start = torch.stack([y, x], 1) * room
            low, high = self.speed
            angle = angle * (2 * torch.pi)
            step = torch.stack([angle.sin(), angle.cos()], 1) * (low + (high - low) * pace)[:, None]
            places = bounce(start, step, self.frames, limits).transpose(0, 1)
            mask = self._mask((what * len(KINDS)).long(), places.to(device))
            paint = torch.tensor(COLOURS, dtype=torch.uint8)[(colour * len(COLOURS)).long()]
            canvas = torch.where(mask[..., None], paint.to(device)[:, None, None, None], canvas)
        first, end = self.cue_start
        begin = first + (draws[:, 0] * (end - first)).long().to(device)
        time = torch.arange(self.frames, device=device)
        shown = (time >= begin[:, None]) & (time < begin[:, None] + self.cue_frames)
        place = (draws[:, None, 1:3] * room).to(device)
        mask = self._mask(torch.tensor(chosen), place) & shown[..., None, None]
        white = torch.tensor(WHITE, dtype=torch.uint8, device=device)
        return torch.where(mask[..., None], white, canvas)

    def _mask(self, kind: Tensor, corner: Tensor) -> Tensor:
        """Masks (N, T, H, W) of shapes of kinds (N,) whose box begins at ``corner`` (N, T, 2)."""
        grid = torch.arange(self.size, device=corner.device, dtype=torch.float64)
        centre = corner + self.radius
        rows = (grid - centre[..., :1]).float()[..., :, None]
        columns = (grid - centre[..., 1:]).float()[..., None, :]
        return shape_masks(kind.to(corner.device)[:, None], rows, columns, self.radius)

    def __getitem__(self, index: int) -> Record:
        """Clip ``index``; its class stands in ``meta["label"]`` and is its sentence."""
        frames = self.batch([index])[0]
        label = self.label(index)
        text = f"it began with a {KINDS[label]}"
        return Record(
            frames=frames,
            times=torch.arange(self.frames, dtype=torch.float64) / self.fps,
            text=text,
            key=f"early-cue/{self.split}/{self.seed}/{index % self.count}",
            meta={"captions": [text], "fps": self.fps, "label": label, "class": KINDS[label]},
        )
