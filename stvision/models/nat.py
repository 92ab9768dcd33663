"""NAT and DiNAT image and video classifiers (Hassani et al., arXiv 2204.07143 and 2209.15001).

The authors' checkpoints and those of transformers' DiNAT are converted on loading.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from stvision.attention.neighborhood_modules import NeighborhoodAttention2D, NeighborhoodAttention3D
from stvision.layers.vision import DropPath, Mlp, drop_path_rates, per_frame
from stvision.models.surface import Backbone, Head, Stage
from stvision.models.weights import load_backbone, read_weights


class _Tokenizer(nn.Module):
    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1),
            nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1),
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.norm(per_frame(self.proj, x)))


class _Downsampler(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1, bias=False)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.norm(per_frame(self.reduction, x)))


class _Layer(nn.Module):
    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp_ratio: float,
        drop: float,
        drop_path: float,
        layer_scale: float | None,
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = attn
        self.mlp = Mlp(dim, mlp_ratio, drop)
        self.drop_path = DropPath(drop_path)
        self.gamma1: nn.Parameter | None = None
        self.gamma2: nn.Parameter | None = None
        if layer_scale is not None:
            self.gamma1 = nn.Parameter(torch.full((dim,), float(layer_scale)))
            self.gamma2 = nn.Parameter(torch.full((dim,), float(layer_scale)))

    def _branch(self, x: Tensor, gamma: Tensor | None) -> Tensor:
        return cast(Tensor, self.drop_path(x if gamma is None else gamma * x))

    def _attend(self, x: Tensor) -> Tensor:
        if isinstance(self.attn, NeighborhoodAttention2D):  # an image is a clip of one frame
            return self.attn(x[:, 0]).unsqueeze(1)
        return cast(Tensor, self.attn(x))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._branch(self._attend(self.norm1(x)), self.gamma1)
        return x + self._branch(self.mlp(self.norm2(x)), self.gamma2)


class NAT(Backbone):
    """Four stages of neighborhood attention; DiNAT is the same with dilations.

    Args:
        depths: blocks of each stage.
        num_heads: heads of each stage.
        embed_dim: channels of the first stage; doubles with each.
        mlp_ratio: hidden over outer channels of the MLPs.
        kernel_size: rows and columns of the neighborhood.
        dilations: per stage and block; 1 everywhere when not given.
        frame_kernel: ``None`` for images. A number makes a video model: windows get that many
            frames, convolutions run frame by frame, and parameters stay those of the image model
            except that ``rpb`` gains a frame axis.
        num_classes: width of the head; 0 for none.
        in_chans: image channels.
        drop_rate: dropout of projections, MLPs and tokens.
        drop_path_rate: chance to drop a branch of the last block, growing linearly from 0.
        layer_scale: first value of the factors of both branches, ``None`` for no factors.
        backend: of :func:`stvision.kernels.neighborhood.na2d`.

    Raises:
        ValueError: lists of different lengths, heads that do not divide the channels, or a number
            below 1.
    """

    def __init__(
        self,
        depths: Sequence[int],
        num_heads: Sequence[int],
        embed_dim: int,
        mlp_ratio: float,
        *,
        kernel_size: int = 7,
        dilations: Sequence[Sequence[int]] | None = None,
        frame_kernel: int | None = None,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.2,
        layer_scale: float | None = None,
        backend: str | None = None,
    ) -> None:
        if dilations is None:
            dilations = [[1] * depth for depth in depths]
        if len(num_heads) != len(depths) or [len(row) for row in dilations] != list(depths):
            raise ValueError(
                f"depths={list(depths)} needs as many num_heads (got {len(num_heads)}) and a "
                f"dilation for each block (got {[len(row) for row in dilations]} per stage)"
            )
        if frame_kernel is not None and frame_kernel < 1:
            raise ValueError(
                f"frame_kernel must be None (images) or at least 1, got {frame_kernel}"
            )
        widths = [embed_dim * 2**i for i in range(len(depths))]
        super().__init__(in_chans, num_classes, widths, frame_kernel)
        self.frame_kernel = frame_kernel
        self.embed_dim = embed_dim
        self.patch_embed = _Tokenizer(in_chans, embed_dim)
        self.pos_drop = nn.Dropout(drop_rate)
        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))
        stages = []
        for i, (dim, heads, row) in enumerate(zip(widths, num_heads, dilations, strict=True)):
            down = _Downsampler(widths[i - 1]) if i else None
            shared: dict[str, Any] = {
                "proj_drop": drop_rate,
                "rpb": True,
                "zero_pad": True,
                "backend": backend,
            }
            blocks: list[nn.Module] = []
            for dilation in row:
                attn: nn.Module
                if frame_kernel is None:
                    attn = NeighborhoodAttention2D(
                        dim, heads, kernel_size, dilation=dilation, **shared
                    )
                else:
                    size = (frame_kernel, kernel_size, kernel_size)
                    attn = NeighborhoodAttention3D(
                        dim, heads, size, dilation=(1, dilation, dilation), **shared
                    )
                blocks.append(_Layer(dim, attn, mlp_ratio, drop_rate, next(rates), layer_scale))
            stages.append(Stage(blocks, down))
        self.stages = nn.ModuleList(stages)
        self.norm = nn.LayerNorm(self.num_features)
        self.head = Head(self.num_features, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def no_weight_decay_keywords(self) -> set[str]:
        """Parts of names of parameters that are not decayed."""
        return {"rpb"}

    def embed(self, x: Tensor) -> Tensor:
        """Pixels (B, T, H, W, in_chans) to (B, T, ceil(H / 4), ceil(W / 4), C)."""
        return cast(Tensor, self.pos_drop(self.patch_embed(x)))

    def norm_features(self, x: Tensor) -> Tensor:
        """The last norm."""
        return cast(Tensor, self.norm(x))


_HUGGING_FACE = (
    (r"^dinat\.", ""),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.norm\.", "patch_embed.norm."),
    (r"^encoder\.levels\.(\d+)\.layers\.", r"levels.\1.blocks."),
    (r"^encoder\.levels\.", "levels."),
    (r"\.attention\.self\.rpb$", ".attn.rpb"),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
)


def _to_own_layout(key: str) -> str:
    """The authors' key to that of :class:`NAT`, where a stage begins with its downsampler."""
    key = re.sub(
        r"^levels\.(\d+)\.downsample\.", lambda m: f"stages.{int(m[1]) + 1}.downsample.", key
    )
    return re.sub(r"^head\.(?=weight$|bias$)", "head.fc.", re.sub(r"^levels\.", "stages.", key))


def convert_nat_state_dict(
    state: Mapping[str, Any], *, frame_kernel: int | None = None
) -> dict[str, Tensor]:
    """Keys of :class:`NAT` from the authors' or transformers' NAT and DiNAT checkpoints.

    Args:
        state: the checkpoint; a wrapping ``"model"``, ``"state_dict"`` or ``"state_dict_ema"`` is
            opened.
        frame_kernel: repeat each ``rpb`` over the frames of a video model's windows. A clip of
            equal frames then gives exactly the logits of its image.

    Returns:
        A state dict; tensors are shared with ``state`` where nothing changes. Own keys pass unchanged.

    Raises:
        ValueError: a query of transformers' layout without its key or value.
    """
    for wrapper in ("state_dict_ema", "state_dict", "model"):
        if isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        part = re.search(r"\.attention\.self\.(query|key|value)\.(weight|bias)$", key)
        new = key
        for pattern, replacement in _HUGGING_FACE:
            new = re.sub(pattern, replacement, new)
        new = _to_own_layout(new)
        if part is not None:
            if part[1] != "query":
                continue
            names = [
                key.replace(".self.query.", f".self.{one}.") for one in ("query", "key", "value")
            ]
            lost = [name for name in names if name not in state]
            if lost:
                raise ValueError(f"the checkpoint has {key} but not {', '.join(lost)}")
            new = re.sub(r"\.attention\.self\.query\.", ".attn.qkv.", new)
            value = torch.cat([state[name] for name in names])
        if new.endswith(".layer_scale_parameters"):
            stem = new.removesuffix("layer_scale_parameters")
            found[stem + "gamma1"], found[stem + "gamma2"] = value.unbind(0)
            continue
        if new.endswith(".rpb") and frame_kernel is not None and value.dim() == 3:
            value = value[:, None].repeat(1, 2 * frame_kernel - 1, 1, 1)
        found[new] = value
    return found


def _check_frame_kernel(state: Mapping[str, Tensor], frame_kernel: int | None) -> None:
    """ValueError where the windows of video weights have another number of frames."""
    rows = {x.shape[1] for key, x in state.items() if key.endswith(".rpb") and x.ndim == 4}
    made = {(n + 1) // 2 for n in rows}
    if len(made) == 1 and made != {frame_kernel}:
        (own,) = made
        raise ValueError(
            f"the weights are a video model's whose windows have {own} frames: pass "
            f"frame_kernel={own}, got frame_kernel={frame_kernel}"
        )


def _create(
    pretrained: str | Path | None, defaults: dict[str, Any], options: dict[str, Any]
) -> NAT:
    settings = defaults | options
    state = None
    if pretrained is not None:
        frame_kernel = settings.get("frame_kernel")
        state = convert_nat_state_dict(read_weights(pretrained), frame_kernel=frame_kernel)
        _check_frame_kernel(state, frame_kernel)
        # the factors exist or not by release, so the checkpoint decides
        if "layer_scale" not in options:
            scaled = any(key.endswith(".gamma1") for key in state)
            settings["layer_scale"] = 1e-5 if scaled else None
    model = NAT(**settings)
    if state is not None:
        load_backbone(model, state, first_conv="patch_embed.proj.0")
    return model


_SIZES: dict[str, dict[str, Any]] = {
    "mini": {"depths": (3, 4, 6, 5), "embed_dim": 64, "mlp_ratio": 3, "drop_path_rate": 0.2},
    "tiny": {"depths": (3, 4, 18, 5), "embed_dim": 64, "mlp_ratio": 3, "drop_path_rate": 0.2},
    "small": {"depths": (3, 4, 18, 5), "embed_dim": 96, "mlp_ratio": 2, "drop_path_rate": 0.3},
    "base": {"depths": (3, 4, 18, 5), "embed_dim": 128, "mlp_ratio": 2, "drop_path_rate": 0.5},
    "large": {"depths": (3, 4, 18, 5), "embed_dim": 192, "mlp_ratio": 2, "drop_path_rate": 0.35},
}


def _builder(family: str, size: str) -> Callable[..., NAT]:
    name = f"{family}_{size}"
    defaults = _SIZES[size] | {"kernel_size": 7}
    width = 48 if size == "large" else 32
    defaults["num_heads"] = tuple(defaults["embed_dim"] // width * 2**i for i in range(4))
    if family == "dinat":
        rates = (8, 4, 2, 1)
        depths = defaults["depths"]
        defaults["dilations"] = [
            [rate if i % 2 else 1 for i in range(depth)]
            for rate, depth in zip(rates, depths, strict=True)
        ]
    elif size in {"small", "base"}:
        defaults["layer_scale"] = 1e-5

    def build(pretrained: str | Path | None = None, **options: Any) -> NAT:
        return _create(pretrained, defaults, options)

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"""{"Di" * (family == "dinat")}NAT-{size.title()}.

    Args:
        pretrained: weights of the authors or of transformers: a file, a folder or ``owner/name``
            of a hub repository.
        options: arguments of :class:`NAT` that differ from the published model.
    """
    return build


nat_mini = _builder("nat", "mini")
nat_tiny = _builder("nat", "tiny")
nat_small = _builder("nat", "small")
nat_base = _builder("nat", "base")
dinat_mini = _builder("dinat", "mini")
dinat_tiny = _builder("dinat", "tiny")
dinat_small = _builder("dinat", "small")
dinat_base = _builder("dinat", "base")
dinat_large = _builder("dinat", "large")

#: name -> function ``(pretrained=None, **options)``
NAT_MODELS: dict[str, Callable[..., NAT]] = {
    build.__name__: build
    for build in (
        nat_mini,
        nat_tiny,
        nat_small,
        nat_base,
        dinat_mini,
        dinat_tiny,
        dinat_small,
        dinat_base,
        dinat_large,
    )
}
