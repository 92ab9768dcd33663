"""The noising side of diffusion training, shared by images and video."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from stvision.models.sampling import make_scheduler


@dataclass(frozen=True)
class DiffusionConfig:
    """What is noised and how, and what the network predicts."""

    schedule: Literal["sd", "authors"] = "sd"
    """Noise schedule, see `stvision.models.sampling.make_scheduler`."""
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    """What the network predicts (v: Salimans and Ho 2022)."""
    min_snr_gamma: float | None = None
    """Cap of the loss weight by signal-to-noise ratio (Hang et al. 2023); none: plain error."""
    timestep_spacing: Literal["leading", "linspace", "trailing"] | None = None
    """Where a sampler's steps lie, in validation and in the exported pipeline; none leaves it to
    the schedule. "trailing" starts at the last timestep, whose noise is what sampling starts from
    (Lin et al. 2024, section 3.3)."""
    text_dropout: float = 0.0
    """Share of items that are trained with the empty sentence, for guidance without a text."""


class Noising:
    """Forward process on a device.

    Args:
        config: schedule and target.
        device: of the tables.

    Raises:
        ValueError: ``timestep_spacing`` for the schedule "authors", which has a grid of its own.
    """

    def __init__(self, config: DiffusionConfig, device: torch.device | str) -> None:
        self.config = config
        self.scheduler = make_scheduler(config.schedule)
        self.scheduler.register_to_config(prediction_type=config.prediction_type)
        if config.timestep_spacing is not None:
            if config.schedule == "authors":
                raise ValueError(
                    f"timestep_spacing={config.timestep_spacing!r} does not go with "
                    "schedule='authors', which has a grid of its own"
                )
            self.scheduler.register_to_config(timestep_spacing=config.timestep_spacing)
        alphas = self.scheduler.alphas_cumprod.to(device, torch.float32)
        self.signal, self.noise = alphas.sqrt(), (1 - alphas).sqrt()
        ratio = alphas / (1 - alphas)
        gamma = config.min_snr_gamma
        capped = ratio if gamma is None else ratio.clamp(max=gamma)
        # the error of the noise, weighted by SNR, is the error of the clean latents
        divisor = ratio if config.prediction_type == "epsilon" else ratio + 1
        self.weight = torch.ones_like(ratio) if gamma is None else capped / divisor

    def draw(
        self, clean: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Noise latents at random times.

        Args:
            clean: (B, ...) float32 latents.
            generator: draws timesteps and noise, on the latents' device.

        Returns:
            Noised latents (B, ...), timesteps (B,) int64, target (B, ...), loss weights (B,).
        """
        device = clean.device
        steps = torch.randint(len(self.signal), (len(clean),), generator=generator, device=device)
        noise = torch.randn(clean.shape, generator=generator, device=device)
        shape = (-1, *(1,) * (clean.ndim - 1))
        signal, amount = self.signal[steps].view(shape), self.noise[steps].view(shape)
        noised = signal * clean + amount * noise
        target = (
            noise if self.config.prediction_type == "epsilon" else signal * noise - amount * clean
        )
        return noised, steps, target, self.weight[steps]

    def drop(self, batch: int, generator: torch.Generator, device: Any) -> Tensor:
        """Which items lose their sentence: (B,) bool."""
        drawn = torch.rand(batch, generator=generator, device=device)
        return drawn < self.config.text_dropout


def weighted_error(predicted: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Mean over items of weight (B,) times mean squared error, in float32."""
    error = (predicted.float() - target.float()).square().flatten(1).mean(1)
    return (error * weight).mean()


def draw_latents(batch: dict[str, Any], generator: torch.Generator) -> Tensor:
    """Clean scaled latents (B, c, T, h, w) float32 of a batch with moments or samples."""
    if "latents" in batch:
        return batch["latents"].float()
    mean, deviation = batch["mean"].float(), batch["std"].float()
    noise = torch.randn(mean.shape, generator=generator, device=mean.device)
    return mean + deviation * noise
