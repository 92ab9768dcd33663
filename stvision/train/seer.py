"""Train Seer: inflate an image U-Net and learn to predict the frames that follow the first ones.

Gu et al., "Seer: Language Instructed Video Prediction with Latent Diffusion Models" (ICLR 2024).
As in the paper, image layers, VAE and text encoder stay as they are; temporal transformers and the
text decomposer learn. Reference latents stand clean before the noised future ones, and the error
is taken on future frames only. The decomposer first learns, by itself, to hand each frame the whole
sentence on average (its pre-initialisation).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from stvision.config import parse_config
from stvision.io import Clip, write_gif, write_strip
from stvision.models.fstext import FSTextDecomposer, identity_loss
from stvision.models.sampling import denoise, randn_per_sample, text_per_frame
from stvision.models.seer import SeerUNetModel
from stvision.train.data import DataConfig
from stvision.train.diffusion import DiffusionConfig, Noising, draw_latents, weighted_error
from stvision.train.encoders import (
    TextConfig,
    TextEncoder,
    check_text,
    component_folder,
    decode_latents,
    load_vae,
    read_config,
)
from stvision.train.entry import report, seeded
from stvision.train.loop import Batch, LoopConfig, Outcome, Task
from stvision.train.lora import LoraConfig, add_lora, merged_state, save_lora
from stvision.train.run import Run
from stvision.train.sources import Held


@dataclass(frozen=True)
class SeerConfig:
    """One training of Seer."""

    output_dir: str = "runs/seer"
    """Folder of this training; the result, a pipeline folder, is its sub-folder `model`."""
    seed: int = 0
    """Of all randomness."""
    vae: str = "runs/vae/model"
    """Folder of the VAE, or of a pipeline that holds one."""
    base: str | None = "runs/image/model"
    """Folder of the image U-Net that is inflated, or of a pipeline; none starts at random."""
    loop: LoopConfig = field(default_factory=LoopConfig)
    """Optimisation."""
    data: DataConfig = field(default_factory=DataConfig)
    """Clips."""
    text: TextConfig = field(default_factory=TextConfig)
    """Text encoder; `auto` is that of `base`, where it holds one."""
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    """Noise, target and text dropout."""
    unet: dict[str, Any] = field(default_factory=dict)
    """Arguments of the image U-Net when it starts at random."""
    inflation: dict[str, Any] = field(default_factory=dict)
    """Options of the inflation, such as `temporal_heads` or `attention`."""
    fstext: dict[str, Any] = field(default_factory=dict)
    """Arguments of FSTextDecomposer."""
    image_layers: Literal["frozen", "lora", "trained"] = "frozen"
    """What happens to the layers of the image U-Net."""
    image_lr_scale: float = 1.0
    """Learning rate of image layers or adapters, relative to that of the temporal ones."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Adapters on the image attention when `image_layers` is "lora"."""
    clip_fstext: bool = False
    """Clip the decomposer's gradients too; the paper clips the U-Net's only."""
    cond_frames: int = 1
    """Clean reference frames."""
    fstext_init_steps: int = 500
    """Steps of the decomposer's pre-initialisation."""
    fstext_init_learning_rate: float = 1e-3
    """Learning rate of these steps."""
    gradient_checkpointing: bool = False
    """Compute activations twice to keep fewer of them."""
    fps: float = 8.0
    """Frames per second of the clips, noted in the pipeline."""
    guidance_scale: float = 3.0
    """Guidance in validation, and the pipeline's default."""
    sampling_steps: int = 20
    """Denoising steps in validation, and the pipeline's default."""
    export_dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Precision of the exported weights."""

    def __post_init__(self) -> None:
        shortest = self.data.frame_counts[0]
        if not 1 <= self.cond_frames < shortest:
            raise ValueError(
                f"cond_frames must be between 1 and {shortest - 1}, got {self.cond_frames}"
            )
        if self.base is None and self.image_layers != "trained":
            raise ValueError(
                f"image_layers={self.image_layers!r} would keep a random image U-Net as it is; "
                "without a base it must be 'trained'"
            )


class _Network(nn.Module):
    """Decompose the sentence, predict what was mixed into future frames, compare."""

    null_text: Tensor

    def __init__(
        self, unet: SeerUNetModel, fstext: FSTextDecomposer, null_text: Tensor, cond_frames: int
    ) -> None:
        super().__init__()
        self.unet, self.fstext, self.cond_frames = unet, fstext, cond_frames
        self.register_buffer("null_text", null_text, persistent=False)

    def forward(
        self,
        reference: Tensor,
        noised: Tensor,
        timestep: Tensor,
        text: Tensor,
        dropped: Tensor,
        target: Tensor,
        weight: Tensor,
    ) -> dict[str, Tensor]:
        latents = torch.cat([reference, noised], dim=2)
        told = self.fstext(text, latents.shape[2])
        # without a sentence the raw states of the empty one are read, as in guidance
        told = torch.where(dropped[:, None, None, None], self.null_text.to(told.dtype), told)
        predicted = self.unet(latents, timestep, told, cond_frames=self.cond_frames).sample
        future = predicted[:, :, reference.shape[2] :]
        return {"loss": weighted_error(future, target, weight)}


class SeerTask(Task):
    """See the module docstring.

    Args:
        config: of this training.
        held: validation clips with latents and text.
        device: where it trains.
        fstext: a decomposer to continue with; a fresh one when None.
    """

    def __init__(
        self,
        config: SeerConfig,
        held: Held,
        device: torch.device,
        fstext: FSTextDecomposer | None = None,
    ) -> None:
        if held.text is None or held.null_text is None:
            raise ValueError("Seer needs text states")
        self.config, self.held, self.device = config, held, device
        self.text = held.text
        with seeded(config.seed):
            self.unet = build_unet(config)
            self.fstext = fstext or build_fstext(config, self.text)
        width = self.unet.config.cross_attention_dim
        if width != self.text.shape[-1]:
            raise ValueError(
                f"the U-Net reads text states of width {width}, but the text encoder's have "
                f"{self.text.shape[-1]}"
            )
        if config.image_layers == "trained":
            self.unet.requires_grad_(True)
        else:
            self.unet.freeze_image_layers()
        if config.image_layers == "lora":
            with seeded(config.seed + 1):
                add_lora(self.unet, config.lora)
        self.fstext.requires_grad_(True)
        if config.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
            self.fstext.enable_gradient_checkpointing()
        self.noising = Noising(config.diffusion, device)
        self.network = _Network(self.unet, self.fstext, held.null_text, config.cond_frames)
        self.model = self.network

    def inputs(self, batch: Batch, generator: torch.Generator) -> dict[str, Any]:
        """Clean references, noised future latents, and who loses the sentence."""
        clean = draw_latents(batch, generator)
        count = self.config.cond_frames
        noised, steps, target, weight = self.noising.draw(clean[:, :, count:], generator)
        return {
            "reference": clean[:, :, :count],
            "noised": noised,
            "timestep": steps,
            "text": batch["text"].float(),
            "dropped": self.noising.drop(len(clean), generator, clean.device),
            "target": target,
            "weight": weight,
        }

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Temporal layers, image layers or adapters, and the decomposer."""
        temporal = {id(parameter) for parameter in self.unet.temporal_parameters()}
        trained = [p for p in self.unet.parameters() if p.requires_grad]
        return [
            {"params": [p for p in trained if id(p) in temporal]},
            {
                "params": [p for p in trained if id(p) not in temporal],
                "lr_scale": self.config.image_lr_scale,
            },
            {"params": list(self.fstext.parameters()), "clip": self.config.clip_fstext},
        ]

    def compile_targets(self) -> list[nn.Module]:
        """U-Net and decomposer."""
        return [self.unet, self.fstext]

    def validate(self, step: int, folder: Path) -> dict[str, float]:
        """Error with fixed noise, and predicted clips against the decoded truth.

        ``psnr`` and ``psnr_copy`` are in dB over future frames, of the prediction and of the last
        reference frame repeated; truth is what the VAE makes of the true latents.
        """
        generator = torch.Generator(self.device).manual_seed(0)
        held = {name: value.to(self.device) for name, value in self.held.tensors.items()}
        losses, predicted, real = [], [], []
        vae = load_vae(self.config.vae, self.device)
        for rows in torch.arange(len(self.text)).split(self.config.loop.batch_size):
            part = {name: value[rows.to(self.device)] for name, value in held.items()}
            text = self.text[rows].to(self.device)
            losses.append(self.model(**self.inputs({**part, "text": text}, generator))["loss"])
            clean = part["latents"].float() if "latents" in part else part["mean"].float()
            predicted.append(self._predict(vae, clean, text, int(rows[0])))
            real.append(decode_latents(vae, clean).cpu())
        future, truth = torch.cat(predicted), torch.cat(real)
        count = self.config.cond_frames
        copied = truth[:, :, count - 1 : count].expand_as(future)
        folder.mkdir(parents=True, exist_ok=True)
        for index in range(min(8, len(truth))):
            shown = torch.cat([truth[index, :, :count], future[index]], dim=1)
            self._write(folder, index, truth[index], shown)
        return {
            "loss": float(torch.stack(losses).mean()),
            "psnr": _psnr(future, truth[:, :, count:]),
            "psnr_copy": _psnr(copied, truth[:, :, count:]),
        }

    def _predict(self, vae: Any, clean: Tensor, text: Tensor, first: int) -> Tensor:
        """Future frames (B, C, T - R, H, W) in [0, 1] on the host."""
        count, total = self.config.cond_frames, clean.shape[2]
        reference = clean[:, :, :count]
        batch, channels, _, height, width = clean.shape
        seeds = [first + index for index in range(batch)]
        noise = randn_per_sample(
            (batch, channels, total - count, height, width), seeds, self.device
        )
        null = self.network.null_text.expand(batch, -1, -1)
        latents = denoise(
            self.unet,
            self.noising.scheduler,
            noise,
            reference,
            self.fstext(text, total),
            negative_text=text_per_frame(null, total),
            guidance_scale=self.config.guidance_scale,
            num_inference_steps=self.config.sampling_steps,
            cond_frames=count,
        )
        return decode_latents(vae, latents).cpu()

    def _write(self, folder: Path, index: int, truth: Tensor, shown: Tensor) -> None:
        clips = [
            Clip.from_frames(frames.permute(1, 2, 3, 0).contiguous(), fps=self.config.fps)
            for frames in (truth, shown)
        ]
        write_strip(clips, folder / f"clip_{index}.png", labels=["truth", "predicted"])
        write_gif(clips[1], folder / f"clip_{index}.gif")

    def export(self, folder: Path) -> None:
        """Write a ``SeerPipeline`` folder; a packaged text encoder is named, not written."""
        config = self.config
        dtype = getattr(torch, config.export_dtype)
        unet = SeerUNetModel.from_config(self.unet.config)
        unet.load_state_dict(merged_state(self.unet))
        if config.image_layers == "lora":
            save_lora(self.unet, folder / "unet_lora")
        fstext = FSTextDecomposer.from_config(self.fstext.config)
        fstext.load_state_dict(self.fstext.state_dict())
        parts = {"unet": unet, "fstext": fstext, "vae": load_vae(config.vae)}
        for name, part in parts.items():
            part.to(dtype).save_pretrained(folder / name)
        self.noising.scheduler.save_pretrained(folder / "scheduler")
        index: dict[str, Any] = {
            "_class_name": "SeerPipeline",
            "_diffusers_version": diffusers.__version__,
            "vae": ["diffusers", "AutoencoderKL"],
            "unet": ["stvision", SeerUNetModel.__name__],
            "fstext": ["stvision", FSTextDecomposer.__name__],
            "scheduler": ["diffusers", "DDIMScheduler"],
            "tokenizer": [None, None],
            "text_encoder": [None, None],
            "num_frames": config.data.num_frames,
            "num_reference_frames": config.cond_frames,
            "height": config.data.height,
            "width": config.data.width,
            "fps": config.fps,
            "guidance_scale": config.guidance_scale,
            "num_inference_steps": config.sampling_steps,
            "max_text_length": self.text.shape[1],
            "text_model": None,
        }
        scheduler = type(self.noising.scheduler)
        if not scheduler.__module__.startswith("diffusers"):
            index["scheduler"] = ["stvision", scheduler.__name__]
        text = config.text.chosen(config.base)
        if text.encoder == "minilm":
            index["text_model"] = "minilm"
        else:
            index |= _save_text(text, folder, dtype)
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def _save_text(text: TextConfig, folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Copy tokenizer and text encoder; their entries of the index."""
    encoder = TextEncoder(text)
    encoder.tokenizer.save_pretrained(folder / "tokenizer")
    encoder.model.to(dtype).save_pretrained(folder / "text_encoder")
    return {
        "tokenizer": ["transformers", type(encoder.tokenizer).__name__],
        "text_encoder": ["transformers", type(encoder.model).__name__],
    }


def _psnr(frames: Tensor, truth: Tensor) -> float:
    """Mean over frames, dB, of (B, C, T, H, W) in [0, 1]."""
    error = (frames - truth).square().mean(dim=(1, 3, 4)).clamp(min=1e-10)
    return float((-10 * torch.log10(error)).mean())


def build_unet(config: SeerConfig) -> SeerUNetModel:
    """The inflated U-Net of a configuration, its temporal layers fresh."""
    if config.base is None:
        image = UNet2DConditionModel(**config.unet)
    else:
        if config.unet:
            raise ValueError("unet describes a random image U-Net; leave it out when base is given")
        folder = component_folder(config.base, "unet")
        image = UNet2DConditionModel.from_pretrained(folder, local_files_only=True)
    return SeerUNetModel.from_unet2d(image, **config.inflation)


def build_fstext(config: SeerConfig, text: Tensor) -> FSTextDecomposer:
    """A fresh decomposer for text states (..., L, D), sized to the clips unless told otherwise."""
    sizes = {
        "dim": text.shape[-1],
        "max_frames": config.data.frame_counts[-1],
        "max_tokens": text.shape[-2],
    }
    return FSTextDecomposer(**{**sizes, **config.fstext})


class _Decomposer(nn.Module):
    def __init__(self, fstext: FSTextDecomposer) -> None:
        super().__init__()
        self.fstext = fstext

    def forward(self, text: Tensor, frames: int) -> dict[str, Tensor]:
        return {"loss": identity_loss(self.fstext(text, frames), text)}


class FSTextTask(Task):
    """Pre-initialisation: the mean over frames of the decomposed states is the sentence's own."""

    def __init__(self, config: SeerConfig, text: Tensor) -> None:
        with seeded(config.seed):
            self.fstext = build_fstext(config, text)
        self.model = _Decomposer(self.fstext)

    def inputs(self, batch: Batch, generator: torch.Generator) -> dict[str, Any]:
        """The sentences, and the length of their clips."""
        clips = batch["latents"] if "latents" in batch else batch["mean"]
        return {"text": batch["text"].float(), "frames": clips.shape[2]}

    def export(self, folder: Path) -> None:
        """Write the decomposer as a model folder."""
        self.fstext.save_pretrained(folder)


def run(config: SeerConfig) -> Outcome:
    """Train, or continue."""
    text = config.text.chosen(config.base)
    unet = config.unet if config.base is None else read_config(config.base, "unet")
    check_text(text, unet.get("cross_attention_dim"), "the image U-Net", config.base)
    training = Run.begin(config, text=text, vae=config.vae)
    fstext = None
    if config.fstext_init_steps > 0:
        outcome = _initialise_fstext(training)
        if not outcome.finished:
            return outcome
        folder = Path(config.output_dir) / "fstext_init" / "model"
        fstext = FSTextDecomposer.from_pretrained(folder, local_files_only=True)
    held, device = training.prepared.held, training.accelerator.device
    return training.train(SeerTask(config, held, device, fstext))


def _initialise_fstext(training: Run) -> Outcome:
    config: SeerConfig = training.config
    text, source = training.prepared.held.text, training.prepared.source
    if text is None:
        raise ValueError("Seer needs text states")
    loop = replace(
        config.loop,
        max_steps=config.fstext_init_steps,
        target_seconds=None,
        settled_steps=None,
        learning_rate=config.fstext_init_learning_rate,
        final_learning_rate=0.0,
        warmup_steps=min(config.loop.warmup_steps, config.fstext_init_steps // 10),
        gradient_accumulation_steps=1,
        ema_decay=None,
        compile="off",
        cuda_graphs=False,  # its input "frames" is a number
        save_every=max(1, config.fstext_init_steps // 4),
        validate_every=0,
        max_grad_norm=1.0,
    )
    position = source.state_dict()
    outcome = training.train(
        FSTextTask(config, text),
        loop=loop,
        output_dir=str(Path(config.output_dir) / "fstext_init"),
        seed=config.seed + 1,
    )
    source.load_state_dict(position)
    training.accelerator.free_memory()
    return outcome


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of ``python -m stvision.train.seer`` and of ``accelerate launch -m``."""
    return report(run, lambda: parse_config(SeerConfig, argv, "stvision train seer"))


if __name__ == "__main__":
    raise SystemExit(main())
