"""Shapes of the kernels: shipped ones, a cache on disk, and a model for all other problems.

Order of :func:`shapes`: what :func:`forced` says, the cache that ``stvision tune`` writes, the
shipped table, the best of :func:`candidates`. The backward in one pass ("once") runs only where
measurements name shapes for it: it adds to float32 sums in memory, whose rate bounds it, while two
passes compute the scores twice.

Kernels that load through pointers, on other GPUs and with a bias, a mask or a dilation, take what
``stvision tune`` found (:func:`pointer_shapes`), else the best of their own model.
"""

import contextlib
import json
import math
import os
from collections.abc import Iterator
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch

from stvision.kernels.neighborhood.triton_tiles import Tiles, _shapes
from stvision.kernels.neighborhood.windows import Axis, axis_tables

Kernel = Literal["forward", "query", "key", "once", "pointers", "pointers_backward"]
#: "forward"; gradient of queries; gradients of keys; all three gradients in one pass
KERNELS: tuple[Kernel, ...] = ("forward", "query", "key", "once")
#: forward and both passes of the backward through pointers
POINTER_KERNELS: tuple[Kernel, ...] = ("pointers", "pointers_backward")

Axes = tuple[Axis, Axis, Axis]

#: (rows of a tile, columns of a box, warps, stages, price of a pair) by kernel and padded head size
SIZES: dict[tuple[str, int], list[tuple[int, int, int, int, float]]] = {
    ("forward", 64): [
        (64, 128, 4, 2, 1.0),
        (64, 64, 4, 2, 1.03),
        (128, 128, 4, 3, 1.05),
        (128, 64, 8, 3, 1.2),
        (64, 32, 4, 3, 1.2),
    ],
    ("forward", 128): [
        (128, 128, 8, 3, 1.0),
        (64, 64, 4, 3, 1.16),
        (128, 64, 8, 3, 1.16),
        (64, 32, 4, 3, 1.25),
    ],
    ("forward", 256): [(128, 64, 8, 2, 1.0), (64, 64, 4, 2, 1.3)],
    ("query", 64): [(64, 64, 4, 2, 1.0), (128, 64, 8, 2, 1.0), (64, 32, 4, 3, 1.15)],
    ("query", 128): [(64, 64, 4, 2, 1.0), (128, 64, 8, 2, 1.3), (64, 32, 4, 2, 1.2)],
    ("query", 256): [(64, 64, 8, 1, 1.0), (64, 32, 4, 2, 1.2)],
    ("key", 64): [(64, 64, 4, 2, 1.0), (64, 32, 4, 2, 1.15), (128, 64, 8, 2, 1.4)],
    ("key", 128): [(64, 64, 4, 2, 1.0), (128, 64, 8, 2, 1.35), (64, 32, 4, 2, 1.2)],
    ("key", 256): [(64, 32, 8, 2, 1.0), (64, 64, 8, 1, 1.1)],
    ("once", 64): [(128, 64, 8, 2, 1.0), (64, 64, 4, 2, 1.6)],
    ("once", 128): [(128, 64, 8, 2, 1.0), (64, 64, 4, 2, 1.8)],
    ("once", 256): [(64, 32, 8, 2, 1.0)],
}

#: measured best shapes by :func:`problem_key`: an H200 and, forward of 16:8,
#: an H100, torch 2.11, Triton 3.6, November 2026
SHIPPED: dict[str, Tiles | None] = {
    "forward 30:18 48:24 80:24 d128 b2": Tiles((2, 8, 8), (1, 4, 32), 8, 3),
    "query 30:18 48:24 80:24 d128 b2": Tiles((2, 8, 4), (2, 8, 4), 4, 2),
    "key 30:18 48:24 80:24 d128 b2": Tiles((4, 4, 4), (2, 4, 8), 4, 2),
    "forward 16:8 44:24 80:40 d128 b2": Tiles((1, 8, 16), (8, 4, 4), 8, 3),
    "query 16:8 44:24 80:40 d128 b2": Tiles((1, 4, 16), (4, 4, 4), 4, 2),
    "key 16:8 44:24 80:40 d128 b2": Tiles((2, 8, 4), (2, 4, 8), 4, 2),
    "forward 16:7 56:7 56:7 d64 b2": Tiles((8, 2, 4), (4, 8, 2), 4, 2),
    "query 16:7 56:7 56:7 d64 b2": Tiles((8, 2, 4), (4, 8, 2), 4, 2),
    "key 16:7 56:7 56:7 d64 b2": Tiles((16, 1, 4), (16, 2, 2), 4, 2),
    "forward 12:5 64:9 64:9 d64 b2": Tiles((4, 8, 2), (2, 16, 2), 4, 2),
    "query 12:5 64:9 64:9 d64 b2": Tiles((4, 8, 2), (2, 16, 2), 4, 3),
    "key 12:5 64:9 64:9 d64 b2": Tiles((2, 4, 4), (2, 4, 8), 4, 2),
    "forward 30:18/6 48:24/8 80:24/8 d128 b2": Tiles((2, 8, 8), (2, 8, 8), 8, 3),
    "query 30:18/6 48:24/8 80:24/8 d128 b2": Tiles((2, 8, 8), (1, 8, 8), 8, 3),
    "key 30:18/6 48:24/8 80:24/8 d128 b2": Tiles((2, 4, 8), (1, 8, 8), 4, 2),
    "forward 30:15/15 48:16/16 80:16/16 d128 b2": Tiles((1, 8, 16), (1, 8, 16), 8, 3),
    "query 30:15/15 48:16/16 80:16/16 d128 b2": Tiles((1, 16, 8), (1, 4, 16), 8, 3),
    "key 30:15/15 48:16/16 80:16/16 d128 b2": Tiles((1, 4, 16), (1, 8, 8), 4, 2),
    "forward 1:1 56:7 56:7 d32 b2": Tiles((1, 8, 8), (1, 4, 16), 4, 2),
    "query 1:1 56:7 56:7 d32 b2": Tiles((1, 8, 8), (1, 16, 2), 4, 3),
    "key 1:1 56:7 56:7 d32 b2": Tiles((1, 2, 16), (1, 8, 8), 4, 2),
}

_FORCED: dict[str, Tiles | None] = {}


def problem_key(kernel: Kernel, axes: Axes, head_dim: int, element_size: int) -> str:
    """One line that names what a choice of shapes depends on."""
    parts = []
    for axis in axes:
        number = f"{axis.query_length}"
        if axis.query_length != axis.key_length or axis.query_map != "index":
            number += f">{axis.key_length}{axis.query_map}"
        number += f":{axis.window}"
        number += f"/{axis.stride}" if axis.stride > 1 else ""
        number += f"x{axis.dilation}" if axis.dilation > 1 else ""
        number += "c" if axis.causal else ""
        parts.append(number)
    return f"{kernel} {' '.join(parts)} d{head_dim} b{element_size}"


@contextlib.contextmanager
def forced(**tiles: Tiles | None) -> Iterator[None]:
    """Use these shapes, by kernel name, whatever the problem; ``once=None`` takes two passes."""
    before = dict(_FORCED)
    _FORCED.update(tiles)
    _forget()
    try:
        yield
    finally:
        _FORCED.clear()
        _FORCED.update(before)
        _forget()


def _forget() -> None:
    """Look again at the next call."""
    shapes.cache_clear()
    pointer_shapes.cache_clear()


def cache_file(device: str) -> Path:
    """File of tuned shapes of a device: under ``STVISION_CACHE``, else the user's cache folder."""
    root = os.environ.get("STVISION_CACHE")
    base = os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))
    folder = Path(root) if root else Path(base) / "stvision"
    name = "".join(c if c.isalnum() else "-" for c in device).strip("-").lower()
    return folder / "neighborhood" / f"{name}.json"


def save(device: str, key: str, tiles: Tiles | None) -> Path:
    """Add one tuned choice to the cache file, ``None`` for two passes; never half a file."""
    path = cache_file(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    known = _read(path)
    known[key] = []
    if tiles is not None:
        known[key] = [*tiles.query, *tiles.key, tiles.warps, tiles.stages, tiles.registers]
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(known, indent=1) + "\n")
    part.replace(path)
    _tuned.cache_clear()
    _forget()
    return path


def _read(path: Path) -> dict[str, list[int]]:
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(known, dict):
        return {}
    return {key: row for key, row in known.items() if isinstance(row, list) and _is_good(row)}


def _is_good(row: list[Any]) -> bool:
    """Whether this is no choice or one that kernels can take; a file may hold anything."""
    if not row:
        return True
    if len(row) != 9 or any(type(n) is not int or n < 1 for n in row[:8]):
        return False
    powers = all(n & (n - 1) == 0 for n in row[:7])
    tiles = min(math.prod(row[:3]), math.prod(row[3:6])) >= 16 and max(row[:6]) <= 256
    return powers and tiles and row[6] <= 32 and type(row[8]) is int and 0 <= row[8] <= 255


@lru_cache(maxsize=8)
def _tuned(device: str) -> dict[str, Tiles | None]:
    found: dict[str, Tiles | None] = {}
    for key, row in _read(cache_file(device)).items():
        if not row:
            if key.startswith("once "):
                found[key] = None
            continue
        found[key] = Tiles((row[0], row[1], row[2]), (row[3], row[4], row[5]), *row[6:])
    return found


@lru_cache(maxsize=4096)
def _work(axis: Axis, rows: int, columns: int, of_keys: bool) -> int:
    """Pairs that a tile size and a box size compute on one axis, padding included."""
    tables = axis_tables(axis)
    start, stop = tables.start, tables.stop
    if of_keys:
        keys = torch.arange(axis.key_length, device="cpu")
        start, stop = (torch.searchsorted(x, keys, right=True) for x in (stop, start))
    low = start[::rows]
    last = torch.arange(rows - 1, rows * len(low), rows, device="cpu").clamp_max(len(start) - 1)
    boxes = (stop[last] - low + columns - 1).clamp_min(0) // columns
    return rows * columns * int(boxes.sum())


@lru_cache(maxsize=256)
def candidates(
    kernel: Kernel, axes: Axes, head_dim: int, element_size: int, most: int = 40
) -> tuple[Tiles, ...]:
    """Shapes worth trying, those that the model takes for the fastest first.

    The model counts the pairs a shape computes, priced by how well its size feeds the tensor cores.

    Args:
        kernel: which of ``KERNELS``.
        axes: the problem; dilation 1.
        head_dim: the larger head size of key and value.
        element_size: bytes of an element.
        most: how many at most.
    """
    of_keys = kernel in {"key", "once"}
    padded = min(256, max(64, 1 << (head_dim * element_size // 2 - 1).bit_length()))
    found = []
    for rows, columns, warps, stages, price in SIZES[kernel, padded]:
        for row, column in product(
            _shapes(rows, axes, of_keys), _shapes(columns, axes, not of_keys)
        ):
            if max(*row, *column) > 256:
                continue
            cost = price * math.prod(
                _work(axis, r, c, of_keys) for axis, r, c in zip(axes, row, column, strict=True)
            )
            query, key = (column, row) if of_keys else (row, column)
            found.append((cost, -column[2], Tiles(query, key, warps, stages)))
    found.sort(key=lambda one: one[:2])
    return tuple(tiles for *_, tiles in found[:most])


@lru_cache(maxsize=1024)
def shapes(
    kernel: Kernel, axes: Axes, head_dim: int, element_size: int, device: str
) -> Tiles | None:
    """Shapes of a kernel for a problem on a device; ``None`` where none fits or two passes win.

    Args:
        kernel, axes, head_dim, element_size: as in :func:`candidates`.
        device: its name, as ``torch.cuda.get_device_name`` gives it.
    """
    if kernel in _FORCED:
        return _FORCED[kernel]
    key = problem_key(kernel, axes, head_dim, element_size)
    for table in (_tuned(device), SHIPPED):
        if key in table:
            return table[key]
    if kernel == "once":
        return None
    best = candidates(kernel, axes, head_dim, element_size)
    return best[0] if best else None


@lru_cache(maxsize=1024)
def pointer_shapes(
    kernel: Kernel, axes: Axes, head_dim: int, element_size: int, device: str
) -> Tiles | None:
    """Tuned shapes of a kernel that loads through pointers, ``None`` where there are none.

    Args:
        kernel: which of ``POINTER_KERNELS``.
        axes, head_dim, element_size, device: as in :func:`shapes`.
    """
    if kernel in _FORCED:
        return _FORCED[kernel]
    return _tuned(device).get(problem_key(kernel, axes, head_dim, element_size))
