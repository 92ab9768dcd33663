"""``stvision convert``: published weights into a folder of a pipeline or of a backbone."""

import json as json_module
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from stvision.cli.options import says_its_defaults

STABLE_DIFFUSION = "stable-diffusion-v1-5/stable-diffusion-v1-5"

#: options that only one form has, with their defaults
SEER_ONLY: dict[str, Any] = {
    "sd": STABLE_DIFFUSION,
    "schedule": "sd",
    "num_frames": None,
    "num_reference_frames": None,
    "local_files_only": False,
}
BACKBONE_ONLY: dict[str, Any] = {"name": None, "l_max": None}


Precision = Literal["float32", "float16", "bfloat16"]


@says_its_defaults
@dataclass
class Command:
    """Turn published weights into a folder of a pipeline ("seer") or of a backbone.

    A backbone's folder holds model.safetensors and config.json, and create_backbone(NAME,
    pretrained=FOLDER) loads it.
    """

    kind: Annotated[
        Literal[
            "seer",
            "nat",
            "dinat",
            "davit",
            "biformer",
            "halonet",
            "tvts",
            "vis4mer",
            "convs5",
        ],
        tyro.conf.Positional,
    ]
    """What the weights are of: "seer", the folders that Seer's authors released; else a family of
    backbones in the layout of its authors, of timm or of transformers."""

    path: Annotated[Path, tyro.conf.Positional]
    """Of "seer", the released folder with pytorch_model.bin (U-Net) and pytorch_model_1.bin
    (decomposer); else a .safetensors file, a file of torch.save or (convs5) an .npz of Flax
    parameters."""

    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Folder to write."""

    name: str | None = None
    """Of backbones, which one it is (default: told by the shapes)."""

    l_max: int | None = None
    """Of "vis4mer", the number of tokens that its layers were made for (default: 2048)."""

    sd: str = STABLE_DIFFUSION
    """Of "seer", Stable Diffusion 1.5 for VAE, text encoder, tokenizer and sizes: a diffusers folder
    or a hub name."""

    dtype: Precision = "float32"
    """Precision of the written weights."""

    schedule: Literal["sd", "authors"] = "sd"
    """Of "seer", the noise schedule for sampling: Stable Diffusion's own, or that of the authors'
    sampler."""

    num_frames: int | None = None
    """Of "seer", frames that the weights were trained on, reference frames included (default: 12 for
    a release with "sthv2_seer" in its path, 16 for the others)."""

    num_reference_frames: int | None = None
    """Of "seer", reference frames that they were trained on (default: 2 for "sthv2_seer", else 1)."""

    local_files_only: bool = False
    """Of "seer", never ask the network for Stable Diffusion: a folder, or what the hub's cache
    holds."""

    json: bool = False
    """Print one JSON object about the result instead of a sentence."""


def run(command: Command) -> None:
    """Convert, write, and say where."""
    for field, default in (BACKBONE_ONLY if command.kind == "seer" else SEER_ONLY).items():
        if getattr(command, field) != default:
            option = field.replace("_", "-")
            whose = "backbones" if command.kind == "seer" else "seer"
            raise ValueError(f"--{option} is an option of {whose}, not of {command.kind}")
    if command.l_max is not None and command.kind != "vis4mer":
        raise ValueError(f"--l-max is an option of vis4mer, not of {command.kind}")
    (_run_seer if command.kind == "seer" else _run_backbone)(command)


def _run_backbone(command: Command) -> None:
    import torch

    from stvision.models.convert_backbone import convert_backbone

    report = convert_backbone(
        command.kind,
        command.path,
        command.output,
        name=command.name,
        dtype=getattr(torch, command.dtype),
        **({} if command.l_max is None else {"l_max": command.l_max}),
    )
    name, parameters = report["backbone"], report["parameters"]
    if command.json:
        print(
            json_module.dumps(
                {
                    "output": str(command.output),
                    "backbone": name,
                    "options": report["options"],
                    "converted_parameters": parameters,
                    "dtype": command.dtype,
                }
            )
        )
    else:
        print(f"wrote {command.output}: {name} ({parameters / 1e6:.1f} M converted parameters)")


def _run_seer(command: Command) -> None:
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
