"""Batches of clips: buckets of equal shape, exact resumption, and collation that counts.

:class:`BucketBatchSampler` keeps clips of different (frames, height, width) apart, divides the
batches of an epoch among processes so that all take the same number of steps, and goes on from any
batch of any epoch. :func:`collate` stacks records and refuses unequal shapes.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from stvision.datasets.records import Record, Skipped, worker_context

Shape = tuple[int, int, int]


def nearest_bucket(frames: int, height: int, width: int, buckets: Sequence[Shape]) -> Shape | None:
    """The bucket that a clip fits best: most frames not above its own, then the nearest shape.

    Args:
        frames: of the clip.
        height: pixels.
        width: pixels.
        buckets: (frames, height, width) each.

    Returns:
        A bucket, or None when the clip has fewer frames than every bucket.
    """
    fitting = [bucket for bucket in buckets if bucket[0] <= frames]
    if not fitting:
        return None

    def misfit(bucket: Shape) -> tuple[float, float, int]:
        ratio = torch.tensor((bucket[1] / bucket[2]) / (height / width)).log().abs().item()
        area = abs(bucket[1] * bucket[2] - height * width)
        return (-bucket[0], round(ratio, 6), area)

    return min(fitting, key=misfit)


class BucketBatchSampler(Sampler[list[int]]):
    """Batches of indices whose clips have one shape; resumable and the same on every process.

    The order depends on (seed, epoch) alone. Iteration runs through the present epoch from the
    present position to its end and then moves to the next epoch. Positions count the batches of
    one process; every process has as many, whatever remains.

    Args:
        shapes: of each clip, (frames, height, width) or any other key of equality.
        batch_size: clips in a batch of one process; or shape -> batch size.
        leftover: what happens to clips that do not fill a last batch of their bucket: "drop" leaves
            them out of this epoch (another epoch's order takes others), "pad" fills the batch with
            clips of the same bucket from its beginning, "keep" gives a smaller batch.
        shuffle: a new order every epoch.
        seed: of the orders.
        rank: number of this process.
        world_size: number of processes.

    Raises:
        ValueError: an argument out of range, or no batch in an epoch.
    """

    def __init__(
        self,
        shapes: Sequence[Any],
        batch_size: int | dict[Any, int],
        *,
        leftover: Literal["drop", "pad", "keep"] = "drop",
        shuffle: bool = True,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if leftover not in ("drop", "pad", "keep"):
            raise ValueError(f"leftover is {leftover!r}; allowed are drop, pad, keep")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}; it must be at least 0 and below {world_size}")
        self.buckets: dict[Any, list[int]] = {}
        for index, shape in enumerate(shapes):
            self.buckets.setdefault(shape, []).append(index)
        self._sizes: dict[Any, int] = {}
        for shape in self.buckets:
            size = batch_size.get(shape) if isinstance(batch_size, dict) else batch_size
            if size is None or size < 1:
                raise ValueError(f"batch_size for {shape} must be at least 1, got {size}")
            self._sizes[shape] = size
        self.leftover, self.shuffle, self.seed = leftover, shuffle, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = self.position = 0
        if not len(self):
            raise ValueError(
                f"{len(shapes)} clips in {len(self.buckets)} buckets do not fill one batch on "
                f"{world_size} process(es); lower batch_size, or leftover='pad'"
            )

    @property
    def dropped(self) -> int:
        """Clips that an epoch leaves out on all processes together."""
        taken = {index for batch in self._global_batches(0) for index in batch}
        return sum(map(len, self.buckets.values())) - len(taken)

    def _count(self) -> int:
        total = 0
        for shape, members in self.buckets.items():
            whole, rest = divmod(len(members), self._sizes[shape])
            total += whole + (1 if rest and self.leftover != "drop" else 0)
        return total

    def __len__(self) -> int:
        """Batches of one process in an epoch."""
        count = self._count()
        if self.leftover == "drop":
            return count // self.world_size
        return (count + self.world_size - 1) // self.world_size

    def _global_batches(self, epoch: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        batches: list[list[int]] = []
        for shape, members in self.buckets.items():
            size = self._sizes[shape]
            order = members
            if self.shuffle:
                order = [members[i] for i in torch.randperm(len(members), generator=generator)]
            cut = [order[i : i + size] for i in range(0, len(order), size)]
            if len(cut[-1]) < size:
                if self.leftover == "drop":
                    cut.pop()
                elif self.leftover == "pad":
                    last = cut[-1]
                    cut[-1] = last + [order[i % len(order)] for i in range(size - len(last))]
            batches += cut
        if self.shuffle:
            batches = [batches[i] for i in torch.randperm(len(batches), generator=generator)]
        steps = len(self) if batches else 0
        needed = steps * self.world_size
        # processes that would be one batch short take batches from the beginning once more
        return [batches[i % len(batches)] for i in range(needed)] if batches else []

    def __iter__(self) -> Iterator[list[int]]:
        batches = self._global_batches(self.epoch)
        for step in range(self.position, len(self)):
            self.position = step + 1
            yield batches[step * self.world_size + self.rank]
        self.set_position(self.epoch + 1, 0)

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch, unless it is the present one."""
        if epoch != self.epoch:
            self.set_position(epoch, 0)

    def set_position(self, epoch: int, position: int) -> None:
        """Let the next iteration start at a batch of an epoch."""
        if not 0 <= position <= len(self) or epoch < 0:
            raise ValueError(
                f"position is {position} of epoch {epoch}; an epoch has {len(self)} batches"
            )
        self.epoch, self.position = epoch, position

    def state_dict(self, consumed: int | None = None) -> dict[str, int]:
        """Where iteration stands.

        Args:
            consumed: batches of this epoch that training has used, when a loader's workers are
                ahead of it; the sampler's own position when None.
        """
        position = self.position if consumed is None else consumed
        return {"epoch": self.epoch, "position": position, "seed": self.seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a position that :meth:`state_dict` gave; the seed must be the same."""
        if state["seed"] != self.seed:
            raise ValueError(f"the state is of seed {state['seed']}, the sampler of {self.seed}")
        self.set_position(state["epoch"], state["position"])


def collate(items: Sequence[Record | Skipped]) -> dict[str, Any]:
    """Stack records into a batch; skipped clips are counted, unequal shapes are an error.

    Returns:
        ``frames`` (B, T, H, W, 3) uint8, ``times`` (B, T) float64, ``text``, ``key`` and ``meta``
        (lists of B), ``skipped`` (list of :class:`~stvision.datasets.records.Skipped`). Without
        any usable clip ``frames`` and ``times`` are empty tensors.

    Raises:
        ValueError: shapes differ.
    """
    records = [item for item in items if not isinstance(item, Skipped)]
    skipped = [item for item in items if isinstance(item, Skipped)]
    shapes = {tuple(record.frames.shape): record.key for record in records}
    if len(shapes) > 1:
        listed = ", ".join(f"{shape} ({key})" for shape, key in sorted(shapes.items()))
        raise ValueError(
            f"a batch of unequal clips: {listed}; use BucketBatchSampler, or a reader with "
            "num_frames and size"
        )
    return {
        "frames": torch.stack([r.frames for r in records])
        if records
        else torch.empty((0, 0, 0, 0, 3), dtype=torch.uint8),
        "times": torch.stack([r.times for r in records])
        if records
        else torch.empty((0, 0), dtype=torch.float64),
        "text": [record.text for record in records],
        "key": [record.key for record in records],
        "meta": [record.meta for record in records],
        "skipped": skipped,
    }


def make_loader(
    dataset: Dataset,
    sampler: BucketBatchSampler,
    *,
    workers: int = 0,
    timeout: float = 300.0,
    pin_memory: bool = False,
) -> DataLoader:
    """A loader of batches whose workers may not hang for ever.

    Args:
        dataset: a reader of this package.
        sampler: which clips make a batch.
        workers: processes that decode; 0 decodes here.
        timeout: seconds without a batch after which the loader raises RuntimeError.
        pin_memory: for fast copies to a GPU.
    """
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=collate,
        timeout=timeout if workers else 0,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
        multiprocessing_context=worker_context(workers),
    )
