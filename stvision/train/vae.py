"""Train a small image autoencoder on single frames.

The objective is that of latent diffusion's autoencoder without its discriminator (Rombach et al.
2022, section 3.1): absolute error, an optional perceptual distance, and a small divergence from
the standard normal. The scaling factor, one over the deviation of the latents, is measured at the
end and stored in the configuration.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor, nn

from stvision.config import parse_config
from stvision.io import Clip, write_strip
from stvision.train.data import DataConfig, to_network_range
from stvision.train.entry import report, seeded
from stvision.train.loop import Batch, LoopConfig, Outcome, Task
from stvision.train.run import Run
from stvision.train.sources import Held


@dataclass(frozen=True)
class VAEConfig:
    """One training of an image autoencoder."""

    output_dir: str = "runs/vae"
    """Folder of this training; the result is its sub-folder `model`."""
    seed: int = 0
    """Of all randomness."""
    loop: LoopConfig = field(default_factory=LoopConfig)
    """Optimisation."""
    data: DataConfig = field(default_factory=lambda: DataConfig(cache="frames"))
    """Clips; one random frame of each is used at a time."""
    block_out_channels: tuple[int, ...] = (32, 64, 64)
    """Channels by level; each level but the first halves height and width."""
    layers_per_block: int = 1
    """Residual blocks in each level."""
    norm_num_groups: int = 16
    """Groups of the group norms."""
    latent_channels: int = 4
    """Channels of the latents."""
    kl_weight: float = 1e-6
    """Weight of the divergence, summed over a frame's latents and divided by its values."""
    perceptual_weight: float = 0.0
    """Weight of the perceptual distance."""
    perceptual: str | None = None
    """`module:callable` that makes a network `(frames in [0, 1], frames) -> distances`."""


class _Network(nn.Module):
    """Encode, draw, decode, compare."""

    def __init__(self, vae: AutoencoderKL, config: VAEConfig, perceptual: Any) -> None:
        super().__init__()
        self.vae = vae
        self.config = config
        # a plain attribute in a tuple: its frozen weights belong to no checkpoint of this network
        self._perceptual = (perceptual,)

    def forward(self, frames: Tensor, noise: Tensor) -> dict[str, Tensor]:
        posterior = self.vae.encode(frames).latent_dist
        decoded = self.vae.decode(posterior.mean + posterior.std * noise).sample
        absolute = (decoded.float() - frames).abs().mean()
        divergence = posterior.kl().float().mean() / frames[0].numel()
        values = {"absolute": absolute, "divergence": divergence}
        loss = absolute + self.config.kl_weight * divergence
        if self._perceptual[0] is not None:
            distance = self._perceptual[0](
                (decoded.float() / 2 + 0.5).clamp(0, 1), frames / 2 + 0.5
            ).mean()
            values["perceptual"] = distance
            loss = loss + self.config.perceptual_weight * distance
        return {"loss": loss, **values}


class VAETask(Task):
    """See the module docstring.

    Args:
        config: of this training.
        held: validation clips, ``frames`` (N, T, H, W, C) uint8.
        device: where validation computes.
        perceptual: a frozen network, or None.
    """

    def __init__(
        self,
        config: VAEConfig,
        held: Held,
        device: torch.device,
        perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        self.held, self.device = held, device
        levels = len(config.block_out_channels)
        with seeded(config.seed):
            self.vae = AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * levels,
                up_block_types=("UpDecoderBlock2D",) * levels,
                block_out_channels=config.block_out_channels,
                layers_per_block=config.layers_per_block,
                norm_num_groups=config.norm_num_groups,
                latent_channels=config.latent_channels,
                sample_size=config.data.height,
                scaling_factor=1.0,
            )
        self.shape = (
            config.latent_channels,
            config.data.height >> (levels - 1),
            config.data.width >> (levels - 1),
        )
        self.model = _Network(self.vae, config, perceptual)

    def inputs(self, batch: Batch, generator: torch.Generator) -> dict[str, Any]:
        """One random frame of each clip, and the noise of the latents."""
        frames = batch["frames"]
        count, device = len(frames), frames.device
        chosen = torch.randint(frames.shape[1], (count,), generator=generator, device=device)
        picked = frames[torch.arange(count, device=device), chosen]
        noise = torch.randn((count, *self.shape), generator=generator, device=device)
        return {"frames": to_network_range(picked[:, None])[:, :, 0], "noise": noise}

    def compile_targets(self) -> list[nn.Module]:
        """Encoder and decoder."""
        return [self.vae.encoder, self.vae.decoder]

    def _held_frames(self) -> Tensor:
        return to_network_range(self.held.tensors["frames"].flatten(0, 1)[:, None])[:, :, 0]

    def validate(self, step: int, folder: Path) -> dict[str, float]:
        """Signal-to-noise ratio of reconstructed frames in dB, and a strip of some."""
        frames = self._held_frames()
        decoded, means = [], []
        for part in frames.split(64):
            mean = self.vae.encode(part.to(self.device)).latent_dist.mean
            means.append(mean)
            decoded.append(self.vae.decode(mean).sample.float().clamp(-1, 1).cpu())
        error = (torch.cat(decoded) / 2 - frames / 2).square().flatten(1).mean(1)
        count = min(8, len(frames))
        places = torch.linspace(0, len(frames) - 1, count).round().long()
        folder.mkdir(parents=True, exist_ok=True)
        rows = [_clip(frames[places]), _clip(torch.cat(decoded)[places])]
        write_strip(rows, folder / "reconstruction.png", labels=["truth", "decoded"])
        psnr = -10 * torch.log10(error.clamp(min=1e-10))
        return {"psnr": float(psnr.mean()), "latent_std": float(torch.cat(means).std())}

    def export(self, folder: Path) -> None:
        """Write a diffusers ``AutoencoderKL`` with its scaling factor."""
        deviation = []
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for part in self._held_frames().split(64):
                posterior = self.vae.encode(part.to(self.device)).latent_dist
                noise = torch.randn(posterior.mean.shape, generator=generator)
                drawn = posterior.mean + posterior.std * noise.to(self.device)
                deviation.append(drawn.flatten().cpu())
        self.vae.register_to_config(scaling_factor=1 / float(torch.cat(deviation).std()))
        self.vae.save_pretrained(folder)


def _clip(frames: Tensor) -> Clip:
    """(N, C, H, W) in [-1, 1] as a clip."""
    return Clip.from_frames((frames / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).contiguous())


def load_perceptual(name: str | None, device: torch.device) -> Any:
    """Make the frozen network that ``module:callable`` names.

    Raises:
        ValueError: no such name.
    """
    if name is None:
        return None
    module, _, attribute = name.partition(":")
    try:
        made = getattr(importlib.import_module(module), attribute)()
    except (ImportError, AttributeError) as error:
        raise ValueError(f"perceptual={name!r} cannot be made: {error}") from error
    made = made.to(device).eval().requires_grad_(False)
    # a metric may switch gradients off around its computation; as a loss it needs them
    plain = getattr(type(made).forward, "__wrapped__", None)
    distance = made if plain is None else MethodType(plain, made)
    probe = torch.rand(1, 3, 32, 32, device=device, requires_grad=True)
    if not distance(probe, torch.zeros_like(probe)).requires_grad:
        raise ValueError(f"perceptual={name!r} passes no gradient, so it cannot be a loss")
    return distance


def run(config: VAEConfig) -> Outcome:
    """Train, or continue."""
    if config.data.cache == "latents":
        raise ValueError("an autoencoder is trained on frames: set data.cache to 'frames' or 'off'")
    training = Run.begin(config, text=None)
    device = training.accelerator.device
    name = config.perceptual if config.perceptual_weight > 0 else None
    return training.train(
        VAETask(config, training.prepared.held, device, load_perceptual(name, device))
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of ``python -m stvision.train.vae`` and of ``accelerate launch -m``."""
    return report(run, lambda: parse_config(VAEConfig, argv, "stvision train vae"))


if __name__ == "__main__":
    raise SystemExit(main())
