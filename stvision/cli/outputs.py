"""Where a command's video goes: a file or folder that takes finished frames one chunk at a time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stvision.io import Clip

#: How a file name ends -> what is written. A name without an ending is a folder of frames.
SUFFIXES = {
    ".mp4": "H.264 video",
    ".gif": "animated picture",
    ".png": "strip: all frames side by side",
    ".jpg": "strip: all frames side by side",
    "": "folder of PNG frames, without loss",
}


def check_output(path: Path) -> None:
    """Say what a name may be, before anything is computed.

    Raises:
        ValueError: another ending.
        FileExistsError: frames would be mixed with what a folder holds already.
    """
    if path.suffix.lower() not in SUFFIXES:
        kinds = ", ".join(f"{suffix} ({kind})" for suffix, kind in SUFFIXES.items() if suffix)
        raise ValueError(
            f"--output must end in one of {kinds}, or in nothing ({SUFFIXES['']}); got {str(path)!r}"
        )
    if path.is_dir() and (path.suffix or any(path.iterdir())):
        raise FileExistsError(f"--output {path} is a folder that is not empty")


@contextmanager
def opened_output(path: Path) -> Iterator[Callable[["Clip"], None]]:
    """A function that writes the next frames; the file is complete when the block ends.

    Video and frames are written as they come, so memory does not grow with their number; GIF and
    strips need all frames at once, which are kept in 8 bits. A block that raises leaves no file,
    but the frames that a folder has got.
    """
    from stvision.io import VideoWriter, write_frames, write_gif, write_strip

    path.parent.mkdir(parents=True, exist_ok=True)
    suffix = path.suffix.lower()
    if suffix == ".mp4":
        with VideoWriter(path) as writer:
            yield writer.write
    elif suffix == "":
        written: list[Path] = []
        yield lambda clip: written.extend(write_frames(clip, path, first=len(written)))
    else:
        parts: list[Clip] = []
        yield lambda clip: parts.append(clip.to_uint8())
        whole = _joined(parts)
        if suffix == ".gif":
            write_gif(whole, path)
        else:
            write_strip([whole], path)


def _joined(parts: list["Clip"]) -> "Clip":
    import torch

    from stvision.io import Clip

    frames = torch.cat([part.frames for part in parts])
    return Clip(frames, torch.cat([part.times for part in parts]), parts[0].fps)
