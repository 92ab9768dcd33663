"""From data sets to batches on the device: resident tensors, or a resumable loader."""

import importlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from stvision.datasets.batching import BucketBatchSampler
from stvision.datasets.records import ClipDataset, Tally, worker_context
from stvision.train.state import derive_seed

#: kind of data set -> "module:class" of its reader
READERS: dict[str, str] = {
    "clips": "stvision.datasets.clips:ClipFolder",
    "something": "stvision.datasets.something_something:SomethingSomething",
    "bridge": "stvision.datasets.bridge:BridgeData",
    "epic": "stvision.datasets.epic_kitchens:EpicKitchens",
    "kinetics": "stvision.datasets.kinetics:Kinetics",
    "ucf101": "stvision.datasets.ucf101:UCF101",
    "hmdb51": "stvision.datasets.hmdb51:HMDB51",
    "coin": "stvision.datasets.coin:COIN",
    "breakfast": "stvision.datasets.breakfast:Breakfast",
    "packed": "stvision.datasets.packed:PackedFolder",
}


@dataclass(frozen=True)
class DataConfig:
    """Which clips, cut how, and where the results of costly steps are kept."""

    kind: Literal[
        "clips",
        "something",
        "bridge",
        "epic",
        "kinetics",
        "ucf101",
        "hmdb51",
        "coin",
        "breakfast",
        "packed",
    ] = "clips"
    """Format of the data set; "packed" is a folder written by `stvision.datasets.packed.pack`."""
    root: str = "data/metaworld"
    """Folder of the data set."""
    split: str = "train"
    """Split that is trained on."""
    validation_split: str = "validation"
    """Split that is validated on."""
    num_frames: int = 12
    """Frames of a clip, uniformly over its length."""
    height: int = 64
    """Pixels."""
    width: int = 64
    """Pixels."""
    buckets: tuple[tuple[int, int, int], ...] = ()
    """Shapes (frames, height, width) of a training with mixed lengths and sizes: each clip is cut
    to the one that fits it best, and every batch has one shape. Needs resident=false. Validation
    keeps to num_frames, height and width."""
    leftover: Literal["drop", "pad", "keep"] = "drop"
    """With a loader: what happens to clips that do not fill the last batch of their shape. They
    are left to other epochs, or filled up with clips of this one, or make a smaller batch."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the reader, such as `cameras` or `index`."""
    cache: Literal["off", "frames", "latents"] = "latents"
    """What is computed once: nothing, decoded frames, or latents and text states."""
    cache_dir: str = "cache"
    """Folder of what was computed once."""
    latents: Literal["moments", "sampled"] = "moments"
    """Keep the mean and deviation of latents and draw anew each time, or keep one drawn sample."""
    resident: bool = True
    """Keep the whole cached set on the device; no loader is involved then."""
    workers: int = 4
    """Processes that decode."""
    validation_clips: int = 16
    """Clips that validation looks at."""

    def __post_init__(self) -> None:
        if self.resident and self.cache == "off":
            raise ValueError("resident=true needs a cache: set cache to 'frames' or 'latents'")
        if self.buckets and self.resident:
            raise ValueError("buckets need a loader: set resident to false")
        if self.buckets and self.kind == "packed":
            raise ValueError("packed clips have one shape: buckets need another kind of data")
        for bucket in self.buckets:
            if min(bucket) < 1:
                raise ValueError(f"a bucket is (frames, height, width), all above 0, got {bucket}")
        if len(set(self.buckets)) != len(self.buckets):
            raise ValueError(f"buckets must differ, got {self.buckets}")

    @property
    def frame_counts(self) -> tuple[int, ...]:
        """Every length that a clip may have, in training and in validation."""
        return tuple(sorted({self.num_frames, *(bucket[0] for bucket in self.buckets)}))


def open_reader(config: DataConfig, split: str, num_frames: int | None = None) -> Any:
    """The data set of a split: a sequence of records ``frames, times, text, key, meta``.

    Args:
        config: which, cut how.
        split: which part of it.
        num_frames: instead of the configuration's.

    Raises:
        FileNotFoundError: no such folder or index.
        ValueError: an option that the reader does not have.
    """
    module, name = READERS[config.kind].split(":")
    cls = getattr(importlib.import_module(module), name)
    known = dict(inspect.signature(cls).parameters)
    if "options" in known:  # handed on to what every reader of clips has
        known |= inspect.signature(ClipDataset).parameters
    taken = {"root", "split", "options", "name", "entries", "tally", "num_frames", "size"}
    unknown = sorted(set(config.options) - (known.keys() - taken))
    if unknown:
        raise ValueError(
            f"data.options has {', '.join(unknown)}; of kind {config.kind} allowed are "
            f"{', '.join(sorted(known.keys() - taken))}"
        )
    return cls(
        config.root,
        split=split,
        num_frames=num_frames or config.num_frames,
        size=(config.height, config.width),
        **config.options,
    )


def to_network_range(frames: Tensor) -> Tensor:
    """Frames (..., T, H, W, C) uint8 -> (..., C, T, H, W) float32 in [-1, 1]."""
    return frames.movedim(-1, -4).float() / 127.5 - 1


class TextTable:
    """States of all sentences, and which sentences each clip may be told with.

    Args:
        states: (K, L, D); row 0 belongs to the empty sentence.
        sentences: for each clip the rows of its sentences, at least one.
    """

    def __init__(self, states: Tensor, sentences: Sequence[Sequence[int]]) -> None:
        if any(not rows for rows in sentences):
            raise ValueError("every clip needs at least one sentence")
        self.states = states
        self.counts = torch.tensor([len(rows) for rows in sentences])
        widest = int(self.counts.max())
        self.rows = torch.tensor([list(rows) + [0] * (widest - len(rows)) for rows in sentences])

    def to(self, device: torch.device) -> "TextTable":
        """The same table with its tensors on a device."""
        twin = object.__new__(TextTable)
        for name in ("states", "counts", "rows"):
            setattr(twin, name, getattr(self, name).to(device))
        return twin

    def choose(self, clips: Tensor, generator: torch.Generator) -> Tensor:
        """States (B, L, D) of one of each clip's sentences, drawn uniformly."""
        counts = self.counts[clips]
        drawn = torch.rand(counts.shape, generator=generator, device=counts.device) * counts
        rows = self.rows[clips].gather(1, drawn.long().clamp(max=counts - 1)[:, None])[:, 0]
        return self.states[rows]


class ResidentSource:
    """Batches cut out of tensors that lie on the device; nothing waits for the host.

    Every epoch runs through a new permutation that depends on (seed, epoch) alone, divided among
    the processes; what does not fill a batch of all processes is left to the next epoch's draw.

    Args:
        tensors: name -> (N, ...), one row an item.
        batch_size: items in a micro-batch of one process.
        accumulation: micro-batches in a step.
        seed: of the permutations.
        rank: number of this process.
        world: number of processes.
        device: where the tensors are put.
        text: adds ``"text"`` (B, L, D) to each batch.
    """

    def __init__(
        self,
        tensors: dict[str, Tensor],
        batch_size: int,
        accumulation: int = 1,
        *,
        seed: int,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
        text: TextTable | None = None,
    ) -> None:
        sizes = {name: len(tensor) for name, tensor in tensors.items()}
        if len(set(sizes.values())) != 1 or min(sizes.values()) == 0:
            raise ValueError(f"tensors must hold the same number of items, at least 1, got {sizes}")
        self.device = torch.device(device)
        self.tensors = {name: tensor.to(self.device) for name, tensor in tensors.items()}
        self.text = None if text is None else text.to(self.device)
        self.count = next(iter(sizes.values()))
        self.batch_size, self.accumulation = batch_size, accumulation
        self.seed, self.rank, self.world = seed, rank, world
        self.batches_per_epoch = max(1, self.count // (batch_size * world))
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.int64)

    def _permutation(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, 3, epoch))
            needed = self.batch_size * self.world * self.batches_per_epoch
            parts = [
                torch.randperm(self.count, generator=generator)
                for _ in range(-(-needed // self.count))
            ]
            order = torch.cat(parts)[:needed]
            if self.device.type == "cuda":
                order = order.pin_memory().to(self.device, non_blocking=True)
            self._epoch, self._order = epoch, order
        return self._order

    def batch(self, step: int, micro: int, generator: torch.Generator) -> dict[str, Any]:
        """The batch of this process; a function of its arguments alone."""
        epoch, place = divmod(step * self.accumulation + micro, self.batches_per_epoch)
        start = (place * self.world + self.rank) * self.batch_size
        chosen = self._permutation(epoch)[start : start + self.batch_size]
        batch = {name: tensor[chosen] for name, tensor in self.tensors.items()}
        if self.text is not None:
            batch["text"] = self.text.choose(chosen, generator)
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Empty: the position follows from the step."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to do."""

    def report(self) -> None:
        """Nothing is left out here; what could not be cached was said then."""


class _Endless:
    """Batches of (index, seed of the item) from a place on, epoch after epoch."""

    def __init__(self, sampler: BucketBatchSampler, seed: int, epoch: int, position: int) -> None:
        self.sampler, self.seed = sampler, seed
        self.epoch, self.position = epoch, position

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, position = self.epoch, self.position
        while True:
            self.sampler.set_position(epoch, position)
            for batch in self.sampler:
                yield [(index, derive_seed(self.seed, 4, epoch, index)) for index in batch]
            epoch, position = epoch + 1, 0


class LoaderSource:
    """Batches from worker processes, at an exact position however far the workers are ahead.

    Args:
        dataset: ``dataset[index, seed]`` gives a dict of tensors and strings; ``seed`` is a
            function of (seed, epoch, index) and decides all randomness of an item.
        sampler: order of the items, divided among the processes.
        collate: list of items -> batch.
        seed: of the items' randomness.
        device: where tensors are put.
        workers: processes that read ahead; 0 reads in this process.
        finish: turns a batch on the device into what the task reads, such as by encoding text.
        timeout: seconds without an answer after which the workers are given up.
        name: of the data, in the line that says what was left out.

    A batch may hold ``"skipped"``, (key, reason) of clips in whose place others were taken; they
    are counted, each once.
    """

    def __init__(
        self,
        dataset: Dataset,
        sampler: BucketBatchSampler,
        collate: Callable[[list[Any]], dict[str, Any]],
        *,
        seed: int,
        device: torch.device | str = "cpu",
        workers: int = 0,
        finish: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
        timeout: float = 600.0,
        name: str = "training data",
    ) -> None:
        self.tally = Tally(name)
        self._left_out: set[str] = set()
        self.dataset, self.sampler, self.collate = dataset, sampler, collate
        self.seed, self.device, self.workers = seed, torch.device(device), workers
        self.finish, self.timeout = finish, timeout
        self.epoch = self.consumed = 0
        self._batches: Iterator[dict[str, Any]] | None = None

    def _start(self) -> Iterator[dict[str, Any]]:
        batches = _Endless(self.sampler, self.seed, self.epoch, self.consumed)
        loader = DataLoader(
            self.dataset,
            batch_sampler=batches,  # type: ignore[arg-type]
            num_workers=self.workers,
            collate_fn=self.collate,
            pin_memory=self.device.type == "cuda",
            timeout=self.timeout if self.workers else 0,
            generator=torch.Generator().manual_seed(0),
            multiprocessing_context=worker_context(self.workers),
        )
        return iter(loader)

    def batch(self, step: int, micro: int, generator: torch.Generator) -> dict[str, Any]:
        """The next batch of this process."""
        if self._batches is None:
            self._batches = self._start()
        found = next(self._batches)
        self.consumed += 1
        if self.consumed == len(self.sampler):
            self.epoch, self.consumed = self.epoch + 1, 0
        for key, reason in found.pop("skipped", ()):
            if key not in self._left_out:
                self._left_out.add(key)
                self.tally.skip(reason, key)
        moved = {
            name: value.to(self.device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in found.items()
        }
        return moved if self.finish is None else self.finish(moved)

    def state_dict(self) -> dict[str, Any]:
        """Position by batches that training has used, not by those that workers have read."""
        return {"epoch": self.epoch, "consumed": self.consumed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position written by :meth:`state_dict`."""
        self.epoch, self.consumed, self._batches = state["epoch"], state["consumed"], None

    def report(self) -> None:
        """Log one line about the clips in whose place others were taken so far, if any."""
        if self.tally.skipped:
            self.tally.kept = sum(map(len, self.sampler.buckets.values())) - self.tally.skipped
            self.tally.report()
