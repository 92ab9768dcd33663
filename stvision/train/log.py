"""Lines of metrics that survive a kill, and TensorBoard files beside them."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stvision.optional import require


@contextmanager
def tensorboard_writer(folder: Path | None, first_step: int) -> Iterator[Any]:
    """A TensorBoard writer for steps from ``first_step`` on; None when there is no folder."""
    if folder is None:
        yield None
        return
    require("tensorboard", extra="train")
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder), purge_step=first_step, flush_secs=30)
    try:
        yield writer
    finally:
        writer.close()


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Add one JSON line."""
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def write_json(path: Path, value: Any) -> None:
    """Write plain data, atomically."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=2))
    os.replace(temporary, path)


def cut_after(path: Path, step: int) -> None:
    """Drop lines of steps that will be made again, and a last line cut short by a kill."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(line + "\n" for line in kept))
    os.replace(temporary, path)
