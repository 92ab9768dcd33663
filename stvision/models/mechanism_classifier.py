"""One small video classifier in which the part that mixes tokens can be any mechanism of the library.

A convolutional stem turns frames into a grid of tokens, blocks of ``x + mix(norm(x))`` and
``x + mlp(norm(x))`` follow, and a linear layer reads the mean of all tokens or of those of the last
frame. Everything but ``mix`` is the same for all mechanisms. What a mechanism needs in parameters is
taken from the MLP beside it, so that all classifiers are equally large (:func:`matched_hidden`).

Tokens get the fixed sines of their row and column and none of their frame: a network learns the
order of frames from its mechanism or not at all.

``create_backbone("mechanism", mechanism="ela")`` is the classifier with timm's surface.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stvision.attention import (
    BiLevelRoutingAttention,
    ChannelGroupAttention,
    FullAttention,
    HaloAttention,
    NeighborhoodAttention,
    SeerWindowAttention,
    SpatialWindowAttention,
    SwapAttention,
    TemporalAttention,
)
from stvision.attention.swap import Branch
from stvision.attention.windows import WindowLayout
from stvision.layers import (
    S4,
    TEMPORAL_HEADS,
    ConvS5,
    EfficientLocalAttention,
    LightAttention,
    NonLocalBlock,
)
from stvision.layers.checks import check_whole
from stvision.layers.conv_s5 import ConvSSM
from stvision.layers.token_selection import MaskGenerator, gather_tokens, select_exact
from stvision.layers.vision import DepthwiseConv, FrameMix, Mlp, PositionConv, per_frame
from stvision.models.selective_s4 import grid_positions
from stvision.models.surface import Backbone, Head
from stvision.models.weights import load_backbone, read_weights

POOLS = ("mean", "last")
#: rows and columns of pixels over those of tokens
STRIDE = 8


@dataclass(frozen=True)
class Place:
    """Where a mixing layer stands, which is what it may depend on.

    Args:
        dim: channels C.
        heads: attention heads.
        index: of its block, from 0.
        tokens: tokens of a clip; a state-space layer is made for so many.
        compiled: take implementations that are compiled on first use (FlexAttention); otherwise
            those that start at once.
        backend: of neighborhood attention, ``None`` to choose.
    """

    dim: int
    heads: int
    index: int
    tokens: int
    compiled: bool
    backend: str | None


class PerFrame(nn.Module):
    """A module of clips, applied to each frame by itself."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, H, W, C) to the same shape."""
        return self.module(x.flatten(0, 1)[:, None])[:, 0].unflatten(0, x.shape[:2])


class Added(nn.Module):
    """What a module that holds its own identity adds to its input."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, H, W, C) to the same shape."""
        return self.module(x) - x


class Divided(nn.Module):
    """Attention over the frames of each pixel, then over the pixels of each frame."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.time = TemporalAttention(dim, heads)
        self.norm = nn.LayerNorm(dim)
        self.space = PerFrame(FullAttention(dim, heads))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, H, W, C) to the same shape."""
        moved = self.time(x)
        return moved + self.space(self.norm(x + moved))


class DilatedNeighborhood(NeighborhoodAttention):
    """Neighborhood attention whose windows reach as far as the volume lets them, as in DiNAT."""

    def mix(self, query: Tensor, key: Tensor, value: Tensor, layout: WindowLayout) -> Tensor:
        from stvision.kernels.neighborhood import na3d

        frames, rows, columns = map(min, self.kernel_size, layout.grid)
        t, h, w = layout.grid
        query, key, value = (x.unflatten(1, layout.grid) for x in (query, key, value))
        out = na3d(
            query,
            key,
            value,
            (frames, rows, columns),
            dilation=(t // frames, h // rows, w // columns),
            backend=self.kernel,
        )
        return cast(Tensor, out).flatten(1, 3)


class SwapMix(nn.Module):
    """A convolution of each frame and one over frames as branches, joined by swap attention.

    Args:
        dim: channels C.
        heads: attention heads.
        query: the branch that asks, "temporal" or "spatial".
    """

    def __init__(self, dim: int, heads: int, query: Branch) -> None:
        super().__init__()
        self.space = DepthwiseConv(dim)
        self.time = FrameMix(dim)
        nn.init.trunc_normal_(self.time.weight, std=0.3)
        self.swap = SwapAttention(dim, heads, query=query, ff_mult=1, norm_num_groups=8)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, H, W, C) to the same shape."""
        return self.swap(self.space(x), self.time(x))


class SelectiveS4Mix(nn.Module):
    """S4 over the half of all tokens that a mask generator picks; the others are left as they are.

    Args:
        dim: channels C.
        tokens: tokens that the layer is made for.
    """

    def __init__(self, dim: int, tokens: int) -> None:
        super().__init__()
        self.generator = MaskGenerator(dim, dim // 4)
        self.s4 = S4(dim, max(1, tokens // 2))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, H, W, C) to the same shape."""
        tokens = x.flatten(1, 3)
        logits = self.generator(tokens).float()
        selection = select_exact(logits, max(1, tokens.shape[1] // 2), noise=self.training)
        mixed = self.s4(gather_tokens(tokens, selection))
        kept = cast(Tensor, selection.kept)[..., None].expand_as(mixed)
        return torch.zeros_like(tokens, dtype=mixed.dtype).scatter(1, kept, mixed).view(x.shape)


def _conv(place: Place) -> DepthwiseConv:
    conv = DepthwiseConv(place.dim, frame_kernel=3)
    nn.init.trunc_normal_(cast(FrameMix, conv.time).weight, std=0.3)
    return conv


def _behind_conv(layer: nn.Module, place: Place) -> nn.Module:
    return nn.Sequential(_conv(place), layer)


def _with_positions(layer: nn.Module, place: Place) -> nn.Module:
    """A depthwise convolution in space and time before a layer that knows no order itself."""
    return nn.Sequential(PositionConv(place.dim, frame_kernel=3), layer)


def _halo(place: Place) -> nn.Module:
    layer = HaloAttention(
        place.dim, place.heads, block_size=4, halo_size=2, block_frames=4, halo_frames=2
    )
    return nn.Sequential(layer, nn.Linear(place.dim, place.dim))


def _routing(place: Place) -> nn.Module:
    return BiLevelRoutingAttention(
        place.dim,
        place.heads,
        n_win=4,
        topk=8,
        region_frames=4,
        flavour="masked",
        lepe_kernel=5,
        frame_kernel=3,
        implementation=None if place.compiled else "blocked",
    )


def _dual(place: Place) -> nn.Module:
    if place.index % 2:
        layer: nn.Module = ChannelGroupAttention(
            place.dim, place.heads, over_time=True, average_frames=True
        )
    else:
        layer = SpatialWindowAttention(place.dim, place.heads, window_size=4, mask_padding=True)
    return _with_positions(layer, place)


def _neighborhood(place: Place) -> nn.Module:
    return NeighborhoodAttention(place.dim, place.heads, kernel_size=5, kernel=place.backend)


def _dilated(place: Place) -> nn.Module:
    kind = DilatedNeighborhood if place.index % 2 else NeighborhoodAttention
    return kind(place.dim, place.heads, kernel_size=5, kernel=place.backend)


def _conv_s5(place: Place) -> nn.Module:
    layer = ConvS5(place.dim, place.dim // 2, readout="half_glu", prenorm=True)
    return Added(layer)


def _space(place: Place) -> nn.Module:
    return PerFrame(FullAttention(place.dim, place.heads))


@dataclass(frozen=True)
class Mechanism:
    """One row of the comparison.

    Args:
        mixer: makes the mixing layer of a block, from and to (B, T, H, W, C); ``None`` for none.
        summary: what a token sees, in a few words.
        order: a change of the order of frames changes the result.
        head: name in :data:`stvision.layers.TEMPORAL_HEADS` of what reads the means of frames.
        control: it is there to be held against, not to be taken.
    """

    mixer: Callable[[Place], nn.Module] | None
    summary: str
    order: bool = True
    head: str | None = None
    control: bool = False


#: name -> mechanism, in the order of the table
MECHANISMS: dict[str, Mechanism] = {
    "none": Mechanism(None, "itself", order=False, control=True),
    "space": Mechanism(_space, "its frame", order=False, control=True),
    "conv": Mechanism(_conv, "3 x 3 tokens and 3 frames, depthwise", control=True),
    "full": Mechanism(lambda p: FullAttention(p.dim, p.heads), "all tokens"),
    "divided": Mechanism(lambda p: Divided(p.dim, p.heads), "its pixel in all frames, its frame"),
    "temporal": Mechanism(lambda p: TemporalAttention(p.dim, p.heads), "its pixel in all frames"),
    "neighborhood": Mechanism(_neighborhood, "5 x 5 x 5 tokens"),
    "dilated-neighborhood": Mechanism(_dilated, "5 x 5 x 5 tokens, in turn as far as they reach"),
    "halo": Mechanism(_halo, "4 x 4 x 4 tokens of its block and 2 around it"),
    "seer-window": Mechanism(
        lambda p: SeerWindowAttention(p.dim, p.heads), "earlier tokens of its window, all frames"
    ),
    "swap": Mechanism(
        lambda p: SwapMix(p.dim, p.heads, "spatial" if p.index % 2 else "temporal"),
        "8 x 8 tokens of all frames of the other branch",
    ),
    "routing": Mechanism(_routing, "8 regions that its region picks"),
    "dual": Mechanism(_dual, "4 x 4 tokens of its frame, in turn channels of all tokens"),
    "s4": Mechanism(lambda p: S4(p.dim, p.tokens), "all earlier tokens"),
    "selective-s4": Mechanism(
        lambda p: SelectiveS4Mix(p.dim, p.tokens), "earlier tokens of the half that is kept"
    ),
    "conv-s5": Mechanism(_conv_s5, "3 x 3 tokens of all earlier frames"),
    "ela": Mechanism(
        lambda p: _behind_conv(EfficientLocalAttention(p.dim, over_time=True), p),
        "conv, and gates from rows, columns, frames",
    ),
    "light-attention": Mechanism(
        lambda p: _behind_conv(LightAttention(p.dim, over_time=True), p),
        "conv, and gates from channels and places",
    ),
    "non-local": Mechanism(
        lambda p: _behind_conv(NonLocalBlock(p.dim, over_time=True), p), "conv, and all tokens"
    ),
    "ts-lstm": Mechanism(_space, "its frame; an LSTM reads 3 segments", head="ts-lstm"),
    "temporal-inception": Mechanism(
        _space, "its frame; convolutions read all frames", head="temporal-inception"
    ),
}


class Stem(nn.Module):
    """Two strided convolutions of each frame: (B, T, H, W, in) to (B, T, H / 8, W / 8, C)."""

    def __init__(self, dim: int, in_chans: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, dim // 2, 7, stride=4, padding=3)
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return per_frame(lambda y: self.conv2(F.gelu(self.conv1(y))), x)


class Block(nn.Module):
    """``x + mix(norm(x))``, then ``x + mlp(norm(x))``.

    Args:
        dim: channels C.
        mixer: from and to (B, T, H, W, C); ``None`` for none.
        hidden: channels inside the MLP.
    """

    def __init__(self, dim: int, mixer: nn.Module | None, hidden: int) -> None:
        super().__init__()
        self.mixer = mixer
        self.norm1 = nn.Identity() if mixer is None else nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, hidden / dim)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, H, W, C) to the same shape."""
        if self.grad_checkpointing and torch.is_grad_enabled():
            return cast(Tensor, checkpoint(self._transform, x, use_reentrant=False))
        return self._transform(x)

    def _transform(self, x: Tensor) -> Tensor:
        if self.mixer is not None:
            x = x + self.mixer(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class FrameHead(nn.Module):
    """Means of frames (B, T, C), brought to a number of steps, and a head over time."""

    def __init__(self, name: str, dim: int, num_classes: int) -> None:
        super().__init__()
        #: Temporal-Inception reads 24 to 47 steps, of any number of frames
        self.steps = 32 if name == "temporal-inception" else None
        self.head = TEMPORAL_HEADS[name](dim, num_classes, hidden=dim)

    @property
    def fc(self) -> nn.Module:
        """The last linear layer."""
        return cast(nn.Module, self.head.fc)

    def reset(self, num_classes: int) -> None:
        """A fresh linear layer of ``num_classes`` outputs; 0 for none.

        Raises:
            ValueError: a negative number.
        """
        check_whole(0, num_classes=num_classes)
        size = cast(int, self.head.num_features)
        self.head.fc = nn.Linear(size, num_classes) if num_classes else nn.Identity()

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, T, C) to (B, classes), or to what the last linear layer reads."""
        if self.steps is not None:
            x = F.adaptive_avg_pool1d(x.mT, self.steps).mT
        return cast(Tensor, self.head(x, pre_logits=pre_logits))


class MechanismClassifier(Backbone):
    """Video classifier around one mechanism, for clips (B, C, T, H, W) of any size.

    Each block is a stage of timm's surface: all have ``dim`` channels and an eighth of the rows.

    Args:
        mechanism: a key of :data:`MECHANISMS`.
        num_classes: outputs; 0 for none.
        dim: channels C of a token.
        depth: blocks.
        heads: attention heads; must divide ``dim``.
        hidden: channels inside the MLPs; ``None`` for :func:`matched_hidden`.
        tokens: tokens of a clip, frames times rows / 8 times columns / 8. State-space layers are
            made for so many; other clips run too.
        pool: ``"mean"`` reads all tokens, ``"last"`` those of the last frame. A mechanism with a
            head over time reads the means of all frames in either case.
        compiled: see :class:`Place`.
        backend: see :class:`Place`.
        in_chans: channels of frames.
        frames: a number for clips, of any length; ``None`` for images (B, C, H, W), which are clips
            of one frame. A TS-LSTM takes three frames and more.

    Raises:
        ValueError: an unknown mechanism or pooling, or sizes that do not fit.
    """

    def __init__(
        self,
        mechanism: str,
        num_classes: int,
        *,
        dim: int = 64,
        depth: int = 4,
        heads: int = 2,
        hidden: int | None = None,
        tokens: int = 1024,
        pool: str = "mean",
        compiled: bool = True,
        backend: str | None = None,
        in_chans: int = 3,
        frames: int | None = 16,
    ) -> None:
        if not isinstance(mechanism, str) or mechanism not in MECHANISMS:
            raise ValueError(f"mechanism must be one of {', '.join(MECHANISMS)}, got {mechanism!r}")
        if pool not in POOLS:
            raise ValueError(f"pool must be 'mean' or 'last', got {pool!r}")
        check_whole(1, depth=depth, tokens=tokens, dim=dim, heads=heads)
        if dim % 32 or dim % heads:
            raise ValueError(
                f"dim must be a multiple of 32 that heads divide, got dim={dim}, heads={heads}"
            )
        if hidden is None:
            hidden = matched_hidden(mechanism, dim, depth, heads)
        check_whole(1, hidden=hidden)
        kind = MECHANISMS[mechanism]
        if kind.head == "ts-lstm" and (frames is None or frames < 3):
            raise ValueError(f"frames of mechanism 'ts-lstm' must be at least 3, got {frames}")
        super().__init__(in_chans, num_classes, [dim] * depth, frames, [STRIDE] * depth)
        for index, info in enumerate(self.feature_info):
            info["module"] = f"blocks.{index}"
        self.mechanism, self.pool, self.dim, self.hidden = mechanism, pool, dim, hidden
        self.stem = Stem(dim, in_chans)
        self.blocks = nn.ModuleList()
        for index in range(depth):
            place = Place(dim, heads, index, tokens, compiled, backend)
            mixer = None if kind.mixer is None else kind.mixer(place)
            self.blocks.append(Block(dim, mixer, hidden))
        self.norm = nn.LayerNorm(dim)
        self.head: nn.Module = (
            Head(dim, num_classes) if kind.head is None else FrameHead(kind.head, dim, num_classes)
        )

    def parts(self) -> nn.ModuleList:
        """The blocks."""
        return self.blocks

    def no_weight_decay(self) -> set[str]:
        """Names of what state-space layers are made of, as in their own backbones."""
        found: set[str] = set()
        for name, module in self.named_modules():
            own = [key for key, _ in module.named_parameters(recurse=False)]
            if isinstance(module, S4):
                found |= {f"{name}.{key}" for key in own}
            elif isinstance(module, ConvSSM):
                found |= {f"{name}.{key}" for key in own if key not in ("B", "C")}
        return found

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh last layer of ``num_classes`` outputs; 0 for none.

        Raises:
            ValueError: a negative number, or a pooling other than what the model does.
        """
        if global_pool == "avg" and (self.pool != "mean" or isinstance(self.head, FrameHead)):
            raise ValueError(
                "global_pool must be None where the last frame or a head over time is read, got "
                "'avg'"
            )
        super().reset_classifier(num_classes, global_pool)

    def embed(self, x: Tensor) -> Tensor:
        """Pixels (B, T, H, W, in_chans) to tokens (B, T, H / 8, W / 8, C), rounded up."""
        grid = self.stem(x)
        # the sum over blocks is in the dtype of the weights, under autocast too
        grid = grid.to(self.norm.weight.dtype)
        return grid + grid_positions((1, *grid.shape[2:4]), self.dim, grid)

    def norm_features(self, x: Tensor) -> Tensor:
        """The norm behind the last block."""
        return cast(Tensor, self.norm(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens of :meth:`forward_features` to (B, classes), or to what the last layer reads."""
        grid = x.unsqueeze(1) if self.frames is None else x
        if isinstance(self.head, FrameHead):
            return cast(Tensor, self.head(grid.mean((2, 3)), pre_logits=pre_logits))
        kept = grid if self.pool == "mean" else grid[:, -1:]
        return cast(Tensor, self.head(kept.mean((1, 2, 3)), pre_logits=pre_logits))


def count_parameters(model: nn.Module) -> int:
    """Trained numbers of a model."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@lru_cache(maxsize=256)
def matched_hidden(mechanism: str, dim: int = 64, depth: int = 4, heads: int = 2) -> int:
    """Channels inside the MLPs with which a classifier is as large as that of full attention.

    That one has MLPs of four times its channels.

    Args:
        mechanism: a key of :data:`MECHANISMS`.
        dim: as in :class:`MechanismClassifier`, as ``depth`` and ``heads``.
        depth: see above.
        heads: see above.

    Returns:
        A multiple of 8, at least 8.
    """

    def size(name: str, hidden: int) -> int:
        with torch.random.fork_rng(devices=[]):  # whoever builds a model gets the draws as ever
            model = MechanismClassifier(
                name, 1, dim=dim, depth=depth, heads=heads, hidden=hidden, tokens=1
            )
        return count_parameters(model)

    wanted = size("full", 4 * dim)
    smallest = size(mechanism, 8)
    each = size(mechanism, 16) - smallest  # parameters of 8 more channels
    return 8 + 8 * max(0, round((wanted - smallest) / each))


def mechanism(
    pretrained: str | Path | None = None, mechanism: str = "divided", **options: Any
) -> MechanismClassifier:
    """mechanism: four blocks of 64 channels around any mechanism of the library.

    Args:
        pretrained: weights in this project's keys: a file, a folder or ``owner/name`` of a hub
            repository. Nothing differs between images and clips.
        mechanism: a key of :data:`MECHANISMS`; attention divided over time and space when not given.
        options: arguments of :class:`MechanismClassifier` that differ.
    """
    model = MechanismClassifier(mechanism, **({"num_classes": 1000} | options))
    if pretrained is not None:
        head = "head.head.fc" if isinstance(model.head, FrameHead) else "head.fc"
        load_backbone(model, read_weights(pretrained), first_conv="stem.conv1", head=head)
    return model


#: name -> function ``(pretrained=None, **options)``
MECHANISM_MODELS: dict[str, Callable[..., MechanismClassifier]] = {"mechanism": mechanism}
