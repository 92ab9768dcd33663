"""Compute decoded frames, latents and text states once; training then reads them.

``python -m stvision.train.cache --config FILE`` fills the cache for the training of that file, and
``--data.root FOLDER --vae FOLDER`` without one; a training that finds nothing there fills it itself. Results are keyed by the files of the data set, by how clips
are cut, and by the weights of the encoders; another file, cut or encoder makes a new entry and
never reuses an old one. Encoders are freed before training starts.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor

from stvision.config import parse_config
from stvision.datasets.records import Record
from stvision.train.data import DataConfig, TextTable, open_reader, to_network_range
from stvision.train.encoders import (
    TextConfig,
    TextEncoder,
    component_folder,
    encode_frames,
    load_vae,
    text_digest,
)
from stvision.train.entry import attempt
from stvision.train.folders import replaced_folder
from stvision.train.state import derive_seed
from stvision.train.store import Store, build, digest, files_digest

logger = logging.getLogger(__name__)

#: of entries and tensors; another one makes caches of before unused
LAYOUT = 2


class _Decoder:
    """Frames of a reader's clips in rising order, decoded ahead by one set of workers."""

    def __init__(self, reader: Any, config: DataConfig) -> None:
        self.reader, self.config = reader, config
        self._items: Iterator[Any] = iter(())
        self._position = -1

    def __call__(self, indices: Sequence[int]) -> tuple[Tensor, list[dict[str, Any]]]:
        """Frames (n, T, H, W, C) uint8 and entries of those clips that can be used."""
        if self._position != indices[0]:
            self._items = self._read(range(indices[0], len(self.reader)))
        self._position = indices[-1] + 1
        frames, entries = [], []
        for index, item in zip(indices, islice(self._items, len(indices)), strict=True):
            if not isinstance(item, Record):
                logger.warning("left out: %s (%s)", item.key, item.reason)
                continue
            captions = list(item.meta.get("captions") or [item.text])
            meta = {k: v for k, v in item.meta.items() if isinstance(v, str | int | float | bool)}
            frames.append(item.frames)
            entries.append({"index": index, "key": item.key, "captions": captions, "meta": meta})
        return _stack(frames, self.config), entries

    def _read(self, indices: Sequence[int]) -> Iterator[Any]:
        if hasattr(self.reader, "iter_items"):
            return self.reader.iter_items(self.config.workers, indices=indices)
        return (self.reader[index] for index in indices)


class _Decoded:
    """The same out of frames that are kept already."""

    def __init__(self, store: Store, config: DataConfig) -> None:
        self.store, self.config = store, config
        self._rows = {entry["index"]: row for row, entry in enumerate(store.entries)}

    def __call__(self, indices: Sequence[int]) -> tuple[Tensor, list[dict[str, Any]]]:
        """Frames (n, T, H, W, C) uint8 and entries of those clips that can be used."""
        rows = [self._rows[index] for index in indices if index in self._rows]
        frames = [self.store.row(row)["frames"] for row in rows]
        return _stack(frames, self.config), [self.store.entries[row] for row in rows]


def _stack(frames: Sequence[Tensor], config: DataConfig) -> Tensor:
    shape = (0, config.num_frames, config.height, config.width, 3)
    return torch.stack(list(frames)) if frames else torch.empty(shape, dtype=torch.uint8)


def _cut(config: DataConfig, split: str, reader: Any) -> dict[str, Any]:
    """What a clip's frames depend on."""
    values = asdict(config)
    names = ("kind", "num_frames", "height", "width", "options")
    cut = {name: values[name] for name in names}
    return {"split": split, **cut, "files": reader.fingerprint(), "layout": LAYOUT}


def _frames_folder(config: DataConfig, spec: dict[str, Any]) -> Path:
    return Path(config.cache_dir) / f"frames-{spec['split']}-{digest(spec)}"


def cached_frames(config: DataConfig, split: str, reader: Any = None) -> Store:
    """Decoded frames ``frames`` (N, T, H, W, C) uint8 of a split; made when not there."""
    reader = open_reader(config, split) if reader is None else reader
    spec = _cut(config, split, reader)
    decode = _Decoder(reader, config)

    def make(indices: Sequence[int]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        frames, entries = decode(indices)
        return {"frames": frames}, entries

    return build(_frames_folder(config, spec), len(reader), make, spec, f"frames of {split}")


def cached_latents(
    config: DataConfig,
    split: str,
    vae_path: str,
    device: torch.device | str,
    seed: int = 0,
    reader: Any = None,
) -> Store:
    """Scaled latents of a split; made when not there.

    ``mean`` and ``std`` (N, c, T, h, w) float16 when ``config.latents`` is "moments", else
    ``latents`` drawn once. Frames that :func:`cached_frames` has made are read from there; without
    them clips are decoded on the way and their frames not kept.
    """
    reader = open_reader(config, split) if reader is None else reader
    cut = _cut(config, split, reader)
    spec = {
        **cut,
        "latents": config.latents,
        "seed": seed if config.latents == "sampled" else None,
        "vae": files_digest(component_folder(vae_path, "vae")),
    }
    folder = Path(config.cache_dir) / f"latents-{split}-{digest(spec)}"
    decode: Callable[[Sequence[int]], tuple[Tensor, list[dict[str, Any]]]]
    try:
        decode = _Decoded(Store(_frames_folder(config, cut)), config)
    except FileNotFoundError:
        decode = _Decoder(reader, config)
    vae = cache(lambda: load_vae(vae_path, device))

    def make(indices: Sequence[int]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        frames, entries = decode(indices)
        if not entries:
            return {}, []
        parts = [
            encode_frames(vae(), to_network_range(part.to(device))) for part in frames.split(16)
        ]
        mean, deviation = (torch.cat(values).cpu() for values in zip(*parts, strict=True))
        if config.latents == "moments":
            return {"mean": mean.half(), "std": deviation.half()}, entries
        generator = torch.Generator().manual_seed(derive_seed(seed, 6, indices[0]))
        noise = torch.randn(mean.shape, generator=generator)
        return {"latents": (mean + deviation * noise).half()}, entries

    return build(folder, len(reader), make, spec, f"latents of {split}")


def cached_text(
    config: DataConfig,
    text: TextConfig,
    entries: Sequence[dict[str, Any]],
    encoder: Callable[[], TextEncoder],
) -> TextTable:
    """States of every sentence of the entries; row 0 is the empty sentence.

    Args:
        config: where they are kept.
        text: which encoder.
        entries: with ``captions``.
        encoder: makes the encoder; called when something is to be computed.
    """
    sentences = sorted({caption for entry in entries for caption in entry["captions"]} - {""})
    sentences.insert(0, "")
    row = {sentence: index for index, sentence in enumerate(sentences)}
    chosen = [[row[caption] for caption in entry["captions"]] for entry in entries]
    key = digest([sentences, text.max_length, text_digest(text)])
    folder = Path(config.cache_dir) / f"text-{key}"
    if not (folder / "text.safetensors").is_file():
        encode = encoder()
        parts = [encode(sentences[i : i + 64]).half().cpu() for i in range(0, len(sentences), 64)]
        with replaced_folder(folder) as temporary:
            save_file({"states": torch.cat(parts)}, temporary / "text.safetensors")
    return TextTable(load_file(folder / "text.safetensors")["states"], chosen)


@contextmanager
def main_process_first(accelerator: Accelerator, folder: Path) -> Iterator[None]:
    """Let the main process run the block first, and the others when it is through.

    The others look for a file meanwhile; they do not wait inside a collective, so the work may take
    longer than a collective's timeout.
    """
    if accelerator.num_processes == 1:
        yield
        return
    flag = folder / ".prepared"
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        flag.unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        yield
        flag.touch()
    else:
        while not flag.is_file():
            time.sleep(0.2)
        yield
    accelerator.wait_for_everyone()


@dataclass(frozen=True)
class CacheConfig:
    """What `stvision train cache` computes; the rest of a task's configuration is not looked at."""

    data: DataConfig = field(default_factory=DataConfig)
    """Which clips."""
    text: TextConfig = field(default_factory=TextConfig)
    """Which text encoder; `auto` is that of `base`, where it holds one."""
    vae: str | None = None
    """Folder of the VAE, for latents."""
    base: str | None = None
    """Folder whose networks the training continues; that of the VAE when none."""
    device: str | None = None
    """Where the encoders compute; the GPU when there is one."""


def fill(config: CacheConfig) -> dict[str, int]:
    """Compute what is missing for both splits; number of clips by split."""
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    counts = {}
    text = config.text.chosen(config.base or config.vae)
    encoder = cache(lambda: TextEncoder(text, device))
    for split in (config.data.split, config.data.validation_split):
        if config.data.cache == "latents":
            if config.vae is None:
                raise ValueError("cache='latents' needs the option vae: a VAE or pipeline folder")
            store = cached_latents(config.data, split, config.vae, device)
        elif config.data.cache == "frames":
            store = cached_frames(config.data, split)
        else:
            raise ValueError("data.cache is 'off': there is nothing to compute")
        cached_text(config.data, text, store.entries, encoder)
        counts[split] = len(store)
    return counts


def run(config: CacheConfig) -> None:
    """Fill the cache and say what it holds."""
    for split, count in fill(config).items():
        print(f"{split}: {count} clips")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of ``python -m stvision.train.cache``; takes the configuration file of a training."""
    return attempt(lambda: run(parse_config(CacheConfig, argv, "stvision train cache", part=True)))


if __name__ == "__main__":
    raise SystemExit(main())
