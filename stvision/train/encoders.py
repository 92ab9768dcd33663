"""Frozen networks in front of the trained one: text encoder and image autoencoder."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor

from stvision.models.open_clip_text import PREFIX, parse_open_clip
from stvision.models.text import default_max_length, encode_text, has_text, load_text, text_folders
from stvision.optional import mend_torchvision, require
from stvision.train.store import digest, files_digest


@dataclass(frozen=True)
class TextConfig:
    """Which text encoder, and how long a sentence may be."""

    encoder: str = "auto"
    """`auto` (that of the folder whose networks are continued, where it holds one, else `minilm`),
    `minilm` (from its package), a folder with `tokenizer/` and `text_encoder/`, or
    `open_clip:MODEL/TAG`, `open_clip:MODEL/FILE` such as `open_clip:RN50/openai`."""
    max_length: int | None = None
    """Tokens a sentence, special ones included; none means the tokenizer's limit, at most 77."""

    def chosen(self, base: str | None) -> "TextConfig":
        """The same with `auto` replaced by what it stands for beside a folder of networks."""
        if self.encoder != "auto":
            return self
        return replace(self, encoder="minilm" if base is None or not has_text(base) else base)


class TextEncoder:
    """Tokenizer and encoder as one function of sentences.

    Args:
        config: which; `auto` stands for `minilm` here.
        device: where the encoder computes.
    """

    def __init__(self, config: TextConfig, device: torch.device | str = "cpu") -> None:
        self.tokenizer, self.model = load_text(config.chosen(None).encoder)
        self.model = self.model.to(device)
        self.max_length = config.max_length or default_max_length(self.tokenizer)

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> Tensor:
        """States (B, L, D) float32."""
        return encode_text(self.tokenizer, self.model, texts, self.max_length).float()


def text_digest(config: TextConfig) -> str:
    """Changes when another encoder would be loaded.

    Raises:
        FileNotFoundError, ImportError, ValueError: there is none.
    """
    name = config.chosen(None).encoder
    if not name.startswith(PREFIX):
        return files_digest(*text_folders(name))
    _, weights = parse_open_clip(name)
    local = Path(name.rpartition("local-dir:")[2] if weights is None else weights)
    return digest([name, files_digest(local) if local.exists() else None])


def check_text(config: TextConfig, width: Any, unet: str, base: str | None) -> None:
    """See to it that the text encoder is there and suits the U-Net, before anything costly is done.

    Args:
        config: which encoder.
        width: of the states that the U-Net reads, as its configuration says it.
        unet: what error sentences call the U-Net.
        base: folder that may hold a text encoder of its own, which they then offer.

    Raises:
        FileNotFoundError, ImportError: there is no such encoder.
        ValueError: its states have another width.
    """
    offer = ""
    if base is not None and has_text(base) and config.encoder != base:
        offer = f"; {base} holds a text encoder of its own: give --text.encoder {base}"
    name = config.chosen(None).encoder
    if name.startswith(PREFIX):
        parse_open_clip(name)
        mend_torchvision()
        require("open_clip", extra="vision", distribution="open_clip_torch", pinned=True)
        return
    try:
        folder = text_folders(name)[-1]
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}{offer}") from error
    found = json.loads((folder / "config.json").read_text()).get("hidden_size")
    if isinstance(found, int) and isinstance(width, int) and found != width:
        raise ValueError(
            f"{unet} reads text states of width {width}, but those of text.encoder {name!r} have "
            f"{found}{offer}"
        )


def load_vae(path: str, device: torch.device | str = "cpu") -> Any:
    """A frozen image VAE from its own folder or from a pipeline folder with ``vae/``."""
    folder = component_folder(path, "vae")
    vae = AutoencoderKL.from_pretrained(folder, local_files_only=True)
    return vae.to(device).eval().requires_grad_(False)


def component_folder(path: str, name: str) -> Path:
    """``path/name`` when that is a model folder, else ``path`` when it is one.

    Raises:
        FileNotFoundError: neither holds a config.json.
    """
    for folder in (Path(path) / name, Path(path)):
        if (folder / "config.json").is_file():
            return folder
    raise FileNotFoundError(f"{path} is neither a {name} folder nor a pipeline folder with {name}/")


def read_config(path: str, name: str) -> dict[str, Any]:
    """Configuration of a component, without its weights.

    Raises:
        FileNotFoundError: see :func:`component_folder`.
    """
    config: dict[str, Any] = json.loads((component_folder(path, name) / "config.json").read_text())
    return config


def check_sizes(path: str, sizes: Iterable[tuple[int, int]]) -> None:
    """See to it that a VAE's latents have whole sizes, before anything costly is done.

    Args:
        path: folder of the VAE, or of a pipeline.
        sizes: (height, width), pixels.

    Raises:
        FileNotFoundError: no VAE there.
        ValueError: a size that the VAE's factor does not divide; the nearest ones are named.
    """
    config = read_config(path, "vae")
    factor = 2 ** (len(config["block_out_channels"]) - 1)
    for height, width in sizes:
        if height % factor or width % factor:
            near = " or ".join(
                f"{h} x {w}"
                for h, w in sorted(
                    {
                        (
                            max(1, step(height / factor)) * factor,
                            max(1, step(width / factor)) * factor,
                        )
                        for step in (math.floor, math.ceil)
                    }
                )
            )
            raise ValueError(
                f"frames of {height} x {width} pixels do not suit {path}, whose latents are {factor} "
                f"times smaller; take {near}"
            )


@torch.no_grad()
def encode_frames(vae: Any, frames: Tensor, chunk: int = 256) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the scaled latents.

    Args:
        vae: image VAE.
        frames: (B, C, T, H, W) float in [-1, 1].
        chunk: frames coded at once.

    Returns:
        Two tensors (B, c, T, h, w) float32, already multiplied by the scaling factor.
    """
    flat = frames.transpose(1, 2).flatten(0, 1)
    means, deviations = [], []
    scale = vae.config.scaling_factor
    for part in flat.split(chunk):
        posterior = vae.encode(part.to(vae.dtype)).latent_dist
        means.append(posterior.mean.float() * scale)
        deviations.append(posterior.std.float() * scale)
    shape = (frames.shape[0], frames.shape[2])
    mean, deviation = (
        torch.cat(p).unflatten(0, shape).transpose(1, 2) for p in (means, deviations)
    )
    return mean, deviation


@torch.no_grad()
def decode_latents(vae: Any, latents: Tensor, chunk: int = 64) -> Tensor:
    """Scaled latents (B, c, T, h, w) to frames (B, C, T, H, W) float32 in [0, 1]."""
    flat = latents.transpose(1, 2).flatten(0, 1) / vae.config.scaling_factor
    parts = [vae.decode(part.to(vae.dtype)).sample.float() for part in flat.split(chunk)]
    frames = torch.cat(parts).unflatten(0, (latents.shape[0], latents.shape[2])).transpose(1, 2)
    return (frames / 2 + 0.5).clamp(0, 1)
