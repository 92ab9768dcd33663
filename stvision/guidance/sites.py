"""Where a U-Net attends over frames, and reasons to leave it alone."""

import re
from dataclasses import dataclass
from typing import Any

from diffusers.models.attention_processor import Attention
from torch import nn

from stvision.attention.volume import VolumeAttention

#: children of an up block that hold attention over frames: UNetMotionModel; UNet3DConditionModel
#: and I2VGenXLUNet; SeerUNetModel
CONTAINERS = ("motion_modules", "temp_attentions", "temporal_attentions")

_PATH = re.compile(rf"up_blocks\.(\d+)\.((?:{'|'.join(CONTAINERS)})\.\d+)\.(.+\.attn[12])$")


@dataclass(frozen=True, eq=False)
class Site:
    """One temporal self-attention.

    Args:
        name: dotted name in the U-Net.
        block: index of its up block.
        place: dotted name in the block; sites of one place correspond.
        module: the attention.
        parent: transformer that holds it, called with a (frames, C, h, w) tensor.
    """

    name: str
    block: int
    place: str
    module: nn.Module
    parent: nn.Module


def find_sites(unet: nn.Module, blocks: tuple[int, ...]) -> list[Site]:
    """Temporal self-attentions of the up blocks numbered in ``blocks``, in order of evaluation.

    Blocks that the U-Net has not, or that hold no temporal attention, are passed over.

    Raises:
        ValueError: there is none, or one is of a kind without dense maps over frames.
    """
    sites = []
    for name, module in unet.named_modules():
        match = _PATH.fullmatch(name)
        if match is None or int(match[1]) not in blocks:
            continue
        if isinstance(module, VolumeAttention):
            if type(module).mix is not VolumeAttention.mix:
                raise ValueError(
                    f"{name} is a {type(module).__name__}, whose maps differ from token to token "
                    "in the places they cover; BroadWay needs windows over all frames "
                    "('seer-window', 'full' or 'temporal' attention)"
                )
        elif not isinstance(module, Attention):
            continue
        parent = unet.get_submodule(f"up_blocks.{match[1]}.{match[2]}")
        sites.append(Site(name, int(match[1]), f"{match[2]}.{match[3]}", module, parent))
    if not sites:
        held = ", ".join(map(str, blocks))
        raise ValueError(
            f"{type(unet).__name__} has no temporal attention in up blocks {held}; BroadWay needs "
            "a video U-Net such as UNetMotionModel, UNet3DConditionModel, I2VGenXLUNet or "
            "SeerUNetModel"
        )
    return sites


def check_chunking(unet: nn.Module, pipeline: Any = None) -> None:
    """Refuse FreeNoise, which cuts the frames into overlapping windows."""
    chunked = any(type(item).__name__ == "FreeNoiseTransformerBlock" for item in unet.modules())
    if chunked or getattr(pipeline, "free_noise_enabled", False):
        raise ValueError(
            "FreeNoise is on: it attends in overlapping windows of frames, whose maps have no "
            "common spectrum; call pipe.disable_free_noise() before BroadWay"
        )


def check_compiled(unet: nn.Module) -> None:
    """Refuse compiled networks: their graphs hold the attention that would be replaced."""
    compiled = hasattr(unet, "_orig_mod") or any(
        getattr(item, "_compiled_call_impl", None) is not None or hasattr(item, "_orig_mod")
        for item in unet.modules()
    )
    if compiled:
        raise ValueError(
            "the U-Net is compiled with torch.compile, and BroadWay replaces attention inside it "
            "in some steps only; use the U-Net as it was before (unet._orig_mod for "
            "torch.compile(unet)) while BroadWay is on"
        )
