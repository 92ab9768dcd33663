"""Breakfast: people who prepare one of ten breakfasts in their kitchens, and the steps they take.

Format (Kuehne et al., "The Language of Actions: Recovering the Syntax and Semantics of
Goal-Directed Human Activities", CVPR 2014): 52 people, P03 to P54, seen by up to five cameras:
``BreakfastII_15fps_qvga_sync/P03/cam01/P03_cereals.avi``, likewise ``cam02``, ``webcam01``,
``webcam02``; the stereo camera's pictures are ``P03/stereo/P03_cereals_ch0.avi`` and ``_ch1.avi``.
Coarse steps lie in ``segmentation_coarse/cereals/P03_cam01_P03_cereals.txt`` (``stereo01`` for the
stereo camera) and beside videos in ``P03_cereals.avi.labels``: lines ``<first>-<last> <step>``,
frames from 1 at 15 a second, both ends included; ``SIL`` is where nothing of interest happens.
Four published splits test on P03-P15, P16-P28, P29-P41 and P42-P54.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from stvision.datasets.labelled import (
    checked_fold,
    checked_share,
    checked_split,
    first_folder,
    held_out,
    sentence_of,
    videos_below,
)
from stvision.datasets.records import ClipDataset, Entry, Tally

#: frames a second of videos and segmentations
RATE = 15.0
#: everybody who was filmed
PEOPLE = range(3, 55)
#: people on whom each published split tests
TEST_PEOPLE = {1: range(3, 16), 2: range(16, 29), 3: range(29, 42), 4: range(42, 55)}
#: activity in names of files -> its published name; in the order of ViS4mer's numbers
ACTIVITIES = {
    "cereals": "bowl of cereals",
    "coffee": "coffee",
    "tea": "tea",
    "pancake": "pancakes",
    "friedegg": "fried eggs",
    "scrambledegg": "scrambled eggs",
    "sandwich": "sandwich",
    "juice": "orange juice",
    "milk": "chocolate milk",
    "salat": "fruit salad",
}
#: the step that stands for none
SILENCE = "SIL"


class Breakfast(ClipDataset):
    """Videos of Breakfast with their activities, or pieces of them with their steps.

    ``meta`` holds ``label``, ``class_id``, ``activity``, ``person``, ``camera``, ``fold`` and
    ``split``; ``class_names`` the names in the order of ``class_id``: the ten activities, or all
    steps of everybody by the alphabet (by ``mapping.txt`` in ``root`` where it is there, lines
    ``<number> <step>``), without ``SIL`` unless ``silence`` is on. Left out and counted are videos
    that there is only a segmentation of, those of unknown activities, and with steps those without
    a segmentation and pieces without a length.

    Args:
        root: folder that holds ``BreakfastII_15fps_qvga_sync`` (or the people's folders) and
            ``segmentation_coarse``.
        split: "train", "test" or "validation". No validation split is published; it is made of
            the share ``validation`` of the training people, chosen by a hash of their names and
            held out of "train".
        fold: published split, 1 to 4.
        test_people: numbers of the people who are tested on instead of the fold's;
            ``range(47, 55)`` is the split of ViS4mer's lists.
        level: "activity", a whole video and its activity; or "step", a piece and its step.
        silence: with steps, keep the pieces of ``SIL`` and its class.
        cameras: names of those that are read, such as "cam01" and "stereo"; all when None.
        channels: pictures of the stereo camera that are read, 0, 1 or both.
        validation: share of training people held out.
        videos: folder of the people's folders; found below ``root`` when None.
        annotations: folder of the segmentations, ``<activity>/<name>.txt``; found below ``root``
            when None. Videos it has none for are looked up beside themselves.
        **options: see :class:`~stvision.datasets.records.ClipDataset`.

    Raises:
        FileNotFoundError: no such folder, or nobody in it.
        ValueError: an unknown split, fold, level, camera or channel, a validation split without a
            share, or a segmentation of another form.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        split: str = "train",
        fold: int = 1,
        test_people: Sequence[int] | None = None,
        level: Literal["activity", "step"] = "activity",
        silence: bool = False,
        cameras: Sequence[str] | None = None,
        channels: Sequence[int] = (0,),
        validation: float = 0.0,
        videos: str | os.PathLike[str] | None = None,
        annotations: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> None:
        folder = Path(root)
        name = checked_split(split)
        checked_fold(fold, TEST_PEOPLE)
        if level not in ("activity", "step"):
            raise ValueError(f"level is {level!r}; allowed are activity, step")
        if not channels or not set(channels) <= {0, 1}:
            raise ValueError(f"channels are {tuple(channels)}; allowed are 0 and 1")
        checked_share(validation, name, "Breakfast")
        tested = TEST_PEOPLE[fold] if test_people is None else test_people
        strangers = sorted(set(tested) - set(PEOPLE))
        if strangers or not tested:
            raise ValueError(
                f"test_people are {tuple(tested)}; allowed are numbers of people, 3 to 54"
            )
        home = first_folder([folder / "BreakfastII_15fps_qvga_sync", folder / "videos", folder])
        home = home if videos is None else Path(videos)
        if home is None or not home.is_dir():
            raise FileNotFoundError(f"no folder {str(home or folder)!r}")
        coarse = folder / "segmentation_coarse" if annotations is None else Path(annotations)
        if annotations is not None and not coarse.is_dir():
            raise FileNotFoundError(f"no folder of segmentations {str(coarse)!r}")

        found = _videos(home)
        if not found:
            raise FileNotFoundError(
                f"no videos P<NN>/<camera>/P<NN>_<activity>.avi below {str(home)!r}"
            )
        seen = sorted({clip.camera for clip in found})
        if cameras is not None and not set(cameras) <= set(seen):
            raise ValueError(f"cameras are {tuple(cameras)}; there are {', '.join(seen)}")
        files = {file.stem: file for file in coarse.glob("*/P*.txt")} if coarse.is_dir() else {}
        pieces = {clip.path: clip.segmentation(files) for clip in found} if level == "step" else {}
        if level == "activity":
            self.class_names = tuple(ACTIVITIES)
        else:
            every = {step for file in pieces.values() if file for _, _, step in _read(file)}
            self.class_names = _step_names(folder / "mapping.txt", every, silence)
        numbers = {label: number for number, label in enumerate(self.class_names)}
        parts = _parts(set(tested), validation)

        tally = Tally(f"Breakfast [{name}{f', fold {fold}' if test_people is None else ''}]")
        entries = []
        for clip in found:
            if parts.get(clip.person) != name or (
                cameras is not None and clip.camera not in cameras
            ):
                continue
            if clip.channel is not None and clip.channel not in channels:
                continue
            if clip.activity not in ACTIVITIES:
                tally.skip("of an unknown activity", clip.key)
                continue
            meta: dict[str, Any] = {
                "activity": clip.activity,
                "person": f"P{clip.person:02d}",
                "camera": clip.camera,
                "fold": fold if test_people is None else None,
                "split": name,
            }
            if level == "activity":
                meta.update(label=clip.activity, class_id=numbers[clip.activity])
                entries.append(Entry(clip.path, [ACTIVITIES[clip.activity]], clip.key, meta))
                continue
            file = pieces[clip.path]
            if file is None:
                tally.skip("without a segmentation", clip.key)
                continue
            for place, (first, last, step) in enumerate(_read(file)):
                key = f"{clip.key}/{place}"
                if step == SILENCE and not silence:
                    continue
                if last < first:
                    tally.skip("too short", key)
                    continue
                own = {**meta, "label": step, "class_id": numbers[step]}
                # frame n (from 1) is shown at (n - 1) / RATE, until n / RATE
                start, end = (first - 1) / RATE, last / RATE
                text = sentence_of(step) if step != SILENCE else "nothing"
                entries.append(Entry(clip.path, [text], key, own, start=start, end=end))
        there = {clip.listed for clip in found if clip.channel in (None, *channels)}
        for stem in sorted(files):
            match = _LISTED.fullmatch(stem)
            if match is None or stem in there or parts.get(int(match[1])) != name:
                continue
            if cameras is None or re.sub(r"^stereo\d+$", "stereo", match[2]) in cameras:
                tally.skip("missing", stem)
        super().__init__(tally.name, entries, tally=tally, **options)


_FILE = re.compile(r"P(\d+)_(\w+?)(?:_ch([01]))?")
_LISTED = re.compile(r"P(\d+)_([a-z]+\d*)_P\d+_\w+")


@dataclass(frozen=True)
class _Video:
    """What a video's place and name say of it; ``channel`` is of the stereo camera alone."""

    path: Path
    person: int
    activity: str
    camera: str
    channel: int | None

    @property
    def key(self) -> str:
        return f"P{self.person:02d}/{self.camera}/{self.path.stem}"

    @property
    def listed(self) -> str:
        """Name of its segmentation, one for both channels of the stereo camera."""
        camera = "stereo01" if self.camera == "stereo" else self.camera
        return f"P{self.person:02d}_{camera}_P{self.person:02d}_{self.activity}"

    def segmentation(self, files: dict[str, Path]) -> Path | None:
        """The file of its steps: the coarse one by its name, or the one that lies beside it."""
        beside = self.path.with_name(f"{self.path.stem}.avi.labels")
        return files.get(self.listed) or (beside if beside.is_file() else None)


def _videos(home: Path) -> list[_Video]:
    found = []
    for path in videos_below(home).values():
        match = _FILE.fullmatch(path.stem)
        if match is not None:
            camera = "stereo" if path.parent.name.startswith("stereo") else path.parent.name
            channel = None if match[3] is None else int(match[3])
            found.append(_Video(path, int(match[1]), match[2], camera, channel))
    return sorted(found, key=lambda video: video.key)


def _parts(tested: set[int], share: float) -> dict[int, str]:
    """Person -> split."""
    rest = [("", f"P{person:02d}") for person in PEOPLE if person not in tested]
    parts = {int(person[1:]): "train" for _, person in rest}
    parts.update({int(person[1:]): "validation" for _, person in held_out(rest, share)})
    return parts | dict.fromkeys(tested, "test")


def _read(file: Path) -> list[tuple[int, int, str]]:
    """First frame, last frame and step of each line."""
    rows = []
    for place, line in enumerate(file.read_text(encoding="utf-8-sig").splitlines(), 1):
        if not line.strip():
            continue
        match = re.fullmatch(r"(\d+)-(\d+)\s+(\S+)", line.strip())
        if match is None:
            raise ValueError(f"{file}, line {place}: {line!r} is not <first>-<last> <step>")
        rows.append((int(match[1]), int(match[2]), match[3]))
    return rows


def _step_names(mapping: Path, found: set[str], silence: bool) -> tuple[str, ...]:
    names = sorted(found)
    if mapping.is_file():
        lines = [line.split() for line in mapping.read_text(encoding="utf-8-sig").splitlines()]
        rows = [(int(line[0]), line[1]) for line in lines if len(line) == 2 and line[0].isdecimal()]
        names = [step for _, step in sorted(rows)]
        unknown = sorted(found - set(names))
        if unknown:
            raise ValueError(f"{mapping} does not number the step {unknown[0]!r}")
    return tuple(step for step in names if silence or step != SILENCE)
