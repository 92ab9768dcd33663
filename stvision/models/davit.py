"""DaViT, and Florence-2's vision tower (Ding et al. 2022, arXiv 2204.03645; Xiao et al. 2023).

Every layer attends twice: among the tokens of a window in space, then among the channels of a group
over all tokens. Keys are timm's; the authors' files and Florence-2's are converted on loading.

As a video model the image weights stay as they are. Windows, MLPs and convolutions work frame by
frame; channel tokens run over space and time with scores averaged over frames; each position
convolution gets a depthwise convolution over frames beside it, zero at the start. So a clip of equal
frames gives exactly the logits of its image.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from stvision.attention.dual import ChannelGroupAttention, SpatialWindowAttention
from stvision.layers.vision import (
    FRAME_WEIGHTS,
    DropPath,
    Mlp,
    PatchConv,
    PositionConv,
    drop_path_rates,
    per_frame,
)
from stvision.models.surface import Backbone, Head, Stage
from stvision.models.weights import load_backbone, read_weights, unwrap


class _Stem(nn.Module):
    """7 x 7 convolution of stride 4, then LayerNorm."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.conv = PatchConv(in_chans, dim, 7, stride=4, padding=3)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.norm(per_frame(self.conv, x)))


class _Downsample(nn.Module):
    """LayerNorm, then a convolution of stride 2: 2 x 2, or 3 x 3 with overlap."""

    def __init__(self, dim: int, out_dim: int, overlap: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.conv: nn.Conv2d
        if overlap:
            self.conv = nn.Conv2d(dim, out_dim, 3, stride=2, padding=1)
        else:
            self.conv = PatchConv(dim, out_dim, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return per_frame(self.conv, self.norm(x))


class DualBlock(nn.Module):
    """Position convolution, attention, position convolution, MLP; all but the first two pre-norm.

    Args:
        dim: channels C.
        attn: attention from and to (B, T, H, W, C).
        mlp_ratio: hidden over outer channels of the MLP.
        drop_path: chance to drop a branch.
        frame_kernel: frames of the position convolutions, 0 for image models.
    """

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        frame_kernel: int = 0,
    ) -> None:
        super().__init__()
        self.cpe1 = PositionConv(dim, frame_kernel=frame_kernel)
        self.norm1 = nn.LayerNorm(dim)
        self.attn = attn
        self.cpe2 = PositionConv(dim, frame_kernel=frame_kernel)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, mlp_ratio)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Transform (B, T, H, W, C) to the same shape."""
        x = self.cpe1(x)
        x = self.cpe2(x + self.drop_path(self.attn(self.norm1(x))))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class DaViT(Backbone):
    """Four stages of layers, each a spatial block and a channel block.

    Args:
        depths: layers of each stage.
        embed_dims: channels of each stage.
        num_heads: heads, and as many channel groups, of each stage.
        window_size: rows and columns of the spatial windows.
        mlp_ratio: hidden over outer channels of the MLPs.
        qkv_bias: bias of the attention's input projections.
        in_chans: channels of images or frames.
        num_classes: outputs of the head; 0 for none.
        frames: ``None`` for images, a number for clips; see
            :class:`stvision.models.surface.Backbone`.
        channel_tokens: for clips, ``"space-time"`` (channel tokens of all frames) or ``"space"``
            (each frame alone).
        frame_kernel: for clips, frames of the position convolutions, odd; 0 for none.
        florence: Florence-2's channel attention and overlapping patches.
        drop_rate: dropout before the head.
        drop_path_rate: chance to drop a branch of the last block, growing linearly from 0.

    Raises:
        ValueError: lists of different lengths, heads that do not divide the channels, or an
            unknown ``channel_tokens``.
    """

    def __init__(
        self,
        depths: Sequence[int] = (1, 1, 3, 1),
        embed_dims: Sequence[int] = (96, 192, 384, 768),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        frames: int | None = None,
        channel_tokens: str = "space-time",
        frame_kernel: int = 3,
        florence: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
    ) -> None:
        super().__init__(in_chans, num_classes, embed_dims, frames)
        if not len(depths) == len(embed_dims) == len(num_heads):
            raise ValueError(
                "depths, embed_dims and num_heads must be of one length, got "
                f"{len(depths)}, {len(embed_dims)} and {len(num_heads)}"
            )
        if channel_tokens not in {"space", "space-time"}:
            raise ValueError(
                f"channel_tokens must be 'space' or 'space-time', got {channel_tokens!r}"
            )
        self.florence = florence
        over_time = frames is not None and channel_tokens == "space-time"
        frame_kernel = 0 if frames is None else frame_kernel
        rates = iter(drop_path_rates(drop_path_rate, 2 * sum(depths)))
        self.stem = _Stem(in_chans, embed_dims[0])
        stages = []
        for i, (depth, dim, heads) in enumerate(zip(depths, embed_dims, num_heads, strict=True)):
            blocks = []
            for _ in range(depth):
                spatial = SpatialWindowAttention(dim, heads, window_size, qkv_bias)
                channel = ChannelGroupAttention(
                    dim, heads, qkv_bias, over_time, average_frames=True, florence=florence
                )
                blocks.append(
                    nn.Sequential(
                        *(
                            DualBlock(dim, attn, mlp_ratio, next(rates), frame_kernel)
                            for attn in (spatial, channel)
                        )
                    )
                )
            down = _Downsample(embed_dims[i - 1], dim, florence) if i else None
            stages.append(Stage(blocks, down))
        self.stages = nn.ModuleList(stages)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.head = Head(embed_dims[-1], num_classes, nn.LayerNorm(embed_dims[-1]), drop_rate)

    def embed(self, x: Tensor) -> Tensor:
        """Pixels (B, T, H, W, in_chans) to (B, T, ceil(H / 4), ceil(W / 4), C)."""
        return cast(Tensor, self.stem(x))


_AUTHORS = (
    (r"^patch_embeds\.0\.proj\.", "stem.conv."),
    (r"^patch_embeds\.0\.norm\.", "stem.norm."),
    (r"^patch_embeds\.(\d+)\.proj\.", r"stages.\1.downsample.conv."),
    (r"^patch_embeds\.(\d+)\.norm\.", r"stages.\1.downsample.norm."),
    (r"^main_blocks\.(\d+)\.", r"stages.\1.blocks."),
    (r"\.cpe\.0\.", ".cpe1."),
    (r"\.cpe\.1\.", ".cpe2."),
    (r"^norms\.", "head.norm."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)
_FLORENCE = (
    (r"^.*vision_tower\.", ""),
    (r"^convs\.0\.proj\.", "stem.conv."),
    (r"^convs\.0\.norm\.", "stem.norm."),
    (r"^convs\.(\d+)\.proj\.", r"stages.\1.downsample.conv."),
    (r"^convs\.(\d+)\.norm\.", r"stages.\1.downsample.norm."),
    (r"^blocks\.(\d+)\.", r"stages.\1.blocks."),
    (r"\.(window|channel)_attn\.norm\.", ".norm1."),
    (r"\.(window|channel)_attn\.fn\.", ".attn."),
    (r"\.ffn\.norm\.", ".norm2."),
    (r"\.ffn\.fn\.net\.", ".mlp."),
    (r"\.conv1\.fn\.dw\.", ".cpe1.proj."),
    (r"\.conv2\.fn\.dw\.", ".cpe2.proj."),
    (r"^norms\.", "head.norm."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)
#: names of the two blocks of a layer in Florence-2's files and in timm's towers
_NAMED = ((r"\.spatial_block\.", ".0."), (r"\.channel_block\.", ".1."))


def convert_davit_state_dict(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Keys of :class:`DaViT` from the authors', timm's or Florence-2's checkpoints.

    Args:
        state: the checkpoint, with or without what a training wraps around it. Of a whole
            Florence-2 only ``vision_tower.*`` is taken.

    Returns:
        A state dict that shares its tensors with ``state``. timm's keys pass unchanged.
    """
    state = unwrap(state)
    tower = [key for key in state if "vision_tower." in key]
    florence = bool(tower) or "convs.0.proj.weight" in state
    rules = (_FLORENCE if florence else _AUTHORS) + _NAMED
    found = {}
    for key in tower or state:
        new = key
        for pattern, replacement in rules:
            new = re.sub(pattern, replacement, new)
        found[new] = state[key]
    return found


_TINY = {"depths": (1, 1, 3, 1), "embed_dims": (96, 192, 384, 768), "num_heads": (3, 6, 12, 24)}
_BASE = {"depths": (1, 1, 9, 1), "embed_dims": (128, 256, 512, 1024), "num_heads": (4, 8, 16, 32)}
_HUGE = {"depths": (1, 1, 9, 1), "embed_dims": (256, 512, 1024, 2048), "num_heads": (8, 16, 32, 64)}
_LARGE = {"depths": (1, 1, 9, 1), "embed_dims": (192, 384, 768, 1536), "num_heads": (6, 12, 24, 48)}
_TOWER = {"window_size": 12, "florence": True, "num_classes": 0}

_SIZES: dict[str, dict[str, Any]] = {
    "davit_tiny": _TINY,
    "davit_small": _TINY | {"depths": (1, 1, 9, 1)},
    "davit_base": _BASE,
    "davit_large": _LARGE | {"window_size": 12},
    "davit_base_fl": _BASE | _TOWER,
    "davit_huge_fl": _HUGE | _TOWER,
}


def _builder(name: str) -> Callable[..., DaViT]:
    def build(pretrained: str | Path | None = None, **options: Any) -> DaViT:
        model = DaViT(**(_SIZES[name] | options))
        if pretrained is not None:
            state = convert_davit_state_dict(read_weights(pretrained))
            # Florence-2's tower ends without the norm of a classifier
            fresh = FRAME_WEIGHTS + (
                ("head.norm.weight", "head.norm.bias") if model.florence else ()
            )
            load_backbone(model, state, first_conv="stem.conv", fresh=fresh)
        return model

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"""{name} as published.

    Args:
        pretrained: weights of the authors, of timm or of Florence-2: a file, a folder or
            ``owner/name`` of a hub repository.
        options: arguments of :class:`DaViT` that differ from the published model.
    """
    return build


#: name -> function ``(pretrained=None, **options)``
DAVIT_MODELS: dict[str, Callable[..., DaViT]] = {name: _builder(name) for name in _SIZES}
