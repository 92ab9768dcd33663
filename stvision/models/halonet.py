"""HaloNet (Vaswani et al. 2021, arXiv 2103.12731): residual networks with block-local attention.

Bottleneck blocks of a residual network whose 3 x 3 convolution gives way to block-local attention in
the later stages. The models are those of timm, whose weights are public; its keys are converted on
loading.

As a video model the image weights stay as they are. Convolutions, norms and channel gates work frame
by frame; windows of the attention gain ``halo_frames`` frames on either side, masked behind the first
and the last frame, with a relative table of frames that is zero at the start. So a clip of equal
frames gives exactly the logits of its image.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from stvision.attention.halo import HaloAttention
from stvision.layers.ela import EfficientLocalAttention
from stvision.layers.vision import DropPath, drop_path_rates, per_frame
from stvision.models.surface import Backbone, Head, Stage
from stvision.models.weights import load_backbone, read_weights, unwrap

#: parameters that image weights lack: the relative tables of frames, zero at the start, and gates
#: that were asked for
FRESH = (".time_rel", ".ela.conv.weight", ".ela.norm.weight", ".ela.norm.bias")

_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU}


@dataclass(frozen=True)
class HaloStage:
    """Blocks of one resolution.

    Args:
        kinds: a letter a block: ``c`` convolution, ``h`` block-local attention.
        width: channels between blocks.
        stride: of the first block.
        heads: attention heads.
    """

    kinds: str
    width: int
    stride: int
    heads: int = 8


def _divisible(channels: float, least: float = 0.9) -> int:
    """The nearest multiple of 8 that is at least 8 and not below ``least`` of ``channels``."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < least * channels else rounded


def _activation(name: str) -> nn.Module:
    """In place of what nothing else reads: the output of a norm or of an addition."""
    return nn.ReLU(inplace=True) if name == "relu" else _ACTIVATIONS[name]()


class _ConvNorm(nn.Module):
    """Convolution, BatchNorm and activation of images (N, C, H, W)."""

    def __init__(
        self, dim: int, out: int, size: int = 1, stride: int = 1, groups: int = 1, act: str = ""
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, out, size, stride, size // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(out)
        self.act = _activation(act) if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.act(self.bn(self.conv(x))))


class _SqueezeExcite(nn.Module):
    """Channel gate from the mean of an image (N, C, H, W) (Hu et al. 2018)."""

    def __init__(self, dim: int, ratio: float) -> None:
        super().__init__()
        hidden = _divisible(dim * ratio, least=0.0)
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.fc2(self.fc1(x.mean((2, 3))).relu()).sigmoid()
        return x * gate[:, :, None, None]


class _EfficientGate(nn.Module):
    """Channel gate from neighbouring channels' means (Wang et al. 2020, ECA-Net)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        size = int(abs(math.log2(dim) + 1) / 2)
        size = max(size if size % 2 else size + 1, 3)
        self.conv = nn.Conv1d(1, 1, size, padding=size // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.conv(x.mean((2, 3))[:, None])[:, 0].sigmoid()
        return x * gate[:, :, None, None]


def _gate(kind: str, dim: int, ratio: float) -> nn.Module:
    if kind == "se":
        return _SqueezeExcite(dim, ratio)
    return _EfficientGate(dim) if kind == "eca" else nn.Identity()


def _clips(x: Tensor, frames: int) -> Tensor:
    """Images (N, C, H, W) to clips (B, T, H, W, C)."""
    x = x.permute(0, 2, 3, 1)
    return x.view(-1, frames, *x.shape[1:])


class _PostNorm(nn.BatchNorm2d):
    """BatchNorm of each frame of (B, T, H, W, C) and an activation, to images (N, C, H, W)."""

    def __init__(self, dim: int, act: str) -> None:
        super().__init__(dim)
        self.act = _activation(act)

    def forward(self, input: Tensor) -> Tensor:
        return cast(Tensor, self.act(super().forward(input.flatten(0, 1).permute(0, 3, 1, 2))))


class _Block(nn.Module):
    """1 x 1 convolution, 3 x 3 convolution with gate or attention, 1 x 1 convolution, residual."""

    def __init__(
        self,
        dim: int,
        out: int,
        mid: int,
        stride: int,
        attention: HaloAttention | None,
        *,
        groups: int,
        gate: nn.Module,
        act: str,
        shortcut: bool,
        linear_out: bool,
        drop_path: float,
        last_gate: nn.Module | None,
    ) -> None:
        super().__init__()
        self.shortcut: nn.Module | None = nn.Identity()
        if dim != out or stride != 1:
            self.shortcut = _ConvNorm(dim, out, 1, stride) if shortcut else None
        self.conv1_1x1 = _ConvNorm(dim, mid, act=act)
        if attention is None:
            self.conv2_kxk = _ConvNorm(mid, mid, 3, stride, groups, act=act)
            self.attn = gate
        else:
            self.self_attn = attention
            self.post_attn = _PostNorm(mid, act)
        self.attends = attention is not None
        self.conv3_1x1 = _ConvNorm(mid, out)
        if self.shortcut is not None:  # without one, nothing would pass a fresh block
            nn.init.zeros_(self.conv3_1x1.bn.weight)
        self.ela = nn.Identity() if last_gate is None else last_gate
        self.drop_path = DropPath(drop_path)
        self.act: nn.Module = nn.Identity()
        if not linear_out:
            self.act = _ACTIVATIONS[act]() if self.shortcut is None else _activation(act)

    def _images(self, x: Tensor, frames: int) -> Tensor:
        """Images (N, C, H, W), ``frames`` of them a clip, to images."""
        y = self.conv1_1x1(x)
        if self.attends:
            y = self.post_attn(self.self_attn(_clips(y, frames)))
        else:
            y = self.attn(self.conv2_kxk(y))
        y = self.conv3_1x1(y)
        if not isinstance(self.ela, nn.Identity) or (self.training and self.drop_path.rate):
            # both look at clips: along their frames, and dropping them as a whole
            y = self.drop_path(self.ela(_clips(y, frames))).flatten(0, 1).permute(0, 3, 1, 2)
        if self.shortcut is not None:
            y = y + self.shortcut(x)
        return cast(Tensor, self.act(y))

    def forward(self, x: Tensor) -> Tensor:
        # one way from clips to images and back for the whole block
        return per_frame(lambda images: self._images(images, x.shape[1]), x)


class _Stem(nn.Module):
    """Convolutions that quarter (or, without pool and last stride, halve) rows and columns."""

    def __init__(
        self,
        in_chans: int,
        widths: Sequence[int],
        size: int,
        pool: bool,
        last_stride: int,
        act: str,
    ) -> None:
        super().__init__()
        self.count = len(widths)
        dim = in_chans
        for i, width in enumerate(widths):
            stride = 2 if i == 0 else last_stride if i == self.count - 1 else 1
            self.add_module(f"conv{i + 1}", _ConvNorm(dim, width, size, stride, act=act))
            dim = width
        self.pool = nn.MaxPool2d(3, stride=2, padding=1) if pool else nn.Identity()

    def _images(self, x: Tensor) -> Tensor:
        for i in range(self.count):
            x = cast(nn.Module, self._modules[f"conv{i + 1}"])(x)
        return cast(Tensor, self.pool(x))

    def forward(self, x: Tensor) -> Tensor:
        return per_frame(self._images, x)


class HaloNet(Backbone):
    """Stem, stages of bottleneck blocks, an optional last convolution, head.

    Args:
        stages: see :class:`HaloStage`.
        stem: widths of the stem's convolutions; the first halves rows and columns.
        stem_size: rows and columns of the stem's kernels.
        stem_pool: halve again by pooling.
        stem_last_stride: stride of the stem's last convolution.
        bottleneck: channels inside a block over its outer ones, for each stage or for all.
        from_input: count the bottleneck from a block's input instead of its output.
        group_size: channels of a group of the 3 x 3 convolutions, 0 for one group.
        gate: ``""``, ``"se"`` or ``"eca"``: channel gate behind the 3 x 3 convolutions.
        gate_ratio: hidden over outer channels of ``"se"``.
        ela: variant of :class:`stvision.layers.ela.EfficientLocalAttention` at the end of each
            block, before the addition; ``""`` for none. No published weights have it.
        act: ``"relu"`` or ``"silu"``.
        shortcut: whether blocks that change channels or size have a shortcut.
        linear_out: no activation at the end of blocks.
        last_width: channels of a last 1 x 1 convolution, 0 for none.
        block_size, halo_size, dim_head, qk_ratio: of
            :class:`stvision.attention.halo.HaloAttention`.
        in_chans: channels of images or frames.
        num_classes: outputs of the head; 0 for none.
        frames: ``None`` for images, a number for clips; see
            :class:`stvision.models.surface.Backbone`.
        block_frames, halo_frames, causal: for clips, of the attention.
        drop_rate: dropout before the head.
        drop_path_rate: chance to drop a branch of the last block, growing linearly from 0.
        implementation: of :func:`stvision.attention.halo.halo_attention`.

    Raises:
        ValueError: an unknown letter, gate or activation, or numbers that do not fit together.
    """

    def __init__(
        self,
        stages: Sequence[HaloStage],
        stem: Sequence[int] = (24, 32, 64),
        *,
        stem_size: int = 3,
        stem_pool: bool = True,
        stem_last_stride: int = 1,
        bottleneck: float | Sequence[float] = 0.25,
        from_input: bool = False,
        group_size: int = 0,
        gate: str = "",
        gate_ratio: float = 1 / 16,
        ela: str = "",
        act: str = "relu",
        shortcut: bool = True,
        linear_out: bool = False,
        last_width: int = 0,
        block_size: int = 8,
        halo_size: int = 3,
        dim_head: int | None = None,
        qk_ratio: float = 1.0,
        in_chans: int = 3,
        num_classes: int = 1000,
        frames: int | None = None,
        block_frames: int = 1,
        halo_frames: int = 1,
        causal: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        implementation: str | None = None,
    ) -> None:
        reduction = 4 if stem_pool or (stem_last_stride == 2 and len(stem) > 1) else 2
        reductions = []
        for stage in stages:
            reduction *= stage.stride
            reductions.append(reduction)
        super().__init__(in_chans, num_classes, [s.width for s in stages], frames, reductions)
        letters = set("".join(stage.kinds for stage in stages))
        if not letters <= {"c", "h"} or not all(stage.kinds for stage in stages):
            raise ValueError(
                f"kinds must be letters 'c' and 'h', got {[stage.kinds for stage in stages]}"
            )
        if act not in _ACTIVATIONS or gate not in {"", "se", "eca"}:
            raise ValueError(
                f"act must be 'relu' or 'silu' and gate '', 'se' or 'eca', got {act!r} and {gate!r}"
            )
        ratios = [bottleneck] * len(stages) if isinstance(bottleneck, float | int) else bottleneck
        if len(ratios) != len(stages):
            raise ValueError(f"bottleneck must be one or {len(stages)} numbers, got {bottleneck}")
        self.stem = _Stem(in_chans, stem, stem_size, stem_pool, stem_last_stride, act)
        rates = iter(drop_path_rates(drop_path_rate, sum(len(stage.kinds) for stage in stages)))
        dim, built = stem[-1], []
        for stage, ratio in zip(stages, ratios, strict=True):
            blocks: list[nn.Module] = []
            for i, kind in enumerate(stage.kinds):
                stride = stage.stride if i == 0 else 1
                mid = _divisible((dim if from_input else stage.width) * ratio)
                attention = None
                if kind == "h":
                    attention = HaloAttention(
                        mid,
                        stage.heads,
                        block_size=block_size,
                        halo_size=halo_size,
                        stride=stride,
                        dim_head=dim_head,
                        qk_ratio=qk_ratio,
                        block_frames=1 if frames is None else block_frames,
                        halo_frames=0 if frames is None else halo_frames,
                        causal=frames is not None and causal,
                        implementation=implementation,
                    )
                blocks.append(
                    _Block(
                        dim,
                        stage.width,
                        mid,
                        stride,
                        attention,
                        groups=mid // group_size if group_size else 1,
                        gate=_gate(gate, mid, gate_ratio),
                        act=act,
                        shortcut=shortcut,
                        linear_out=linear_out,
                        drop_path=next(rates),
                        last_gate=EfficientLocalAttention(
                            stage.width, ela, over_time=frames is not None
                        )
                        if ela
                        else None,
                    )
                )
                dim = stage.width
            built.append(Stage(blocks))
        self.stages = nn.ModuleList(built)
        self.final_conv = _ConvNorm(dim, last_width, act=act) if last_width else nn.Identity()
        self.num_features = self.head_hidden_size = last_width or dim
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
        self.head = Head(self.num_features, num_classes, drop_rate=drop_rate)

    def embed(self, x: Tensor) -> Tensor:
        """Pixels (B, T, H, W, in_chans) to the stem's grid."""
        return cast(Tensor, self.stem(x))

    def norm_features(self, x: Tensor) -> Tensor:
        """The last convolution, where there is one."""
        if isinstance(self.final_conv, nn.Identity):
            return x
        return per_frame(self.final_conv, x)


#: 1 x 1 convolutions of timm that are linear layers here
_MATRICES = re.compile(r"\.(self_attn\.q|self_attn\.kv|attn\.fc1|attn\.fc2)\.weight$")


def convert_halonet_state_dict(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Keys of :class:`HaloNet` from timm's checkpoints; its own keys pass unchanged."""
    found = {}
    for key, value in unwrap(state).items():
        new = re.sub(r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2.", key)
        new = re.sub(r"^stem\.(conv|bn)\.", r"stem.conv1.\1.", new)
        if _MATRICES.search(new) and value.ndim == 4:
            value = value[:, :, 0, 0]
        found[new] = value
    return found


def _stages(*rows: tuple) -> tuple[HaloStage, ...]:
    return tuple(HaloStage(*row) for row in rows)


_SIZES: dict[str, dict[str, Any]] = {
    "halonet_h1": {
        "stages": _stages(("hhh", 64, 1), ("hhh", 128, 2), ("hhhhhhhhhh", 256, 2), ("hhh", 512, 2)),
        "stem": (64,),
        "stem_size": 7,
        "bottleneck": 1.0,
    },
    "halonet26t": {
        "stages": _stages(("cc", 256, 1), ("cc", 512, 2), ("ch", 1024, 2), ("hh", 2048, 2)),
        "halo_size": 2,
    },
    "halonet50ts": {
        "stages": _stages(
            ("ccc", 256, 1), ("ccch", 512, 2, 4), ("chchch", 1024, 2), ("chc", 2048, 2)
        ),
        "act": "silu",
    },
    "sehalonet33ts": {
        "stages": _stages(("cc", 256, 1), ("cch", 512, 2), ("cch", 1024, 2), ("hh", 1536, 2)),
        "bottleneck": (0.25, 0.25, 0.25, 0.333),
        "stem_pool": False,
        "stem_last_stride": 2,
        "act": "silu",
        "gate": "se",
        "last_width": 1280,
    },
    "eca_halonext26ts": {
        "stages": _stages(("cc", 256, 1), ("cc", 512, 2), ("ch", 1024, 2), ("hh", 2048, 2)),
        "group_size": 16,
        "act": "silu",
        "gate": "eca",
        "halo_size": 2,
        "dim_head": 16,
    },
    "haloregnetz_b": {
        "stages": _stages(("cc", 48, 2), ("cccccc", 96, 2), ("ccch" * 3, 192, 2), ("hh", 288, 2)),
        "stem": (32,),
        "stem_pool": False,
        "bottleneck": 3.0,
        "from_input": True,
        "group_size": 16,
        "gate": "se",
        "gate_ratio": 0.25,
        "act": "silu",
        "shortcut": False,
        "linear_out": True,
        "last_width": 1536,
        "block_size": 7,
        "halo_size": 2,
        "qk_ratio": 0.33,
    },
}


def _builder(name: str) -> Callable[..., HaloNet]:
    def build(pretrained: str | Path | None = None, **options: Any) -> HaloNet:
        model = HaloNet(**(_SIZES[name] | options))
        if pretrained is not None:
            state = convert_halonet_state_dict(read_weights(pretrained))
            load_backbone(model, state, first_conv="stem.conv1.conv", fresh=FRESH)
        return model

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"""{name} as in timm.

    Args:
        pretrained: weights of timm: a file, a folder or ``owner/name`` of a hub repository.
        options: arguments of :class:`HaloNet` that differ from the published model.
    """
    return build


#: name -> function ``(pretrained=None, **options)``
HALONET_MODELS: dict[str, Callable[..., HaloNet]] = {name: _builder(name) for name in _SIZES}
