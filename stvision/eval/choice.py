"""Which clips of a data set are evaluated: as many of each task, read from the index alone."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from stvision.datasets.metaworld_tasks import SCENES


@dataclass(frozen=True)
class Item:
    """One clip that is evaluated.

    Args:
        number: its place in the data set.
        key: its name.
        text: its sentence, the first where it has several.
        task: what it shows.
        scene: group of clips whose first frames look alike; its own task when there is no such
            group.
    """

    number: int
    key: str
    text: str
    task: str
    scene: str


@dataclass
class Choice:
    """Which clips are evaluated, and what the index says of the whole split.

    Args:
        items: the clips.
        sentences: task -> the sentences that the split has for it.
        scene_tasks: scene -> its tasks.
        unreadable: clips that would have been taken, but could not be read.
    """

    items: list[Item] = field(default_factory=list)
    sentences: dict[str, list[str]] = field(default_factory=dict)
    scene_tasks: dict[str, list[str]] = field(default_factory=dict)
    unreadable: int = 0


def choose_clips(
    dataset: Any,
    count: int,
    num_frames: int,
    *,
    progress: Callable[[int], object] | None = None,
) -> Choice:
    """Take clips of each task in turn until there are ``count``; only those taken are decoded.

    Args:
        dataset: has ``entries``, each with ``key``, ``captions`` and ``meta``, where ``"task"`` must
            stand and ``"scene"`` may (default: the simulator's scene of that task), and gives the
            record with ``frames`` ``(T, H, W, C)`` by its number.
        count: clips wanted; fewer are taken where there are fewer.
        num_frames: frames that a clip must have; another one counts as unreadable.
        progress: called with the number of clips just taken.

    Raises:
        ValueError: a clip without a task, or no readable clip.
    """
    by_task: dict[str, list[Item]] = {}
    choice = Choice()
    for number, entry in enumerate(dataset.entries):
        task = entry.meta.get("task")
        if not task:
            raise ValueError(
                f"clip {entry.key!r} has no 'task' in the index, by which clips are chosen and "
                "their predictions judged"
            )
        text = entry.captions[0]
        scene = entry.meta.get("scene") or SCENES.get(task, task)
        by_task.setdefault(task, []).append(Item(number, entry.key, text, task, scene))
        for found, value in (
            (choice.sentences.setdefault(task, []), text),
            (choice.scene_tasks.setdefault(scene, []), task),
        ):
            if value not in found:
                found.append(value)

    def readable(items: list[Item]) -> Iterator[Item]:
        for item in items:
            try:
                whole = len(dataset[item.number].frames) == num_frames
            except (ValueError, OSError):
                whole = False
            if whole:
                yield item
            else:
                choice.unreadable += 1

    waiting = [readable(items) for _, items in sorted(by_task.items())]
    while waiting and len(choice.items) < count:
        for items in list(waiting):
            item = next(items, None)
            if item is None:
                waiting.remove(items)
                continue
            choice.items.append(item)
            if progress is not None:
                progress(1)
            if len(choice.items) == count:
                break
    if not choice.items:
        raise ValueError("the data set has no readable clips in this split")
    return choice
