"""NAT and DiNAT image and video classifiers (Hassani et al., arXiv 2204.07143 and 2209.15001).

Keys are those of the authors' checkpoints; those of transformers' DiNAT are converted on loading.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stvision.attention.neighborhood_modules import NeighborhoodAttention2D, NeighborhoodAttention3D
from stvision.models.weights import load_backbone, read_weights


def _per_frame(module: nn.Module, x: Tensor) -> Tensor:
    """A convolution of images on (B, H, W, C) or, frame by frame, on (B, T, H, W, C)."""
    lead = x.shape[:-3]
    out = module(x.flatten(0, -4).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return cast(Tensor, out.unflatten(0, lead))


class _Tokenizer(nn.Module):
    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1),
            nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1),
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.norm(_per_frame(self.proj, x)))


class _Downsampler(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1, bias=False)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.norm(_per_frame(self.reduction, x)))


class _Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int, drop: float) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.act, self.drop = nn.GELU(), nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.drop(self.fc2(self.drop(self.act(self.fc1(x))))))


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
        self.mlp = _Mlp(dim, int(dim * mlp_ratio), drop)
        self.drop_path = drop_path
        self.gamma1: nn.Parameter | None = None
        self.gamma2: nn.Parameter | None = None
        if layer_scale is not None:
            self.gamma1 = nn.Parameter(torch.full((dim,), float(layer_scale)))
            self.gamma2 = nn.Parameter(torch.full((dim,), float(layer_scale)))

    def _branch(self, x: Tensor, gamma: Tensor | None) -> Tensor:
        x = x if gamma is None else gamma * x
        if not self.training or not self.drop_path:
            return x
        kept = x.new_empty(x.shape[:1] + (1,) * (x.dim() - 1)).bernoulli_(1 - self.drop_path)
        return x * kept / (1 - self.drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._branch(self.attn(self.norm1(x)), self.gamma1)
        return x + self._branch(self.mlp(self.norm2(x)), self.gamma2)


class _Level(nn.Module):
    def __init__(self, blocks: list[nn.Module], dim: int, downsample: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = _Downsampler(dim) if downsample else None
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = cast(Tensor, checkpoint(block, x, use_reentrant=False))
            else:
                x = block(x)
        return x


class NAT(nn.Module):
    """Four levels of neighborhood attention; DiNAT is the same with dilations.

    Args:
        depths: blocks of each level.
        num_heads: heads of each level.
        embed_dim: channels of the first level; doubles with each.
        mlp_ratio: hidden over outer channels of the MLPs.
        kernel_size: rows and columns of the neighborhood.
        dilations: per level and block; 1 everywhere when not given.
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
        ValueError: lists of different lengths, or heads that do not divide the channels.
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
        super().__init__()
        if dilations is None:
            dilations = [[1] * depth for depth in depths]
        if len(num_heads) != len(depths) or [len(row) for row in dilations] != list(depths):
            raise ValueError(
                f"depths={list(depths)} needs as many num_heads (got {len(num_heads)}) and a "
                f"dilation for each block (got {[len(row) for row in dilations]} per level)"
            )
        self.frame_kernel = frame_kernel
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.embed_dim = embed_dim
        self.num_features = self.head_hidden_size = embed_dim * 2 ** (len(depths) - 1)
        self.feature_info = [
            {"num_chs": embed_dim * 2**i, "reduction": 4 * 2**i, "module": f"levels.{i}"}
            for i in range(len(depths))
        ]
        self.patch_embed = _Tokenizer(in_chans, embed_dim)
        self.pos_drop = nn.Dropout(drop_rate)
        total = sum(depths)
        rates = iter([drop_path_rate * i / max(1, total - 1) for i in range(total)])
        levels = []
        for i, (heads, row) in enumerate(zip(num_heads, dilations, strict=True)):
            dim = embed_dim * 2**i
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
            levels.append(_Level(blocks, dim, i + 1 < len(depths)))
        self.levels = nn.ModuleList(levels)
        self.norm = nn.LayerNorm(self.num_features)
        self.head: nn.Module = nn.Identity()
        self.reset_classifier(num_classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def no_weight_decay_keywords(self) -> set[str]:
        """Parts of names of parameters that are not decayed."""
        return {"rpb"}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward instead of keeping its activations."""
        for level in self.levels:
            cast(_Level, level).grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh head of ``num_classes`` outputs; 0 for none. The only pooling is the mean."""
        if global_pool not in (None, "avg"):
            raise ValueError(f"global_pool must be 'avg' or None, got {global_pool!r}")
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        if isinstance(self.head, nn.Linear):
            nn.init.trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)
            self.head.to(self.norm.weight)  # device and dtype

    def _embed(self, x: Tensor) -> Tensor:
        axes = "H, W" if self.frame_kernel is None else "T, H, W"
        if x.dim() != 2 + len(axes.split()) or x.shape[1] != self.in_chans:
            raise ValueError(f"x must be (B, {self.in_chans}, {axes}), got {tuple(x.shape)}")
        return cast(Tensor, self.pos_drop(self.patch_embed(x.movedim(1, -1))))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Features of each level, before it is downsampled.

        Args:
            x: (B, C, H, W), or (B, C, T, H, W) for a video model.
            indices: levels to return; a number n for the last n, ``None`` for all.
            norm: apply the last norm to the last level's features.
            stop_early: do not compute past the last asked level.
            output_fmt: ``"NCHW"`` (channels second) or ``"NHWC"`` (last).
            intermediates_only: return only the list.

        Returns:
            (result of :meth:`forward_features`, list of features), or the list. With
            ``stop_early`` the first is the features where the computation stopped.

        Raises:
            ValueError: a level that does not exist, or an unknown format.
        """
        count = len(self.levels)
        if output_fmt not in {"NCHW", "NHWC"}:
            raise ValueError(f"output_fmt must be 'NCHW' or 'NHWC', not {output_fmt!r}")
        if isinstance(indices, int):
            if not 0 < indices <= count:
                raise ValueError(f"indices={indices} must lie between 1 and {count}")
            indices = range(count - indices, count)
        asked = list(range(count) if indices is None else indices)
        if any(not -count <= i < count for i in asked):
            raise ValueError(f"indices={asked} must lie between {-count} and {count - 1}")
        places = {i % count for i in asked}
        found: dict[int, Tensor] = {}
        x = self._embed(x)
        for i, module in enumerate(self.levels):
            level = cast(_Level, module)
            x = level(x)
            if i in places:
                y = self.norm(x) if norm and i == count - 1 else x
                found[i] = y.movedim(-1, 1) if output_fmt == "NCHW" else y
            if stop_early and i == max(places, default=count):
                break
            if level.downsample is not None:
                x = level.downsample(x)
        features = [found[i % count] for i in asked]
        if intermediates_only:
            return features
        return (self.norm(x) if x.shape[-1] == self.num_features else x), features

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, H / 32, W / 32, D); a video model keeps its frames before H."""
        return cast(Tensor, self.forward_intermediates(x, [])[0])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Mean over the grid, then the head unless ``pre_logits``."""
        x = x.flatten(1, -2).mean(1)
        return x if pre_logits else cast(Tensor, self.head(x))

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W), or clips (B, C, T, H, W) for a video model, to (B, classes)."""
        return self.forward_head(self.forward_features(x))


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
        A state dict; tensors are shared with ``state`` where nothing changes.

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


def _create(
    pretrained: str | Path | None, defaults: dict[str, Any], options: dict[str, Any]
) -> NAT:
    settings = defaults | options
    state = None
    if pretrained is not None:
        state = convert_nat_state_dict(
            read_weights(pretrained), frame_kernel=settings.get("frame_kernel")
        )
        # the factors exist or not by release, so the checkpoint decides
        if "layer_scale" not in options:
            scaled = any(key.endswith(".gamma1") for key in state)
            settings["layer_scale"] = 1e-5 if scaled else None
    model = NAT(**settings)
    if state is not None:
        load_backbone(model, state, first_conv="patch_embed.proj.0", head="head")
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
