"""Checkpoints that are either whole or not there.

A checkpoint is a folder ``step_<n>``. It is written under a temporary name, its marker file last,
and renamed only then, so a folder with the final name and a marker that agrees with its files is
whole whatever happened to the process. Anything else in the folder is left alone.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

MARKER = "complete.json"
_NAME = re.compile(r"step_(\d{1,12})")
_TEMPORARY = re.compile(r"\.step_\d{1,12}\.writing")


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint after ``step`` optimizer steps lies."""
    return folder / f"step_{step:08d}"


def begin(folder: Path, step: int) -> Path:
    """Make the empty temporary folder of a checkpoint (one process does this)."""
    temporary = folder / f".step_{step:08d}.writing"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def finish(temporary: Path, folder: Path, step: int) -> Path:
    """Mark a written checkpoint as whole and give it its name (one process, after all wrote)."""
    files = sorted(file for file in temporary.rglob("*") if file.is_file())
    sizes = {}
    for file in files:
        _flush(file)
        sizes[file.relative_to(temporary).as_posix()] = file.stat().st_size
    marker = temporary / MARKER
    marker.write_text(json.dumps({"step": step, "files": sizes}))
    _flush(marker)
    final = checkpoint_path(folder, step)
    if final.exists():
        shutil.rmtree(final)
    os.replace(temporary, final)
    _flush(folder)
    return final


def is_complete(path: Path) -> bool:
    """Whether the marker is there and every file has the size that it names."""
    try:
        files = json.loads((path / MARKER).read_text())["files"]
        return all((path / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def complete_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints by rising step; other things in the folder are not looked at."""
    if not folder.is_dir():
        return []
    found = []
    for entry in folder.iterdir():
        match = _NAME.fullmatch(entry.name)
        if match and entry.is_dir() and is_complete(entry):
            found.append((int(match[1]), entry))
    return [entry for _, entry in sorted(found)]


def clean(folder: Path, keep: int, keep_if: Callable[[int], bool] = lambda step: False) -> None:
    """Remove remains of interrupted writes and all but the last ``keep`` whole checkpoints.

    Args:
        folder: where the checkpoints lie.
        keep: number of the newest to keep, at least 1.
        keep_if: steps for which it answers True are kept whatever their age.
    """
    if not folder.is_dir():
        return
    for entry in folder.iterdir():
        if _TEMPORARY.fullmatch(entry.name):
            shutil.rmtree(entry, ignore_errors=True)
    for entry in complete_checkpoints(folder)[:-keep]:
        if not keep_if(int(entry.name.removeprefix("step_"))):
            # out of sight first: a removal cut short must not leave a folder that looks whole
            hidden = entry.with_name(f".{entry.name}.writing")
            os.replace(entry, hidden)
            shutil.rmtree(hidden, ignore_errors=True)


def _flush(path: Path) -> None:
    """Force a file or a folder entry to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
