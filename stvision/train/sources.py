"""Put together what a task's configuration names: reader, cache, text, source of batches."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from stvision.datasets.batching import BucketBatchSampler
from stvision.datasets.records import ClipError, Skipped
from stvision.train.buckets import Part, open_parts
from stvision.train.cache import cached_frames, cached_latents, cached_text, main_process_first
from stvision.train.data import (
    DataConfig,
    LoaderSource,
    ResidentSource,
    TextTable,
    open_reader,
    to_network_range,
)
from stvision.train.encoders import TextConfig, TextEncoder, check_sizes, encode_frames, load_vae
from stvision.train.loop import Source
from stvision.train.options import LoopConfig
from stvision.train.store import Store


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
    """Clips of stores, read from the disk one by one; the sentence is drawn by the item's seed."""

    def __init__(
        self, stores: Sequence[Store], text: TextTable | None, extra: dict[str, Tensor]
    ) -> None:
        self.places = [(store, row) for store in stores for row in range(len(store))]
        self.text, self.extra = text, extra

    def __getitem__(self, place: tuple[int, int]) -> dict[str, Any]:
        index, seed = place
        store, row = self.places[index]
        item: dict[str, Any] = store.row(row)
        item |= {name: tensor[index] for name, tensor in self.extra.items()}
        if self.text is not None:
            generator = torch.Generator().manual_seed(seed)
            item["text"] = self.text.choose(torch.tensor([index]), generator)[0]
        return item


class _ReadItems(Dataset):
    """Clips decoded anew each time; a broken one is replaced by the next of its shape.

    What was left out for an item stands in its ``"skipped"``, (key, reason) each. With ``classes``,
    class -> index, an item holds the index of its clip's class as ``"label"``.
    """

    def __init__(
        self, readers: Sequence[Any], classes: dict[str, int] | None = None, label_key: str = ""
    ) -> None:
        self.places = [(reader, row) for reader in readers for row in range(len(reader))]
        self.classes, self.label_key = classes, label_key

    def __getitem__(self, place: tuple[int, int]) -> dict[str, Any]:
        index, seed = place
        reader, row = self.places[index]
        skipped: list[tuple[str, str]] = []
        for offset in range(min(100, len(reader))):
            found = (row + offset) % len(reader)
            try:
                record = reader[found, seed]
            except ClipError as error:
                skipped.append((reader.entries[found].key, error.reason))
                continue
            if isinstance(record, Skipped):
                skipped.append((record.key, record.reason))
                continue
            captions = record.meta.get("captions") or [record.text]
            caption = captions[seed % len(captions)]
            item = {"frames": record.frames, "caption": caption, "skipped": skipped}
            if self.classes is not None:
                item["label"] = self.classes[str(record.meta[self.label_key])]
            return item
        raise ValueError(
            f"{len(skipped)} clips in a row could not be read, the first for being "
            f"{skipped[0][1]}: {skipped[0][0]}"
        )


def _collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Stack items; what was left out for them is joined to one list."""
    skipped = [pair for item in items for pair in item.pop("skipped", [])]
    return {**default_collate(items), "skipped": skipped}


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
            occur in the training split, sorted.
        label_key: entry of a clip's meta data that holds its class.

    Raises:
        ValueError: a clip of either split without a class, or of one that is not among the names.
    """
    shared = {"seed": seed, "rank": accelerator.process_index, "world": accelerator.num_processes}
    device = accelerator.device
    if vae is not None:
        shapes = {(height, width) for _, height, width in data.buckets}
        check_sizes(vae, sorted(shapes | {(data.height, data.width)}))
    if data.cache == "off":
        return _uncached(data, loop, accelerator, shared, text, vae, labels, label_key)

    encoder = cache(lambda: TextEncoder(cast(TextConfig, text), device))

    def stored(split: str, parts: list[Part]) -> list[Store]:
        if vae is None:
            return [cached_frames(cut, split, reader) for cut, reader in parts]
        return [cached_latents(cut, split, vae, device, seed, reader) for cut, reader in parts]

    with main_process_first(accelerator, Path(data.cache_dir)):
        stores = stored(data.split, open_parts(data, data.split))
        validation = replace(data, buckets=())
        held_store = stored(data.validation_split, open_parts(validation, data.validation_split))[0]
        entries = [entry for store in stores for entry in store.entries]
        tables = [
            None if text is None else cached_text(data, text, part, encoder)
            for part in (entries, held_store.entries)
        ]
    encoder.cache_clear()
    table = tables[0]
    extra: dict[str, Tensor] = {}
    held = _hold(held_store, tables[1], data.validation_clips)
    names: list[str] = []
    if labels is not None:
        names = class_names(entries, label_key) if labels == "all" else list(labels)
        extra["label"] = label_tensor(entries, names, label_key)
        label_tensor(held_store.entries, names, label_key)  # all of them, not only those kept
        held.tensors["label"] = label_tensor(held.entries, names, label_key)
    source: Source
    if data.resident:
        source = ResidentSource(
            {**stores[0].load(), **extra},
            loop.batch_size,
            loop.gradient_accumulation_steps,
            device=device,
            text=table,
            **shared,
        )
    else:
        source = LoaderSource(
            _StoredItems(stores, table, extra),
            _sampler([len(store) for store in stores], data, loop, accelerator, seed),
            default_collate,
            seed=seed,
            device=device,
            workers=data.workers,
            name=data.root,
        )
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the encoders are gone
    return Prepared(source, held, entries, names)


def _sampler(
    counts: Sequence[int], data: DataConfig, loop: LoopConfig, accelerator: Accelerator, seed: int
) -> BucketBatchSampler:
    """Batches of parts with so many clips, each part of one shape."""
    return BucketBatchSampler(
        [number for number, count in enumerate(counts) for _ in range(count)],
        loop.batch_size,
        leftover=data.leftover,
        seed=seed,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )


def class_of(entry: Any, key: str) -> str:
    """Class of a clip: what stands under ``key`` in its meta data.

    Args:
        entry: of a reader, or a line of a store or of packed clips.
        key: name of the class in the meta data.

    Raises:
        ValueError: nothing stands there.
    """
    known = entry if isinstance(entry, dict) else vars(entry)
    value = known["meta"].get(key)
    if value is None or value == "":
        there = ", ".join(sorted(known["meta"])) or "nothing"
        raise ValueError(
            f"clip {known['key']!r} has no {key!r} in its meta data, by which it would be classed; "
            f"there is {there}"
        )
    return str(value)


def class_names(entries: Sequence[Any], key: str) -> list[str]:
    """Classes that occur, each once, sorted; ValueError for a clip without one."""
    return sorted({class_of(entry, key) for entry in entries})


def label_tensor(entries: Sequence[Any], labels: Sequence[str], key: str) -> Tensor:
    """Class index (N,) of each entry.

    Raises:
        ValueError: an entry without that key, or of another class.
    """
    index = {label: number for number, label in enumerate(labels)}
    found = []
    for entry in entries:
        value = class_of(entry, key)
        if value not in index:
            name = entry["key"] if isinstance(entry, dict) else entry.key
            raise ValueError(
                f"clip {name!r} has {key}={value!r}, which is none of the {len(labels)} classes "
                f"that are trained: {', '.join(labels[:8])}{' ...' if len(labels) > 8 else ''}"
            )
        found.append(index[value])
    return torch.tensor(found)


def _check_validation(count: int, data: DataConfig) -> None:
    """Say which split is empty, rather than fail in the middle of it."""
    if count == 0:
        raise ValueError(
            f"no clips of split {data.validation_split!r} in {data.root} to validate on; add some, "
            f"or give --data.validation-split {data.split}"
        )


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
    labels: Sequence[str] | Literal["all"] | None,
    label_key: str,
) -> Prepared:
    """Decode, encode and read sentences anew for each batch; the encoders stay on the device."""
    device = accelerator.device
    encoder = None if text is None else TextEncoder(text, device)
    vae = None if vae_path is None else load_vae(vae_path, device)

    def finish(batch: dict[str, Any]) -> dict[str, Any]:
        captions = batch.pop("caption")
        batch.pop("skipped", None)
        if encoder is not None:
            batch["text"] = encoder(list(captions))
        if vae is not None:
            frames = to_network_range(batch.pop("frames"))
            batch["mean"], batch["std"] = encode_frames(vae, frames, chunk=32)
        return batch

    with main_process_first(accelerator, Path(data.cache_dir)) if data.buckets else nullcontext():
        readers = [reader for _, reader in open_parts(data, data.split)]
    held_reader = open_reader(data, data.validation_split)
    _check_validation(len(held_reader), data)
    names: list[str] = []
    classes = None
    if labels is not None:
        entries = [entry for reader in readers for entry in reader.entries]
        names = class_names(entries, label_key) if labels == "all" else list(labels)
        for known in (entries, held_reader.entries):
            label_tensor(known, names, label_key)
        classes = {name: number for number, name in enumerate(names)}
    source = LoaderSource(
        _ReadItems(readers, classes, label_key),
        _sampler([len(reader) for reader in readers], data, loop, accelerator, shared["seed"]),
        _collate,
        seed=shared["seed"],
        device=device,
        workers=data.workers,
        finish=finish,
        name=data.root,
    )
    count = min(data.validation_clips, len(held_reader))
    places = torch.linspace(0, len(held_reader) - 1, count).round().long().tolist()
    held_items = _ReadItems([held_reader], classes, label_key)
    items = _collate([held_items[place, 0] for place in places])
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
    return Prepared(source, held, [], names)
