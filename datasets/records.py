"""What every reader of clips with sentences shares: records, sampling, decoding, counting.

A reader lists its clips as :class:`Entry` objects and hands them to :class:`ClipDataset`, which
decodes frames, picks a sentence and answers to an index. What cannot be used is never dropped
silently: entries that are unusable by what the annotations say are counted when the list is made,
clips that turn out broken when they are read; :class:`Tally` says both in one line.
"""

import copy
import hashlib
import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

logger = logging.getLogger(__name__)

Sampling = Literal["uniform", "segments", "center", "random"]

#: names under which a split is known
SPLIT_NAMES: dict[str, str] = {
    "val": "validation",
    "valid": "validation",
    "dev": "validation",
    "eval": "validation",
    "training": "train",
    "testing": "test",
}


def canonical_split(name: str) -> str:
    """``"val"``, ``"valid"`` and ``"dev"`` are ``"validation"``; other names stay as they are."""
    lowered = name.strip().lower()
    return SPLIT_NAMES.get(lowered, lowered)


class ClipError(ValueError):
    """A clip that cannot be used: broken, too short, or without a sentence.

    Args:
        reason: a few words by which such clips are counted.
        message: the whole sentence, with the clip's name.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        return (ClipError, (self.reason, str(self)))


@dataclass
class Record:
    """One clip with its sentence.

    Args:
        frames: (T, H, W, 3) uint8, RGB.
        times: (T,) float64, seconds on the source's clock.
        text: a sentence.
        key: name of the clip, the same in every run.
        meta: further facts; ``captions`` holds all sentences, ``fps`` the rate of the frames.
    """

    frames: Tensor
    times: Tensor
    text: str
    key: str
    meta: dict[str, Any] = field(default_factory=dict)


class Skipped(NamedTuple):
    """What a data set with ``on_error="skip"`` gives in place of a clip that cannot be used."""

    key: str
    reason: str


@dataclass
class Entry:
    """Where a clip lies and what is said about it.

    Args:
        source: path of a video or folder of images, or paths of single images.
        captions: its sentences, at least one.
        key: its name.
        meta: further facts.
        start: first second of the clip in its source; the source's begin when None.
        end: second at which it stops; the source's end when None.
        fps: rate of images that lie as single files; ignored for videos.
    """

    source: Path | list[Path]
    captions: list[str]
    key: str
    meta: dict[str, Any] = field(default_factory=dict)
    start: float | None = None
    end: float | None = None
    fps: float | None = None


class Tally:
    """Counts what was left out, by reason, and says it in one line."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.kept = 0
        self.reasons: Counter[str] = Counter()
        self.examples: dict[str, str] = {}

    def skip(self, reason: str, key: str) -> None:
        """Count one more clip left out."""
        self.reasons[reason] += 1
        self.examples.setdefault(reason, key)

    @property
    def skipped(self) -> int:
        """Clips left out."""
        return sum(self.reasons.values())

    def __str__(self) -> str:
        text = f"{self.name}: {self.kept} clips"
        if self.reasons:
            reasons = ", ".join(
                f"{count} {reason} (first: {self.examples[reason]})"
                for reason, count in self.reasons.most_common()
            )
            text += f", {self.skipped} left out: {reasons}"
        return text

    def report(self) -> None:
        """Log the line; as a warning when something was left out."""
        logger.log(logging.WARNING if self.reasons else logging.INFO, "%s", self)


def clean_captions(captions: Sequence[Any]) -> list[str]:
    """Sentences without surrounding space, without empty ones, each once."""
    texts = (" ".join(str(text).split()) for text in captions if text is not None)
    return list(dict.fromkeys(text for text in texts if text))


class ClipDataset(Dataset):
    """A map-style data set of :class:`Record` over a list of entries.

    ``dataset[index]`` draws its random choices anew each time; ``dataset[index, seed]`` makes them
    a function of the seed.

    Args:
        name: shown in counts and errors.
        entries: the clips.
        num_frames: frames of a record; all of the clip (at ``fps``) when None.
        fps: rate at which frames are taken; the source's own when None.
        sampling: with ``num_frames``: "uniform" spreads them over the whole clip, "segments" takes
            one at random from each of equal parts of it (TSN, Wang et al. 2016), "center" and
            "random" take them in a row (at ``fps``) from its middle or a random place.
        size: pixels, (height, width) or side of a square; frames are scaled to cover it and cut to
            it in the middle. The source's own size when None.
        caption: "first" or "random" of a clip's sentences.
        on_error: "raise" :class:`ClipError` for clips that cannot be used, or "skip" to give
            :class:`Skipped`, which :func:`stvision.datasets.batching.collate` counts and drops.
        backend: reader of videos, see ``stvision.io.open_video``.
        seed: of random choices where no seed comes with the index.
        tally: counts of what the reader has left out already.
    """

    def __init__(
        self,
        name: str,
        entries: Sequence[Entry],
        *,
        num_frames: int | None = None,
        fps: float | None = None,
        sampling: Sampling = "uniform",
        size: int | tuple[int, int] | None = None,
        caption: Literal["first", "random"] = "first",
        on_error: Literal["raise", "skip"] = "raise",
        backend: str = "pyav",
        seed: int | None = None,
        tally: Tally | None = None,
    ) -> None:
        if num_frames is not None and num_frames < 1:
            raise ValueError(f"num_frames must be at least 1, got {num_frames}")
        if fps is not None and not fps > 0:
            raise ValueError(f"fps must be above 0, got {fps}")
        for value, field_name, allowed in (
            (sampling, "sampling", ("uniform", "segments", "center", "random")),
            (caption, "caption", ("first", "random")),
            (on_error, "on_error", ("raise", "skip")),
        ):
            if value not in allowed:
                raise ValueError(f"{field_name} is {value!r}; allowed are {', '.join(allowed)}")
        pair = (size, size) if isinstance(size, int) else size
        if pair is not None and min(pair) < 1:
            raise ValueError(f"size must be at least 1 pixel, got {size}")
        self.name = name
        self.entries = list(entries)
        self.num_frames, self.fps, self.sampling = num_frames, fps, sampling
        self.size = None if pair is None else (int(pair[0]), int(pair[1]))
        self.caption, self.on_error, self.backend = caption, on_error, backend
        self.seed = seed
        self.view: tuple[int, int] | None = None
        self.tally = tally or Tally(name)
        self.tally.kept = len(self.entries)
        self.tally.report()

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int | tuple[int, int]) -> Any:
        number, seed = index if isinstance(index, tuple) else (index, None)
        if seed is None and self.seed is not None:
            seed = self.seed * 1_000_003 + number
        generator = torch.Generator()
        generator.manual_seed(seed) if seed is not None else generator.seed()
        entry = self.entries[number]
        try:
            return self._record(entry, generator)
        except ClipError as error:
            if self.on_error == "skip":
                return Skipped(entry.key, error.reason)
            raise

    def _record(self, entry: Entry, generator: torch.Generator) -> Record:
        captions = entry.captions
        if not captions:
            raise ClipError("without a sentence", f"{entry.key}: the clip has no sentence")
        clip = self._decode(entry, generator)
        pick = 0
        if self.caption == "random":
            pick = int(torch.randint(len(captions), (1,), generator=generator))
        meta = {**entry.meta, "captions": list(captions)}
        if clip.fps is not None:
            meta["fps"] = clip.fps
        return Record(clip.frames, clip.times, captions[pick], entry.key, meta)

    @contextmanager
    def _opened(self, entry: Entry) -> Iterator[Any]:
        """A reader of the clip; everything that goes wrong with it is a :class:`ClipError`."""
        from stvision.io import open_video
        from stvision.io.images import open_stills

        try:
            if isinstance(entry.source, list):
                reader = open_stills(list(entry.source), fps=entry.fps)
            elif entry.fps is not None and entry.source.is_dir():
                reader = open_stills(entry.source, fps=entry.fps)
            else:
                reader = open_video(entry.source, self.backend)
            assert reader is not None
            with reader:
                yield reader
        except FileNotFoundError as error:
            raise ClipError("missing", f"{entry.key}: {error}") from error
        except ClipError:
            raise
        except (ValueError, IndexError, OSError, RuntimeError) as error:
            raise ClipError("broken", f"{entry.key}: {error}") from error

    def _decode(self, entry: Entry, generator: torch.Generator) -> Any:
        with self._opened(entry) as reader:
            clip = reader.get(self._choose(entry, reader.times, generator))
        return self._fit(clip)

    def measure(self, index: int) -> tuple[int, int, int]:
        """Frames that a record could have at most, and height and width of the source, undecoded.

        Raises:
            ClipError: the clip cannot be opened.
        """
        entry = self.entries[index]
        with self._opened(entry) as reader:
            return len(self._candidates(entry, reader.times)), reader.height, reader.width

    def reshaped(
        self, num_frames: int, size: tuple[int, int], indices: Sequence[int] | None = None
    ) -> "ClipDataset":
        """The same data set with clips of another shape; only those of ``indices`` when given."""
        twin = copy.copy(self)
        twin.num_frames, twin.size = num_frames, size
        if indices is not None:
            twin.entries = [self.entries[index] for index in indices]
        return twin

    def temporal_view(self, number: int, count: int) -> "ClipDataset":
        """The same data set with one of several views in time of each clip, without any draw.

        With "uniform" and "segments" sampling the views lie between each other over the whole clip (see
        ``stvision.io.sampling.view_indices``); with "center" and "random" their first frames are
        spread evenly from the clip's beginning to the last that leaves room, and a single view is
        the middle.

        Args:
            number: of the view, from 0.
            count: of views.

        Raises:
            ValueError: no such view, or a data set without ``num_frames``.
        """
        if not 0 <= number < count:
            raise ValueError(f"view {number} of {count}: views are numbered from 0")
        if self.num_frames is None:
            raise ValueError(f"{self.name}: views need num_frames")
        twin = copy.copy(self)
        twin.view = (number, count)
        return twin

    def _fit(self, clip: Any) -> Any:
        if self.size is not None and (clip.height, clip.width) != self.size:
            height, width = self.size
            scale = max(height / clip.height, width / clip.width)
            scaled = max(height, round(clip.height * scale)), max(width, round(clip.width * scale))
            clip = clip.resize(*scaled).center_crop(height, width)
        return clip

    def _candidates(self, entry: Entry, times: Tensor) -> list[int]:
        """Frames of the source that lie in the clip, at the asked rate."""
        from stvision.io.sampling import fps_indices

        first = 0 if entry.start is None else int(torch.searchsorted(times, entry.start - 1e-6))
        stop = len(times)
        if entry.end is not None:
            stop = int(torch.searchsorted(times, entry.end - 1e-6))
        span = times[first:stop]
        if not len(span):
            raise ClipError("too short", f"{entry.key}: no frames between its start and its end")
        picks = list(range(len(span))) if self.fps is None else fps_indices(span, self.fps)
        return [first + pick for pick in picks]

    def _choose(self, entry: Entry, times: Tensor, generator: torch.Generator) -> list[int]:
        from stvision.io.sampling import segment_indices, view_indices

        picks = self._candidates(entry, times)
        wanted = self.num_frames
        if wanted is None:
            return picks
        if len(picks) < wanted:
            raise ClipError(
                "too short", f"{entry.key}: {len(picks)} frames, {wanted} are asked for"
            )
        number, count = self.view or (0, 1)
        if self.sampling == "segments" and self.view is None:
            places = torch.rand(wanted, generator=generator, dtype=torch.float64)
            return [picks[i] for i in segment_indices(times[picks], places)]
        if self.sampling in ("uniform", "segments"):
            return [picks[i] for i in view_indices(times[picks], wanted, number, count)]
        room = len(picks) - wanted
        begin = room // 2
        if count > 1:
            begin = round(room * number / (count - 1))
        elif self.sampling == "random" and self.view is None:
            begin = int(torch.randint(room + 1, (1,), generator=generator))
        return picks[begin : begin + wanted]

    def paths(self) -> list[Path]:
        """Files (or folders) that the clips come from, each once."""
        sources: dict[Path, None] = {}
        for entry in self.entries:
            source = entry.source[0].parent if isinstance(entry.source, list) else entry.source
            sources[source] = None
        return list(sources)

    def fingerprint(self) -> str:
        """Hash of what the records depend on: files (size, time), sentences, cut and sampling."""
        state = hashlib.blake2b(digest_size=16)
        how = (self.num_frames, self.fps, self.sampling, self.size, self.caption, self.seed)
        state.update(repr(how if self.view is None else (*how, self.view)).encode())
        for path in self.paths():
            try:
                facts = os.stat(path)
                state.update(f"{path}|{facts.st_size}|{facts.st_mtime_ns}\n".encode())
            except FileNotFoundError:
                state.update(f"{path}|missing\n".encode())
        for entry in self.entries:
            state.update(f"{entry.key}|{entry.captions}|{entry.start}|{entry.end}\n".encode())
        return state.hexdigest()

    def iter_records(
        self,
        workers: int = 0,
        *,
        indices: Sequence[int] | None = None,
        timeout: float = 300.0,
        progress: bool = False,
    ) -> Iterator[Record]:
        """Every usable record in order, decoded ahead by worker processes.

        Clips that cannot be used are counted and left out; one summary line is logged at the end.

        Args:
            workers: processes; 0 decodes here.
            indices: which clips; all when None.
            timeout: seconds without an answer of the workers after which they are given up.
            progress: show a bar.

        Raises:
            RuntimeError: the workers did not answer in time.
        """
        from tqdm import tqdm

        chosen = list(range(len(self))) if indices is None else list(indices)
        tally = Tally(self.name)
        items = self.iter_items(workers, indices=chosen, timeout=timeout)
        for item in tqdm(items, total=len(chosen), unit="clip", disable=not progress):
            if isinstance(item, Skipped):
                tally.skip(item.reason, item.key)
                continue
            tally.kept += 1
            yield item
        tally.report()
        self.last_tally = tally

    def iter_items(
        self, workers: int = 0, *, indices: Sequence[int], timeout: float = 300.0
    ) -> Iterator[Record | Skipped]:
        """As :meth:`iter_records`, with a :class:`Skipped` for each clip that cannot be used."""
        yield from self._ahead(self.__getitem__, workers, indices, timeout)

    def iter_shapes(
        self, workers: int = 0, *, indices: Sequence[int], timeout: float = 300.0
    ) -> Iterator[tuple[int, int, int] | Skipped]:
        """:meth:`measure` of each clip, by worker processes."""
        yield from self._ahead(self.measure, workers, indices, timeout)

    def _ahead(
        self, read: Callable[[int], Any], workers: int, indices: Sequence[int], timeout: float
    ) -> Iterator[Any]:
        yield from DataLoader(
            _Tolerant(self, read),
            batch_size=None,
            sampler=indices,  # type: ignore[arg-type]
            num_workers=workers,
            timeout=timeout if workers else 0,
            prefetch_factor=4 if workers else None,
            multiprocessing_context=worker_context(workers),
        )


def worker_context(workers: int) -> str | None:
    """How decoding workers start: as copies of this process on Linux, else as the platform does.

    A copy is there at once; a new interpreter imports everything again, seconds a worker. A copy
    has this process's memory but only the thread that made it, so a worker must need nothing that
    another thread held: decoders are opened, used and closed inside of a worker; torch computes
    there with one thread (the loader sees to it), which never asks the pool that was not copied;
    the device is not touched, batches are pinned and moved by this process; and the locks of
    Python's imports and logging and of the allocator are reset in a copy. What must not happen
    is that another thread draws from torch's global generator at that very moment, since every
    worker seeds its own copy of it: start reading from the thread that trains.
    """
    return "fork" if workers and sys.platform == "linux" else None


class _Tolerant(Dataset):
    """A way of reading a data set, with unusable clips as :class:`Skipped`."""

    def __init__(self, dataset: ClipDataset, read: Callable[[int], Any]) -> None:
        self.dataset, self.read = dataset, read

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.read(index)
        except ClipError as error:
            return Skipped(self.dataset.entries[index].key, error.reason)
