"""``stvision convert``: published weights into a pipeline folder."""

import json as json_module
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from stvision.cli.options import says_its_defaults


@says_its_defaults
@dataclass
class Command:
    """Turn published weights into a pipeline folder."""

    kind: Annotated[Literal["seer"], tyro.conf.Positional]
    """What the weights are of: "seer", the folders that Seer's authors released."""

    path: Annotated[Path, tyro.conf.Positional]
    """Released folder with pytorch_model.bin (U-Net) and pytorch_model_1.bin (decomposer)."""

    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Pipeline folder to write."""

    sd: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    """Stable Diffusion 1.5 for VAE, text encoder, tokenizer and sizes: a diffusers folder or a
    hub name."""

    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Precision of the written weights."""

    schedule: Literal["sd", "authors"] = "sd"
    """Noise schedule for sampling: Stable Diffusion's own, or that of the authors' sampler."""

    num_frames: int | None = None
    """Frames that the weights were trained on, reference frames included (default: 12 for a
    release with "sthv2_seer" in its path, 16 for the others)."""

    num_reference_frames: int | None = None
    """Reference frames that they were trained on (default: 2 for "sthv2_seer", else 1)."""

    local_files_only: bool = False
    """Never ask the network for Stable Diffusion: a folder, or what the hub's cache holds."""

    json: bool = False
    """Print one JSON object about the result instead of a sentence."""


def run(command: Command) -> None:
    """Convert, write, and say where."""
    if command.output.exists() and (not command.output.is_dir() or any(command.output.iterdir())):
        raise FileExistsError(f"{command.output} exists and is not an empty folder")

    ssv2 = "sthv2_seer" in command.path.resolve().parts
    frames = (12 if ssv2 else 16) if command.num_frames is None else command.num_frames
    references = command.num_reference_frames
    if references is None:
        references = 2 if ssv2 else 1
    if not 1 <= references < frames:
        raise ValueError(
            f"num_reference_frames must be between 1 and num_frames - 1 = {frames - 1}, "
            f"got {references}"
        )

    from stvision.optional import mend_torchvision

    mend_torchvision()  # before diffusers is first imported

    import torch
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers import AutoTokenizer, CLIPTextModel

    from stvision.models.convert_seer import convert_seer, find_release
    from stvision.models.sampling import make_scheduler
    from stvision.pipelines.seer import SeerPipeline

    dtype = getattr(torch, command.dtype)
    hub: dict[str, Any] = {"local_files_only": command.local_files_only}
    find_release(command.path)
    try:
        config = UNet2DConditionModel.load_config(command.sd, subfolder="unet", **hub)
    except OSError as error:
        raise FileNotFoundError(
            f"--sd {command.sd} is no diffusers folder or hub name of Stable Diffusion: {error}"
        ) from error
    unet, fstext = convert_seer(command.path, config)
    torch.nn.Module.to(unet, dtype)
    torch.nn.Module.to(fstext, dtype)
    pipeline = SeerPipeline(
        vae=AutoencoderKL.from_pretrained(command.sd, subfolder="vae", **hub).to(dtype),
        unet=unet,
        fstext=fstext,
        scheduler=make_scheduler(command.schedule),
        tokenizer=AutoTokenizer.from_pretrained(command.sd, subfolder="tokenizer", **hub),
        text_encoder=CLIPTextModel.from_pretrained(
            command.sd, subfolder="text_encoder", dtype=dtype, **hub
        ),
        num_frames=frames,
        num_reference_frames=references,
        height=256,
        width=256,
    )
    pipeline.save_pretrained(command.output)
    parameters = sum(p.numel() for p in (*unet.parameters(), *fstext.parameters()))
    if command.json:
        report = {
            "output": str(command.output),
            "converted_parameters": parameters,
            "num_frames": frames,
            "num_reference_frames": references,
            "schedule": command.schedule,
            "dtype": command.dtype,
        }
        print(json_module.dumps(report))
    else:
        print(f"wrote {command.output} ({parameters / 1e6:.1f} M converted parameters)")
