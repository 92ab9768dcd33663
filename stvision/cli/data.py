"""``stvision data``: render simulated episodes, decode a folder once, look at a folder of clips."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from stvision.cli.options import says_its_defaults


@says_its_defaults
@dataclass
class Metaworld:
    """Render episodes of Meta-World robot tasks into a folder of clips with one index."""

    out: Path
    """Folder to write; the same command again goes on where it stopped."""
    tasks: tuple[str, ...] = ()
    """Task names, such as drawer-open-v3; 31 tasks when none are given."""
    episodes: int = 100
    """Episodes played a task, one a seed."""
    first_seed: int = 0
    """Seed of the first episode."""
    cameras: tuple[str, ...] = ("workspace",)
    """Views: workspace, workspace-left, front, overhead, or Meta-World's own, such as corner2."""
    size: tuple[int, int] = (64, 64)
    """Height and width, pixels."""
    frames: int = 16
    """Frames kept of an episode, evenly over its length."""
    same_start: bool = True
    """Tasks that share a scene begin with the same picture, so that only the sentence differs."""
    tail: int = 16
    """Steps of 12.5 ms that an episode goes on after its success."""
    crf: int = 12
    """Quality of the H.264 encoder, 0 to 51; lower is better."""
    lossless: bool = False
    """Keep every value of the pictures (few browsers play such files)."""
    validation: float = 0.05
    """Share of seeds in the validation split."""
    test: float = 0.05
    """Share of seeds in the test split."""
    workers: int | None = None
    """Processes; the cores of this machine when not given."""
    json: bool = False
    """Print the summary as one JSON object."""


@says_its_defaults
@dataclass
class Pack:
    """Decode a folder of clips once into one memory-mapped file, for fast training."""

    data: tyro.conf.Positional[Path]
    """Folder of clips with an index."""
    out: Path
    """Folder to write; the same command again goes on where it stopped."""
    frames: int = 16
    """Frames of a clip, evenly over its length."""
    size: tuple[int, int] = (64, 64)
    """Height and width, pixels."""
    index: str | None = None
    """Index file; index.jsonl or index.csv of the folder when not given."""
    split: str | None = None
    """Only this split; all of them when not given."""
    workers: int | None = None
    """Processes that decode; the cores of this machine, at most 8, when not given."""


@says_its_defaults
@dataclass
class Check:
    """Count the clips of a folder, its splits and tasks, and what cannot be used."""

    data: tyro.conf.Positional[Path]
    """Folder of clips with an index."""
    index: str | None = None
    """Index file; index.jsonl or index.csv of the folder when not given."""
    decode: bool = False
    """Decode every clip as well, which finds broken ones."""
    frames: int | None = None
    """Frames that a clip must have."""
    workers: int | None = None
    """Processes that decode; the cores of this machine, at most 8, when not given."""
    json: bool = False
    """Print one JSON object."""


@dataclass
class Command:
    """Render or inspect a set of clips."""

    action: Annotated[
        Annotated[Metaworld, tyro.conf.subcommand("metaworld", prefix_name=False)]
        | Annotated[Pack, tyro.conf.subcommand("pack", prefix_name=False)]
        | Annotated[Check, tyro.conf.subcommand("check", prefix_name=False)],
        tyro.conf.arg(name=""),
    ]
    """What to do."""


def run(command: Command) -> int:
    """Do what was asked for; 1 when a check finds no usable clip."""
    action = command.action
    if isinstance(action, Metaworld):
        return _metaworld(action)
    if isinstance(action, Pack):
        return _pack(action)
    return _check(action)


def _metaworld(command: Metaworld) -> int:
    from stvision.datasets.metaworld import DEFAULT_TASKS, render

    summary = render(
        command.out,
        tasks=command.tasks or DEFAULT_TASKS,
        episodes=command.episodes,
        first_seed=command.first_seed,
        cameras=command.cameras,
        size=command.size,
        num_frames=command.frames,
        same_start=command.same_start,
        tail=command.tail,
        crf=command.crf,
        lossless=command.lossless,
        validation=command.validation,
        test=command.test,
        workers=command.workers,
    )
    if command.json:
        facts = {
            "index": str(summary.index),
            "episodes": summary.episodes,
            "clips": summary.clips,
            "failed": summary.failed,
            "rendered": summary.rendered,
            "seconds": round(summary.seconds, 3),
        }
        print(json.dumps(facts))
    else:
        print(summary)
    return 0


def _pack(command: Pack) -> int:
    from stvision.datasets.clips import ClipFolder
    from stvision.datasets.packed import pack

    dataset = ClipFolder(
        command.data,
        index=command.index,
        split=command.split,
        num_frames=command.frames,
        size=command.size,
    )
    print(pack(dataset, command.out, workers=_workers(command.workers)))
    return 0


def _workers(asked: int | None) -> int:
    from stvision.io.reader import default_threads

    return default_threads() if asked is None else asked


def _check(command: Check) -> int:
    from stvision.datasets.clips import ClipFolder

    dataset = ClipFolder(command.data, index=command.index, num_frames=command.frames)
    facts: dict[str, Any] = {
        "clips": len(dataset),
        "left_out": dict(dataset.tally.reasons),
        "splits": _counts(dataset, "split"),
        "tasks": _counts(dataset, "task"),
        "cameras": _counts(dataset, "camera"),
        "sentences": len({text for entry in dataset.entries for text in entry.captions}),
    }
    if command.decode:
        sizes: Counter[str] = Counter()
        for record in dataset.iter_records(_workers(command.workers), progress=not command.json):
            sizes["x".join(map(str, record.frames.shape[:3]))] += 1
        facts["clips"] = dataset.last_tally.kept
        facts["left_out"] = dict(dataset.tally.reasons + dataset.last_tally.reasons)
        facts["shapes"] = dict(sizes.most_common())
    if command.json:
        print(json.dumps(facts))
    else:
        for name, value in facts.items():
            if isinstance(value, dict):
                value = ", ".join(f"{key} {count}" for key, count in value.items()) or "-"
            print(f"{name.replace('_', ' '):<10} {value}")
    return 0 if facts["clips"] else 1


def _counts(dataset: Any, column: str) -> dict[str, int]:
    counts = Counter(
        str(entry.meta[column]) for entry in dataset.entries if entry.meta.get(column) is not None
    )
    return dict(counts.most_common())
