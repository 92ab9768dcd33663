"""Train a small text-to-image diffusion model on single frames, the base that is inflated later.

Latent diffusion with a diffusers ``UNet2DConditionModel`` (Rombach et al. 2022, section 3.2), told
the sentence of the clip from which a frame is taken.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from stvision.config import parse_config
from stvision.io import Clip, write_strip
from stvision.models.sampling import randn_per_sample
from stvision.train.data import DataConfig
from stvision.train.diffusion import DiffusionConfig, Noising, draw_latents, weighted_error
from stvision.train.encoders import TextConfig, check_text, decode_latents, load_vae
from stvision.train.entry import report, seeded
from stvision.train.loop import Batch, LoopConfig, Outcome, Task
from stvision.train.run import Run
from stvision.train.sources import Held


@dataclass(frozen=True)
class ImageConfig:
    """One training of a text-to-image diffusion model."""

    output_dir: str = "runs/image"
    """Folder of this training; the result is its sub-folder `model`."""
    seed: int = 0
    """Of all randomness."""
    vae: str = "runs/vae/model"
    """Folder of the VAE."""
    loop: LoopConfig = field(default_factory=LoopConfig)
    """Optimisation."""
    data: DataConfig = field(default_factory=DataConfig)
    """Clips; one random frame of each is used at a time."""
    text: TextConfig = field(default_factory=TextConfig)
    """Text encoder."""
    diffusion: DiffusionConfig = field(default_factory=lambda: DiffusionConfig(text_dropout=0.1))
    """Noise and target."""
    unet: dict[str, Any] = field(default_factory=dict)
    """Arguments of diffusers' UNet2DConditionModel."""
    frames_per_clip: int = 1
    """Frames that are taken of each clip in a batch."""
    guidance_scale: float = 3.0
    """Guidance of the validation's samples."""
    sampling_steps: int = 20
    """Denoising steps of the validation's samples."""


class _Network(nn.Module):
    """Predict what was mixed in, and compare."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self, noised: Tensor, timestep: Tensor, text: Tensor, target: Tensor, weight: Tensor
    ) -> dict[str, Tensor]:
        predicted = self.unet(noised, timestep, encoder_hidden_states=text).sample
        return {"loss": weighted_error(predicted, target, weight)}


class ImageTask(Task):
    """See the module docstring.

    Args:
        config: of this training.
        held: validation clips with text.
        device: where it trains.
    """

    def __init__(self, config: ImageConfig, held: Held, device: torch.device) -> None:
        if held.text is None or held.null_text is None:
            raise ValueError("a text-to-image model needs text states")
        self.config, self.held, self.device = config, held, device
        self.text, self.null_text = held.text, held.null_text.to(device)
        with seeded(config.seed):
            self.unet = UNet2DConditionModel(**config.unet)
        width = self.unet.config.cross_attention_dim
        if width != self.null_text.shape[-1]:
            raise ValueError(
                f"unet.cross_attention_dim is {width}, but the text encoder's states have width "
                f"{self.null_text.shape[-1]}"
            )
        self.noising = Noising(config.diffusion, device)
        self.model = _Network(self.unet)

    def inputs(self, batch: Batch, generator: torch.Generator) -> dict[str, Any]:
        """Noised latents of random frames, with the empty sentence for some."""
        clips = draw_latents(batch, generator)
        count, frames, device = len(clips), clips.shape[2], clips.device
        each = self.config.frames_per_clip
        drawn = torch.rand(count, frames, generator=generator, device=device)
        chosen = drawn.argsort(1)[:, :each]
        rows = torch.arange(count, device=device)[:, None]
        clean = clips.transpose(1, 2)[rows, chosen].flatten(0, 1)
        noised, steps, target, weight = self.noising.draw(clean, generator)
        text = batch["text"].float().repeat_interleave(chosen.shape[1], 0)
        dropped = self.noising.drop(len(text), generator, device)
        text = torch.where(dropped[:, None, None], self.null_text, text)
        return {
            "noised": noised,
            "timestep": steps,
            "text": text,
            "target": target,
            "weight": weight,
        }

    def compile_targets(self) -> list[nn.Module]:
        """The U-Net."""
        return [self.unet]

    def validate(self, step: int, folder: Path) -> dict[str, float]:
        """Loss on held-out frames with fixed noise, and samples beside true frames."""
        generator = torch.Generator(self.device).manual_seed(0)
        held = {name: value.to(self.device) for name, value in self.held.tensors.items()}
        batch = {**held, "text": self.text.to(self.device)}
        losses = [self.model(**self.inputs(batch, generator))["loss"] for _ in range(4)]
        count = min(8, len(self.text))
        vae = load_vae(self.config.vae, self.device)
        truth = draw_latents({n: v[:count] for n, v in held.items()}, generator)[:, :, :1]
        sampled = self._sample(self.text[:count].to(self.device), truth[:, :, 0].shape)
        folder.mkdir(parents=True, exist_ok=True)
        rows = []
        for latents in (truth, sampled[:, :, None]):
            frames = decode_latents(vae, latents)[:, :, 0]
            rows.append(Clip.from_frames(frames.permute(0, 2, 3, 1).cpu().contiguous()))
        write_strip(rows, folder / "samples.png", labels=["real", "sampled"])
        return {"loss": float(torch.stack(losses).mean())}

    def _sample(self, text: Tensor, shape: Sequence[int]) -> Tensor:
        """DDIM with guidance; (B, c, h, w)."""
        scheduler = self.noising.scheduler
        scheduler.set_timesteps(self.config.sampling_steps, device=self.device)
        latents = randn_per_sample(shape, 0, self.device)
        contexts = torch.cat([self.null_text.expand_as(text), text])
        for timestep in scheduler.timesteps:
            both = self.unet(
                torch.cat([latents, latents]), timestep, encoder_hidden_states=contexts
            ).sample
            without, told = both.chunk(2)
            predicted = without + self.config.guidance_scale * (told - without)
            latents = scheduler.step(predicted, timestep, latents, return_dict=False)[0]
        return latents

    def export(self, folder: Path) -> None:
        """Write ``unet/`` and ``scheduler/`` as diffusers does."""
        self.unet.save_pretrained(folder / "unet")
        self.noising.scheduler.save_pretrained(folder / "scheduler")


def run(config: ImageConfig) -> Outcome:
    """Train, or continue."""
    check_text(config.text, config.unet.get("cross_attention_dim"), "the U-Net", config.vae)
    training = Run.begin(config, text=config.text, vae=config.vae)
    return training.train(ImageTask(config, training.prepared.held, training.accelerator.device))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of ``python -m stvision.train.image`` and of ``accelerate launch -m``."""
    return report(run, lambda: parse_config(ImageConfig, argv, "stvision train image"))


if __name__ == "__main__":
    raise SystemExit(main())
