"""Frozen networks in front of the trained one: text encoder and image autoencoder."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor

from stvision.models.text import (
    default_max_length,
    encode_text,
    load_packaged_minilm,
    packaged_minilm_folder,
)


@dataclass(frozen=True)
class TextConfig:
    """Which text encoder, and how long a sentence may be."""

    encoder: str = "minilm"
    """`minilm` (from its package) or a folder with `tokenizer/` and `text_encoder/`."""
    max_length: int | None = None
    """Tokens a sentence, special ones included; none means the tokenizer's limit, at most 77."""


class TextEncoder:
    """Tokenizer and encoder as one function of sentences.

    Args:
        config: which.
        device: where the encoder computes.
    """

    def __init__(self, config: TextConfig, device: torch.device | str = "cpu") -> None:
        if config.encoder == "minilm":
            self.tokenizer, self.model = load_packaged_minilm()
        else:
            self.tokenizer, self.model = _load_text(*text_folders(config))
        self.model = self.model.to(device).eval().requires_grad_(False)
        self.max_length = config.max_length or default_max_length(self.tokenizer)

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> Tensor:
        """States (B, L, D) float32."""
        return encode_text(self.tokenizer, self.model, texts, self.max_length).float()


def text_folders(config: TextConfig) -> list[Path]:
    """Where the files of tokenizer and encoder lie.

    Raises:
        FileNotFoundError: they are not there.
    """
    if config.encoder == "minilm":
        return [packaged_minilm_folder()]
    folder = Path(config.encoder)
    if not (folder / "text_encoder").is_dir() or not (folder / "tokenizer").is_dir():
        raise FileNotFoundError(
            f"{folder} must hold the folders tokenizer and text_encoder, as a diffusers pipeline has"
        )
    return [folder / "tokenizer", folder / "text_encoder"]


def _load_text(tokenizer: Path, encoder: Path) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModel, AutoTokenizer, CLIPTextModel

    kind = AutoConfig.from_pretrained(encoder, local_files_only=True).model_type
    cls: Any = CLIPTextModel if kind.startswith("clip") else AutoModel
    return (
        AutoTokenizer.from_pretrained(tokenizer, local_files_only=True),
        cls.from_pretrained(encoder, local_files_only=True),
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


def check_sizes(path: str, sizes: Iterable[tuple[int, int]]) -> None:
    """See to it that a VAE's latents have whole sizes, before anything costly is done.

    Args:
        path: folder of the VAE, or of a pipeline.
        sizes: (height, width), pixels.

    Raises:
        FileNotFoundError: no VAE there.
        ValueError: a size that the VAE's factor does not divide; the nearest ones are named.
    """
    config = json.loads((component_folder(path, "vae") / "config.json").read_text())
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
