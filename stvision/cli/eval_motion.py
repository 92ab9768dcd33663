"""``stvision eval motion``: optical flow, consistency and flicker of clips, before and after."""

import json as json_module
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from stvision.cli.options import says_its_defaults

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = {".mp4", ".webm", ".mkv", ".mov", ".avi", ".gif", ".m4v"}


@says_its_defaults
@dataclass
class Motion:
    """Measure motion, consistency and flicker of a clip or a folder of clips.

    With --against, clips of the same names are compared pair by pair, and each pair is written side
    by side as a video. Results stand in OUT/motion.json, OUT/motion.md and OUT/motion.png.
    """

    clips: Annotated[Path, tyro.conf.Positional]
    """Clip or folder of clips."""

    against: Path | None = None
    """Clip or folder to compare with: the clips after a change."""

    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """Folder for results (default: print only)."""

    flow: Literal["auto", "farneback", "raft"] = "auto"
    """Optical flow: RAFT when torchvision and its weights are on this machine, else Farneback."""

    num_frames: int | None = None
    """Frames measured, spread evenly over each clip (default: all)."""

    size: tuple[int, int] | None = None
    """Height and width to measure at (default: each clip's own)."""

    json: bool = False
    """Print one JSON object instead of the table."""


def _paths(path: Path) -> dict[str, Path]:
    if path.is_file():
        return {path.stem: path}
    if not path.is_dir():
        raise FileNotFoundError(f"no clip or folder of clips at {str(path)!r}")
    found: dict[str, Path] = {}
    for item in sorted(path.iterdir()):
        if item.suffix.lower() in SUFFIXES:
            if item.stem in found:
                raise ValueError(f"{item} and {found[item.stem]} share one name")
            found[item.stem] = item
    if not found:
        raise FileNotFoundError(f"no clips in {str(path)!r}")
    return found


def run_motion(command: Motion) -> int:
    """Measure, write, print."""
    from tqdm import tqdm

    from stvision.eval.motion import measure_motion, side_by_side
    from stvision.eval.report import write_text
    from stvision.io import read_clip, write_video

    sides = {"clips": _paths(command.clips)}
    if command.against is not None:
        before, after = sides.pop("clips"), _paths(command.against)
        if len(before) == len(after) == 1:  # two files need not have one name
            after = dict(zip(before, after.values(), strict=True))
        shared = sorted(set(before) & set(after))
        if not shared:
            raise ValueError(f"no names are in both {command.clips} and {command.against}")
        sides = {
            "before": {key: before[key] for key in shared},
            "after": {key: after[key] for key in shared},
        }

    def read(path: Path) -> "Tensor":
        clip = read_clip(path, num_frames=command.num_frames, size=command.size)
        return clip.to_uint8().frames

    with tqdm(total=sum(map(len, sides.values())), desc="motion") as bar:

        def items(paths: dict[str, Path]) -> "Iterator[tuple[str, Tensor]]":
            for key, path in paths.items():
                yield key, read(path)
                bar.update()

        report = measure_motion(
            {column: items(paths) for column, paths in sides.items()}, method=command.flow
        )
    report.protocol["frames"] = command.num_frames or "all"
    report.protocol["size"] = command.size or "each clip's own"
    if command.out is not None:
        report.write_json(command.out / "motion.json")
        write_text(command.out / "motion.md", report.to_markdown())
        report.plot(command.out / "motion.png")
        for key in sides.get("before", ()):
            first, second = (
                read_clip(sides[side][key], num_frames=command.num_frames, size=command.size)
                for side in ("before", "after")
            )
            pair = side_by_side(first.to_uint8().frames, second.to_uint8().frames)
            folder = command.out / "pairs"
            folder.mkdir(parents=True, exist_ok=True)
            write_video(pair, folder / f"{key}.mp4", fps=first.fps or 8.0)
    if command.json:
        print(json_module.dumps(report.to_dict()))
    else:
        print(report.to_markdown(), end="")
        if command.out is not None:
            print(f"written to {command.out}")
    return 0
