"""Predictions on disk, so that a stopped evaluation goes on where it was."""

import json
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stvision.eval.predict import Prediction
from stvision.eval.report import write_text


class PredictionStore:
    """Predictions of one column on disk, one 8-bit array a clip, made with one set of settings.

    Args:
        folder: where they lie, ``settings.json`` beside them; it is made when it is not there.
        settings: what they are made with, as JSON gives it back.

    Attributes:
        spoken: key of a clip -> task of the sentence it was predicted with; a clip that is not in
            it was given its own.

    Raises:
        ValueError: the folder holds predictions made with other settings.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        self.spoken: dict[str, str] = {}
        path = folder / "settings.json"
        if path.is_file():
            found = json.loads(path.read_text())
            if found != settings:
                changed = ", ".join(
                    f"{name} {found.get(name)!r}, now {settings.get(name)!r}"
                    for name in sorted(set(found) | set(settings))
                    if found.get(name) != settings.get(name)
                )
                raise ValueError(
                    f"{folder} holds predictions made with other settings ({changed}); "
                    "choose another --out or remove that folder"
                )
        else:
            write_text(path, json.dumps(settings, indent=1) + "\n")

    def _path(self, key: str) -> Path:
        # names of clips may hold folders; the checksum keeps the flattened name unique
        flat = "".join(c if c.isalnum() or c in "._-" else "_" for c in key)[-80:]
        return self.folder / f"{flat}.{zlib.crc32(key.encode()):08x}.npy"

    def has(self, key: str) -> bool:
        """Whether the clip called ``key`` has been predicted, with success or without."""
        return self._path(key).is_file()

    def save(self, key: str, frames: Tensor) -> None:
        """Keep ``frames`` ``(T, H, W, C)``, floating point in [0, 1], whole or not at all.

        A clip that is not finite is kept as an empty array: a failure, not to be tried again.
        """
        finite = bool(frames.isfinite().all())
        array = (frames.clamp(0, 1) * 255).round().to("cpu").byte().numpy() if finite else None
        path = self._path(key)
        temporary = path.with_suffix(f".{os.getpid()}.part")
        with temporary.open("wb") as file:
            np.save(file, np.zeros(0, np.uint8) if array is None else array)
        os.replace(temporary, path)

    def load(self, key: str) -> Prediction:
        """The prediction of the clip called ``key``: ``(T, H, W, C)`` uint8, or why there is none.

        Raises:
            FileNotFoundError: the clip has not been predicted.
        """
        array = np.load(self._path(key), allow_pickle=False)
        spoken = self.spoken.get(key)
        if not array.size:
            return Prediction(None, spoken, "frames that are not finite")
        return Prediction(torch.from_numpy(array), spoken)
