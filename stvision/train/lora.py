"""Low-rank adapters (Hu et al. 2022) on the image attention of an inflated U-Net, through peft."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from stvision.models.seer import SeerUNetModel
from stvision.optional import require

#: projections of image attention; the temporal transformers are trained themselves
_TARGETS = (
    r"((down_blocks|up_blocks)\.\d+|mid_block)\.attentions\..*"
    r"\.attn[12]\.(to_q|to_k|to_v|to_out\.0)"
)


@dataclass(frozen=True)
class LoraConfig:
    """Size of the adapters."""

    rank: int = 8
    """Inner width."""
    alpha: float = 8.0
    """The adapter's output is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Dropout before the adapter."""


def add_lora(unet: SeerUNetModel, config: LoraConfig) -> None:
    """Put adapters into a U-Net; what was trained before stays trained."""
    peft = require("peft", extra="train")
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    unet.add_adapter(
        peft.LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=_TARGETS,
            init_lora_weights="gaussian",
        )
    )
    for parameter in trained:
        parameter.requires_grad_(True)


@torch.no_grad()
def merged_state(unet: SeerUNetModel) -> dict[str, Tensor]:
    """State of a U-Net as if its adapters had been added into the weights; it is not changed."""
    state = dict(unet.state_dict())
    for name, module in unet.named_modules():
        if not hasattr(module, "get_delta_weight"):
            continue
        for part in ("weight", "bias"):
            base = state.pop(f"{name}.base_layer.{part}", None)
            if base is not None:
                state[f"{name}.{part}"] = base
        for adapter in module.active_adapters:
            state[f"{name}.weight"] = state[f"{name}.weight"] + module.get_delta_weight(adapter)
    return {name: value for name, value in state.items() if ".lora_" not in name}


def save_lora(unet: SeerUNetModel, folder: Path) -> None:
    """Write the adapters alone, as diffusers' ``load_lora_adapter`` reads them."""
    unet.save_lora_adapter(folder)
