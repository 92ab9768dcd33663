"""Put together what a task's configuration names: reader, cache, text, source of batches."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from stvision.datasets.batching import BucketBatchSampler
from stvision.datasets.records import ClipError, Record
from stvision.train.cache import cached_frames, cached_latents, cached_text, main_process_first
from stvision.train.data import (
    DataConfig,
    LoaderSource,
    ResidentSource,
    TextTable,
    open_reader,
    to_network_range,
)
from stvision.train.encoders import TextConfig, TextEncoder, encode_frames, load_vae
from stvision.train.loop import LoopConfig, Source
from stvision.train.store import Store

logger = logging.getLogger(__name__)


@dataclass
class Held:
    """Clips kept for validation, on the host.

    Args:
        tensors: (N, ...) each, as in a batch.
        text: (N, L, D) states of each clip's first sentence, or None.
        null_text: (L, D) states of the empty sentence, or None.
        entries: key, captions and meta of each clip.
    """

    tensors: dict[str, Tensor]
    text: Tensor | None
    null_text: Tensor | None
    entries: list[dict[str, Any]]


@dataclass
class Prepared:
    """Batches for training, clips for validation, entries of the training set, class names."""

    source: Source
    held: Held
    entries: list[dict[str, Any]]
    labels: list[str]


class _StoredItems(Dataset):
    """Clips of a store, read from the disk one by one; the sentence is drawn by the item's seed."""

    def __init__(self, store: Store, text: TextTable | None, extra: dict[str, Tensor]) -> None:
        self.store, self.text, self.extra = store, text, extra

    def __getitem__(self, place: tuple[int, int]) -> dict[str, Any]:
        index, seed = place
        item: dict[str, Any] = self.store.row(index)
        item |= {name: tensor[index] for name, tensor in self.extra.items()}
        if self.text is not None:
            generator = torch.Generator().manual_seed(seed)
            item["text"] = self.text.choose(torch.tensor([index]), generator)[0]
        return item


class _ReadItems(Dataset):
    """Clips decoded anew each time; a broken one is replaced by the next one that can be read."""

    def __init__(self, reader: Any) -> None:
        self.reader = reader

    def __getitem__(self, place: tuple[int, int]) -> dict[str, Any]:
        index, seed = place
        for offset in range(100):
            try:
                record = self.reader[(index + offset) % len(self.reader), seed]
            except (ClipError, OSError) as error:
                logger.warning("another clip takes the place of one that cannot be read: %s", error)
                continue
            if not isinstance(record, Record):
                continue
            captions = record.meta.get("captions") or [record.text]
            return {"frames": record.frames, "caption": captions[seed % len(captions)]}
        raise ValueError(f"100 clips in a row from {index} on could not be read")


def prepare(
    data: DataConfig,
    loop: LoopConfig,
    accelerator: Accelerator,
    *,
    seed: int,
    text: TextConfig | None,
    vae: str | None = None,
    labels: Sequence[str] | Literal["all"] | None = None,
    label_key: str = "task",
) -> Prepared:
    """Open, or compute once, everything that a training reads.

    Args:
        data: which clips.
        loop: batch size and accumulation.
        accelerator: rank and device.
        seed: of the order and of drawn latents.
        text: text encoder, or None when no text is read.
        vae: VAE folder when the batches hold latents, None when they hold frames.
        labels: class names when the batches shall hold ``"label"`` (B,); "all" takes those that
            occur, sorted.
        label_key: entry of a clip's meta data that holds its class.
    """
    shared = {"seed": seed, "rank": accelerator.process_index, "world": accelerator.num_processes}
    device = accelerator.device
    if data.cache == "off":
        return _uncached(data, loop, accelerator, shared, text, vae)

    with main_process_first(accelerator, Path(data.cache_dir)):
        stores = []
        for split in (data.split, data.validation_split):
            if vae is None:
                stores.append(cached_frames(data, split))
            else:
                stores.append(cached_latents(data, split, vae, device, seed))
        tables = [
            None if text is None else cached_text(data, text, store.entries, device)
            for store in stores
        ]
    store, table = stores[0], tables[0]
    extra: dict[str, Tensor] = {}
    held = _hold(stores[1], tables[1], data.validation_clips)
    names: list[str] = []
    if labels is not None:
        found = {str(entry["meta"].get(label_key)) for entry in store.entries}
        names = sorted(found) if labels == "all" else list(labels)
        extra["label"] = label_tensor(store.entries, names, label_key)
        held.tensors["label"] = label_tensor(held.entries, names, label_key)
    source: Source
    if data.resident:
        source = ResidentSource(
            {**store.load(), **extra},
            loop.batch_size,
            loop.gradient_accumulation_steps,
            device=device,
            text=table,
            **shared,
        )
    else:
        source = LoaderSource(
            _StoredItems(store, table, extra),
            _sampler(len(store), loop, accelerator, seed),
            default_collate,
            seed=seed,
            device=device,
            workers=data.workers,
        )
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the encoders are gone
    return Prepared(source, held, store.entries, names)


def _sampler(
    count: int, loop: LoopConfig, accelerator: Accelerator, seed: int
) -> BucketBatchSampler:
    # readers and caches give every clip one shape, so there is one bucket
    return BucketBatchSampler(
        [()] * count,
        loop.batch_size,
        seed=seed,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )


def label_tensor(entries: Sequence[dict[str, Any]], labels: Sequence[str], key: str) -> Tensor:
    """Class index (N,) of each entry.

    Raises:
        ValueError: an entry without that key, or of another class.
    """
    index = {label: number for number, label in enumerate(labels)}
    found = []
    for entry in entries:
        value = entry["meta"].get(key)
        if value not in index:
            raise ValueError(
                f"clip {entry['key']!r} has {key}={value!r}, which is none of the {len(labels)} "
                "classes"
            )
        found.append(index[value])
    return torch.tensor(found)


def _hold(store: Store, table: TextTable | None, count: int) -> Held:
    """Clips spread evenly over the store."""
    count = min(count, len(store))
    chosen = torch.linspace(0, len(store) - 1, count).round().long().tolist()
    rows = [store.row(index) for index in chosen]
    tensors = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    text = None if table is None else table.states[table.rows[chosen, 0]].float()
    null = None if table is None else table.states[0].float()
    return Held(tensors, text, null, [store.entries[index] for index in chosen])


def _uncached(
    data: DataConfig,
    loop: LoopConfig,
    accelerator: Accelerator,
    shared: dict[str, int],
    text: TextConfig | None,
    vae_path: str | None,
) -> Prepared:
    """Decode, encode and read sentences anew for each batch; the encoders stay on the device."""
    device = accelerator.device
    encoder = None if text is None else TextEncoder(text, device)
    vae = None if vae_path is None else load_vae(vae_path, device)

    def finish(batch: dict[str, Any]) -> dict[str, Any]:
        captions = batch.pop("caption")
        if encoder is not None:
            batch["text"] = encoder(list(captions))
        if vae is not None:
            frames = to_network_range(batch.pop("frames"))
            batch["mean"], batch["std"] = encode_frames(vae, frames, chunk=32)
        return batch

    reader = open_reader(data, data.split)
    source = LoaderSource(
        _ReadItems(reader),
        _sampler(len(reader), loop, accelerator, shared["seed"]),
        default_collate,
        seed=shared["seed"],
        device=device,
        workers=data.workers,
        finish=finish,
    )
    held_reader = open_reader(data, data.validation_split)
    count = min(data.validation_clips, len(held_reader))
    places = torch.linspace(0, len(held_reader) - 1, count).round().long().tolist()
    items = default_collate([_ReadItems(held_reader)[p, 0] for p in places])
    captions = list(items["caption"])
    batch = finish({**items, "frames": items["frames"].to(device)})
    states = batch.pop("text", None)
    held = Held(
        {name: value.cpu() for name, value in batch.items()},
        None if states is None else states.cpu(),
        None if encoder is None else encoder([""])[0].cpu(),
        [
            {"key": str(p), "captions": [c], "meta": {}}
            for p, c in zip(places, captions, strict=True)
        ],
    )
    return Prepared(source, held, [], [])
