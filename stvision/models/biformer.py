"""BiFormer (Zhu et al. 2023, arXiv 2303.08810): stages of bi-level routing attention.

Three stages route between regions, the last attends in full. Both published lines are here: the
convolutional stem (tiny, small, base) and Swin's layout (``biformer_stl``, and ``biformer_stl_nchw``
with the authors' second routing layer). Their checkpoints are converted on loading.

As a video model the image weights stay as they are. Regions are boxes of all frames (or of
``region_frames``), so a region picks as many others as in an image; the last stage attends over
space and time; each position convolution and each convolution of values gets a depthwise convolution
over frames beside it, zero at the start. With regions of all frames a clip of equal frames gives
exactly the logits of its image.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from stvision.attention.dispatch import dispatch_attention
from stvision.attention.routing import BiLevelRoutingAttention
from stvision.layers.vision import (
    FRAME_WEIGHTS,
    DepthwiseConv,
    DropPath,
    Mlp,
    PatchConv,
    PositionConv,
    drop_path_rates,
    per_frame,
)
from stvision.models.surface import Backbone, Head, Stage
from stvision.models.weights import load_backbone, read_weights, unwrap

#: heads of the last stage, whatever its channels
LAST_HEADS = 8


class _PerFrame(nn.Sequential):
    """Image layers on each frame of (B, T, H, W, C)."""

    def forward(self, input: Tensor) -> Tensor:
        return per_frame(super().forward, input)


class FullLepeAttention(nn.Module):
    """Attention among all tokens of a clip plus a depthwise convolution: the last stage's.

    Args:
        dim: channels C; a multiple of 8.
        lepe_from_value: convolve the values (as ``biformer_stl_nchw``) instead of the input.
        frame_kernel: frames of the convolution over time, 0 for none.
    """

    def __init__(self, dim: int, lepe_from_value: bool = False, frame_kernel: int = 0) -> None:
        super().__init__()
        if dim % LAST_HEADS:
            raise ValueError(f"the last stage's channels must be a multiple of 8, got {dim}")
        self.lepe_from_value = lepe_from_value
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.lepe = DepthwiseConv(dim, 5, frame_kernel)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, H, W, C) to the same shape."""
        b, t, h, w, c = x.shape
        # linear layers of rows record no views of their own, forward and backward
        qkv = self.qkv(x.reshape(-1, c)).view(b, t * h * w, 3, LAST_HEADS, c // LAST_HEADS)
        q, k, v = qkv.unbind(2)
        out = dispatch_attention(q, k, v).reshape(x.shape)
        source = v.reshape(x.shape) if self.lepe_from_value else x
        out = out + self.lepe(source)
        return cast(Tensor, self.proj(out.view(-1, c))).view(x.shape)


class _Block(nn.Module):
    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp_ratio: float,
        drop_path: float,
        positions: bool,
        frame_kernel: int,
    ) -> None:
        super().__init__()
        self.pos_embed = PositionConv(dim, 3, frame_kernel) if positions else nn.Identity()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = attn
        self.mlp = Mlp(dim, mlp_ratio)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pos_embed(x)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class BiFormer(Backbone):
    """Four stages; blocks of position convolution, attention and MLP.

    Args:
        depths: blocks of each stage.
        embed_dims: channels of each stage.
        topks: regions that a region attends to, for each stage but the last, which attends in full.
        n_win: regions along H and W.
        head_dim: channels of a head, but in the last stage, which has 8 heads.
        mlp_ratio: hidden over outer channels of the MLPs.
        layout: ``"conv"`` (stem of two convolutions, position convolutions) or ``"swin"`` (4 x 4
            patches, norm before 2 x 2 downsampling, no position convolutions; what these do not
            divide is padded with zeros, where the authors' convolutions drop it).
        flavour: of the routing layers, see
            :class:`stvision.attention.routing.BiLevelRoutingAttention`.
        lepe_from_value: in the last stage convolve values instead of the input.
        in_chans: channels of images or frames.
        num_classes: outputs of the head; 0 for none.
        frames: ``None`` for images, a number for clips; see
            :class:`stvision.models.surface.Backbone`.
        region_frames: for clips, frames of a region; ``None`` for all.
        frame_kernel: for clips, frames of the convolutions over time, odd; 0 for none.
        drop_rate: dropout before the head.
        drop_path_rate: chance to drop a branch of the last block, growing linearly from 0.
        implementation: of :func:`stvision.attention.routing.bilevel_routing_attention`.

    Raises:
        ValueError: lists that do not fit each other, or an unknown layout or flavour.
    """

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 8, 2),
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        topks: Sequence[int] = (1, 4, 16),
        n_win: int = 7,
        head_dim: int = 32,
        mlp_ratio: float = 3.0,
        *,
        layout: str = "conv",
        flavour: str = "legacy",
        lepe_from_value: bool = False,
        in_chans: int = 3,
        num_classes: int = 1000,
        frames: int | None = None,
        region_frames: int | None = None,
        frame_kernel: int = 3,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        implementation: str | None = None,
    ) -> None:
        super().__init__(in_chans, num_classes, embed_dims, frames)
        if not len(depths) == len(embed_dims) == len(topks) + 1:
            raise ValueError(
                "depths and embed_dims must be of one length and topks one shorter, got "
                f"{len(depths)}, {len(embed_dims)} and {len(topks)}"
            )
        if layout not in {"conv", "swin"}:
            raise ValueError(f"layout must be 'conv' or 'swin', got {layout!r}")
        frame_kernel = 0 if frames is None else frame_kernel
        conv, first = layout == "conv", embed_dims[0]
        if conv:
            self.stem = _PerFrame(
                nn.Conv2d(in_chans, first // 2, 3, stride=2, padding=1),
                nn.BatchNorm2d(first // 2),
                nn.GELU(),
                nn.Conv2d(first // 2, first, 3, stride=2, padding=1),
                nn.BatchNorm2d(first),
            )
        else:
            self.stem = _PerFrame(PatchConv(in_chans, first, 4, stride=4), nn.BatchNorm2d(first))

        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))
        stages = []
        for i, (depth, dim) in enumerate(zip(depths, embed_dims, strict=True)):
            down = None
            if i and conv:
                down = _PerFrame(
                    nn.Conv2d(embed_dims[i - 1], dim, 3, stride=2, padding=1), nn.BatchNorm2d(dim)
                )
            elif i:
                before = embed_dims[i - 1]
                down = _PerFrame(nn.BatchNorm2d(before), PatchConv(before, dim, 2, stride=2))
            blocks = []
            for _ in range(depth):
                attn: nn.Module
                if i < len(topks):
                    if dim % head_dim:
                        raise ValueError(f"head_dim {head_dim} must divide channels, got {dim}")
                    attn = BiLevelRoutingAttention(
                        dim,
                        dim // head_dim,
                        n_win,
                        topks[i],
                        region_frames=region_frames,
                        flavour=flavour,
                        frame_kernel=frame_kernel,
                        implementation=implementation,
                    )
                else:
                    attn = FullLepeAttention(dim, lepe_from_value, frame_kernel)
                blocks.append(_Block(dim, attn, mlp_ratio, next(rates), conv, frame_kernel))
            stages.append(Stage(blocks, down))
        self.stages = nn.ModuleList(stages)
        self.norm = nn.BatchNorm2d(embed_dims[-1])
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.head = Head(embed_dims[-1], num_classes, drop_rate=drop_rate)

    def embed(self, x: Tensor) -> Tensor:
        """Pixels (B, T, H, W, in_chans) to (B, T, H / 4, W / 4, C)."""
        return cast(Tensor, self.stem(x))

    def norm_features(self, x: Tensor) -> Tensor:
        """The BatchNorm between the last stage and pooling."""
        # As one tall image, whose gradient comes in the same order: pooling's own is in another, at
        # which BatchNorm's backward on the CPU gives other strides than torch's graphs expect.
        tall = x.flatten(0, -2)[None, None, :, None]
        return per_frame(self.norm, tall).view(x.shape)


_AUTHORS = (
    (r"^downsample_layers\.0\.", "stem."),
    (r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
    (r"^stages\.(\d+)\.(?:blocks\.)?(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.pos_embed\.(weight|bias)$", r".pos_embed.proj.\1"),
    (r"\.attn\.qkv\.qkv\.", ".attn.qkv."),
    (r"\.attn\.qkv_linear\.", ".attn.qkv."),
    (r"\.attn\.(?:wo|output_linear)\.", ".attn.proj."),
    (r"\.attn\.lepe\.(weight|bias)$", r".attn.lepe.proj.\1"),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.[23]\.", ".mlp.fc2."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)
#: 1 x 1 convolutions of the authors that are linear layers here
_MATRICES = re.compile(r"\.(qkv|attn\.proj|fc1|fc2)\.weight$")


def convert_biformer_state_dict(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Keys of :class:`BiFormer` from the authors' checkpoints, of both routing layers.

    Args:
        state: the checkpoint, with or without the ``"model"`` around it. Keys of
            :class:`BiFormer` pass unchanged.

    Returns:
        A state dict that shares its tensors with ``state``.
    """
    found = {}
    for key, value in unwrap(state).items():
        new = key
        for pattern, replacement in _AUTHORS:
            new = re.sub(pattern, replacement, new)
        if _MATRICES.search(new) and value.ndim == 4:
            value = value[:, :, 0, 0]
        found[new] = value
    return found


_STL = {
    "depths": (2, 2, 6, 2),
    "embed_dims": (96, 192, 384, 768),
    "mlp_ratio": 4.0,
    "layout": "swin",
}
_SIZES: dict[str, dict[str, Any]] = {
    "biformer_tiny": {"depths": (2, 2, 8, 2)},
    "biformer_small": {"depths": (4, 4, 18, 4), "drop_path_rate": 0.15},
    "biformer_base": {"depths": (4, 4, 18, 4), "embed_dims": (96, 192, 384, 768)},
    "biformer_stl": _STL,
    "biformer_stl_nchw": _STL | {"flavour": "nchw", "lepe_from_value": True},
}


def _builder(name: str) -> Callable[..., BiFormer]:
    def build(pretrained: str | Path | None = None, **options: Any) -> BiFormer:
        model = BiFormer(**(_SIZES[name] | options))
        if pretrained is not None:
            state = convert_biformer_state_dict(read_weights(pretrained))
            load_backbone(model, state, first_conv="stem.0", fresh=FRAME_WEIGHTS)
        return model

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"""{name} as published.

    Args:
        pretrained: weights of the authors: a file, a folder or ``owner/name`` of a hub repository.
        options: arguments of :class:`BiFormer` that differ from the published model.
    """
    return build


#: name -> function ``(pretrained=None, **options)``
BIFORMER_MODELS: dict[str, Callable[..., BiFormer]] = {name: _builder(name) for name in _SIZES}
